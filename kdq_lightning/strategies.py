"""How tables and figures show each strategy: its title, colour and marker, by the strategy's name in the records."""

from collections.abc import Iterable
from typing import NamedTuple


class Appearance(NamedTuple):
    """How a strategy is shown.

    Attributes:
        title: In tables, legends and sentences.
        colour: Matplotlib colour, the same in every figure.
        marker: Matplotlib marker, the same in every figure.
    """

    title: str
    colour: str
    marker: str


APPEARANCES = {
    "teacher": Appearance("Teacher", "#000000", "o"),
    "control": Appearance("Control", "#999999", "s"),
    "vanilla": Appearance("Vanilla KD", "#0072B2", "D"),
    "mixup": Appearance("Mixup KD", "#E69F00", "^"),
    "dkd": Appearance("DKD", "#009E73", "v"),
    "hint": Appearance("Hints", "#56B4E9", "P"),
    "dml": Appearance("DML", "#CC79A7", "X"),
    "recover": Appearance("Recovered", "#D55E00", "*"),
}
"""The project's own strategies, in the order of tables; colours that colour-blind readers tell apart (Okabe & Ito)."""

NEXT = (
    *(("#332288", "<"), ("#882255", ">"), ("#999933", "p"), ("#44AA99", "h")),
    *(("#661100", "d"), ("#6699CC", "8"), ("#AA4466", "H")),
)
"""Colour and marker of further strategies; colours of Tol's "muted" scheme."""


def appearances(strategies: Iterable[str]) -> dict[str, Appearance]:
    """Return how each of the strategies is shown, in the order of tables.

    A strategy that is not in `APPEARANCES` comes after them, in alphabetical order. Its title is its name, and it takes
    the next colour and marker of `NEXT`, which start again when they are used up.

    Args:
        strategies: Names from the records; ask for all strategies of a report at once, so that no two share a colour.
    """
    names = set(strategies)
    shown = {name: appearance for name, appearance in APPEARANCES.items() if name in names}
    for index, name in enumerate(sorted(names - APPEARANCES.keys())):
        shown[name] = Appearance(name, *NEXT[index % len(NEXT)])
    return shown
