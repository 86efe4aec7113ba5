"""The answer in sentences: which track fits and wins under which budget, what to ship, whether distilling helped."""

from collections.abc import Mapping, Sequence
from itertools import groupby

from kdq_lightning.files import format_bytes
from kdq_lightning.report.advice import Advice
from kdq_lightning.report.duels import Duel, File
from kdq_lightning.report.findings import Findings
from kdq_lightning.report.formatting import format_p, format_summary
from kdq_lightning.report.gains import sentences_on_distilling

TRACK_VERDICTS = {
    "student": "the student wins",
    "teacher": "the teacher wins",
    "both": "each wins somewhere",
    "": "student and teacher are not distinguishable",
    None: "nothing could be compared",
}
"""Which track wins at equal bytes on a data set, as `verdict` returns it, in words."""


def answer(findings: Findings) -> str:
    """Return the answer on a data set: a sentence for each outcome over the budgets, and a paragraph on distilling.

    Args:
        findings: On the data set.
    """
    duels = findings.duels
    if verdict(duels) is None:
        known = f" The file to ship is {_described(findings.advice[-1].file)}." if duels else ""
        text = f"The question stays open: no file of a student and of a teacher can be compared at equal bytes.{known}"
    else:
        groups = [list(group) for _, group in groupby(duels, _outcome)]
        text = " ".join(_range_sentence(group, findings.advice, is_first=group is groups[0]) for group in groups)
    return f"{text}\n\n{sentences_on_distilling(findings)}".strip()


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


def _range_sentence(group: Sequence[Duel], advice: Sequence[Advice], is_first: bool) -> str:
    first, last = group[0], group[-1]
    open_end = last.high == float("inf")
    span = f"from {format_bytes(first.low)} on" if open_end else f"up to {format_bytes(last.high)}"
    if not is_first and not open_end:
        span = f"from {format_bytes(first.low)} to {format_bytes(last.high)}"
    if first.winner is None:
        side = last.student or last.teacher
        assert side is not None
        if first.student and first.teacher:
            return f"{_capital(span)} nothing is tested: the right answers of some records are missing."
        where = f"Under {format_bytes(last.high)}" if is_first and not open_end else _capital(span)
        return f"{where} only the {_track(side)} fits; ship {_files_between(group, advice)}."
    points = sorted(abs(duel.difference.points) for duel in group if duel.difference)
    p_values = [duel.difference.p for duel in group if duel.difference]
    if first.winner:
        side = first.student if first.winner == "student" else first.teacher
        assert side is not None
        by = " to ".join(dict.fromkeys(f"{value:.2f}" for value in (points[0], points[-1])))
        p = f"{format_p(max(p_values))}{' at most' if len(set(p_values)) > 1 else ''}"
        better = f"the {_track(side)} is better at equal bytes, by {by} percentage points"
        return f"{_capital(span)} {better} ({p})."
    p = f"{format_p(min(p_values))}{' at least' if len(set(p_values)) > 1 else ''}"
    return f"{_capital(span)} student and teacher are not distinguishable at equal bytes ({p})."


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _track(file: File) -> str:
    """Return the name of a file's track, with its network."""
    return f"{'teacher' if file.row.is_teachers else 'student'} ({file.row.network})"


def _files_between(group: Sequence[Duel], advice: Sequence[Advice]) -> str:
    """Describe the files to ship in the ranges of a group: two of them, or the last if there are more."""
    new = [a for a in advice if group[0].low <= a.low <= group[-1].low]
    if not new:
        new = [a for a in advice if a.low < group[0].low]
    if len(new) != SHOWN:
        return _described(new[-1].file)
    return f"{_described(new[0].file)}, or from {format_bytes(new[1].low)} on {_described(new[1].file)}"


SHOWN = 2  # files of one track that a sentence names


def _described(file: File) -> str:
    """Return a file's label, bytes and accuracy."""
    return f"{file.label} ({format_bytes(file.cell.packed_bytes)}, {format_summary(file.cell, 'test_top1')} %)"


def over_all(verdicts: Mapping[str, str | None]) -> str:
    """Return the sentence that sums up several data sets, given the verdict on each."""
    parts = [f"on {dataset} {TRACK_VERDICTS[found]}" for dataset, found in verdicts.items()]
    return f"Over the data sets, at equal bytes: {'; '.join(parts)}."
