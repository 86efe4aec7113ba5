"""Uses of private functions of Lightning, TensorBoard and rich, all in this file.

Each part has a test of its own in tests/test_lightning_internals.py, which says what breaks if a release of Lightning
changes it. No other module uses a private name of Lightning.
"""

import subprocess
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import ModelCheckpoint as LightningModelCheckpoint
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.custom_scalar import metadata
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.util.tensor_util import make_tensor_proto
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams


class StageTrainer(LightningTrainer):
    """Lightning's Trainer, with two of its decisions under public names that a subclass overrides.

    Relies on: `Trainer._run_stage`, called once a command when processes, data and weights are in place and the signal
    handlers are installed; `Trainer.received_sigterm`, which the loops read after each batch.
    """

    def run_stage(self) -> Any:  # noqa: ANN401 - what Lightning's stages return
        """Do the work of the command that was set up: fit, validate, test or predict."""
        return super()._run_stage()

    def _run_stage(self) -> Any:  # noqa: ANN401
        return self.run_stage()

    def should_terminate(self) -> bool:
        """Return whether the loops raise `SIGTERMException` at the end of this batch."""
        return super().received_sigterm

    @property
    def received_sigterm(self) -> bool:
        """Return `should_terminate()`, under the name that Lightning reads."""
        return self.should_terminate()


class WithoutRunning:
    """Before `LightningCLI` among the bases: the command is parsed, nothing is instantiated and nothing is run.

    Relies on: `LightningCLI._run_subcommand`, called last by the constructor.
    """

    def instantiate_classes(self) -> None:
        """Instantiate nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


class ModelCheckpoint(LightningModelCheckpoint):
    """Lightning's ModelCheckpoint, which would forget the best epoch of a run folder that was moved.

    It would then save a worse epoch over it. Relies on: the keys of `ModelCheckpoint.state_dict`; and on the class's
    name in `state_key`, under which a checkpoint holds the state, so this class can't have another.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Look for the checkpoints in the folder of the checkpoint that training goes on from."""

        def here(path: str) -> str:
            return str(Path(self.dirpath or "", Path(path).name)) if path else path

        paths = {key: here(state_dict[key]) for key in ("best_model_path", "kth_best_model_path", "last_model_path")}
        scores = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **paths, "best_k_models": scores, "dirpath": self.dirpath})


def drawing_waits(live: Live) -> AbstractContextManager[Any]:
    """Return a context in which rich's thread doesn't draw, so that a line printed in it isn't drawn over.

    Relies on: the lock of rich's `Live`.
    """
    return live._lock


class EpochBar(RichProgressBar):
    """Lightning's bar with epochs counted from 1 and room for 80 columns; it is gone when the work is done.

    Where the output is no terminal it draws nothing, not even its last state. Relies on:
    `RichProgressBar._get_train_description`, the words before the bar of a training, and `progress`, its bars.
    """

    def setup(self, trainer: LightningTrainer, pl_module: LightningModule, stage: str) -> None:
        """Draw in one process alone, and on a terminal alone."""
        super().setup(trainer, pl_module, stage)
        if not Console().is_terminal:
            self.disable()

    def configure_columns(self, trainer: LightningTrainer) -> list[ProgressColumn]:
        """Return what stands in the bar's line: words, bar, batches, time left."""
        return [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]

    def get_metrics(self, trainer: LightningTrainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return what the user logs with `prog_bar`, without the number of the version."""
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in metrics.items() if name != "v_num"}

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bars; bars drawn by rich's thread meanwhile would take the line's place if they are more."""
        with drawing_waits(self.progress.live) if self.progress is not None else nullcontext():
            super().print(*args, **kwargs)

    def teardown(self, trainer: LightningTrainer, pl_module: LightningModule, stage: str) -> None:
        """Take the bars away."""
        for task in self.progress.tasks if self.progress is not None else []:
            task.visible = False
        super().teardown(trainer, pl_module, stage)

    def _get_train_description(self, current_epoch: int) -> str:
        epochs = self.trainer.max_epochs
        return f"epoch {current_epoch + 1}/{epochs}" if epochs and epochs > 0 else f"epoch {current_epoch + 1}"


def completed_epochs(checkpoint: Mapping[str, Any]) -> int:
    """Return how many epochs of training a checkpoint has behind it.

    Relies on: the `loops` of a checkpoint. Its key `epoch` counts from 0 and is that of the epoch it was saved in, be
    it complete or not.
    """
    epochs: int = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    return epochs


def started_processes(trainer: LightningTrainer) -> list[subprocess.Popen[bytes]]:
    """Return the processes of the other ranks that this process has started with `strategy=ddp`; by rank.

    Relies on: the launcher's `procs`. Forked processes are not among them.
    """
    processes = getattr(trainer.strategy.launcher, "procs", [])
    return [process for process in processes if isinstance(process, subprocess.Popen)]


def pass_on_signal(trainer: LightningTrainer, signum: int) -> None:
    """Send a signal to the processes that this one has started.

    Relies on: the launcher's `kill`.
    """
    if trainer.strategy.launcher is not None:
        trainer.strategy.launcher.kill(signum)


def set_up_validation_loaders(trainer: LightningTrainer) -> None:
    """Let `trainer.val_dataloaders` be there: Lightning doesn't ask for them if there is nothing left to train.

    Relies on: `fit_loop.epoch_loop.val_loop.setup_data`, which asks the source of the loaders that `fit` was given.
    """
    if trainer.val_dataloaders is None:
        trainer.fit_loop.epoch_loop.val_loop.setup_data()


def write_hyperparameters(writer: SummaryWriter, values: Mapping[str, Any], metrics: Sequence[str]) -> None:
    """Write a run's row of TensorBoard's HParams tab; `SummaryWriter.add_hparams` would make a run of its own.

    Relies on: `SummaryWriter._get_file_writer` and `torch.utils.tensorboard.summary.hparams`, which is how
    `TensorBoardLogger.log_hyperparams` does it.

    Args:
        writer: Of the run.
        values: Numbers, bools and strings by name.
        metrics: Tags of scalars, whose last points are shown beside them.
    """
    for summary in hparams(dict(values), dict.fromkeys(metrics, 0.0)):  # type: ignore[no-untyped-call]
        writer._get_file_writer().add_summary(summary)  # type: ignore[no-untyped-call]


def write_margin_charts(writer: SummaryWriter, category: str, charts: Mapping[str, Sequence[tuple[str, ...]]]) -> None:
    """Lay out charts of values between their bounds in TensorBoard's custom scalars, which doesn't smooth them.

    `SummaryWriter.add_custom_scalars` takes one series a chart. Relies on: `SummaryWriter._get_file_writer`.

    Args:
        writer: Of the run.
        category: Title of the group of charts.
        charts: Tags of a value, its lower and its upper bound, a triple a series, by the chart's title; TensorBoard
            shows the chart that is written last first.
    """
    layout = Layout()
    group = layout.category.add(title=category)
    for title, series in reversed(list(charts.items())):
        chart = group.chart.add(title=title)
        for value, lower, upper in series:
            chart.margin.series.add(value=value, lower=lower, upper=upper)
    value = Summary.Value(
        tag=metadata.CONFIG_SUMMARY_TAG,
        tensor=make_tensor_proto(layout.SerializeToString()),
        metadata=metadata.create_summary_metadata(),
    )
    writer._get_file_writer().add_summary(Summary(value=[value]))  # type: ignore[no-untyped-call]
