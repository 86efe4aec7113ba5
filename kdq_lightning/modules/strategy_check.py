"""Checks a strategy class: it must have a loss, and a name in the records that no other class has."""

import inspect
from collections.abc import Iterator
from typing import Any

from kdq_lightning.errors import UserError


def check_strategy(kind: type[Any], base: type[Any]) -> None:
    """Refuse a strategy class that would pass for another one.

    Args:
        kind: The class.
        base: The class that all strategies stand on; its `losses` is that of the control.

    Raises:
        UserError: If the class has a teacher or a strategy name of its own, but no `losses`; or if another class claims
            the same name by the default of its argument `strategy`.
    """
    name = claimed_name(kind)
    if kind is not base and kind.losses is base.losses and (name is not None or _takes_teacher(kind)):
        raise UserError(
            f"{kind.__name__} has no method losses(view) and would train as the control does: define what it minimises"
        )
    for other in _family(base):
        is_same = (other.__module__, other.__qualname__) == (kind.__module__, kind.__qualname__)  # a notebook's cell
        if name is not None and not is_same and claimed_name(other) == name:
            raise UserError(
                f"{kind.__name__} and {other.__name__} both claim the strategy name {name!r}: give one of them another"
                " default of its argument `strategy`"
            )


def claimed_name(kind: type[Any]) -> str | None:
    """Return the default of the argument `strategy` of a class's own `__init__`; None if it has none."""
    own = vars(kind).get("__init__")
    parameter = inspect.signature(own).parameters.get("strategy") if own else None
    return parameter.default if parameter is not None and isinstance(parameter.default, str) else None


def _takes_teacher(kind: type[Any]) -> bool:
    own = (vars(parent).get("__init__") for parent in kind.__mro__)
    return any("teacher" in inspect.signature(init).parameters for init in own if inspect.isfunction(init))


def _family(kind: type[Any]) -> Iterator[type[Any]]:
    """Yield a class and all imported classes below it."""
    yield kind
    for below in kind.__subclasses__():
        yield from _family(below)
