"""The report's files: report.md, section after section, and the tables and figures beside it."""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from kdq_lightning.quantization.methods import DEFAULT_METHOD
from kdq_lightning.report.advice import CLEAR
from kdq_lightning.report.answer import answer, over_all, verdict
from kdq_lightning.report.claims import section_on_claims
from kdq_lightning.report.figures import draw_figures, render
from kdq_lightning.report.file_choice import SAME_SIZE
from kdq_lightning.report.findings import DROP_RESAMPLES, Findings
from kdq_lightning.report.formatting import MISSING
from kdq_lightning.report.gains import gains_in_words
from kdq_lightning.report.rows import Row, by_method, method_title
from kdq_lightning.report.shipping import advice_table, sentence_on_shipping
from kdq_lightning.report.significance import LEVEL, RESAMPLES
from kdq_lightning.report.table_formats import Table, to_csv, to_latex, to_markdown
from kdq_lightning.report.tables import bytes_table, cell_table, drop_table, duel_table, gain_table, measure_table
from kdq_lightning.report.words import words
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
    advice = {f.dataset: advice_table(f) for f in findings if f.duels}
    for f, text in zip(findings, answers, strict=True):
        sections += [text, *([to_markdown(advice[f.dataset]), SHIPPING] if f.dataset in advice else [])]
    sections += words([row for f in findings for row in f.rows])
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

There are two tracks: quantize the *teacher*, a big network; or train a *student*, a small network, most often by \
distilling, that is by the teacher's answers, and quantize that. *At equal bytes* compares the best file of each track \
within one budget of bytes; files are chosen on validation images and compared on test images. Accuracies are top-1 on \
the test images in percent, mean ± standard deviation over trainings with different seeds (a single training has \
no ±); *points* are percentage points."""

SHIPPING = f"""A larger file stands here only where it is better beyond chance (p < {LEVEL:g}): than the row above on \
validation images, or than the other track at equal bytes; any other is not worth its bytes. Differences: the file to \
ship minus the other track's best within the budget, 95 % intervals in brackets. `kdq report DIR --max_bytes 100kB` \
names one file."""

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
    "The file to ship: of the winners at equal bytes, or the smaller files where neither wins, in order of the budget"
    " each that is better than the one before it: than one of its own track by the paired test on validation images at"
    f" the level {LEVEL:g}, not adjusted (where their right answers aren't recorded, by {CLEAR:g} points), than one of"
    " the other track if it wins at equal bytes.",
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
    tables = _table_of_each_method(rows, lambda own: measure_table(own, "test_top1", published))
    missing = f" *{MISSING}*: no record of it." if any(MISSING in table for table in tables) else ""
    absent = [appearance.title for strategy, appearance in APPEARANCES.items() if strategy not in known]
    blocks = [
        f"## {dataset}",
        *(
            block
            for name, caption in FIGURES.items()
            if name in figures
            for block in (f"![{caption.partition('.')[0]}]({name}_{dataset}.svg)", caption)
        ),
        f"Test accuracy; the best of a column in bold.{brackets}{missing} Seeds: {_seeds(rows)}.",
        *tables,
        *([f"Without any record: {', '.join(absent)}."] if absent else []),
    ]
    if findings.gains:
        blocks += [
            "Against the control, the same network trained without a teacher, at equal bits (one seed on a side:"
            " another training may give another verdict):",
            "\n".join(f"- {sentence}" for sentence in gains_in_words(findings.gains)),
        ]
    more = ", ".join(f"[{name.removesuffix(f'_{dataset}.csv')}]({name})" for name in tables_of(findings, published))
    pictures = ", ".join(f"[{name}]({name}_{dataset}.svg)" for name in figures if name not in FIGURES)
    return [*blocks, f"As CSV: {more}." + (f" More figures: {pictures}." if pictures else "")]


FIGURES = {
    "accuracy_vs_bytes": "Accuracy against bytes of the file. Yellow: the files to ship, those of the table above."
    " They are chosen on validation images: a point above yellow was no better there beyond chance, so its height here"
    " may be luck. Error bars: ± one standard deviation over seeds, so how far another training would fall from the"
    " mean; a strategy with one seed has none. Points at the same place are drawn side by side.",
    "accuracy_vs_bits": "Accuracy against bits a weight. Dashed lines are the float networks. At equal bits the"
    " teacher's file is larger: who is higher here has not won.",
    "methods": "Accuracy against bits of each method of quantizing. Hollow markers, where there are any: the published"
    " study, with the networks in brackets.",
}
"""The figures that the report shows, with what stands under each; it links the others."""


def _table_of_each_method(rows: Sequence[Row], table_of: Callable[[Sequence[Row]], Table]) -> list[str]:
    """Return a table in Markdown for the rows of each method; a table without rows is left out."""
    blocks = []
    for method, own in by_method(rows).items():
        table = table_of(own)
        if table.rows:
            blocks += [] if method == DEFAULT_METHOD else [f"The same with {method_title(method)} (method `{method}`):"]
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
