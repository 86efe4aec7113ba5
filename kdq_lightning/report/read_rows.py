"""Read the records below some folders and gather them into the rows of the report's tables."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdq_lightning.errors import UserError
from kdq_lightning.quantization.methods import DEFAULT_METHOD
from kdq_lightning.report.labels import with_different_labels
from kdq_lightning.report.rows import Cell, Measurement, Row, method_order
from kdq_lightning.runs.records import CORRECT, MEASURES, RECORDS, Record, find_records, identity, read_correct
from kdq_lightning.runs.versions import version_number
from kdq_lightning.strategies import Appearance, appearances


def read_rows(folders: Sequence[Path]) -> tuple[dict[str, list[Row]], list[str]]:
    """Read every record below the folders.

    Returns:
        The rows by data set, in the order of tables; and notes, sentences on what a reader should know of the records.

    Raises:
        UserError: If there is no record, a file is damaged, or a file has another format than this release reads.
    """
    notes: list[str] = []
    measurements = [
        measurement
        for folder, records in _from_oldest(find_records(*folders)).items()
        for measurement in _measurements(folder, records, notes)
    ]
    measurements = _number_unseeded(measurements, notes)
    if not measurements:
        raise UserError(
            f"there is no {RECORDS} below {', '.join(map(str, folders))}: train a network with `kdq fit`, or quantize"
            " one with `kdq quantize`"
        )
    versions = sorted({m.record.version for m in measurements})
    if len(versions) > 1:
        notes.append(f"The records were written by different releases: {', '.join(versions)}.")
    if foreign := {f"{m.record.strategy} ({m.record.network})" for m in measurements if m.record.epochs is None}:
        notes.append(
            f"Weights from a file that does not say how they were trained: {', '.join(sorted(foreign))}. If the"
            " validation images were used for it, their validation accuracy is too high, and choices lean to them."
        )
    shown = appearances(m.record.strategy for m in measurements)
    groups: defaultdict[str, list[list[Measurement]]] = defaultdict(list)
    for group in _group(_newest(measurements, notes)):
        groups[group[0].record.dataset].append(group)
    return {dataset: _rows(groups[dataset], shown) for dataset in sorted(groups)}, notes


def _from_oldest(records: dict[Path, list[Record]]) -> dict[Path, list[Record]]:
    """Sort the versions' folders of each run by age: version_10 comes after version_2."""

    def age(folder: Path) -> tuple[str, int, str]:
        return str(folder.parent), version_number(folder), folder.name

    return {folder: records[folder] for folder in sorted(records, key=age)}


def _measurements(folder: Path, records: list[Record], notes: list[str]) -> list[Measurement]:
    """Join the records of a version with their vectors; add notes on what is missing, and on what isn't understood."""
    if unknown := {column for record in records for column in record.unknown} - MEASURES.keys():
        notes.append(
            f"{folder} was written by another release: columns that this one doesn't know are left out:"
            f" {', '.join(sorted(unknown))}."
        )
    correct = read_correct(folder)

    def vector(record: Record, split: str) -> NDArray[np.bool_] | None:
        found = correct.get(record.correct_key(split))
        return None if found is None else found.numpy()

    measurements = [Measurement(record, folder, vector(record, "test"), vector(record, "val")) for record in records]
    missing = {m.record.bits for m in measurements if m.correct is None and m.record.test_top1 is not None}
    if missing:
        listed = ", ".join(map(str, sorted(missing)))
        notes.append(f"{folder} has no images in {CORRECT} at {listed} bits: it is left out of paired tests there.")
    return measurements


def _number_unseeded(measurements: Iterable[Measurement], notes: list[str]) -> list[Measurement]:
    """Give the runs that were not seeded numbers of their own, -1, -2, ...: each of them is another draw."""
    numbers: dict[Path, int] = {}
    numbered = []
    for m in measurements:
        if m.record.seed is None:
            number = numbers.setdefault(m.folder, -1 - len(numbers))
            m = replace(m, record=replace(m.record, seed=number))
        numbered.append(m)
    notes += [f"{folder} was trained without a seed: {number} stands for it." for folder, number in numbers.items()]
    return numbered


def _newest(measurements: Iterable[Measurement], notes: list[str]) -> list[Measurement]:
    """Keep the newest of several records of the same thing; add a note where their figures differ.

    Args:
        measurements: From the oldest to the newest.
        notes: Gets the sentences.
    """
    kept: dict[tuple[object, ...], Measurement] = {}
    replaced: dict[tuple[Path, Path], Record] = {}
    for m in measurements:
        r = m.record
        key = (r.dataset, r.strategy, r.network, r.peer, r.seed, r.config_hash, r.method, identity(r).bits)
        if key in kept and _figures(kept[key].record) != _figures(r):
            replaced[kept[key].folder, m.folder] = r
        kept[key] = m
    for (old, new), record in replaced.items():
        notes.append(
            f"{old} and {new} both hold {record.strategy} with seed {record.seed} and the same settings, and their"
            " figures differ: the latter's are used."
        )
    return list(kept.values())


def _figures(record: Record) -> dict[str, object]:
    """Return what makes a difference between two records of the same thing: everything except run, time, release."""
    return asdict(replace(record, run="", seconds=None, version=""))


def _group(measurements: Iterable[Measurement]) -> list[list[Measurement]]:
    """Return the measurements of each trained network, over all methods.

    They have the same settings (`config_hash`) and network; they differ in seed, peer, method and bit width. Recovery
    after quantization has a run for each bit width: these are one group, too.
    """
    by_settings: defaultdict[tuple[str, str, str, str], list[Measurement]] = defaultdict(list)
    for m in measurements:
        by_settings[m.record.dataset, m.record.strategy, m.record.config_hash, m.record.network].append(m)
    groups: list[list[Measurement]] = []
    for group in by_settings.values():
        same = next((other for other in groups if _is_same_recovery(group, other)), None)
        if same is None:
            groups.append(group)
        else:
            same += group
    return groups


def _is_same_recovery(group: list[Measurement], other: list[Measurement]) -> bool:
    """Tell whether two groups are one recovered network at different bit widths (`recover_2bit`, `recover_4bit`)."""

    def settings(group: list[Measurement]) -> tuple[str, str, str, str]:
        first = group[0].record
        return first.dataset, first.strategy, first.network, re.sub(r"\d+bit", "", first.run)

    if group[0].record.strategy != "recover" or settings(group) != settings(other):
        return False
    sizes = [{(m.record.method, identity(m.record).bits) for m in members} for members in (group, other)]
    return sizes[0].isdisjoint(sizes[1])


def _rows(groups: list[list[Measurement]], shown: Mapping[str, Appearance]) -> list[Row]:
    """Return the rows of a data set, in the order of tables.

    Args:
        groups: The measurements of each trained network.
        shown: How each strategy is shown, in the order of tables.
    """
    teachers = {group[0].record.network for group in groups if group[0].record.strategy == "teacher"}
    rows = []
    for group in groups:
        first = group[0].record
        dataset, strategy, network = first.dataset, first.strategy, first.network
        members: defaultdict[tuple[str, int], list[Measurement]] = defaultdict(list)
        for m in sorted(group, key=lambda m: (m.record.bits, m.record.seed, m.record.peer)):
            members[m.record.method, identity(m.record).bits].append(m)
        cells = {key: Cell(tuple(measurements)) for key, measurements in members.items()}
        rows += [
            Row(
                dataset,
                strategy,
                network,
                method,
                {bits: cell for (name, bits), cell in cells.items() if name in ("", method)},
                f"{shown[strategy].title} ({network})",
                shown[strategy],
                strategy == "teacher" or (strategy == "recover" and network in teachers),
            )
            for method in {name for name, _ in cells if name} or {DEFAULT_METHOD}
        ]
    order = list(shown)

    def place(row: Row) -> tuple[object, ...]:
        run, settings = row.first_record.run, row.first_record.config_hash
        return order.index(row.strategy), row.network, run, settings, row.seeds, method_order(row.method)

    return with_different_labels(sorted(rows, key=place))
