"""Everything that is written to TensorBoard."""

import math
import shutil
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.tensorboard import SummaryWriter

from kdq_lightning.quantization.methods import CUSTOM_METHOD, DEFAULT_METHOD, METHODS, MIXED_METHOD
from kdq_lightning.report.figures import accuracy_figure
from kdq_lightning.runs.records import FLOAT_BITS, LayerRecord, Record, identity
from kdq_lightning.runs.versions import next_number, version_folder
from kdq_lightning.training.lightning_internals import write_hyperparameters, write_margin_charts
from kdq_lightning.training.result_tables import markdown_table

SUFFIX = ".quantized"  # of the event file that quantization writes, whole
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
    """Return whether quantization has written its events into a version's folder."""
    return any(folder.glob(f"events.*{SUFFIX}"))


def write_quantized(
    folder: Path,
    records: Sequence[Record],
    layers: Sequence[LayerRecord],
    images: int,
    hyperparameters: Mapping[str, Any],
) -> None:
    """Write what quantization found into one event file, in place of an older one, so that each point stands once.

    Args:
        folder: Of the version.
        records: Of all its networks, methods and bit widths.
        layers: Of the same.
        images: Number of images that the records' accuracies (`Record.top1`) were measured on.
        hyperparameters: Of the module, for the HParams tab; names that start with "_" and empty values are left out.
    """
    beside = folder / ".quantized"
    shutil.rmtree(beside, ignore_errors=True)
    with SummaryWriter(str(beside), filename_suffix=SUFFIX) as writer:
        for peer, group in groupby(records, key=lambda record: record.peer):
            _write_network(writer, list(group), f"/{peer}" if peer else "", images)
        _write_layer_errors(writer, layers, {record.peer for record in records})
        _write_layout(writer)
        _write_hyperparameters(writer, {"run": records[0].run, "seed": records[0].seed, **hyperparameters}, records)
    for old in folder.glob(f"events.*{SUFFIX}"):
        old.unlink()
    for new in beside.iterdir():
        new.replace(folder / new.name)
    beside.rmdir()


def _write_network(writer: SummaryWriter, records: list[Record], suffix: str, images: int) -> None:
    """Write curves, figure and table of one network; its tags end in `suffix`."""

    def add(tag: str, value: float | None, step: int) -> None:
        if value is not None:
            for end, shown in zip(("", "_low", "_high"), (value, *interval(value, images)), strict=True):
                writer.add_scalar(f"quantized/{tag}{end}{suffix}", shown, step)

    floats = [record for record in records if record.bits == FLOAT_BITS]
    quantized = [record for record in records if record.bits != FLOAT_BITS]
    for record in quantized:
        method, bits = tag_of(record.method), identity(record).bits
        add(f"accuracy_vs_bytes{method}", record.top1, record.packed_bytes)
        if record.method != MIXED_METHOD:
            add(f"accuracy_vs_bits{method}", record.top1, bits)
        if record.method == DEFAULT_METHOD:
            add("agreement_vs_bits", record.agreement_float, bits)
    for bits in sorted({identity(record).bits for record in quantized if record.method != MIXED_METHOD}):
        add("float_accuracy", floats[0].top1 if floats else None, bits)
    by_method = {method: list(rows) for method, rows in groupby(quantized, key=lambda record: record.method)}
    curves = {f"{records[0].name}, {method}": [*rows, *floats] for method, rows in by_method.items()}
    writer.add_figure(f"quantized/figure{suffix}", accuracy_figure(curves), 0)
    writer.add_text(f"quantized/table{suffix}", markdown_table(records), 0)


def tag_of(method: str) -> str:
    """Return what a method adds to the tags of its curves: nothing for `default`."""
    return "" if method == DEFAULT_METHOD else f"_{method}"


def interval(percent: float, images: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of images, in percent.

    Source: Wilson 1927, Probable Inference, the Law of Succession, and Statistical Inference.

    Args:
        percent: The share, in percent.
        images: Number of images that it is a share of.
    """
    share, z = percent / 100, NormalDist().inv_cdf(0.975)
    centre = share + z**2 / (2 * images)
    radius = z * math.sqrt(share * (1 - share) / images + z**2 / (4 * images**2))
    low, high = ((centre + side * radius) / (1 + z**2 / images) for side in (-1, 1))
    return 100 * max(low, 0.0), 100 * min(high, 1.0)


def _write_layer_errors(writer: SummaryWriter, layers: Sequence[LayerRecord], peers: set[str]) -> None:
    """Write the layers' relative errors, in the order of the layers, a curve a network, method and bit width."""
    for (network, method, bits), rows in groupby(layers, key=identity):
        suffix = f"/{network}" if network in peers else ""
        for index, layer in enumerate(rows):
            writer.add_scalar(f"layer_error/{bits}bit{tag_of(method)}{suffix}", layer.relative_error, index)


def _write_layout(writer: SummaryWriter) -> None:
    """Lay out the custom scalars, alike in every run: TensorBoard shows a chart of its own for each other layout."""
    methods = [tag_of(method) for method in (*METHODS, CUSTOM_METHOD)]
    charts = {
        "accuracy vs bits": [*(f"accuracy_vs_bits{method}" for method in methods), "float_accuracy"],
        "accuracy vs bytes": [f"accuracy_vs_bytes{method}" for method in [*methods, tag_of(MIXED_METHOD)]],
    }
    series = {
        title: [
            tuple(f"quantized/{tag}{end}{suffix}" for end in ("", "_low", "_high"))
            for suffix in ("", "/peer0", "/peer1")
            for tag in tags
        ]
        for title, tags in charts.items()
    }
    write_margin_charts(writer, "quantized", series)


def _write_hyperparameters(
    writer: SummaryWriter, hyperparameters: Mapping[str, Any], records: Sequence[Record]
) -> None:
    """Write the run's row of the HParams tab, and its metrics as scalars: means over the peers, alike in every run."""
    plain = {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in hyperparameters.items()
        if value is not None and not name.startswith("_")
    }
    shown = {FLOAT_BITS: "quantized/float", **{bits: f"quantized/accuracy_{bits}bit" for bits in SUMMARIZED}}
    for bits, tag in shown.items():
        accuracies = [
            record.top1
            for record in records
            if record.bits == bits and record.method in (DEFAULT_METHOD, "") and record.top1 is not None
        ]
        if accuracies:
            writer.add_scalar(tag, fmean(accuracies), 0)
    write_hyperparameters(writer, plain, list(shown.values()))
