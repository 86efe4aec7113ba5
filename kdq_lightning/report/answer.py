"""The answer in sentences: which track fits and wins under which budget, whether distilling helped, what to ship."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from kdq_lightning.files import format_bytes
from kdq_lightning.quantization.methods import MIXED_METHOD
from kdq_lightning.report.duels import Duel, File, files_of
from kdq_lightning.report.file_choice import choose_file
from kdq_lightning.report.findings import Findings
from kdq_lightning.report.formatting import MISSING, format_difference, format_p, format_summary
from kdq_lightning.report.rows import Measurement, trained_label, whole_rows
from kdq_lightning.report.significance import LEVEL
from kdq_lightning.report.table_formats import Table, table_of_texts
from kdq_lightning.runs.records import FLOAT_BITS, packed_path

TRACK_VERDICTS = {
    "student": "the student wins",
    "teacher": "the teacher wins",
    "both": "each wins somewhere",
    "": "student and teacher are not distinguishable",
    None: "nothing could be compared",
}
"""Which track wins at equal bytes on a data set, as `verdict` returns it, in words."""


class Advice(NamedTuple):
    """What to ship in a range of budgets.

    Attributes:
        low: Smallest budget of the range, in bytes.
        file: The file to ship: the winner of the test at equal bytes, or the smaller file where no winner is known.
        needs: Bytes that a budget must have for it: those of the larger file of the first comparison.
        duel: The comparison at the range's largest budget.
    """

    low: float
    file: File
    needs: int
    duel: Duel

    @property
    def other(self) -> File | None:
        """The other track's best file of no more bytes than the budget, None if none fits."""
        return self.duel.teacher if self.file is self.duel.student else self.duel.student


def advise(duels: Sequence[Duel]) -> list[Advice]:
    """Return what to ship, a range of budgets after the other; neighbours with the same file and outcome are one.

    Args:
        duels: `Findings.duels`.
    """
    advice: list[Advice] = []
    for duel in duels:
        files = [file for file in (duel.student, duel.teacher) if file]
        winner = {"student": duel.student, "teacher": duel.teacher}.get(duel.winner or "")
        file = winner or min(files, key=lambda file: (file.size, -file.validation_top1))
        last = advice[-1] if advice else None
        same = last and (last.file, last.duel.winner) == (file, duel.winner)
        if last and same:
            advice[-1] = last._replace(duel=duel)
        else:
            advice.append(Advice(duel.low, file, max(file.cell.packed_bytes for file in files), duel))
    return advice


def advice_table(duels: Sequence[Duel]) -> Table:
    """Return the table of what to ship under which budget; see `advise`."""
    header = ["budget from", "ship", "test, %", "the other track's best", "test, %", "difference in points"]
    lines = []
    for advice in advise(duels):
        other, difference = advice.other, advice.duel.difference
        if difference and advice.file is advice.duel.teacher:
            difference = difference.reversed
        texts = [format_bytes(advice.low), *_label_and_accuracy(advice.file)]
        texts += [*_label_and_accuracy(other)] if other else ["none fits", ""]
        texts.append(format_difference(difference) if difference else "not tested" if other else "")
        lines.append(texts)
    return table_of_texts(header, lines)


def _label_and_accuracy(file: File) -> tuple[str, str]:
    return file.label, format_summary(file.cell, "test_top1")


def answer(findings: Findings) -> str:
    """Return the answer on a data set: a sentence for each outcome over the budgets, and one on distillation.

    Args:
        findings: On the data set.
    """
    duels = findings.duels
    if verdict(duels) is None:
        best = duels[-1].student or duels[-1].teacher if duels else None
        known = f" The best file is {_best(best)}." if best else ""
        text = f"The question stays open: no file of a student and of a teacher can be compared at equal bytes.{known}"
    else:
        groups = [list(group) for _, group in groupby(duels, _outcome)]
        text = " ".join(_range_sentence(group, is_first=group is groups[0]) for group in groups)
    return f"{text} {sentence_on_distilling(findings)}".strip()


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


def _range_sentence(group: Sequence[Duel], is_first: bool) -> str:
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
        return f"{where} only the {_track(side)} fits; its best file there is {_best(side)}."
    points = sorted(abs(duel.difference.points) for duel in group if duel.difference)
    p_values = [duel.difference.p for duel in group if duel.difference]
    if first.winner:
        side = first.student if first.winner == "student" else first.teacher
        assert side is not None
        by = " to ".join(dict.fromkeys(f"{value:.2f}" for value in (points[0], points[-1])))
        p = f"{format_p(max(p_values))}{' at most' if len(set(p_values)) > 1 else ''}"
        return f"{_capital(span)} the {_track(side)} is better at equal bytes, by {by} points ({p})."
    p = f"{format_p(min(p_values))}{' at least' if len(set(p_values)) > 1 else ''}"
    return f"{_capital(span)} student and teacher are not distinguishable at equal bytes ({p})."


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _track(file: File) -> str:
    """Return the name of a file's track, with its network."""
    return f"{'teacher' if file.row.is_teachers else 'student'} ({file.row.network})"


def _best(file: File) -> str:
    """Return a file's label, bytes and accuracy."""
    return f"{file.label}: {format_bytes(file.cell.packed_bytes)}, {format_summary(file.cell, 'test_top1')} %"


def sentence_on_distilling(findings: Findings) -> str:
    """Say whether distilling helped: the best distilled file, chosen on validation, against the control's like it.

    Returns:
        The sentence; nothing if no distilled network can be compared with a control.
    """
    able = [
        (row.cells[bits].validation_top1 or 0.0, bits, row, test)
        for row, tests in findings.gains.items()
        for bits, test in tests.items()
        if bits != FLOAT_BITS and row.method != MIXED_METHOD and not row.is_teachers
    ]
    if not able:
        return ""
    _, bits, row, test = max(able, key=lambda choice: choice[:2])
    controls = [
        other
        for other in findings.rows
        if (other.strategy, other.network, other.method) == ("control", row.network, row.method) and bits in other.cells
    ]
    seeds = ", one seed" if test.runs == 1 else ""
    numbers = (
        f"{row.label} has {format_summary(row.cells[bits], 'test_top1')} % at {bits} bits, the control"
        f" {format_summary(controls[0].cells[bits], 'test_top1')} % ({format_p(test.p)}{seeds})"
    )
    if test.p >= LEVEL:
        better = dict.fromkeys(trained_label(row) for _, _, row, test in able if test.p < LEVEL and test.points > 0)
        others = f" It helped elsewhere, at some bit widths: {', '.join(better)}." if better else ""
        return f"Whether distilling helped can't be told of the file that validation chooses: {numbers}.{others}"
    return f"Distilling {'helped' if test.points > 0 else 'did not help'}: {numbers}."


def sentence_on_shipping(findings: Findings, max_bytes: float | None, min_accuracy: float | None) -> str:
    """Return the sentence on the file to ship; nothing if the user asks for no such file.

    Args:
        findings: On a data set.
        max_bytes: Most bytes that the file may have.
        min_accuracy: Least validation accuracy that the file must have, in percent.
    """
    if max_bytes is None and min_accuracy is None:
        return ""
    asked = [f"at most {format_bytes(max_bytes)}"] if max_bytes is not None else []
    asked += [f"at least {min_accuracy:g} % on validation"] if min_accuracy is not None else []
    chosen = choose_measurement(findings, max_bytes, min_accuracy)
    if chosen is None:
        return f"No file has {' and '.join(asked)}."
    file, m = chosen
    test = MISSING if m.record.test_top1 is None else f"{m.record.test_top1:.2f} %"
    return (
        f"With {' and '.join(asked)}, ship {file.label}, seed {m.record.seed}: {m.record.packed_bytes:,} bytes,"
        f" {m.record.val_top1:.2f} % on validation, {test} on the test images. {_where(m)}"
    )


def _where(m: Measurement) -> str:
    """Say where the file of a record is, and how it is exported."""
    if m.record.bits == FLOAT_BITS:
        return f"It is the float network of `{m.folder}`."
    path = packed_path(m.folder, m.record)
    if path.is_file():
        return f"Take it elsewhere: `kdq export {path} --to onnx --out {path.stem}.onnx`"
    return f"Its record is in `{m.folder}`; its packed file, `{path.name}`, is not beside it."


def choose_measurement(
    findings: Findings, max_bytes: float | None, min_accuracy: float | None
) -> tuple[File, Measurement] | None:
    """Return the one file to ship, of one seed; None if no file meets the limits.

    Within a budget it is the file of `advise`, of the seed with the best validation accuracy. With a least accuracy it
    is the smallest file that has it on validation.

    Args:
        findings: On a data set.
        max_bytes: See `choose_file`.
        min_accuracy: See `choose_file`.
    """
    files = files_of(whole_rows(findings.rows))
    if min_accuracy is None and max_bytes is not None:
        within = [advice for advice in advise(findings.duels) if advice.needs <= max_bytes]
        files = [within[-1].file] if within else files
    known = [(file, m) for file in files for m in file.cell.measurements if m.record.val_top1 is not None]
    sizes = [m.record.packed_bytes for _, m in known]
    best = choose_file(sizes, [m.record.val_top1 or 0.0 for _, m in known], max_bytes, min_accuracy)
    return None if best is None else known[best]


def over_all(verdicts: Mapping[str, str | None]) -> str:
    """Return the sentence that sums up several data sets, given the verdict on each."""
    parts = [f"on {dataset} {TRACK_VERDICTS[found]}" for dataset, found in verdicts.items()]
    return f"Over the data sets, at equal bytes: {'; '.join(parts)}."
