"""Everything that is written to TensorBoard and other loggers."""

import shutil
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.tensorboard import SummaryWriter

from kdq_lightning.runs.records import LayerRecord, Record
from kdq_lightning.runs.versions import claim_version, next_number
from kdq_lightning.training.curves import SUMMARY_TAGS, charts, points_of
from kdq_lightning.training.lightning_internals import write_hyperparameters, write_margin_charts
from kdq_lightning.training.result_tables import markdown_table
from kdq_lightning.training.run_figures import accuracy_figure, layer_errors_figure

SUFFIX = ".quantized"  # of the event file that quantization writes, whole


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

    def claim(self) -> None:
        """Make the run's folder, if this process is the one that writes."""
        if getattr(rank_zero_only, "rank", 0) == 0:
            _ = self.version

    @property
    def version(self) -> int:
        """The run's number; the folder is made with it, so two runs that start at once never share one."""
        if self._claimed is None:
            is_rank_zero = getattr(rank_zero_only, "rank", 0) == 0
            self._claimed = (claim_version if is_rank_zero else next_number)(Path(self.root_dir))
        return self._claimed

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write scalars; Lightning's own `epoch` is none of our tags."""
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)


def has_quantized(folder: Path) -> bool:
    """Return whether quantization has written its events into a version's folder."""
    return any(folder.glob(f"events.*{SUFFIX}"))


def publish_quantized(
    loggers: Sequence[Logger],
    records: Sequence[Record],
    layers: Sequence[LayerRecord],
    images: int,
    hyperparameters: Mapping[str, Any],
) -> None:
    """Give what quantization found to every logger: TensorBoard gets figures and tables, others numbers.

    Args:
        loggers: Of the trainer.
        records: Of all networks, methods and bit widths.
        layers: Of the same.
        images: Number of images that the records' accuracies (`Record.top1`) were measured on.
        hyperparameters: Of the run.
    """
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            write_quantized(Path(logger.log_dir), records, layers, images, hyperparameters)
            continue
        steps: dict[int, dict[str, float]] = {}
        for point in points_of(records, images):
            steps.setdefault(point.step, {})[point.tag] = point.value
        for step, metrics in sorted(steps.items()):
            logger.log_metrics(metrics, step)
        logger.save()


def write_quantized(
    folder: Path,
    records: Sequence[Record],
    layers: Sequence[LayerRecord],
    images: int,
    hyperparameters: Mapping[str, Any],
) -> None:
    """Write what quantization found into one event file, in place of an older one, so that each point stands once.

    Args:
        folder: That TensorBoard takes for one run.
        records: See `publish_quantized`.
        layers: See `publish_quantized`.
        images: See `publish_quantized`.
        hyperparameters: For the HParams tab; names that start with "_" and empty values are left out.
    """
    beside = folder / ".quantized"
    shutil.rmtree(beside, ignore_errors=True)
    with SummaryWriter(str(beside), filename_suffix=SUFFIX) as writer:
        for point in points_of(records, images):
            writer.add_scalar(point.tag, point.value, point.step)
        writer.add_figure("quantized/figure", accuracy_figure(records, images), 0)
        for name, group in groupby(records, key=lambda record: record.name):
            rows = list(group)
            suffix = f"/{name}" if rows[0].peer else ""
            of_network = [layer for layer in layers if layer.network == name]
            if any(layer.codebook for layer in of_network):
                writer.add_figure(f"quantized/layer_errors{suffix}", layer_errors_figure(rows, of_network), 0)
            writer.add_text(f"quantized/table{suffix}", markdown_table(rows), 0)
        write_margin_charts(writer, "quantized", charts())
        write_hyperparameters(writer, plain_values(hyperparameters), list(SUMMARY_TAGS.values()))
    for old in folder.glob(f"events.*{SUFFIX}"):
        old.unlink()
    for new in beside.iterdir():
        new.replace(folder / new.name)
    beside.rmdir()


def plain_values(hyperparameters: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Return hyper-parameters as TensorBoard takes them; what it can't hold becomes text."""
    return {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in hyperparameters.items()
        if value is not None and not name.startswith("_")
    }
