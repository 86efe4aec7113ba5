"""Whose classes: the names of a network's classes beside those of the data, so that no label stands for another."""

from collections.abc import Sequence
from urllib.parse import quote, unquote

from kdq_lightning.errors import UserError

SHOWN = 4  # names in a line


def encode_names(names: Sequence[str]) -> str:
    """Return class names as one line of ASCII, which takes few bytes in a file; names may hold any character."""
    return ",".join(quote(name, safe=" ", errors="surrogateescape") for name in names)


def decode_names(text: str) -> tuple[str, ...]:
    """Return the class names that `encode_names` wrote."""
    return tuple(unquote(name, errors="surrogateescape") for name in text.split(","))


def shorten_names(names: Sequence[str], shown: int = SHOWN) -> str:
    """Return class names for a message, the first few of many; bytes that are no text are escaped."""
    text = ", ".join(name.encode("utf-8", "backslashreplace").decode() for name in names[:shown])
    return text if len(names) <= shown else f"{text}, ..."


def class_order(theirs: Sequence[str], ours: Sequence[str], what: str, dataset: str) -> list[int] | None:
    """Return where a network has each class of the data; None if it has them in the data's order.

    Args:
        theirs: The network's class names, in the order of its outputs.
        ours: The data's, by label.
        what: The network in a message, such as `the teacher runs/teacher (digits)`.
        dataset: Name of the data.

    Raises:
        UserError: If the classes are not the same.
    """
    if list(theirs) == list(ours):
        return None
    if sorted(theirs) != sorted(ours):
        foreign = [name for name in theirs if name not in ours] or list(theirs)
        unknown = [name for name in ours if name not in theirs] or list(ours)
        raise UserError(
            f"{what} has other classes than the data {dataset} (it has {shorten_names(foreign)}; the data have"
            f" {shorten_names(unknown)}): give a network that was trained on these classes, or rename the classes where"
            " they mean the same"
        )
    places = {name: place for place, name in enumerate(theirs)}
    return [places[name] for name in ours]
