"""The report's files: report.md, section after section, and the tables and figures beside it."""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from kdq_lightning.quantization.methods import DEFAULT_METHOD
from kdq_lightning.report.answer import advice_table, answer, over_all, sentence_on_shipping, verdict
from kdq_lightning.report.claims import gains_in_words, section_on_claims
from kdq_lightning.report.figures import draw_figures, render
from kdq_lightning.report.file_choice import SAME_SIZE
from kdq_lightning.report.findings import DROP_RESAMPLES, Findings
from kdq_lightning.report.rows import Row, by_method
from kdq_lightning.report.significance import RESAMPLES
from kdq_lightning.report.table_formats import Table, to_csv, to_latex, to_markdown
from kdq_lightning.report.tables import bytes_table, cell_table, drop_table, duel_table, gain_table, measure_table
from kdq_lightning.runs.records import MEASURES
from kdq_lightning.strategies import APPEARANCES


class ReportOptions(NamedTuple):
    """What the user asks for.

    Attributes:
        max_bytes: Most bytes of the file to ship; None for no limit.
        min_accuracy: Least validation accuracy of the file to ship, in percent; None for no limit.
        published: Whether the published accuracies stand beside the measured ones.
    """

    max_bytes: float | None = None
    min_accuracy: float | None = None
    published: bool = False


class Report(NamedTuple):
    """What is printed, and what is written.

    Attributes:
        answer: The answer in sentences.
        advice: What to ship under which budget, by data set.
        files: The content of every file of the report, by the file's name.
    """

    answer: str
    advice: dict[str, Table]
    files: dict[str, bytes]


def compose(findings: Sequence[Findings], notes: Sequence[str], options: ReportOptions) -> Report:
    """Return the report over all data sets.

    Args:
        findings: What was found, one for each data set.
        notes: Sentences on what a reader should know of the records.
        options: What the user asks for.
    """
    answers = []
    for f in findings:
        shipping = sentence_on_shipping(f, options.max_bytes, options.min_accuracy)
        answers.append(f"**{f.dataset}**: {answer(f)}" + (f"\n\n{shipping}" if shipping else ""))
    sections = [INTRODUCTION, "## The answer"]
    advice = {f.dataset: advice_table(f.duels) for f in findings if f.duels}
    for f, text in zip(findings, answers, strict=True):
        sections += [text, *([to_markdown(advice[f.dataset]), SHIPPING] if f.dataset in advice else [])]
    if len(findings) > 1:
        answers.append(over_all({f.dataset: verdict(f.duels) for f in findings}))
        sections.append(answers[-1])
    files: dict[str, bytes] = {}
    for f in findings:
        figures = draw_figures(f)
        files |= {f"{name}_{f.dataset}.{kind}": render(figures[name], kind) for name in figures for kind in KINDS}
        files |= {name: to_csv(table).encode() for name, table in tables_of(f, options.published).items()}
        files |= _latex_tables(f, options.published)
        sections += _section(f, figures, options.published)
    sections += ["## What this stands on", "\n".join(f"- {note}" for note in [*notes, *SHORT_METHOD])]
    details = [DETAILS, *map(section_on_claims, findings), "## How it is computed"]
    details.append("\n".join(f"- {note}" for note in METHOD))
    files["details.md"] = ("\n\n".join(details) + "\n").encode()
    files["report.md"] = ("\n\n".join(sections) + "\n").encode()
    return Report("\n\n".join(answers), advice, files)


KINDS = ("svg", "png")  # formats of each figure

INTRODUCTION = """# Quantize the big network, or distil it and quantize the small one?

Accuracies are top-1 on the test set in percent, mean ± sample deviation over seeds. Every choice (the best file of a \
size, the file to ship) is made on validation images."""

SHIPPING = """Of each track the best file within the budget, on validation; ship the winner of the paired test, or the \
smaller file where the two are not distinguishable. Differences are those of the file to ship minus the other track's. \
`kdq report DIR --max_bytes 100kB` names one file."""

BARS = """Bars: ± one sample deviation over seeds; a strategy with one seed has none. Points at the same place are \
drawn side by side."""

SHORT_METHOD = (
    "Differences: paired bootstrap over test images and seeds, 95 % intervals in brackets, p-values adjusted (Holm).",
    "Weights of few bits save storage and traffic; arithmetic stays float unless a kernel for them exists.",
    "How it is computed, and the published study's claims beside these numbers: [details](details.md).",
)

DETAILS = "# The published claims, and how the report is computed"

METHOD = (
    "At equal bytes: each file against the opponent's best file of no more bytes, chosen on validation. Sizes are those"
    " of files on disk; the float network's is its float32 `.safetensors` file. Sizes that differ by at most"
    f" {SAME_SIZE} bytes count as equal.",
    "Differences: paired bootstrap over the test images and the seeds of each side, 95 % intervals in brackets."
    " p-values are adjusted (Holm) over the bit widths of a row against one reference, and over the budgets of a data"
    f" set, not over rows; intervals and McNemar's mid-p, that of one seed, are not. Unadjusted, {RESAMPLES:,}"
    f" resamples can show no p below {2 / (RESAMPLES + 1):.4f}, and {DROP_RESAMPLES:,} (losses from float) none below"
    f" {2 / (DROP_RESAMPLES + 1):.3f}. Of a side with one seed an interval knows the chance of the images alone; with"
    " two or three it is somewhat too narrow. Calibration images are the same for all seeds: their chance is in no"
    " interval.",
    "The figures' Pareto front is drawn on the test accuracies.",
    "Mutual learning: tables show the mean over peers, paired tests use the first peer.",
)


def tables_of(findings: Findings, published: bool) -> dict[str, Table]:
    """Return the tables that are written as CSV, by the name of the file."""
    dataset, rows = findings.dataset, findings.rows
    tables = {
        f"equal_bytes_{dataset}.csv": duel_table(findings.file_duels),
        f"loss_from_float_{dataset}.csv": drop_table(findings.drops),
        f"cells_{dataset}.csv": cell_table(rows),
    }
    for method, own in by_method(rows).items():
        name = _suffix(method, dataset)
        tables[f"accuracy{name}.csv"] = measure_table(own, "test_top1", published)
        tables[f"bytes{name}.csv"] = bytes_table(own)
        if any(row in findings.gains for row in own):
            tables[f"gain{name}.csv"] = gain_table(findings.gains, own)
        for measure in MEASURES:
            if MEASURES[measure].caption and any(
                measure in cell.summaries for row in own for cell in row.cells.values()
            ):
                tables[f"{measure}{name}.csv"] = measure_table(own, measure)
    return tables


def _suffix(method: str, dataset: str) -> str:
    """Return what the names of a method's files end in."""
    return f"_{dataset}" if method == DEFAULT_METHOD else f"_{method}_{dataset}"


def _latex_tables(findings: Findings, published: bool) -> dict[str, bytes]:
    """Return the table of accuracies of each method in LaTeX, by the name of the file."""
    files = {}
    for method, rows in by_method(findings.rows).items():
        caption = f"Top-1 accuracy on {findings.dataset}, percent"
        caption += "" if method == DEFAULT_METHOD else f", method {method}"
        table = to_latex(measure_table(rows, "test_top1", published), caption)
        files[f"accuracy{_suffix(method, findings.dataset)}.tex"] = table.encode()
    return files


def _section(findings: Findings, figures: Collection[str], published: bool) -> list[str]:
    """Return the paragraphs on a data set.

    Args:
        findings: On the data set.
        figures: Names of the figures that were drawn.
        published: Whether the main table has the published accuracies.
    """
    dataset, rows = findings.dataset, findings.rows
    brackets = " In brackets the published accuracy and the difference from it." if published else ""
    known = {*(row.strategy for row in rows), "recover"}
    absent = [appearance.title for strategy, appearance in APPEARANCES.items() if strategy not in known]
    blocks = [
        f"## {dataset}",
        *(f"![{FIGURES[name]}]({name}_{dataset}.svg)" for name in FIGURES if name in figures),
        BARS,
        f"Test accuracy; the best of a column in bold.{brackets} Seeds: {_seeds(rows)}.",
        *_table_of_each_method(rows, lambda own: measure_table(own, "test_top1", published)),
        *([f"Without any record: {', '.join(absent)}."] if absent else []),
    ]
    if findings.gains:
        blocks += [
            "Against the control, the same network trained without a teacher, at equal bits:",
            "\n".join(f"- {sentence}" for sentence in gains_in_words(findings.gains)),
        ]
    more = ", ".join(f"[{name.removesuffix(f'_{dataset}.csv')}]({name})" for name in tables_of(findings, published))
    pictures = ", ".join(f"[{name}]({name}_{dataset}.svg)" for name in figures if name not in FIGURES)
    return [*blocks, f"As CSV: {more}." + (f" More figures: {pictures}." if pictures else "")]


FIGURES = {
    "accuracy_vs_bytes": "Accuracy against bytes of the file",
    "accuracy_vs_bits": "Accuracy against bits a weight; dashed lines are float networks",
    "methods": "Accuracy against bits of each method, and of the published study",
}
"""The figures that the report shows, with their captions; it links the others."""


def _table_of_each_method(rows: Sequence[Row], table_of: Callable[[Sequence[Row]], Table]) -> list[str]:
    """Return a table in Markdown for the rows of each method; a table without rows is left out."""
    blocks = []
    for method, own in by_method(rows).items():
        table = table_of(own)
        if table.rows:
            blocks += [] if method == DEFAULT_METHOD else [f"Method `{method}`:"]
            blocks.append(to_markdown(table))
    return blocks


def _seeds(rows: Sequence[Row]) -> str:
    """Return the seeds, such as "0, 1"; where rows have different seeds, with the labels of the rows."""
    by_seeds: dict[str, list[str]] = {}
    for row in rows:
        by_seeds.setdefault(", ".join(map(str, row.seeds)), []).append(row.label)
    if len(by_seeds) == 1:
        return next(iter(by_seeds))
    return "; ".join(f"{seeds} of {', '.join(labels)}" for seeds, labels in by_seeds.items())
