"""Everything that is written to TensorBoard."""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from kdq_lightning.report.figures import accuracy_figure
from kdq_lightning.runs.records import FLOAT_BITS, LayerRecord, Record
from kdq_lightning.runs.versions import next_number, version_folder
from kdq_lightning.training.lightning_internals import write_hyperparameters

SUFFIX = ".quantized"  # of the event file that quantization writes, whole
COLUMNS = ("bits", "levels", "kB", "val top-1", "test top-1", "agreement", "flips", "relative error", "recipe")
NARROW = 6  # of them fit into a terminal of 80 characters
SUMMARIZED = (2, 3, 4, 8)  # bit widths whose accuracies stand beside the hyper-parameters


class Dashboard(TensorBoardLogger):
    """Writes the events of one run folder, `<root>/<name>/version_N`, and claims that folder for itself."""

    def __init__(self, root: str | Path, name: str, version: int | None = None, after_step: int | None = None) -> None:
        """Name the run.

        Args:
            root: Folder of all runs.
            name: The run's name.
            version: An existing version to go on with; None claims the next free number.
            after_step: Where it goes on: later points of the broken run are dropped, so that each stands once; none
                are if not given.
        """
        purge_step = None if after_step is None else after_step + 1
        super().__init__(root, name, version, default_hp_metric=False, purge_step=purge_step)
        self._claimed = version

    @property
    def version(self) -> int:
        """The run's number; the folder is made with it, so two runs that start at once never share one."""
        if self._claimed is None:
            self._claimed = self._claim()
        return self._claimed

    def _claim(self) -> int:
        run = Path(self.root_dir)
        number = next_number(run)
        while getattr(rank_zero_only, "rank", 0) == 0:
            try:
                version_folder(run, number).mkdir(parents=True)
                break
            except FileExistsError:
                number += 1
        return number

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write scalars; Lightning's own `epoch` is none of our tags."""
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)


def has_quantized(folder: Path) -> bool:
    """Tell whether quantization has written its events into a version's folder."""
    return any(folder.glob(f"events.*{SUFFIX}"))


def write_quantized(
    folder: Path, records: Sequence[Record], layers: Sequence[LayerRecord], hyperparameters: Mapping[str, Any]
) -> None:
    """Write what quantization found into one event file, in place of an older one, so that each point stands once.

    Args:
        folder: Of the version.
        records: Of all its networks and bit widths.
        layers: Of the same.
        hyperparameters: Of the module, for the hparams tab; names that start with "_" and empty values are left out.
    """
    beside = folder / ".quantized"
    shutil.rmtree(beside, ignore_errors=True)
    with SummaryWriter(str(beside), filename_suffix=SUFFIX) as writer:
        metrics: dict[str, float] = {}
        for peer, group in groupby(records, key=lambda record: record.peer):
            metrics |= _write_network(writer, list(group), f"/{peer}" if peer else "")
        peers = {record.peer for record in records}
        for (network, bits), rows in groupby(layers, key=lambda layer: (layer.network, layer.bits)):
            suffix = f"/{network}" if network in peers else ""
            for index, layer in enumerate(rows):
                writer.add_scalar(f"layer_error/{bits}bit{suffix}", layer.relative_error, index)
        _write_layout(writer, {f"/{peer}" if peer else "" for peer in peers})
        _write_hyperparameters(writer, {"run": records[0].run, "seed": records[0].seed, **hyperparameters}, metrics)
    for old in folder.glob(f"events.*{SUFFIX}"):
        old.unlink()
    for new in beside.iterdir():
        new.replace(folder / new.name)
    beside.rmdir()


def _write_network(writer: SummaryWriter, records: list[Record], suffix: str) -> dict[str, float]:
    """Write curves, figure and table of one network; return its metrics for the hparams tab."""
    floats = [record for record in records if record.bits == FLOAT_BITS]
    metrics = {}
    for record in records:
        if record.bits == FLOAT_BITS:
            continue
        for tag, value, step in (
            ("accuracy_vs_bits", record.top1, record.bits),
            ("float_accuracy", floats[0].top1 if floats else None, record.bits),
            ("agreement_vs_bits", record.agreement_float, record.bits),
            ("accuracy_vs_bytes", record.top1, record.packed_bytes),
        ):
            if value is not None:
                writer.add_scalar(f"quantized/{tag}{suffix}", value, step)
        if record.bits in SUMMARIZED and record.top1 is not None:
            metrics[f"quantized/accuracy_{record.bits}bit{suffix}"] = record.top1
    writer.add_figure(f"quantized/figure{suffix}", accuracy_figure({records[0].name: records}), 0)
    writer.add_text(f"quantized/table{suffix}", markdown_table(records), 0)
    return metrics


def _write_layout(writer: SummaryWriter, suffixes: Iterable[str]) -> None:
    """Lay out the custom scalars: accuracy against bits, with the float network's line, and against bytes."""
    charts = {
        "accuracy vs bits": ("accuracy_vs_bits", "float_accuracy"),
        "accuracy vs bytes": ("accuracy_vs_bytes",),
    }
    layout = {
        title: ["Multiline", [f"quantized/{tag}{suffix}$" for suffix in sorted(suffixes) for tag in tags]]
        for title, tags in charts.items()
    }
    writer.add_custom_scalars({"quantized": layout})


def _write_hyperparameters(
    writer: SummaryWriter, hyperparameters: Mapping[str, Any], metrics: Mapping[str, float]
) -> None:
    """Write the run's row of the HParams tab, and its metrics as scalars."""
    plain = {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in hyperparameters.items()
        if value is not None and not name.startswith("_")
    }
    for name, value in metrics.items():
        writer.add_scalar(name, value, 0)
    write_hyperparameters(writer, plain, metrics)


def table_rows(records: Iterable[Record]) -> list[list[str]]:
    """Return the cells of `COLUMNS`, a row a record; empty where a number doesn't exist."""

    def cell(value: float | None, digits: int = 2) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    return [
        [
            "float" if record.bits == FLOAT_BITS else str(record.bits),
            "" if record.levels is None else str(record.levels),
            cell(record.packed_bytes / 1000, 1),
            cell(record.val_top1),
            cell(record.test_top1),
            cell(record.agreement_float),
            cell(record.flips),
            cell(record.relative_error, 4),
            " ".join(filter(None, [record.solver, record.codebook])),
        ]
        for record in records
    ]


def markdown_table(records: Iterable[Record]) -> str:
    """Return the table of one network's records in Markdown; accuracies, agreement and flips in percent."""
    rows = [list(COLUMNS), ["---:"] * (len(COLUMNS) - 1) + [":---"], *table_rows(records)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def terminal_table(records: Sequence[Record]) -> Table:
    """Return the table of a run's records, networks one below the other, for the terminal."""
    first = records[0]
    limited = ", on a part of the images" if first.partial else ""
    table = Table(title=f"{first.run}: {first.strategy} on {first.dataset}, percent{limited}", title_justify="left")
    table.add_column("network")
    for column in COLUMNS[:NARROW]:
        table.add_column(column, justify="right")
    for name, group in groupby(records, key=lambda record: record.name):
        rows = table_rows(group)
        for i, row in enumerate(rows):
            table.add_row("" if i else name, *row[:NARROW], end_section=i == len(rows) - 1)
    return table
