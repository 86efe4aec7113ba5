"""The numbers of the records that the report shows, and how each is shown."""

from collections.abc import Callable
from typing import NamedTuple


class Measure(NamedTuple):
    """How the report shows one number of the records.

    Attributes:
        caption: Stands above its table; without a caption it has no table under "Fidelity".
        decimals: In its table.
        best: Picks the best of a column, `max` or `min`; None if no value is better than another.
        axis: Label of the y axis of its figure against the bit width; without a label it has no such figure.
        log: Whether the y axis of its figure is logarithmic.
    """

    caption: str = ""
    decimals: int = 2
    best: Callable[[list[float]], float] | None = None
    axis: str = ""
    log: bool = False


MEASURES = {
    "test_top1": Measure(best=max, axis="test accuracy, %"),  # its table is the main one, without a caption
    "test_top5": Measure(best=max),
    "val_top1": Measure(best=max),
    "val_top5": Measure(best=max),
    "agreement_float": Measure(best=max),
    "agreement_teacher": Measure(
        "Test images that get the teacher's class, percent", best=max, axis="images with the teacher's class, %"
    ),
    "flips": Measure(
        "Flips: test images right in float and wrong at b bits, or the other way round, percent", best=min
    ),
    "nll": Measure(best=min),
    "ece": Measure("Expected calibration error, percent", best=min),
    "relative_error": Measure(
        "Relative error of the layers' outputs on the calibration images, mean over layers",
        decimals=4,
        best=min,
        axis="relative error of layer outputs",
        log=True,
    ),
}
"""By the name of the field in `Record`, in the order of tables and of `cells_<dataset>.csv`."""
