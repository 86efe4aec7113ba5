"""kdq-lightning: distil a network and quantize it, or quantize it as it is?

`PostTrainingQuantization` is the callback for any Lightning project; `quantize` and `load_packed` need no Lightning.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdq_lightning.quantization import load_packed, quantize
    from kdq_lightning.training.post_training import PostTrainingQuantization

__all__ = ["PostTrainingQuantization", "load_packed", "quantize"]
__version__ = version("kdq-lightning")

_PLACES = {
    "PostTrainingQuantization": "kdq_lightning.training.post_training",
    "load_packed": "kdq_lightning.quantization",
    "quantize": "kdq_lightning.quantization",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever has the name
    """Import a name when it is asked for (PEP 562): the engine does without Lightning."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    """Return the names that can be imported, asked for already or not."""
    return sorted({*globals(), *__all__})
