"""A table of texts, and how it is written as Markdown, LaTeX and CSV."""

import csv
import io
from collections.abc import Sequence
from typing import NamedTuple


class Entry(NamedTuple):
    """One text of a table, and whether it is set in bold."""

    text: str
    bold: bool = False


class Table(NamedTuple):
    """A table; each row has as many entries as the header."""

    header: list[str]
    rows: list[list[Entry]]


def table_of_texts(header: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """Return a table of plain texts; None is an empty text."""
    return Table(list(header), [[Entry("" if value is None else str(value)) for value in row] for row in rows])


def to_markdown(table: Table) -> str:
    """Return the table in Markdown: columns with numbers to the right, others and the first to the left.

    A bar within a text is escaped, because it would end the cell.
    """

    def line(texts: Sequence[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"

    rows = [line([f"**{text}**" if bold else text for text, bold in row]) for row in table.rows]
    columns = [[row[column].text for row in table.rows] for column in range(1, len(table.header))]
    numbers = [any(text[:1] in set("+-0123456789") for text in column) for column in columns]
    rule = "|" + "|".join([" --- ", *(" ---: " if is_number else " --- " for is_number in numbers)]) + "|"
    return "\n".join([line(table.header), rule, *rows])


_TEX = {**{c: f"\\{c}" for c in "&%$#_{}"}, "±": "$\\pm$", "\\": "\\textbackslash{}", "~": "\\textasciitilde{}"}


def to_latex(table: Table, caption: str) -> str:
    """Return the table in LaTeX, which needs the package booktabs."""

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
    """Return the table as CSV, without bold."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.header)
    writer.writerows([entry.text for entry in row] for row in table.rows)
    return text.getvalue()
