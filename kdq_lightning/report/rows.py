"""The rows and cells of the report's tables. `Cell.summaries` computes mean and deviation over the seeds.

A row is a trained strategy, quantized by one method; a cell is that row at one bit width.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdq_lightning.files import format_bytes
from kdq_lightning.quantization.methods import CUSTOM_METHOD, DEFAULT_METHOD, MIXED_METHOD
from kdq_lightning.runs.records import FLOAT_BITS, MEASURES, Record
from kdq_lightning.strategies import Appearance

METHOD_TITLES = {"gpfq": "plain GPFQ", MIXED_METHOD: "mixed bits", CUSTOM_METHOD: "own solver or codebook"}
"""Methods in words; that of `DEFAULT_METHOD` is said nowhere, because it goes without saying."""


@dataclass(frozen=True, eq=False)
class Measurement:
    """One record, with the images that it got right.

    Attributes:
        record: The record.
        folder: The version's folder that holds it.
        correct: Whether each test image was classified correctly, bool (images,); None if that isn't known.
        correct_validation: Likewise of the validation images.
    """

    record: Record
    folder: Path
    correct: NDArray[np.bool_] | None
    correct_validation: NDArray[np.bool_] | None = None

    @property
    def seed(self) -> int:
        """The seed of its run; runs without one are numbered below zero when they are read."""
        assert self.record.seed is not None, "numbered by read_rows"
        return self.record.seed


class Summary(NamedTuple):
    """A number over the seeds of a cell.

    Attributes:
        mean: Mean over the seeds; of several peers with one seed, their mean counts.
        deviation: Sample deviation over the seeds (n - 1), None for a single seed.
    """

    mean: float
    deviation: float | None


def summarize(values: Sequence[float]) -> Summary:
    """Return mean and sample deviation of the values, one value a seed."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Summary(float(np.mean(values)), deviation)


@dataclass(frozen=True, eq=False)
class Cell:
    """A row at one bit width.

    Attributes:
        measurements: Those of all seeds and peers, in order of seed, then peer.
    """

    measurements: tuple[Measurement, ...]

    @cached_property
    def first_peers(self) -> tuple[Measurement, ...]:
        """The measurements that paired tests and choices use: of mutual learning's peers, those of the first alone."""
        first = min(m.record.peer for m in self.measurements)
        return tuple(m for m in self.measurements if m.record.peer == first)

    @cached_property
    def packed_bytes(self) -> int:
        """Size of the file in bytes: the largest over the seeds, because a budget must hold each of them."""
        return max(m.record.packed_bytes for m in self.first_peers)

    @cached_property
    def correct(self) -> dict[int, NDArray[np.bool_]]:
        """Whether each test image was classified correctly, bool (images,), by seed; seeds without it are left out."""
        return {m.seed: m.correct for m in self.first_peers if m.correct is not None}

    @cached_property
    def correct_validation(self) -> dict[int, NDArray[np.bool_]]:
        """As `correct`, of the validation images."""
        return {m.seed: m.correct_validation for m in self.first_peers if m.correct_validation is not None}

    @cached_property
    def levels(self) -> int | None:
        """How many values a weight may take: the most over seeds and peers."""
        return max((m.record.levels for m in self.measurements if m.record.levels is not None), default=None)

    @cached_property
    def seeds(self) -> list[int]:
        """The seeds, in ascending order."""
        return sorted({m.seed for m in self.measurements})

    @cached_property
    def summaries(self) -> dict[str, Summary]:
        """Mean and deviation over the seeds by the name in `MEASURES`; a number that no record has is left out."""
        values: dict[str, defaultdict[int, list[float]]] = {name: defaultdict(list) for name in MEASURES}
        for m in self.measurements:
            for name, by_seed in values.items():
                if (value := m.record.number(name)) is not None:
                    by_seed[m.seed].append(value)
        return {
            name: summarize([float(np.mean(peers)) for peers in by_seed.values()])
            for name, by_seed in values.items()
            if by_seed
        }

    @cached_property
    def validation_top1(self) -> float | None:
        """Validation accuracy in percent, the mean of `first_peers`, by which files are chosen; None if not known."""
        values = [m.record.val_top1 for m in self.first_peers if m.record.val_top1 is not None]
        return float(np.mean(values)) if values else None


@dataclass(frozen=True, eq=False)
class Row:
    """A strategy on a data set, with one network, one configuration and one method of quantizing it.

    Rows that differ in the method alone share the cell of their float network.

    Attributes:
        dataset: Name of the data set.
        strategy: Its name in the records.
        network: Name of the network; peers with different networks are rows of their own.
        method: Name of the method that quantized it.
        cells: By bit width, in ascending order; `FLOAT_BITS` is the float network. Those of mixed bits by
            budget in bytes.
        label: Title of the row in tables and figures; different for each row of a data set.
        appearance: Colour and marker of its curves.
        is_teachers: Whether it is on the teacher's track: the teacher itself, or the teacher's network recovered after
            quantization. All others are students.
    """

    dataset: str
    strategy: str
    network: str
    method: str
    cells: dict[int, Cell]
    label: str
    appearance: Appearance
    is_teachers: bool

    @property
    def first_measurement(self) -> Measurement:
        """That of its smallest bit width, seed and peer, whose folder has the settings."""
        return next(iter(self.cells.values())).measurements[0]

    @property
    def first_record(self) -> Record:
        """The record of its smallest bit width, seed and peer, which names the run."""
        return self.first_measurement.record

    @cached_property
    def seeds(self) -> list[int]:
        """All seeds of its cells, in ascending order."""
        return sorted({seed for cell in self.cells.values() for seed in cell.seeds})

    @cached_property
    def is_partial(self) -> bool:
        """Whether a limit left images out of its evaluation."""
        return any(m.record.partial for cell in self.cells.values() for m in cell.measurements)


def size_label(method: str, bits: int) -> str:
    """Return what a file of a row is called, such as "2 bits", "float" or "within 100 kB" for mixed bits."""
    if bits == FLOAT_BITS:
        return "float"
    return f"within {format_bytes(bits)}" if method == MIXED_METHOD else f"{bits} bit{'s' if bits > 1 else ''}"


def by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of each method, `DEFAULT_METHOD` first."""
    methods = sorted({row.method for row in rows}, key=method_order)
    return {method: [row for row in rows if row.method == method] for method in methods}


def trained_label(row: Row) -> str:
    """Return the label of a row without its method: rows that share a trained network have it in common."""
    return row.label.replace(f", {method_title(row.method)}", "", 1)


def method_title(method: str) -> str:
    """Return what a method is called in labels, such as "plain GPFQ"; a reader need not know its name in records."""
    return METHOD_TITLES.get(method, method)


def method_order(method: str) -> tuple[bool, str]:
    """Return the key by which methods are sorted: `DEFAULT_METHOD` first, then by name."""
    return method != DEFAULT_METHOD, method


def whole_rows(rows: Sequence[Row]) -> Sequence[Row]:
    """Return the rows that were evaluated on all images, or all rows if there is no such row."""
    return [row for row in rows if not row.is_partial] or rows
