"""The tables of the report: most have a row for each strategy and a column for each bit width."""

from collections.abc import Mapping, Sequence

from kdq_lightning.quantization.methods import DEFAULT_METHOD, MIXED_METHOD
from kdq_lightning.report.duels import Duel, File, files_of
from kdq_lightning.report.findings import Drop
from kdq_lightning.report.formatting import MISSING, format_difference, format_p, format_summary
from kdq_lightning.report.published import BITS, published_drop, published_top1
from kdq_lightning.report.rows import Row, size_label
from kdq_lightning.report.significance import Difference
from kdq_lightning.report.table_formats import Entry, Table, table_of_texts
from kdq_lightning.runs.records import FLOAT_BITS, MEASURES


def bit_widths(rows: Sequence[Row]) -> list[int]:
    """Return the columns of a table, in ascending order: the bit widths of the rows.

    With rows of the default method, the published bit widths are columns, too.
    """
    published = BITS if any(row.method == DEFAULT_METHOD for row in rows) else ()
    return sorted({*published, *(bits for row in rows for bits in row.cells)})


def heading(bits: int, levels: Sequence[int] = (), method: str = DEFAULT_METHOD) -> str:
    """Return the title of a column, such as "2 bits, 4 levels".

    Args:
        bits: Bit width; of mixed bits the budget in bytes.
        levels: The different numbers of levels in the column; they are named only if there is exactly one.
        method: Of the rows.
    """
    if bits == FLOAT_BITS:
        return "float (32 bits)"
    title = size_label(method, bits)
    return f"{title}, {levels[0]} levels" if len(levels) == 1 and method != MIXED_METHOD else title


def measure_table(rows: Sequence[Row], measure: str, published: bool = False) -> Table:
    """Return the table of a number of the records: mean ± deviation over seeds, the best of each column in bold.

    Args:
        rows: Of one data set.
        measure: Name in `MEASURES`.
        published: Add the published accuracy, and the difference from it, in brackets.
    """
    widths = bit_widths(rows)
    levels = {bits: sorted({row.cells[bits].levels or 0 for row in rows if bits in row.cells} - {0}) for bits in widths}
    columns = [_column(rows, bits, measure, published, len(levels[bits]) > 1) for bits in widths]
    lines = [[Entry(row.label), *entries] for row, *entries in zip(rows, *columns, strict=True)]
    return Table(["", *(heading(bits, levels[bits], rows[0].method) for bits in widths)], lines)


def _column(rows: Sequence[Row], bits: int, measure: str, published: bool, name_levels: bool) -> list[Entry]:
    """Return the entries of a bit width; `name_levels` adds the number of levels to each, because the rows differ."""
    decimals, best = MEASURES[measure].decimals, MEASURES[measure].best
    cells = [row.cells.get(bits) for row in rows]
    means = [cell.summaries[measure].mean if cell and measure in cell.summaries else None for cell in cells]
    # Rounded first: what looks equal is equally good. A column of equal numbers has no best.
    rounded = [None if mean is None else round(mean, decimals) for mean in means]
    known = [value for value in rounded if value is not None]
    top = best(known) if best and len(set(known)) > 1 else None
    entries = []
    for row, cell, mean, value in zip(rows, cells, means, rounded, strict=True):
        text = format_summary(cell, measure, decimals) if cell else MISSING
        if cell and name_levels and cell.levels:
            text += f", {cell.levels} levels"
        if published and (known_top1 := published_top1(row.dataset, row.strategy, bits)) is not None:
            text += f" ({known_top1:.2f})" if mean is None else f" ({known_top1:.2f}, {mean - known_top1:+.2f})"
        entries.append(Entry(text, bold=value is not None and value == top))
    return entries


def bytes_table(rows: Sequence[Row]) -> Table:
    """Return the table of the files' sizes in bytes."""
    widths = bit_widths(rows)
    lines = [
        [row.label, *(f"{row.cells[bits].packed_bytes:,}" if bits in row.cells else MISSING for bits in widths)]
        for row in rows
    ]
    return table_of_texts(["", *(heading(bits, (), rows[0].method) for bits in widths)], lines)


def duel_table(duels: Sequence[Duel]) -> Table:
    """Return the table of the comparisons at equal bytes, in order of the budget."""
    header = ["budget, bytes", "student's best", "bytes", "test", "teacher's best", "bytes", "test"]
    header += ["student minus teacher", "p", "McNemar", "better"]
    lines = []
    for duel in sorted(duels, key=lambda duel: duel.low):
        texts = [f"{duel.low:,.0f}", *_describe(duel.student), *_describe(duel.teacher)]
        if duel.difference is None or duel.mcnemar is None:
            texts += [MISSING] * 3 + ["" if duel.student and duel.teacher else "the only one that fits"]
        else:
            texts += [format_difference(duel.difference, with_p=False), format_p(duel.difference.p)]
            texts += [format_p(duel.mcnemar.mid_p), duel.winner or "not distinguishable"]
        lines.append(texts)
    return table_of_texts(header, lines)


def _describe(file: File | None) -> list[str]:
    """Return label, bytes and test accuracy of a file."""
    if file is None:
        return ["none fits", "", ""]
    return [file.label, f"{file.size:,}", format_summary(file.cell, "test_top1")]


def gain_table(gains: Mapping[Row, Mapping[int, Difference]], rows: Sequence[Row]) -> Table:
    """Return the table of the gains of some rows; `gains` is `Findings.gains`."""
    widths = bit_widths(rows)
    lines = [
        [row.label, *(format_difference(tests[bits]) if bits in tests else MISSING for bits in widths)]
        for row in rows
        if (tests := gains.get(row)) is not None
    ]
    return table_of_texts(["", *(heading(bits, (), rows[0].method) for bits in widths)], lines)


def drop_table(drops: Sequence[Drop]) -> Table:
    """Return the table of `Findings.drops`, a row for each network and bit width."""
    header = ["", "bits", "loss from float", "published", "minus the control's", "minus the teacher's"]
    lines = []
    for drop in drops:
        strategy = drop.row.strategy
        versus = [
            format_difference(test) if test else "" if strategy == reference else MISSING
            for reference, test in (("control", drop.versus_control), ("teacher", drop.versus_teacher))
        ]
        known = published_drop(drop.row.dataset, strategy, drop.bits)
        size = size_label(drop.row.method, drop.bits) if drop.row.method == MIXED_METHOD else drop.bits
        published = "" if known is None else f"{known:.2f}"
        lines.append([drop.row.label, size, format_difference(drop.own, with_p=False), published, *versus])
    return table_of_texts(header, lines)


def cell_table(rows: Sequence[Row]) -> Table:
    """Return every number of every cell, a row for each cell, to start a plot or a spreadsheet of one's own from.

    The column `method` exists if there are several methods; it is empty for the float network, which stands once.
    """
    has_methods = any(row.method != DEFAULT_METHOD for row in rows)
    header = ["dataset", "row", "strategy", "network", *(["method"] if has_methods else [])]
    header += ["bits", "levels", "packed_bytes", "seeds"]
    header += [name for measure in MEASURES for name in (measure, f"{measure}_deviation")]
    lines = []
    for file in files_of(rows):
        row, bits, cell = file.row, file.bits, file.cell
        method = "" if bits == FLOAT_BITS else row.method
        numbers = [value for measure in MEASURES for value in cell.summaries.get(measure, (None, None))]
        lines.append(
            [
                *(row.dataset, row.label, row.strategy, row.network, *([method] if has_methods else [])),
                *(cell.measurements[0].record.bits, cell.levels, cell.packed_bytes, len(cell.seeds)),
                *("" if value is None else f"{value:.6g}" for value in numbers),
                published_top1(row.dataset, row.strategy, bits),
            ]
        )
    return table_of_texts([*header, "published"], lines)
