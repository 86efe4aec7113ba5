"""The report itself: what is said, in which order, and the files beside it."""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from kdq_lightning.report.answer import Duel, File, duels_by_budget, duels_by_file, files_of
from kdq_lightning.report.claims import RESAMPLES as DROP_RESAMPLES
from kdq_lightning.report.claims import Drop, drops, format_difference, format_p, nearly_float, sharper_drop
from kdq_lightning.report.figures import render
from kdq_lightning.report.gains import gains_over_control, sentence_of_gains, table_of_gains
from kdq_lightning.report.pictures import figures_of
from kdq_lightning.report.published import NETWORKS, WINNER
from kdq_lightning.report.rows import Row
from kdq_lightning.report.sentences import TRACK_VERDICTS, ReportOptions, answer, over_all, shipped, verdict
from kdq_lightning.report.significance import RESAMPLES
from kdq_lightning.report.tables import (
    MISSING,
    Entry,
    Table,
    cells_csv,
    format_cell,
    table_by_bits,
    table_of_bytes,
    to_csv,
    to_latex,
    to_markdown,
)
from kdq_lightning.strategies import STRATEGIES


class Report(NamedTuple):
    """The answer in sentences, and the content of every file by its name."""

    answer: str
    files: dict[str, bytes]


def compose(datasets: Mapping[str, Sequence[Row]], notes: Sequence[str], options: ReportOptions) -> Report:
    """Write the report over all data sets.

    Args:
        datasets: Rows by data set.
        notes: What a reader should know of the records.
        options: What the user asks for.
    """
    files: dict[str, bytes] = {}
    answers, sections, verdicts, claims = [], [], {}, []
    for dataset, rows in datasets.items():
        sides = files_of(rows)
        duels = duels_by_budget(*sides)
        verdicts[dataset] = verdict(duels)
        answers.append(f"**{dataset}**: {answer(duels)}" + "".join(shipped(rows, options)))
        lost = drops(rows)
        claims.append(_claims(dataset, rows, verdicts[dataset], lost))
        sections.append(_section(dataset, rows, options, duels_by_file(*sides), lost, files))
    text = "\n\n".join([*answers, *([over_all(verdicts)] if len(verdicts) > 1 else [])])
    documents = [INTRODUCTION, "## The answer", text, *sections, "## The published claims", *claims]
    documents += ["## What this stands on", "\n".join(f"- {note}" for note in [*METHOD, *notes])]
    files["report.md"] = ("\n\n".join(documents) + "\n").encode()
    return Report(text, files)


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


def _claims(dataset: str, rows: Sequence[Row], found: str | None, lost: Sequence[Drop]) -> str:
    """Return what the records say of each published claim on a data set."""
    claimed = "nothing on this data set"
    if dataset in WINNER:
        claimed = f"the quantized {WINNER[dataset]} wins here ({', '.join(NETWORKS)}, 2^b + 1 levels)"
    networks = ", ".join(dict.fromkeys(row.network for row in rows))
    blocks = [
        f"### {dataset}",
        f"**Which track wins.** Published: {claimed}. Measured, at equal bytes: {TRACK_VERDICTS[found]} ({networks}).",
        "**Does the student drop more sharply?** Loss from float minus the teacher's loss, in points:\n\n"
        + _bullets(sharper_drop(lost, rows)),
        "**Do quantized networks nearly match float?** Loss from float, in points:\n\n" + _bullets(nearly_float(lost)),
    ]
    return "\n\n".join(blocks)


def _bullets(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences or ["Nothing to compare: records are missing."])


def _section(
    dataset: str,
    rows: Sequence[Row],
    options: ReportOptions,
    duels: Sequence[Duel],
    lost: Sequence[Drop],
    files: dict[str, bytes],
) -> str:
    """Return a data set's tables and figures, and put their files beside."""
    accuracy = table_by_bits(rows, "test_top1", best=max, published=options.published)
    files[f"accuracy_{dataset}.csv"] = to_csv(accuracy).encode()
    files[f"accuracy_{dataset}.tex"] = to_latex(accuracy, f"Top-1 accuracy on {dataset}, percent").encode()
    files[f"cells_{dataset}.csv"] = cells_csv(rows).encode()
    figures = figures_of(dataset, rows)
    for name, figure in figures.items():
        for kind in ("svg", "png"):
            files[f"{name}_{dataset}.{kind}"] = render(figure, kind)
    brackets = " In brackets the published accuracy and the difference from it." if options.published else ""
    absent = [
        look.title
        for strategy, look in STRATEGIES.items()
        if strategy not in {*(row.strategy for row in rows), "recover"}
    ]
    blocks = [
        f"## {dataset}",
        f"Test accuracy; the best of a column in bold.{brackets} Seeds: {_seeds(rows)}.",
        to_markdown(accuracy),
        *([f"Without any record: {', '.join(absent)}."] if absent else []),
        f"![Accuracy against bit width](accuracy_vs_bits_{dataset}.svg)",
        f"![Accuracy against bytes](accuracy_vs_bytes_{dataset}.svg)",
        "### Equal bytes",
        "Each file against the opponent's best file of no more bytes; files that their own side beats are left out.",
        to_markdown(_duel_table(duels)),
        *_gains(rows),
        "### Loss from float",
        "Points lost from float to b bits, and that minus the control's and the teacher's loss.",
        to_markdown(_drop_table(lost)),
        "### Bytes of the files",
        to_markdown(table_of_bytes(rows)),
        *_measures(dataset, rows, figures),
    ]
    return "\n\n".join(blocks)


def _gains(rows: Sequence[Row]) -> list[str]:
    gains = gains_over_control(rows)
    if not gains:
        return []
    caption = "Test accuracy minus that of the same network trained without a teacher, at equal bits, in points."
    table = to_markdown(table_of_gains(gains, rows))
    return ["### Gain over the control", sentence_of_gains(gains), caption, table]


def _seeds(rows: Sequence[Row]) -> str:
    """Return the seeds, and where rows differ in them, of which rows they are."""
    by_seeds: dict[str, list[str]] = {}
    for row in rows:
        by_seeds.setdefault(", ".join(map(str, row.seeds)), []).append(row.label)
    if len(by_seeds) == 1:
        return next(iter(by_seeds))
    return "; ".join(f"{seeds} of {', '.join(labels)}" for seeds, labels in by_seeds.items())


MEASURES = {
    "agreement_teacher": ("Test images that get the teacher's class, percent", 2, max),
    "flips": ("Flips: test images right in float and wrong at b bits, or the other way round, percent", 2, min),
    "ece": ("Expected calibration error, percent", 2, min),
    "relative_error": ("Relative error of the layers' outputs on the calibration images, mean over layers", 4, min),
}
"""Numbers of the records that have a table of their own: caption, decimals, and what is best."""


def _measures(dataset: str, rows: Sequence[Row], figures: Collection[str]) -> list[str]:
    """Return fidelity, calibration and layer error, of the rows that have them."""
    blocks = ["### Fidelity"]
    for field, (caption, decimals, best) in MEASURES.items():
        known = [row for row in rows if any(cell.mean(field) is not None for cell in row.cells.values())]
        if known:
            blocks += [f"{caption}:", to_markdown(table_by_bits(known, field, decimals, best))]
        if field in figures:
            blocks.append(f"![{caption}]({field}_{dataset}.svg)")
    return blocks


def _duel_table(duels: Sequence[Duel]) -> Table:
    header = ["budget, bytes", "student's best", "bytes", "test", "teacher's best", "bytes", "test"]
    header += ["student minus teacher", "p", "McNemar", "better"]
    rows = []
    for duel in sorted(duels, key=lambda duel: duel.low):
        texts = [f"{duel.low:,.0f}", *_describe(duel.student), *_describe(duel.teacher)]
        if duel.difference is None or duel.p is None or duel.mcnemar is None:
            texts += [MISSING] * 3 + ["" if duel.student and duel.teacher else "the only one that fits"]
        else:
            texts += [format_difference(duel.difference, with_p=False), format_p(duel.p), format_p(duel.mcnemar.mid_p)]
            texts.append(duel.winner or "not distinguishable")
        rows.append([Entry(text) for text in texts])
    return Table(header, rows)


def _describe(file: File | None) -> list[str]:
    if file is None:
        return ["none fits", "", ""]
    return [file.label, f"{file.size:,}", format_cell(file.cell, "test_top1")]


def _drop_table(lost: Sequence[Drop]) -> Table:
    header = ["", "bits", "loss from float", "published", "minus the control's", "minus the teacher's"]
    rows = []
    for drop in lost:
        own = drop.row.strategy
        versus = [
            format_difference(test) if test else "" if own == reference else MISSING
            for reference, test in (("control", drop.versus_control), ("teacher", drop.versus_teacher))
        ]
        published = "" if drop.published is None else f"{drop.published:.2f}"
        texts = [drop.row.label, str(drop.bits), format_difference(drop.own, with_p=False), published, *versus]
        rows.append([Entry(text) for text in texts])
    return Table(header, rows)
