"""The report's tables in the published form, a row a strategy and a column a bit width, as Markdown, LaTeX and CSV."""

import csv
import io
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kdq_lightning.report.published import BITS, published_top1
from kdq_lightning.report.rows import Cell, Row
from kdq_lightning.runs.records import FLOAT_BITS

MISSING = "missing"


class Entry(NamedTuple):
    """A table's cell."""

    text: str
    bold: bool = False


class Table(NamedTuple):
    """A table; every row is as long as the header."""

    header: list[str]
    rows: list[list[Entry]]


def bit_widths(rows: Sequence[Row]) -> list[int]:
    """Return the columns: the published bit widths and whatever else there is."""
    return sorted({*BITS, *(bits for row in rows for bits in row.cells)})


def table_of_bytes(rows: Sequence[Row]) -> Table:
    """Return the sizes of the files."""
    widths = bit_widths(rows)
    texts = [[f"{row.cells[bits].packed_bytes:,}" if bits in row.cells else MISSING for bits in widths] for row in rows]
    header = ["", *(heading(bits, []) for bits in widths)]
    return Table(header, [[Entry(row.label), *map(Entry, line)] for row, line in zip(rows, texts, strict=True)])


def table_by_bits(
    rows: Sequence[Row],
    field: str,
    decimals: int = 2,
    best: Callable[[list[float]], float] | None = None,
    published: bool = False,
) -> Table:
    """Return a table of a number of the records: mean ± deviation over seeds. The only row has no best.

    Args:
        rows: Of one data set.
        field: Of `Record`.
        decimals: Shown.
        best: Picks the best of a column's means, which is set in bold; None for no bold.
        published: Add the published accuracy and the difference from it, in brackets.
    """
    widths = bit_widths(rows)
    levels = {bits: sorted({row.cells[bits].levels or 0 for row in rows if bits in row.cells} - {0}) for bits in widths}
    header = ["", *(heading(bits, levels[bits]) for bits in widths)]
    columns = [_column(rows, bits, field, decimals, best, published, len(levels[bits]) > 1) for bits in widths]
    return Table(header, [[Entry(row.label), *entries] for row, *entries in zip(rows, *columns, strict=True)])


def heading(bits: int, levels: list[int]) -> str:
    """Return a column's title; levels are named where there is one number of them."""
    if bits == FLOAT_BITS:
        return "float (32 bits)"
    plural = "s" if bits > 1 else ""
    return f"{bits} bit{plural}, {levels[0]} levels" if len(levels) == 1 else f"{bits} bit{plural}"


def _column(
    rows: Sequence[Row],
    bits: int,
    field: str,
    decimals: int,
    best: Callable[[list[float]], float] | None,
    published: bool,
    name_levels: bool,
) -> list[Entry]:
    """Return the entries of a bit width; levels are named in each where the rows differ in them."""
    cells = [row.cells.get(bits) for row in rows]
    means = [None if cell is None else cell.mean(field) for cell in cells]
    # Rounded first: what looks equal is equally good.
    known = [round(mean, decimals) for mean in means if mean is not None]
    top = best(known) if best and len(set(known)) > 1 else None
    entries = []
    for row, cell, mean in zip(rows, cells, means, strict=True):
        text = MISSING if cell is None else format_cell(cell, field, decimals)
        if cell is not None and name_levels and cell.levels:
            text += f", {cell.levels} levels"
        if published and (value := published_top1(row.dataset, row.strategy, bits)) is not None:
            text += f" ({value:.2f})" if mean is None else f" ({value:.2f}, {mean - value:+.2f})"
        entries.append(Entry(text, bold=mean is not None and round(mean, decimals) == top))
    return entries


def format_cell(cell: Cell, field: str, decimals: int = 2) -> str:
    """Return "mean ± deviation" over seeds; one seed has no deviation."""
    found = cell.mean_and_deviation(field)
    if found is None:
        return MISSING
    mean, deviation = found
    return f"{mean:,.{decimals}f}" + ("" if deviation is None else f" ± {deviation:,.{decimals}f}")


def to_markdown(table: Table) -> str:
    """Return a Markdown table; a bar in a text doesn't end its cell."""

    def line(texts: Sequence[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"

    rows = [line([f"**{text}**" if bold else text for text, bold in row]) for row in table.rows]
    rule = "|" + "|".join([" --- ", *(" ---: " for _ in table.header[1:])]) + "|"
    return "\n".join([line(table.header), rule, *rows])


_TEX = {**{c: f"\\{c}" for c in "&%$#_{}"}, "±": "$\\pm$", "\\": "\\textbackslash{}", "~": "\\textasciitilde{}"}


def to_latex(table: Table, caption: str) -> str:
    """Return a LaTeX table, which needs the package booktabs."""

    def escape(text: str) -> str:
        return "".join(_TEX.get(character, character) for character in text)

    def line(texts: Sequence[str]) -> str:
        return " & ".join(texts) + r" \\"

    rows = [line([rf"\textbf{{{escape(text)}}}" if bold else escape(text) for text, bold in row]) for row in table.rows]
    return "\n".join(
        [
            r"\begin{table}",
            rf"\caption{{{escape(caption)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}",
            r"\toprule",
            line([escape(text) for text in table.header]),
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def to_csv(table: Table) -> str:
    """Return the table as it is printed, without bold."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.header)
    writer.writerows([entry.text for entry in row] for row in table.rows)
    return text.getvalue()


FIELDS = (
    *("test_top1", "test_top5", "val_top1", "val_top5", "agreement_float", "agreement_teacher"),
    *("flips", "nll", "ece", "relative_error"),
)


def cells_csv(rows: Sequence[Row]) -> str:
    """Return every number of every cell in the long form: what a plot or a spreadsheet of one's own starts from."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    numbers = [name for field in FIELDS for name in (field, f"{field}_deviation")]
    writer.writerow(
        ["dataset", "row", "strategy", "network", "bits", "levels", "packed_bytes", "seeds", *numbers, "published"]
    )
    for row in rows:
        for bits, cell in row.cells.items():
            found = [cell.mean_and_deviation(field) or (None, None) for field in FIELDS]
            values = ["" if value is None else f"{value:.6g}" for pair in found for value in pair]
            known = published_top1(row.dataset, row.strategy, bits)
            seeds = len({m.record.seed for m in cell.measurements})
            head = [row.dataset, row.label, row.strategy, row.network, bits, cell.levels, cell.packed_bytes, seeds]
            writer.writerow([*head, *values, known])
    return text.getvalue()
