"""What to ship, as a table, and the one file for a budget or an accuracy that a user names."""

from kdq_lightning.files import format_bytes
from kdq_lightning.report.duels import File, files_of
from kdq_lightning.report.file_choice import choose_file
from kdq_lightning.report.findings import Findings
from kdq_lightning.report.formatting import MISSING, format_difference, format_summary
from kdq_lightning.report.rows import Measurement, whole_rows
from kdq_lightning.report.table_formats import Table, table_of_texts
from kdq_lightning.runs.records import FLOAT_BITS, packed_path


def advice_table(findings: Findings) -> Table:
    """Return the table of what to ship under which budget, `Findings.advice`."""
    lines = []
    for a in findings.advice:
        other, difference = a.other, a.duel.difference
        if difference and a.file is a.duel.teacher:
            difference = difference.reversed
        against = f"{other.label}: {format_summary(other.cell, 'test_top1')}" if other else "none fits"
        points = format_difference(difference) if difference else "not tested" if other else ""
        lines.append([format_bytes(a.low), a.file.label, format_summary(a.file.cell, "test_top1"), against, points])
    header = ["budget from", "ship", "test, %", "the other track's best, test, %", "difference in points"]
    return table_of_texts(header, lines)


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
        return f"Take it elsewhere:\n\n    kdq export {path} --to onnx --out {path.stem}.onnx"
    return f"Its record is in `{m.folder}`; its packed file, `{path.name}`, is not beside it."


def choose_measurement(
    findings: Findings, max_bytes: float | None, min_accuracy: float | None
) -> tuple[File, Measurement] | None:
    """Return the one file to ship, of one seed; None if no file meets the limits.

    Within a budget it is that of `Findings.advice`, of the seed with the best validation accuracy. With a least
    accuracy it is the smallest file that has it on validation.

    Args:
        findings: On a data set.
        max_bytes: See `choose_file`.
        min_accuracy: See `choose_file`.
    """
    files = files_of(whole_rows(findings.rows))
    if min_accuracy is None and max_bytes is not None:
        within = [a for a in findings.advice if a.needs <= max_bytes]
        files = [within[-1].file] if within else files
    known = [(file, m) for file in files for m in file.cell.measurements if m.record.val_top1 is not None]
    sizes = [m.record.packed_bytes for _, m in known]
    best = choose_file(sizes, [m.record.val_top1 or 0.0 for _, m in known], max_bytes, min_accuracy)
    return None if best is None else known[best]
