"""Comparisons at equal bytes: the best student's file against the best teacher's file."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from kdq_lightning.errors import UserError
from kdq_lightning.report.file_choice import budget_ranges, choose_file, pareto_front, rounded_sizes
from kdq_lightning.report.rows import Cell, Row, size_label, whole_rows
from kdq_lightning.report.significance import Difference, McNemar, holm_adjusted, mcnemar, paired_bootstrap


@dataclass(frozen=True)
class File:
    """A row at one bit width: one file, with a version of it for each seed.

    Attributes:
        row: The row.
        bits: The bit width; of mixed bits the budget in bytes.
        size: Bytes that count in comparisons: of files of nearly one size, those of the largest (`rounded_sizes`).
    """

    row: Row
    bits: int
    size: int

    @property
    def cell(self) -> Cell:
        """The row's cell at this bit width."""
        return self.row.cells[self.bits]

    @property
    def validation_top1(self) -> float:
        """Validation accuracy in percent."""
        validation_top1 = self.cell.validation_top1
        assert validation_top1 is not None, "comparable_files leaves out files whose validation accuracy isn't known"
        return validation_top1

    @property
    def label(self) -> str:
        """The row's label and the bit width, such as "Vanilla KD (resnet18), 2 bits"."""
        return f"{self.row.label}, {size_label(self.row.method, self.bits)}"


@dataclass(frozen=True)
class Duel:
    """The student's best file against the teacher's best file within a budget.

    Attributes:
        low: Smallest budget in bytes for which these two files are the best.
        high: Smallest budget for which they no longer are, infinite if there is none.
        student: The student's best file, chosen on validation; None if none fits into the budget.
        teacher: The teacher's best file, likewise.
        difference: Student minus teacher on the test images, its p-value adjusted (Holm) over the duels of a data set;
            None if there is only one file.
        mcnemar: McNemar's test of the two files of the first seed that both have, else of each one's first seed.
    """

    low: float
    high: float
    student: File | None
    teacher: File | None
    difference: Difference | None = None
    mcnemar: McNemar | None = None

    @cached_property
    def winner(self) -> str | None:
        """Either "student" or "teacher", "" if they are not distinguishable, None if there was no test."""
        if self.difference is None:
            return None
        return {1: "student", -1: "teacher", 0: ""}[self.difference.sign]


def files_of(rows: Sequence[Row]) -> list[File]:
    """Return each file of the rows once: rows of different methods share their float network."""
    places: dict[Cell, tuple[Row, int]] = {}
    for row in rows:
        for bits, cell in row.cells.items():
            places.setdefault(cell, (row, bits))
    sizes = rounded_sizes([cell.packed_bytes for cell in places])
    return [File(row, bits, size) for (row, bits), size in zip(places.values(), sizes, strict=True)]


def comparable_files(rows: Sequence[Row]) -> tuple[list[File], list[File]]:
    """Return the students' and the teacher's files whose accuracy is known on validation and test images.

    Rows that were evaluated on a part of the images are left out if others were evaluated on all.

    Args:
        rows: All rows of a data set.

    Raises:
        UserError: If the rows were tested on different test sets.
    """
    students: list[File] = []
    teachers: list[File] = []
    labels: dict[int, str] = {}  # of a row, by its number of test images
    for file in files_of(whole_rows(rows)):
        if file.cell.validation_top1 is None or not file.cell.correct:
            continue
        (teachers if file.row.is_teachers else students).append(file)
        for vector in file.cell.correct.values():
            labels.setdefault(len(vector), file.row.label)
    if len(labels) > 1:
        (images, label), (other_images, other_label) = list(labels.items())[:2]
        raise UserError(
            f"{label} was tested on {images} images of {rows[0].dataset} and {other_label} on {other_images}: these are"
            " different test sets, report them apart"
        )
    return students, teachers


def duels_by_budget(students: Sequence[File], teachers: Sequence[File]) -> list[Duel]:
    """Return the best file of each side for each range of budgets, not yet tested."""
    ranges = budget_ranges(*_sizes_and_accuracies(students), *_sizes_and_accuracies(teachers))
    return [
        Duel(
            r.low,
            r.high,
            None if r.first is None else students[r.first],
            None if r.second is None else teachers[r.second],
        )
        for r in ranges
    ]


def duels_by_file(students: Sequence[File], teachers: Sequence[File]) -> list[Duel]:
    """Return each file with the opponent's best file of no more bytes, not yet tested.

    Files that another file of their own side beats in size and validation accuracy are left out: nobody would choose
    them.
    """
    duels = []
    for own, others in ((students, teachers), (teachers, students)):
        for index in pareto_front(*_sizes_and_accuracies(own)):
            file = own[index]
            best = choose_file(*_sizes_and_accuracies(others), max_bytes=file.size)
            opponent = None if best is None else others[best]
            student, teacher = (opponent, file) if file.row.is_teachers else (file, opponent)
            duels.append(Duel(file.size, file.size, student, teacher))
    return duels


def _sizes_and_accuracies(files: Sequence[File]) -> tuple[list[int], list[float]]:
    return [file.size for file in files], [file.validation_top1 for file in files]


def with_tests(*families: Sequence[Duel]) -> list[list[Duel]]:
    """Return each family of duels with their tests; the p-values are adjusted (Holm) within a family.

    Two files that meet several times are tested once, and count once in a family.
    """
    tests: dict[tuple[File, File], tuple[Difference, McNemar]] = {}
    tested = []
    for duels in families:
        pairs = {(duel.student, duel.teacher) for duel in duels if duel.student and duel.teacher}
        tests |= {pair: compare(*pair) for pair in pairs if pair not in tests}
        differences = holm_adjusted({pair: tests[pair][0] for pair in pairs})
        tested.append(
            [
                replace(duel, difference=differences[pair], mcnemar=tests[pair][1])
                if (pair := (duel.student, duel.teacher)) in differences
                else duel
                for duel in duels
            ]
        )
    return tested


def compare(student: File, teacher: File) -> tuple[Difference, McNemar]:
    """Test two files on the same test images.

    Returns:
        Student minus teacher over all seeds, its p-value not adjusted; and McNemar's test of the first seed that both
        have, else of each one's first seed.
    """
    first, second = student.cell.correct, teacher.cell.correct
    seed = next((seed for seed in first if seed in second), None)
    one = next(iter(first.values())) if seed is None else first[seed]
    other = next(iter(second.values())) if seed is None else second[seed]
    return paired_bootstrap(np.stack(list(first.values())), np.stack(list(second.values()))), mcnemar(one, other)
