"""The claims of the published study, each with what the records say of it: numbers, intervals, p-values."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kdq_lightning.report.answer import is_teachers
from kdq_lightning.report.published import SHARPER_DROP, published_drop
from kdq_lightning.report.rows import Row, whole_rows
from kdq_lightning.report.significance import LEVEL, Difference, holm, paired_bootstrap
from kdq_lightning.runs.records import FLOAT_BITS

DROP_VERDICTS = {
    1: "drops more sharply than the teacher at",
    -1: "drops less than the teacher at",
    0: "has a drop that is not distinguishable from the teacher's at",
}

RESAMPLES = 2000  # there are some hundred such tests

NEAR = 1.0  # points below float that count as "nearly match"


@dataclass(frozen=True)
class Drop:
    """What a row loses from float to a bit width, in points on the test images.

    Attributes:
        row: The network.
        bits: The bit width.
        own: Float minus quantized.
        published: The published loss, None where there is none.
        versus_control: This loss minus the control's, None without a control at this bit width.
        versus_teacher: This loss minus the teacher's.
    """

    row: Row
    bits: int
    own: Difference
    published: float | None
    versus_control: Difference | None
    versus_teacher: Difference | None


def drops(rows: Sequence[Row]) -> list[Drop]:
    """Return the loss of every row at every bit width that can be tested.

    The p-values of one row against one reference are adjusted together (Holm), over its bit widths.
    """
    whole = whole_rows(rows)
    found: list[Drop] = []
    for row in whole:
        lost = {bits: accuracy_drop(row, bits) for bits in row.cells if bits != FLOAT_BITS}
        row_drops = []
        for bits, own in lost.items():
            if own is None:
                continue
            versus = [_versus(row, bits, own, whole, strategy) for strategy in ("control", "teacher")]
            published = published_drop(row.dataset, row.strategy, bits)
            row_drops.append(Drop(row, bits, paired_bootstrap(own, resamples=RESAMPLES), published, *versus))
        found += _adjusted(row_drops)
    return found


def accuracy_drop(row: Row, bits: int) -> NDArray[np.int8] | None:
    """Return float minus quantized correctness, (seeds, images), of the seeds that have both; None if none has."""
    if FLOAT_BITS not in row.cells or bits not in row.cells:
        return None
    whole, quantized = row.cells[FLOAT_BITS].correct, row.cells[bits].correct
    pairs = [whole[seed].astype(np.int8) - quantized[seed] for seed in whole if seed in quantized]
    return np.stack(pairs) if pairs else None


def _versus(row: Row, bits: int, own: NDArray[np.int8], rows: Sequence[Row], strategy: str) -> Difference | None:
    """Return a row's loss minus that of the row of another strategy that is most like it."""
    others = [other for other in rows if other.strategy == strategy and accuracy_drop(other, bits) is not None]
    if row.strategy == strategy or not others:
        return None
    reference = accuracy_drop(closest_reference(row, bits, others), bits)
    assert reference is not None
    return paired_bootstrap(own, reference, RESAMPLES) if reference.shape[1] == own.shape[1] else None


def closest_reference(row: Row, bits: int, others: Sequence[Row]) -> Row:
    """Return the row that is quantized like the given one if there is such, then the one of the same network."""

    def likeness(other: Row) -> tuple[bool, bool]:
        first, second = (r.cells[bits].measurements[0].record for r in (row, other))
        return (first.solver, first.codebook) == (second.solver, second.codebook), row.network == other.network

    return max(others, key=likeness)


def _adjusted(row_drops: list[Drop]) -> list[Drop]:
    for field in ("versus_control", "versus_teacher"):
        tests = [getattr(drop, field) for drop in row_drops]
        adjusted = iter(holm([test.p for test in tests if test]))
        row_drops = [
            replace(drop, **{field: test._replace(p=next(adjusted))}) if test else drop
            for drop, test in zip(row_drops, tests, strict=True)
        ]
    return row_drops


def format_difference(difference: Difference, with_p: bool = True) -> str:
    """Return "+1.20 [+0.50, +1.90], p = 0.001"."""
    points, low, high = (round(value, 2) + 0.0 for value in difference[:3])  # + 0.0: no "-0.00"
    text = f"{points:+.2f} [{low:+.2f}, {high:+.2f}]"
    return f"{text}, {format_p(difference.p)}" if with_p else text


def format_p(p: float) -> str:
    """Return "p = 0.012", "p = 2e-07"."""
    return f"p = {p:.3f}" if p >= 0.001 else f"p = {p:.1g}"


def sharper_drop(found: Sequence[Drop], rows: Sequence[Row]) -> list[str]:
    """Answer whether the students lose more than the teacher, a sentence a row."""
    sentences = []
    for row in dict.fromkeys(drop.row.label for drop in found):
        tested = [drop for drop in found if drop.row.label == row and drop.versus_teacher is not None]
        if not tested or is_teachers(tested[0].row, rows):
            continue
        claimed = SHARPER_DROP.get(tested[0].row.dataset, ())
        parts = []
        for verdict, what in DROP_VERDICTS.items():
            chosen = [drop for drop in tested if _sign(drop.versus_teacher) == verdict]
            numbers = "; ".join(
                f"{drop.bits} bits{' (sharper drop claimed)' if drop.bits in claimed else ''} {format_difference(test)}"
                for drop in chosen
                if (test := drop.versus_teacher)
            )
            parts += [f"{what} {numbers}"] if chosen else []
        sentences.append(f"{row} {'; '.join(parts)}.")
    return sentences


def _sign(difference: Difference | None) -> int:
    if difference is None or difference.p >= LEVEL:
        return 0
    return 1 if difference.points > 0 else -1


def nearly_float(found: Sequence[Drop]) -> list[str]:
    """Answer from how many bits on a row nearly matches its float accuracy, a sentence a row."""
    sentences = []
    for label in dict.fromkeys(drop.row.label for drop in found):
        own = sorted((drop for drop in found if drop.row.label == label), key=lambda drop: drop.bits)
        smallest = next((drop for drop in own if drop.own.points <= NEAR), None)
        certain = next((drop for drop in own if drop.own.high <= NEAR), None)
        most = own[-1]
        text = f"{label} loses, at {most.bits} bits, {format_difference(most.own, with_p=False)} points"
        if smallest is None:
            text += f"; no bit width is within {NEAR:g} point of float"
        else:
            text += f"; the smallest bit width within {NEAR:g} point of float is {smallest.bits} bits"
            text += f" ({format_difference(smallest.own, with_p=False)})"
            text += f"; {f'{certain.bits} bits' if certain else 'none'} with its whole interval"
        sentences.append(f"{text}.")
    return sentences
