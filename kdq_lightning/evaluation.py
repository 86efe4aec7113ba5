"""What is measured of a classifier: accuracy and calibration, exact over all ranks."""

from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError


def build_metrics(num_classes: int) -> MetricCollection:
    """Return top-1, top-5 and expected calibration error (15 bins), shares in [0, 1].

    They take probabilities (batch, classes) and labels (batch,). With fewer than 6 classes top-5 is 1.

    Source of the calibration error: Guo et al. 2017, On Calibration of Modern Neural Networks, eq. 3.
    """
    return MetricCollection(
        {
            "top1": MulticlassAccuracy(num_classes, average="micro", validate_args=False),
            "top5": MulticlassAccuracy(num_classes, min(5, num_classes), average="micro", validate_args=False),
            "ece": MulticlassCalibrationError(num_classes, n_bins=15, validate_args=False),
        },
        compute_groups=False,
    )
