"""Made-up records for the tests of report and study: random right answers, and the accuracies that they give."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from kdq_lightning.runs.records import Record, write_correct, write_records

BYTES_A_BIT = {"resnet50": 3000, "resnet18": 1400}
IMAGES = 2000


def draw_correct(accuracy: float, seed: int, images: int = IMAGES) -> torch.Tensor:
    """Return which images are right, bool (images,); easy images are easy for everyone."""
    difficulty = np.random.default_rng(0).random(images)
    noise = np.random.default_rng(seed).normal(scale=0.1, size=images)
    return torch.from_numpy((difficulty + noise).argsort().argsort() < accuracy / 100 * images)


def write_run(
    folder: Path,
    strategy: str,
    accuracies: dict[int, float],
    *,
    seed: int = 0,
    dataset: str = "cifar10",
    network: str = "resnet18",
    peers: tuple[str, ...] = ("",),
    vectors: bool = True,
    images: int = IMAGES,
    **changes: object,
) -> list[Record]:
    """Write a version's folder with a record for each bit width (32 is float), and return the records.

    Args:
        folder: The folder; it is made.
        strategy: Name of the strategy, also of the run.
        accuracies: About the test accuracy in percent, by bit width.
        seed: Seed of the run; each further seed adds half a point of accuracy.
        dataset: Name of the data set.
        network: A network of `BYTES_A_BIT`.
        peers: Names of the peers; each further one loses a point of accuracy.
        vectors: Whether the images' right answers are written, too.
        images: Number of test images.
        **changes: Other fields of the records.
    """
    records, correct = [], {}
    for i, peer in enumerate(peers):
        for bits, accuracy in accuracies.items():
            right = draw_correct(accuracy + 0.5 * seed - i, 1000 * seed + 100 * i + bits + len(strategy), images)
            values = {
                "run": strategy,
                "dataset": dataset,
                "strategy": strategy,
                "network": network,
                "peer": peer,
                "seed": seed,
                "method": "" if bits == 32 else "default",
                "solver": "" if bits == 32 else "gpfq",
                "codebook": "" if bits == 32 else "int",
                "bits": bits,
                "levels": None if bits == 32 else 2**bits,
                "packed_bytes": BYTES_A_BIT[network] * bits + 500,
                "val_top1": accuracy + 0.2,
                "val_top5": 99.0,
                "test_top1": 100 * right.double().mean().item(),
                "test_top5": 99.0,
                "agreement_float": 100 - (32 - bits) / 3,
                "agreement_teacher": None if strategy in ("teacher", "control", "dml") else accuracy - 5,
                "flips": (32 - bits) / 4,
                "nll": 0.5,
                "ece": 3.0 + seed,
                "relative_error": None if bits == 32 else 2.0**-bits,
                "seconds": 1.0 + seed,
                "epochs": 15,
                "partial": False,
                "config_hash": f"{dataset}-{strategy}-{network}",
                "version": "0.1.0",
            } | changes
            record = Record(**values)
            records.append(record)
            correct[record.correct_key("test")] = right
            if record.val_top1 is not None:
                correct[record.correct_key("val")] = draw_correct(record.val_top1, 7000 + 1000 * seed + bits, images)
    write_records(folder, records)
    if vectors:
        write_correct(folder, correct)
    return records


WIDTHS = (2, 3, 4, 5, 6, 7, 8, 32)
ACCURACIES = {
    "teacher": (60, 85, 92, 93, 93.4, 93.5, 93.6, 93.7),
    "control": (70, 86, 89, 90, 90.3, 90.4, 90.5, 90.6),
    "vanilla": (72, 87, 90, 91, 91.3, 91.4, 91.5, 91.6),
    "mixup": (71, 87, 90.5, 91.5, 91.8, 91.9, 92, 92.1),
    "dml": (69, 85, 89, 90.5, 90.6, 90.7, 90.8, 90.9),
}


def write_study(root: Path, dataset: str = "cifar10", strategies: Iterable[str] = ACCURACIES) -> None:
    """Write the runs of a study on a data set: two seeds of each strategy."""
    seeds = (0, 1)
    for strategy in strategies:
        accuracies = ACCURACIES[strategy]
        for seed in seeds:
            write_run(
                root / f"seed{seed}" / strategy / "version_0",
                strategy,
                dict(zip(WIDTHS, accuracies, strict=True)),
                seed=seed,
                dataset=dataset,
                network="resnet50" if strategy == "teacher" else "resnet18",
                peers=("peer0", "peer1") if strategy == "dml" else ("",),
            )
