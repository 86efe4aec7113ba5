"""The question: at equal bytes, is the quantized student or the quantized teacher better?"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from kdq_lightning.errors import UserError
from kdq_lightning.report.budgets import budget_ranges, choose_file, pareto_front
from kdq_lightning.report.rows import Cell, Measurement, Row, whole_rows
from kdq_lightning.report.significance import LEVEL, Difference, McNemar, holm, mcnemar, paired_bootstrap
from kdq_lightning.runs.records import FLOAT_BITS


@dataclass(frozen=True)
class File:
    """A row at one bit width, which is one file (a seed)."""

    row: Row
    bits: int

    @property
    def cell(self) -> Cell:
        """Its measurements."""
        return self.row.cells[self.bits]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.cell.packed_bytes

    @property
    def validation_top1(self) -> float:
        """Validation accuracy in percent, known of every file that takes part."""
        validation_top1 = self.cell.validation_top1
        assert validation_top1 is not None, "files_of leaves the others out"
        return validation_top1

    @property
    def label(self) -> str:
        """Row and bit width."""
        return f"{self.row.label}, {'float' if self.bits == FLOAT_BITS else f'{self.bits} bits'}"


@dataclass(frozen=True)
class Duel:
    """The best student's file against the best teacher's, of those that fit into a budget.

    Attributes:
        low: Smallest budget in bytes for which these are the best.
        high: Smallest budget beyond.
        student: Chosen on validation; None if none fits.
        teacher: Likewise.
        difference: Student minus teacher on the test images; None if either is missing or knows no images.
        p: The difference's p-value, adjusted for all duels of the data set (Holm).
        mcnemar: Of the first seed that both have, or of each side's first.
    """

    low: float
    high: float
    student: File | None
    teacher: File | None
    difference: Difference | None = None
    p: float | None = None
    mcnemar: McNemar | None = None

    @cached_property
    def winner(self) -> str | None:
        """Return "student" or "teacher", "" if not distinguishable, None if there was no test."""
        if self.difference is None or self.p is None:
            return None
        if self.p >= LEVEL:
            return ""
        return "student" if self.difference.points > 0 else "teacher"


def is_teachers(row: Row, rows: Iterable[Row]) -> bool:
    """Tell whether a row is on the teacher's track: the teacher itself, or its network recovered after quantization."""
    if row.strategy != "recover":
        return row.strategy == "teacher"
    return row.network in {other.network for other in rows if other.strategy == "teacher"}


def files_of(rows: Sequence[Row]) -> tuple[list[File], list[File]]:
    """Return the student's and the teacher's files that can be compared: accuracy known on validation and test.

    Where some rows were measured on all images, those measured on a part are left out.

    Raises:
        UserError: If the rows were measured on different test sets.
    """
    sides: tuple[list[File], list[File]] = [], []
    images: dict[int, str] = {}
    for row in whole_rows(rows):
        for bits, cell in row.cells.items():
            if cell.validation_top1 is None or not cell.correct:
                continue
            sides[is_teachers(row, rows)].append(File(row, bits))
            for vector in cell.correct.values():
                images.setdefault(len(vector), row.label)
    if len(images) > 1:
        (one, first), (other, second) = list(images.items())[:2]
        raise UserError(
            f"{first} was tested on {one} images of {rows[0].dataset} and {second} on {other}: these are different test"
            " sets, report them apart"
        )
    return sides


def duels_by_budget(students: Sequence[File], teachers: Sequence[File]) -> list[Duel]:
    """Return who is better for each range of budgets; the p-values are adjusted together."""
    ranges = budget_ranges(
        [file.size for file in students],
        [file.validation_top1 for file in students],
        [file.size for file in teachers],
        [file.validation_top1 for file in teachers],
    )
    return _tested(
        Duel(
            r.low,
            r.high,
            None if r.first is None else students[r.first],
            None if r.second is None else teachers[r.second],
        )
        for r in ranges
    )


def duels_by_file(students: Sequence[File], teachers: Sequence[File]) -> list[Duel]:
    """Set each file against the opponent's best file of no more bytes.

    Files that another of their own side beats in size and validation accuracy are left out: nobody would choose them.
    """
    duels = []
    for side, others, is_student in ((students, teachers, True), (teachers, students, False)):
        sizes = [file.size for file in side]
        for i in pareto_front(sizes, [file.validation_top1 for file in side]):
            best = choose_file([f.size for f in others], [f.validation_top1 for f in others], max_bytes=sizes[i])
            opponent = None if best is None else others[best]
            pair = (side[i], opponent) if is_student else (opponent, side[i])
            duels.append(Duel(sizes[i], sizes[i], *pair))
    return _tested(duels)


def _tested(duels: Iterable[Duel]) -> list[Duel]:
    """Add the tests; a pair that meets twice is one test."""
    found: dict[tuple[int, int], tuple[Difference, McNemar]] = {}
    duels = list(duels)
    for duel in duels:
        if duel.student and duel.teacher and (key := _pair(duel)) not in found:
            first, second = duel.student.cell.correct, duel.teacher.cell.correct
            seed = next((seed for seed in first if seed in second), None)
            one = next(iter(first.values())) if seed is None else first[seed]
            other = next(iter(second.values())) if seed is None else second[seed]
            difference = paired_bootstrap(np.stack(list(first.values())), np.stack(list(second.values())))
            found[key] = difference, mcnemar(one, other)
    adjusted = dict(zip(found, holm([difference.p for difference, _ in found.values()]), strict=True))
    return [
        replace(duel, difference=found[key][0], p=adjusted[key], mcnemar=found[key][1])
        if (key := _pair(duel)) in found
        else duel
        for duel in duels
    ]


def _pair(duel: Duel) -> tuple[int, int]:
    return id(duel.student and duel.student.cell), id(duel.teacher and duel.teacher.cell)


def choose_measurement(
    rows: Sequence[Row], max_bytes: float | None, min_accuracy: float | None
) -> tuple[File, Measurement] | None:
    """Return the one file to ship, chosen on validation; None if no file meets the options.

    Args:
        rows: Of one data set.
        max_bytes: At most so many bytes.
        min_accuracy: At least so much validation accuracy in percent: the smallest file that has it.
    """
    known = [
        (File(row, bits), m)
        for row in whole_rows(rows)
        for bits, cell in row.cells.items()
        for m in cell.measurements
        if m.record.val_top1 is not None
    ]
    sizes = [m.record.packed_bytes for _, m in known]
    best = choose_file(sizes, [m.record.val_top1 or 0.0 for _, m in known], max_bytes, min_accuracy)
    return None if best is None else known[best]


def merge_ranges(duels: Sequence[Duel], key: Callable[[Duel], object]) -> list[list[Duel]]:
    """Group neighbouring duels that come out the same."""
    groups: list[list[Duel]] = []
    for duel in duels:
        if groups and key(groups[-1][-1]) == key(duel):
            groups[-1].append(duel)
        else:
            groups.append([duel])
    return groups
