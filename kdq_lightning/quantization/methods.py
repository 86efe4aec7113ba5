"""The methods that records, tables, figures and file names tell apart: whole ways to quantize a network."""

from collections.abc import Sequence
from typing import Any

from kdq_lightning.errors import UserError

DEFAULT_METHOD = "default"
CUSTOM_METHOD = "custom"  # what a user's solver or codebook makes of `default`
MIXED_METHOD = "mixed"  # a bit width of its own for each layer, within a budget of bytes

METHODS: dict[str, dict[str, Any]] = {DEFAULT_METHOD: {}, "gpfq": {"mode": "official"}}
"""Arguments of `quantize` by method.

`default` is the best known for each bit width, with at most 2^b levels. `gpfq` is the published recursion whole (Zhang,
Zhou, Saab 2023, arXiv 2201.11113), with 2^b + 1 levels. They stand side by side in all that is written.
"""


def choose_methods(names: Sequence[str], solver: str | None, codebook: str | None) -> dict[str, dict[str, Any]]:
    """Return the arguments of `quantize` by the name that records give the method.

    Args:
        names: Some of `METHODS`.
        solver: Of the user; turns `default` into `CUSTOM_METHOD`, as does a codebook.
        codebook: Of the user.

    Raises:
        UserError: If there is no method, one twice, or one unknown, or if solver and codebook would change nothing.
    """
    if not names or len(set(names)) != len(names):
        raise UserError(f"methods are one or more different ones of {', '.join(METHODS)}, got {list(names)}")
    if unknown := [name for name in names if name not in METHODS]:
        raise UserError(f"unknown method {unknown[0]!r}: choose one or more of {', '.join(METHODS)}")
    given = {key: value for key, value in (("solver", solver), ("codebook", codebook)) if value is not None}
    if given and DEFAULT_METHOD not in names:
        raise UserError(
            f"{' and '.join(given)} change the method default, which is not among the methods {list(names)}: add it, or"
            f" leave out {' and '.join(given)}"
        )
    methods = {name: METHODS[name] for name in names if not given or name != DEFAULT_METHOD}
    return {CUSTOM_METHOD: given, **methods} if given else methods
