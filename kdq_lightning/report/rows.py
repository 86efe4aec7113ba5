"""Records, gathered into the rows and cells of the report's tables."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdq_lightning.errors import UserError
from kdq_lightning.report.significance import mean_and_deviation
from kdq_lightning.runs.records import CORRECT, RECORDS, Record, find_records, read_correct
from kdq_lightning.strategies import STRATEGIES, appearance

"""What tables call each strategy, in their order."""


@dataclass(frozen=True)
class Measurement:
    """A record, where it lies, and which test images it got right: bool (images,), None if that isn't known."""

    record: Record
    folder: Path
    correct: NDArray[np.bool_] | None


@dataclass(frozen=True)
class Cell:
    """A row at one bit width: the measurements of all its seeds and peers, in that order."""

    measurements: tuple[Measurement, ...]

    @property
    def first_peers(self) -> tuple[Measurement, ...]:
        """Those of the network that paired tests compare: of mutual learning's peers the first."""
        return tuple(m for m in self.measurements if m.record.peer in ("", "peer0"))

    @property
    def packed_bytes(self) -> int:
        """Size of the file, of several seeds' the largest: a budget must hold any of them."""
        return max(m.record.packed_bytes for m in self.first_peers)

    @property
    def correct(self) -> dict[int, NDArray[np.bool_]]:
        """Which test images were right, (images,), by seed; seeds that don't know are left out."""
        return {m.record.seed: m.correct for m in self.first_peers if m.correct is not None}

    @property
    def levels(self) -> int | None:
        """Values that a weight may take, the most of any seed and peer."""
        return max((m.record.levels for m in self.measurements if m.record.levels is not None), default=None)

    def values(self, field: str) -> list[float]:
        """Return a number of the records, one a seed: the mean over its peers."""
        seeds: defaultdict[int, list[float]] = defaultdict(list)
        for m in self.measurements:
            if (value := getattr(m.record, field)) is not None:
                seeds[m.record.seed].append(value)
        return [float(np.mean(values)) for values in seeds.values()]

    def mean(self, field: str) -> float | None:
        """Return the mean over seeds and peers, None if no record has the number."""
        values = self.values(field)
        return float(np.mean(values)) if values else None

    def mean_and_deviation(self, field: str) -> tuple[float, float | None] | None:
        """Return mean and sample deviation over seeds, None if no record has the number."""
        values = self.values(field)
        return mean_and_deviation(values) if values else None

    @property
    def validation_top1(self) -> float | None:
        """The validation accuracy of the first peers, mean over seeds: what every choice is made by."""
        values = [m.record.val_top1 for m in self.first_peers if m.record.val_top1 is not None]
        return float(np.mean(values)) if values else None


@dataclass(frozen=True)
class Row:
    """A strategy on a data set, with one network and one way of quantizing it.

    Attributes:
        dataset: Name of the data.
        strategy: As in the records.
        network: Its name; of peers that differ all names, joined by "+".
        label: What tables and figures call it.
        cells: By bit width; 32 is the float network.
    """

    dataset: str
    strategy: str
    network: str
    label: str
    cells: dict[int, Cell]

    @property
    def run(self) -> str:
        """Name of its run."""
        return next(iter(self.cells.values())).measurements[0].record.run

    @property
    def seeds(self) -> list[int]:
        """Every seed that any of its cells has."""
        return sorted({m.record.seed for cell in self.cells.values() for m in cell.measurements})

    @property
    def partial(self) -> bool:
        """Whether a limit left images out of its evaluation."""
        return any(m.record.partial for cell in self.cells.values() for m in cell.measurements)


def whole_rows(rows: Sequence[Row]) -> Sequence[Row]:
    """Return the rows that were measured on all images; where there are none, those measured on a part."""
    return [row for row in rows if not row.partial] or rows


def read_rows(folders: Sequence[Path]) -> tuple[dict[str, list[Row]], list[str]]:
    """Read every record below the folders.

    Returns:
        The rows by data set, in the tables' order; and sentences on what a reader should know of them.

    Raises:
        UserError: If there is no record, a file is damaged, or it is of a release with another format.
    """
    notes: list[str] = []
    found = [
        measurement
        for folder, records in _in_order_of_age(find_records(*folders)).items()
        for measurement in _measure(folder, records, notes)
    ]
    if not found:
        raise UserError(
            f"there is no {RECORDS} below {', '.join(map(str, folders))}: train a network with `kdq fit`, or quantize"
            " one with `kdq quantize`"
        )
    versions = sorted({m.record.version for m in found})
    if len(versions) > 1:
        notes.append(f"The records were written by different releases: {', '.join(versions)}.")
    if foreign := {f"{m.record.strategy} ({m.record.network})" for m in found if m.record.epochs is None}:
        notes.append(
            f"Weights from a file that does not say how they were trained: {', '.join(sorted(foreign))}. If the"
            " validation images were used for it, their validation accuracy is too high, and choices lean to them."
        )
    datasets: defaultdict[str, list[Row]] = defaultdict(list)
    for row in _gather(_without_repetitions(found, notes)):
        datasets[row.dataset].append(row)
    return {name: _labelled(_in_order(rows)) for name, rows in sorted(datasets.items())}, notes


def _in_order_of_age(records: dict[Path, list[Record]]) -> dict[Path, list[Record]]:
    """Sort version folders so that version_10 comes after version_2."""

    def age(folder: Path) -> tuple[str, int, str]:
        number = folder.name.removeprefix("version_")
        return str(folder.parent), int(number) if number.isdigit() else -1, folder.name

    return {folder: records[folder] for folder in sorted(records, key=age)}


def _measure(folder: Path, records: list[Record], notes: list[str]) -> list[Measurement]:
    """Join a version's records with its vectors."""
    correct = read_correct(folder)
    vectors = {record: correct.get(record.correct_key("test")) for record in records}
    lacking = [record.bits for record, vector in vectors.items() if vector is None and record.test_top1 is not None]
    if lacking:
        notes.append(
            f"{folder} has no images in {CORRECT} at {_listed(lacking)} bits: it is left out of paired tests there."
        )
    return [
        Measurement(record, folder, None if vector is None else vector.numpy()) for record, vector in vectors.items()
    ]


def _without_repetitions(found: Iterable[Measurement], notes: list[str]) -> list[Measurement]:
    """Keep the newest of several records of the same thing, and say so where they differ."""
    kept: dict[tuple[object, ...], Measurement] = {}
    replaced: dict[tuple[Path, Path], Record] = {}
    for m in found:
        r = m.record
        key = (r.dataset, r.strategy, r.network, r.peer, r.seed, r.config_hash, r.bits)
        if key in kept and _what_counts(kept[key].record) != _what_counts(r):
            replaced[kept[key].folder, m.folder] = r
        kept[key] = m
    for (old, new), record in replaced.items():
        notes.append(
            f"{old} and {new} both hold {record.strategy} with seed {record.seed} and the same settings, and their"
            " figures differ: the latter's are used."
        )
    return list(kept.values())


def _what_counts(record: Record) -> dict[str, object]:
    return asdict(replace(record, run="", seconds=None, version=""))


def _gather(found: Iterable[Measurement]) -> list[Row]:
    """Group measurements into rows.

    A row's records share their settings, which `config_hash` stands for: they differ in seed, peer and bit width. A
    recovered network has a run for each bit width, which are one row.
    """
    groups: defaultdict[tuple[str, str, str], list[Measurement]] = defaultdict(list)
    for m in found:
        groups[m.record.dataset, m.record.strategy, m.record.config_hash].append(m)
    rows: list[Row] = []
    for (dataset, strategy, _), group in groups.items():
        network = "+".join(dict.fromkeys(m.record.network for m in sorted(group, key=lambda m: m.record.peer)))
        widths = sorted({m.record.bits for m in group})
        cells = {bits: Cell(_in_seed_order(m for m in group if m.record.bits == bits)) for bits in widths}
        row = Row(dataset, strategy, network, "", cells)
        partner = next((other for other in rows if _are_one(row, other)), None)
        if partner is None:
            rows.append(row)
        else:
            partner.cells.update(cells)
    return [replace(row, cells=dict(sorted(row.cells.items()))) for row in rows]


def _are_one(row: Row, other: Row) -> bool:
    """Whether two rows are one recovered network at different bit widths (runs `recover_2bit`, `recover_4bit`)."""
    same = [(r.dataset, r.strategy, r.network, re.sub(r"\d+bit", "", r.run)) for r in (row, other)]
    return row.strategy == "recover" and same[0] == same[1] and not row.cells.keys() & other.cells.keys()


def _in_seed_order(group: Iterable[Measurement]) -> tuple[Measurement, ...]:
    return tuple(sorted(group, key=lambda m: (m.record.seed, m.record.peer)))


def _in_order(rows: Iterable[Row]) -> list[Row]:
    strategies = list(STRATEGIES)

    def place(row: Row) -> tuple[int, str, str, str, str, list[int]]:
        known = strategies.index(row.strategy) if row.strategy in STRATEGIES else len(strategies)
        hashes = sorted(m.record.config_hash for cell in row.cells.values() for m in cell.measurements)
        return known, row.strategy, row.network, row.run, hashes[0], row.seeds

    return sorted(rows, key=place)


def _labelled(rows: list[Row]) -> list[Row]:
    """Name the rows by strategy and network; where that isn't enough, by run and, last, by settings."""
    labels = [f"{appearance(row.strategy).title} ({row.network})" for row in rows]
    for detail in (lambda row: row.run, _hash):
        twice = {label for label in labels if labels.count(label) > 1}
        labels = [
            f"{label} {detail(row)}" if label in twice else label for label, row in zip(labels, rows, strict=True)
        ]
    return [
        replace(row, label=f"{label}, partial" if row.partial else label)
        for label, row in zip(labels, rows, strict=True)
    ]


def _hash(row: Row) -> str:
    return next(iter(row.cells.values())).measurements[0].record.config_hash


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(set(numbers))))
