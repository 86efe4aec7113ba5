"""How reports and figures show each strategy: title, colour and marker, by the name that records use."""

from typing import NamedTuple


class Appearance(NamedTuple):
    """What a strategy looks like.

    Attributes:
        title: In tables, legends and sentences.
        colour: Matplotlib's, the same in every figure.
        marker: Matplotlib's, the same in every figure.
    """

    title: str
    colour: str
    marker: str


# Colours of Okabe & Ito, which colour-blind readers tell apart. The order is that of tables.
STRATEGIES = {
    "teacher": Appearance("Teacher", "#000000", "o"),
    "control": Appearance("Control", "#999999", "s"),
    "vanilla": Appearance("Vanilla KD", "#0072B2", "D"),
    "mixup": Appearance("Mixup KD", "#E69F00", "^"),
    "dkd": Appearance("DKD", "#009E73", "v"),
    "hint": Appearance("Hints", "#56B4E9", "P"),
    "dml": Appearance("DML", "#CC79A7", "X"),
    "recover": Appearance("Recovered", "#D55E00", "*"),
}


def appearance(strategy: str, position: int = 0) -> Appearance:
    """Return how a strategy is shown; an unknown one is titled by its name.

    Args:
        strategy: Its name in the records.
        position: Place among the curves of a figure, which gives an unknown strategy its colour.
    """
    return STRATEGIES.get(strategy, Appearance(strategy, f"C{position}", "."))
