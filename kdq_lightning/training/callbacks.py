"""What happens around training: the run folder's files, which process was killed, predictions on disk."""

import csv
import io
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from kdq_lightning.data.base import ImageDataModule
from kdq_lightning.files import remove_empty, remove_leftovers, write_atomically
from kdq_lightning.runs.records import RECORDS
from kdq_lightning.runs.versions import is_version, mark_finished
from kdq_lightning.training.lightning_internals import ModelCheckpoint, started_processes

KEPT = ("checkpoints", RECORDS)  # a folder that holds one of them stays when its run fails
DEATH_SECONDS = 2  # from a lost connection to the exit code of the process at its other end


def checkpoint_callbacks() -> list[ModelCheckpoint]:
    """Return what writes `checkpoints/best.ckpt` (highest `val/top1`) and `checkpoints/last.ckpt` (every epoch)."""
    best = ModelCheckpoint(
        filename="best", monitor="val/top1", mode="max", save_on_train_epoch_end=True, enable_version_counter=False
    )
    last = ModelCheckpoint(filename="last", save_on_train_epoch_end=True, enable_version_counter=False)
    return [best, last]


class SaveConfig(SaveConfigCallback):
    """Writes the whole configuration into the run folder; a command without a run folder writes none."""

    def setup(self, trainer: LightningTrainer, pl_module: LightningModule, stage: str) -> None:
        """Write `config.yaml` before training begins."""
        if stage == "fit" or trainer.logger:
            super().setup(trainer, pl_module, stage)


class RunFolder(Callback):
    """Marks a run as finished, removes what a killed run left behind, and the folder of a failed one with no result."""

    def setup(self, trainer: LightningTrainer, pl_module: LightningModule, stage: str) -> None:
        """Remove half-written files that killed runs of this name left behind."""
        if trainer.is_global_zero and trainer.logger and trainer.logger.log_dir:
            remove_leftovers(Path(trainer.logger.log_dir).parent)

    def on_train_end(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        """Mark the weights as final: a teacher is taken from such a version only."""
        folder = trainer.log_dir  # a collective call, so every rank makes it
        if trainer.is_global_zero and folder and trainer.logger:
            mark_finished(Path(folder))

    def on_exception(self, trainer: LightningTrainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the folder if it holds neither a checkpoint nor a record, and those above it that are empty then."""
        saves_then = isinstance(exception, SIGTERMException) and trainer.global_step > 0
        if trainer.is_global_zero and trainer.logger and not saves_then:
            folder = Path(trainer.logger.log_dir or "")
            if is_version(folder) and not any((folder / kept).exists() for kept in KEPT):
                shutil.rmtree(folder, ignore_errors=True)
                remove_empty([folder.parent, Path(trainer.default_root_dir)])


class LogSteps(Callback):
    """Writes `train/loss_step`, a mean over the ranks' batches, and `lr_step`; at other steps it reads no tensor."""

    def __init__(self, every: int) -> None:
        """Choose the steps.

        Args:
            every: Steps of the optimizer from one point to the next.
        """
        self.every = every
        self._last_step = 0

    def on_train_start(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        """Begin after the step of the checkpoint, whose point stands."""
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: LightningTrainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's type has no keys
        batch: object,
        batch_idx: int,
    ) -> None:
        """Log after the optimizer's step, not after each batch whose gradients it takes."""
        step = trainer.global_step
        if step % self.every or step == self._last_step:
            return
        self._last_step = step
        loss = outputs["loss"] * trainer.accumulate_grad_batches  # which Lightning has divided it by
        mean = float(trainer.strategy.reduce(loss, reduce_op="mean"))
        metrics = {"train/loss_step": mean, "lr_step": trainer.optimizers[0].param_groups[0]["lr"]}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step)


class NameDeadRank(Callback):
    """Says which rank was killed, where torch only says that a connection was closed."""

    def on_exception(self, trainer: LightningTrainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Add a note to the error if one of the processes that this one has started is gone."""
        if not isinstance(exception, RuntimeError):
            return
        processes = started_processes(trainer)
        deadline = time.monotonic() + DEATH_SECONDS
        while not any(process.poll() for process in processes) and processes and time.monotonic() < deadline:
            time.sleep(0.1)
        for rank, process in enumerate(processes, start=trainer.global_rank + 1):
            if (process.returncode or 0) < 0:
                exception.add_note(f"rank {rank} was killed by signal {-process.returncode}, so the run has ended")


class WritePredictions(lightning_callbacks.BasePredictionWriter):
    """Writes a table of each image's file, label, predicted class and its probability; classes by their names."""

    def __init__(self, path: Callable[[], Path]) -> None:
        """Choose the file.

        Args:
            path: Returns it; called when there is something to write.
        """
        super().__init__(write_interval="epoch")
        self.path = path

    def write_on_epoch_end(
        self,
        trainer: LightningTrainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Collect the predictions of all ranks, sort them by image, and write the file."""
        rows = [
            row for index, top1, p in predictions for row in zip(index.tolist(), top1.tolist(), p.tolist(), strict=True)
        ]
        if trainer.world_size > 1:
            shards: list[list[tuple[int, int, float]]] = [[] for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(shards, rows)
            rows = [row for shard in shards for row in shard]
        if trainer.is_global_zero:
            path = self.path()
            write_atomically(path, predictions_table(rows, trainer.datamodule))  # type: ignore[attr-defined]
            trainer.print(f"{len(rows)} predictions in {path}")


def predictions_table(rows: Iterable[tuple[int, int, float]], data: ImageDataModule) -> bytes:
    """Return the CSV file of predictions, in order of the images.

    Args:
        rows: Index in `data.predicted_set`, predicted class and its probability, of each image.
        data: Where the images come from; those without files are called `test/<index>`.
    """
    images, classes = data.predicted_set, data.class_names
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["file", "label", "predicted", "probability"])
    for index, predicted, probability in sorted(rows):
        label = int(images.labels[index])
        file = images.files[index] if images.files else f"test/{index}"
        writer.writerow([file, classes[label] if label >= 0 else "", classes[predicted], f"{probability:.6f}"])
    return table.getvalue().encode(errors="backslashreplace")  # names of files are bytes, not always UTF-8
