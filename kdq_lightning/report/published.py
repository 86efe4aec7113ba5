"""The accuracies and claims of the study that this project replicates, to stand beside measured ones.

ResNet-50 teacher, ResNet-18 students, GPFQ (Zhang, Zhou, Saab 2023) with 2^b + 1 levels at b bits, its scale factor C
chosen for each network and bit width on the test set, one seed. Column 32 mixes: Vanilla KD and DML print GPFQ at 32
bits, DKD the float network; where the float accuracy is known beside it, `FLOAT` has it.
"""

NETWORKS = ("resnet50", "resnet18")
"""Teacher and student."""

BITS = (2, 3, 4, 5, 6, 7, 8, 32)

TOP1: dict[str, dict[str, tuple[float, ...]]] = {
    "cifar100": {
        "teacher": (66.63, 74.17, 75.06, 75.84, 75.73, 75.78, 75.80, 76.43),
        "vanilla": (26.23, 47.65, 59.75, 65.93, 68.70, 69.85, 70.54, 75.33),
        "mixup": (33.07, 46.50, 57.10, 60.33, 61.83, 61.77, 62.16, 62.17),
        "dml": (19.22, 37.06, 52.96, 62.94, 65.98, 69.89, 70.87, 75.12),
        "dkd": (22.20, 33.11, 44.78, 49.76, 52.20, 52.76, 52.85, 58.01),
    },
    "cifar10": {
        "teacher": (90.90, 91.29, 91.55, 91.60, 91.88, 91.88, 92.00, 92.25),
        "vanilla": (71.87, 82.40, 86.47, 88.78, 88.89, 89.36, 89.69, 90.77),
        "mixup": (88.12, 92.63, 94.20, 95.09, 95.21, 95.18, 95.45, 95.77),
        "dml": (82.39, 86.98, 90.45, 91.84, 92.00, 92.43, 92.54, 92.89),
        "dkd": (61.06, 69.69, 77.69, 81.76, 83.45, 84.16, 84.39, 89.95),
    },
}
"""Top-1 on the test set in percent, by data set, strategy and the bit widths of `BITS`."""

FLOAT = {("cifar100", "vanilla"): 75.72, ("cifar100", "dml"): 75.73}
"""Float accuracies where column 32 is GPFQ at 32 bits."""

SHARPER_DROP = {"cifar100": (2, 3, 4, 5, 6), "cifar10": (2, 3, 4)}
"""Bit widths at which the student is said to lose more accuracy than the teacher."""

WINNER = {"cifar100": "teacher", "cifar10": "student"}
"""Which quantized network is said to win."""


def published_top1(dataset: str, strategy: str, bits: int) -> float | None:
    """Return the published accuracy in percent, None where there is none."""
    row = TOP1.get(dataset, {}).get(strategy)
    return row[BITS.index(bits)] if row and bits in BITS else None


def published_curves(dataset: str) -> dict[str, tuple[tuple[int, ...], tuple[float, ...]]]:
    """Return the published accuracies of quantized networks, bit widths and percent, by strategy."""
    return {strategy: (BITS[:-1], row[:-1]) for strategy, row in TOP1.get(dataset, {}).items()}


def published_drop(dataset: str, strategy: str, bits: int) -> float | None:
    """Return the published loss of accuracy from float to this bit width in points, None where there is none."""
    quantized, mixed = (published_top1(dataset, strategy, width) for width in (bits, 32))
    if quantized is None or mixed is None:
        return None
    return FLOAT.get((dataset, strategy), mixed) - quantized
