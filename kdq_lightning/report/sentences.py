"""The answer in words."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kdq_lightning.report.answer import Duel, choose_measurement, merge_ranges
from kdq_lightning.report.claims import format_difference, format_p
from kdq_lightning.report.figures import format_bytes
from kdq_lightning.report.rows import Row
from kdq_lightning.report.tables import MISSING, format_cell

TRACK_VERDICTS = {
    "student": "the student wins",
    "teacher": "the teacher wins",
    "both": "each wins somewhere",
    "": "student and teacher are not distinguishable",
    None: "nothing could be compared",
}


class ReportOptions(NamedTuple):
    """What the user asks for beside the report: a budget in bytes, an accuracy in percent, the published values."""

    max_bytes: float | None = None
    min_accuracy: float | None = None
    published: bool = False


def answer(duels: Sequence[Duel]) -> str:
    """Return who wins at equal bytes, by range of budgets, in sentences."""
    fought = [duel for duel in duels if duel.winner is not None]
    if not fought:
        return "the question stays open, no file of a student and of a teacher can be compared at equal bytes."
    parts = [_range_sentence(group) for group in merge_ranges(duels, _outcome)]
    return f"at equal bytes {TRACK_VERDICTS[verdict(duels)]}. " + " ".join(parts)


def verdict(duels: Sequence[Duel]) -> str | None:
    """Return "student", "teacher", "both", "" for not distinguishable, or None if nothing was tested."""
    winners = {duel.winner for duel in duels} - {None}
    if not winners:
        return None
    winners.discard("")
    return "both" if len(winners) > 1 else "".join(str(winner) for winner in winners)


def _outcome(duel: Duel) -> object:
    alone = duel.student is None, duel.teacher is None
    return duel.winner, alone


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
    chances = [duel.p for duel in group if duel.p is not None]
    if first.winner:
        at_most = " at most" if len(set(chances)) > 1 else ""
        return f"{span} the {first.winner} is better, {format_p(max(chances))}{at_most}: {_ends(group)}."
    at_least = " at least" if len(set(chances)) > 1 else ""
    return f"{span} not distinguishable, {format_p(min(chances))}{at_least}: {_ends(group)}."


def _ends(group: Sequence[Duel]) -> str:
    """Return what meets at the smallest and at the largest budget of a range."""
    return " … ".join(dict.fromkeys(_describe(duel) for duel in (group[0], group[-1])))


def _describe(duel: Duel) -> str:
    files = [file for file in (duel.student, duel.teacher) if file]
    text = " against ".join(f"{file.label} ({format_cell(file.cell, 'test_top1')} %)" for file in files)
    if duel.difference is None:
        return text
    return f"{text}, student minus teacher {format_difference(duel.difference, with_p=False)} points"


def shipped(rows: Sequence[Row], options: ReportOptions) -> list[str]:
    """Return the sentence on the file to ship, if there is a wish."""
    if options.max_bytes is None and options.min_accuracy is None:
        return []
    asked = [f"at most {format_bytes(options.max_bytes)}"] if options.max_bytes is not None else []
    asked += [f"at least {options.min_accuracy:g} % on validation"] if options.min_accuracy is not None else []
    chosen = choose_measurement(rows, options.max_bytes, options.min_accuracy)
    if chosen is None:
        return [f" No file has {' and '.join(asked)}."]
    file, m = chosen
    test = MISSING if m.record.test_top1 is None else f"{m.record.test_top1:.2f} %"
    return [
        f" With {' and '.join(asked)}, ship {file.label}, seed {m.record.seed}, of `{m.folder}`:"
        f" {m.record.packed_bytes:,} bytes, {m.record.val_top1:.2f} % on validation, {test} on the test images."
    ]


def over_all(verdicts: Mapping[str, str | None]) -> str:
    """Return the one sentence over several data sets."""
    parts = [f"on {dataset} {TRACK_VERDICTS[found]}" for dataset, found in verdicts.items()]
    return f"Over the data sets, at equal bytes: {'; '.join(parts)}."
