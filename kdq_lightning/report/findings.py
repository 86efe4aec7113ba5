"""Computes the statistical tests and the choice of files for one data set. Means are computed in rows.py."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kdq_lightning.report.advice import Advice, advise
from kdq_lightning.report.duels import Duel, comparable_files, duels_by_budget, duels_by_file, with_tests
from kdq_lightning.report.rows import Row, whole_rows
from kdq_lightning.report.significance import Difference, holm_adjusted, paired_bootstrap
from kdq_lightning.runs.records import FLOAT_BITS

DROP_RESAMPLES = 2000  # fewer than of other tests, because there are some hundred tests of drops


@dataclass(frozen=True)
class Drop:
    """The accuracy that a network loses from float to a bit width, in points on the test images.

    Attributes:
        row: The network.
        bits: The bit width.
        own: Float minus quantized.
        versus_control: This loss minus the control's; None without a control at this bit width.
        versus_teacher: This loss minus the teacher's; None without a teacher at this bit width.
    """

    row: Row
    bits: int
    own: Difference
    versus_control: Difference | None
    versus_teacher: Difference | None


@dataclass(frozen=True)
class Findings:
    """What the report says of one data set. The answer, tables and figures only show it.

    Attributes:
        dataset: Name of the data set.
        rows: Its rows, in the order of tables; their cells hold means and deviations.
        duels: The best student's file against the best teacher's, for each range of budgets, in ascending order.
        file_duels: Each file against the opponent's best file of no more bytes.
        gains: Accuracy of each row minus the control's of the same network and method, in points, by bit width.
        drops: The loss from float of each row at each bit width.
    """

    dataset: str
    rows: Sequence[Row]
    duels: Sequence[Duel]
    file_duels: Sequence[Duel]
    gains: Mapping[Row, Mapping[int, Difference]]
    drops: Sequence[Drop]

    @cached_property
    def advice(self) -> list[Advice]:
        """What to ship, a range of budgets after the other; see `advise`."""
        return advise(self.duels)


def find(rows: Sequence[Row]) -> Findings:
    """Return the findings on a data set.

    Args:
        rows: All rows of the data set, at least one.

    Raises:
        UserError: If the rows were tested on different test sets.
    """
    files = comparable_files(rows)
    duels, file_duels = with_tests(duels_by_budget(*files), duels_by_file(*files))
    whole = whole_rows(rows)
    return Findings(rows[0].dataset, rows, duels, file_duels, gains_over_control(whole), drops_from_float(whole))


def gains_over_control(rows: Sequence[Row]) -> dict[Row, dict[int, Difference]]:
    """Return the gains of all rows, except the teacher, that have a control of the same network and method.

    The p-values of a row are adjusted together (Holm), over its bit widths.
    """
    controls = [row for row in rows if row.strategy == "control"]
    gains = {}
    for row in rows:
        same = [control for control in controls if (control.network, control.method) == (row.network, row.method)]
        if row.strategy not in ("teacher", "control") and same:
            tests = {bits: test for bits in row.cells if (test := _gain(row, bits, same)) is not None}
            gains[row] = holm_adjusted(tests)
    return gains


def _gain(row: Row, bits: int, controls: Sequence[Row]) -> Difference | None:
    """Return the difference from the closest control; None if it isn't known which images either got right."""
    able = [control for control in controls if bits in control.cells and control.cells[bits].correct]
    own = row.cells[bits].correct
    if not own or not able:
        return None
    reference = closest_reference(row, bits, able).cells[bits].correct
    return paired_bootstrap(np.stack(list(own.values())), np.stack(list(reference.values())))


def drops_from_float(rows: Sequence[Row]) -> list[Drop]:
    """Return the drops of all rows at all bit widths that can be tested.

    The p-values of a row against one reference are adjusted together (Holm), over its bit widths.
    """
    losses: dict[Row, dict[int, NDArray[np.int8]]] = {}
    for row in rows:
        known = {bits: accuracy_drop(row, bits) for bits in row.cells if bits != FLOAT_BITS}
        losses[row] = {bits: loss for bits, loss in known.items() if loss is not None}
    drops = []
    for row, own in losses.items():
        control, teacher = (_against(row, losses, reference) for reference in ("control", "teacher"))
        drops += [
            Drop(row, bits, paired_bootstrap(loss, resamples=DROP_RESAMPLES), control.get(bits), teacher.get(bits))
            for bits, loss in own.items()
        ]
    return drops


def accuracy_drop(row: Row, bits: int) -> NDArray[np.int8] | None:
    """Return how much each image's correctness drops from float to a bit width.

    Returns:
        Float minus quantized, -1, 0 or 1, int8 (seeds, images), of the seeds that have both; None if no seed has.
    """
    if FLOAT_BITS not in row.cells or bits not in row.cells:
        return None
    whole, quantized = row.cells[FLOAT_BITS].correct, row.cells[bits].correct
    pairs = [whole[seed].astype(np.int8) - quantized[seed] for seed in whole if seed in quantized]
    return np.stack(pairs) if pairs else None


def _against(row: Row, losses: Mapping[Row, Mapping[int, NDArray[np.int8]]], strategy: str) -> dict[int, Difference]:
    """Return a row's loss minus that of the closest row of a strategy, by bit width; p-values are adjusted."""
    tests = {}
    for bits, loss in losses[row].items():
        others = [
            other
            for other in losses
            if (other.strategy, other.method) == (strategy, row.method) and bits in losses[other]
        ]
        if row.strategy != strategy and others:
            reference = losses[closest_reference(row, bits, others)][bits]
            tests[bits] = paired_bootstrap(loss, reference, resamples=DROP_RESAMPLES)
    return holm_adjusted(tests)


def closest_reference(row: Row, bits: int, others: Sequence[Row]) -> Row:
    """Return the row to compare with: one with the same solver and codebook if there is any, and the same network.

    Args:
        row: The row to compare.
        bits: The bit width at which both are compared.
        others: Rows that have this bit width, at least one.
    """

    def likeness(other: Row) -> tuple[bool, bool]:
        first, second = (r.cells[bits].measurements[0].record for r in (row, other))
        return (first.solver, first.codebook) == (second.solver, second.codebook), row.network == other.network

    return max(others, key=likeness)
