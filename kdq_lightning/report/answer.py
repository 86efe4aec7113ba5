"""The answer in sentences: who wins at equal bytes, and which file to ship."""

from collections.abc import Mapping, Sequence
from itertools import groupby

from kdq_lightning.files import format_bytes
from kdq_lightning.report.duels import Duel, File, files_of
from kdq_lightning.report.file_choice import choose_file
from kdq_lightning.report.formatting import MISSING, format_difference, format_p, format_summary
from kdq_lightning.report.rows import Measurement, Row, whole_rows

TRACK_VERDICTS = {
    "student": "the student wins",
    "teacher": "the teacher wins",
    "both": "each wins somewhere",
    "": "student and teacher are not distinguishable",
    None: "nothing could be compared",
}
"""Which track wins at equal bytes on a data set, as `verdict` returns it, in words."""


def answer(duels: Sequence[Duel]) -> str:
    """Return who wins at equal bytes, in a sentence for each range of budgets with the same outcome."""
    if verdict(duels) is None:
        return "the question stays open, no file of a student and of a teacher can be compared at equal bytes."
    parts = [_range_sentence(list(group)) for _, group in groupby(duels, _outcome)]
    return f"at equal bytes {TRACK_VERDICTS[verdict(duels)]}. " + " ".join(parts)


def verdict(duels: Sequence[Duel]) -> str | None:
    """Return which track wins, a key of `TRACK_VERDICTS`."""
    winners = {duel.winner for duel in duels} - {None}
    if not winners:
        return None
    winners.discard("")
    return "both" if len(winners) > 1 else "".join(str(winner) for winner in winners)


def _outcome(duel: Duel) -> tuple[str | None, bool, bool]:
    """Return what the ranges of one sentence have in common."""
    return duel.winner, duel.student is None, duel.teacher is None


def _range_sentence(group: Sequence[Duel]) -> str:
    first, last = group[0], group[-1]
    end = "on" if last.high == float("inf") else f"to {format_bytes(last.high)}"
    span = f"From {format_bytes(first.low)} {end}"
    if first.winner is None:
        side = first.student or first.teacher
        alone = first.student is None or first.teacher is None
        if side is None or not alone:
            return f"{span}: not tested, the right answers are missing."
        return f"{span} only the {'student' if first.student else 'teacher'} fits: {_ends(group)}."
    p_values = [duel.difference.p for duel in group if duel.difference]
    if first.winner:
        at_most = " at most" if len(set(p_values)) > 1 else ""
        return f"{span} the {first.winner} is better, {format_p(max(p_values))}{at_most}: {_ends(group)}."
    at_least = " at least" if len(set(p_values)) > 1 else ""
    return f"{span} not distinguishable, {format_p(min(p_values))}{at_least}: {_ends(group)}."


def _ends(group: Sequence[Duel]) -> str:
    """Return the two files at the smallest budget of a range, and those at the largest if they are others."""
    return " … ".join(dict.fromkeys(_describe(duel) for duel in (group[0], group[-1])))


def _describe(duel: Duel) -> str:
    files = [file for file in (duel.student, duel.teacher) if file]
    text = " against ".join(f"{file.label} ({format_summary(file.cell, 'test_top1')} %)" for file in files)
    if duel.difference is None:
        return text
    return f"{text}, student minus teacher {format_difference(duel.difference, with_p=False)} points"


def sentence_on_shipping(rows: Sequence[Row], max_bytes: float | None, min_accuracy: float | None) -> str:
    """Return the sentence on the file to ship, with a blank before it; nothing if the user asks for no such file.

    Args:
        rows: Of one data set.
        max_bytes: Most bytes that the file may have.
        min_accuracy: Least validation accuracy that the file must have, in percent.
    """
    if max_bytes is None and min_accuracy is None:
        return ""
    asked = [f"at most {format_bytes(max_bytes)}"] if max_bytes is not None else []
    asked += [f"at least {min_accuracy:g} % on validation"] if min_accuracy is not None else []
    chosen = choose_measurement(rows, max_bytes, min_accuracy)
    if chosen is None:
        return f" No file has {' and '.join(asked)}."
    file, m = chosen
    test = MISSING if m.record.test_top1 is None else f"{m.record.test_top1:.2f} %"
    return (
        f" With {' and '.join(asked)}, ship {file.label}, seed {m.record.seed}, of `{m.folder}`:"
        f" {m.record.packed_bytes:,} bytes, {m.record.val_top1:.2f} % on validation, {test} on the test images."
    )


def choose_measurement(
    rows: Sequence[Row], max_bytes: float | None, min_accuracy: float | None
) -> tuple[File, Measurement] | None:
    """Return the one file to ship, of one seed, chosen on validation; None if no file meets the limits.

    Args:
        rows: Of one data set.
        max_bytes: See `choose_file`.
        min_accuracy: See `choose_file`.
    """
    files = files_of(whole_rows(rows))
    known = [(file, m) for file in files for m in file.cell.measurements if m.record.val_top1 is not None]
    sizes = [m.record.packed_bytes for _, m in known]
    best = choose_file(sizes, [m.record.val_top1 or 0.0 for _, m in known], max_bytes, min_accuracy)
    return None if best is None else known[best]


def over_all(verdicts: Mapping[str, str | None]) -> str:
    """Return the sentence that sums up several data sets, given the verdict on each."""
    parts = [f"on {dataset} {TRACK_VERDICTS[found]}" for dataset, found in verdicts.items()]
    return f"Over the data sets, at equal bytes: {'; '.join(parts)}."
