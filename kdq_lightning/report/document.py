"""The report's files: report.md, section after section, and the tables and figures beside it."""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import NamedTuple

from kdq_lightning.quantization.methods import DEFAULT_METHOD
from kdq_lightning.report.answer import answer, over_all, sentence_on_shipping, verdict
from kdq_lightning.report.claims import section_on_claims, sentence_on_gains
from kdq_lightning.report.figures import draw_figures, render
from kdq_lightning.report.findings import DROP_RESAMPLES, Findings
from kdq_lightning.report.rows import Row, by_method
from kdq_lightning.report.significance import RESAMPLES
from kdq_lightning.report.table_formats import Table, to_csv, to_latex, to_markdown
from kdq_lightning.report.tables import bytes_table, cell_table, drop_table, duel_table, gain_table, measure_table
from kdq_lightning.runs.records import MEASURES
from kdq_lightning.strategies import STRATEGIES


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
    """The answer in sentences, and the content of every file of the report by the file's name."""

    answer: str
    files: dict[str, bytes]


def compose(findings: Sequence[Findings], notes: Sequence[str], options: ReportOptions) -> Report:
    """Return the report over all data sets.

    Args:
        findings: What was found, one for each data set.
        notes: Sentences on what a reader should know of the records.
        options: What the user asks for.
    """
    answers = [
        f"**{f.dataset}**: {answer(f.duels)}{sentence_on_shipping(f.rows, options.max_bytes, options.min_accuracy)}"
        for f in findings
    ]
    if len(findings) > 1:
        answers.append(over_all({f.dataset: verdict(f.duels) for f in findings}))
    text = "\n\n".join(answers)
    files: dict[str, bytes] = {}
    sections = [INTRODUCTION, "## The answer", text]
    for f in findings:
        figures = draw_figures(f)
        files |= {f"{name}_{f.dataset}.{kind}": render(figures[name], kind) for name in figures for kind in KINDS}
        for method, rows in by_method(f.rows).items():
            accuracy = measure_table(rows, "test_top1", options.published)
            name, caption = f"accuracy_{f.dataset}", f"Top-1 accuracy on {f.dataset}, percent"
            if method != DEFAULT_METHOD:
                name, caption = f"accuracy_{method}_{f.dataset}", f"{caption}, method {method}"
            files[f"{name}.csv"] = to_csv(accuracy).encode()
            files[f"{name}.tex"] = to_latex(accuracy, caption).encode()
        files[f"cells_{f.dataset}.csv"] = to_csv(cell_table(f.rows)).encode()
        sections += _section(f, figures, options.published)
    sections += ["## The published claims", *map(section_on_claims, findings)]
    sections += ["## What this stands on", "\n".join(f"- {note}" for note in [*METHOD, *notes])]
    files["report.md"] = ("\n\n".join(sections) + "\n").encode()
    return Report(text, files)


KINDS = ("svg", "png")  # formats of each figure

INTRODUCTION = """# Quantize the big network, or distil it and quantize the small one?

Accuracies are top-1 on the test set in percent, mean ± sample deviation over seeds. Every choice (the best file of a \
size, the file to ship) is made on validation images."""

METHOD = (
    "At equal bytes: each file against the opponent's best file of no more bytes, chosen on validation. Sizes are those"
    " of files on disk; the float network's is its float32 `.safetensors` file.",
    "Differences: paired bootstrap over the test images and the seeds of each side, 95 % intervals in brackets."
    " p-values are adjusted (Holm) over the bit widths of a row against one reference, and over the budgets of a data"
    f" set, not over rows; intervals and McNemar's mid-p, that of one seed, are not. Unadjusted, {RESAMPLES:,}"
    f" resamples can show no p below {2 / (RESAMPLES + 1):.4f}, and {DROP_RESAMPLES:,} (losses from float) none below"
    f" {2 / (DROP_RESAMPLES + 1):.3f}. Of a side with one seed an interval knows the chance of the images alone; with"
    " two or three it is somewhat too narrow. Calibration images are the same for all seeds: their chance is in no"
    " interval.",
    "The figures' Pareto front is drawn on the test accuracies.",
    "Mutual learning: tables show the mean over peers, paired tests use the first peer.",
    "Weights of few bits save storage and traffic; arithmetic stays float unless a kernel for them exists.",
)


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
    absent = [appearance.title for strategy, appearance in STRATEGIES.items() if strategy not in known]
    blocks = [
        f"## {dataset}",
        f"Test accuracy; the best of a column in bold.{brackets} Seeds: {_seeds(rows)}.",
        *_table_of_each_method(rows, lambda own: measure_table(own, "test_top1", published)),
        *([f"Without any record: {', '.join(absent)}."] if absent else []),
        f"![Accuracy against bit width](accuracy_vs_bits_{dataset}.svg)",
        f"![Accuracy against bytes](accuracy_vs_bytes_{dataset}.svg)",
        "### Equal bytes",
        "Each file against the opponent's best file of no more bytes; files that their own side beats are left out.",
        to_markdown(duel_table(findings.file_duels)),
    ]
    if findings.gains:
        blocks += [
            "### Gain over the control",
            sentence_on_gains(findings.gains),
            "Test accuracy minus that of the same network trained without a teacher, at equal bits, in points.",
            *_table_of_each_method(rows, lambda own: gain_table(findings.gains, own)),
        ]
    blocks += [
        "### Loss from float",
        "Points lost from float to b bits, and that minus the control's and the teacher's loss.",
        to_markdown(drop_table(findings.drops)),
        "### Bytes of the files",
        *_table_of_each_method(rows, bytes_table),
        "### Fidelity",
    ]
    for name, measure in MEASURES.items():
        having = [row for row in rows if any(name in cell.summaries for cell in row.cells.values())]
        if measure.caption and having:
            blocks.append(f"{measure.caption}:")
            blocks += _table_of_each_method(having, partial(measure_table, measure=name))
        if measure.caption and name in figures:
            blocks.append(f"![{measure.caption}]({name}_{dataset}.svg)")
    return blocks


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
