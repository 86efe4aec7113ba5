"""The tables of a run's records and of an evaluation, for the terminal and for TensorBoard, and what to type next."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from kdq_lightning.runs.records import FLOAT_BITS, MEASURES, Record, added_measures
from kdq_lightning.runs.versions import is_version
from kdq_lightning.training.header import LABEL, relative_path

NARROW = ("method", "bits", "levels", "kB", "val top-1", "test top-1", "agreement")  # fits into 80 characters
COLUMNS = (*NARROW, "flips", "relative error", "recipe")

CAPTION = "kB: of the packed file; agreement: images with the float network's class"

SCORES = {"top1": ("top-1, %", 2), "top5": ("top-5, %", 2), "ece": ("ECE, %", 2), "loss": ("loss", 4)}
"""What `kdq test` calls a score, and its decimals."""

SCORES_EXPLAINED = "top-5: the class is among the five likeliest; ECE: confidence against accuracy"


def table_rows(records: Iterable[Record]) -> list[list[str]]:
    """Return the cells of `COLUMNS`, a row a record; empty where a number doesn't exist."""
    return [
        [
            record.method,
            "float" if record.bits == FLOAT_BITS else str(record.bits),
            "" if record.levels is None else str(record.levels),
            format_number(record.packed_bytes / 1000, 1),
            format_number(record.val_top1),
            format_number(record.test_top1),
            format_number(record.agreement_float),
            format_number(record.flips),
            format_number(record.relative_error, 4),
            " ".join(filter(None, [record.solver, record.codebook])),
        ]
        for record in records
    ]


def format_number(value: float | None, decimals: int = 2) -> str:
    """Return a number with so many decimals, or nothing for None."""
    return "" if value is None else f"{value:.{decimals}f}"


EXPLANATION = (
    "Accuracies, agreement and flips in percent of the images. **Agreement**: images that get the float network's"
    " class. **Flips**: images that the float network gets right and this one wrong, or the other way round."
    " **Relative error**: of the layers' outputs on the calibration images, the mean over the layers."
)


def markdown_table(records: Iterable[Record]) -> str:
    """Return the table of one network's records in Markdown, and a line that explains its columns."""
    float_first = sorted(records, key=lambda record: record.bits != FLOAT_BITS)  # TensorBoard cuts long tables
    added = added_measures(float_first)
    more = [[format_number(record.number(name), MEASURES[name].decimals) for name in added] for record in float_first]
    rows = [[*COLUMNS, *added], [":---", *["---:"] * (len(COLUMNS) - 2), ":---", *["---:"] * len(added)]]
    rows += [[*cells, *numbers] for cells, numbers in zip(table_rows(float_first), more, strict=True)]
    return "\n".join([EXPLANATION, "", *(f"| {' | '.join(row)} |" for row in rows)])


def terminal_table(records: Sequence[Record]) -> Table:
    """Return the table of a run's records, networks one below the other, for the terminal."""
    first = records[0]
    limited = ", on a part of the images" if first.partial else ""
    title = f"{first.run}: {first.strategy} on {first.dataset}, percent{limited}"
    table = Table(title=title, caption=CAPTION, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.title_justify = table.caption_justify = "left"
    table.add_column("network")
    for column in NARROW:
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, group in groupby(records, key=lambda record: record.name):
        of_name = list(group)
        rows, names = table_rows(of_name), list(dict.fromkeys([name, of_name[0].network]))  # of a peer both
        for i, row in enumerate(rows):
            table.add_row(names[i] if i < len(names) else "", *row[: len(NARROW)], end_section=i == len(rows) - 1)
    return table


def scores_table(title: str, scores: Mapping[str, float], networks: Mapping[str, str]) -> Table:
    """Return the table of `kdq test` and `kdq validate`, at most 80 columns wide for a few networks.

    Args:
        title: Above the names of the scores.
        scores: What was logged, by names such as `test/top1` and, of several networks, `test/top1/peer0`.
        networks: Name that each network was built by; the first column is the mean if there are several.
    """
    names = [name.partition("/")[2] for name in scores]
    peers = [peer for peer in networks if any(name.endswith(f"/{peer}") for name in names)]
    values = dict(zip(names, scores.values(), strict=True))
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(title, no_wrap=True)
    for column in ["mean", *(f"{peer} {networks[peer]}" for peer in peers)] if peers else networks.values():
        table.add_column(column, justify="right")
    for name in dict.fromkeys(name for name in names if not name.endswith(tuple(f"/{peer}" for peer in peers))):
        label, decimals = SCORES.get(name, (name, 4))
        cells = [values.get(key) for key in (name, *(f"{name}/{peer}" for peer in peers))]
        table.add_row(label, *(format_number(cell, decimals) for cell in cells))
    return table


def closing_lines(folder: Path, has_curves: bool) -> list[str]:
    """Return the last lines of a run: where its results lie, and the commands that show them.

    Args:
        folder: Of the results.
        has_curves: Whether TensorBoard finds curves there.
    """
    run = folder.parent if is_version(folder) else folder
    facts = {"results": relative_path(str(folder))}
    if has_curves:
        facts["curves"] = f"tensorboard --logdir {_quoted(folder.parent.parent)}"
    facts["next"] = f"kdq report {_quoted(run)}"
    return [f"{label:<{LABEL}}{text}" for label, text in facts.items()]


def quantize_command(folder: Path) -> str:
    """Return the command that quantizes a version that was trained without."""
    version = _quoted(folder)
    return f"kdq quantize --config {version}/config.yaml --ckpt_path {version} --quantization.enabled true"


def _quoted(path: Path) -> str:
    return shlex.quote(relative_path(str(path)))
