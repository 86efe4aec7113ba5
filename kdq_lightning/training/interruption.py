"""What a run that is cut off has reached: a checkpoint every few minutes, and at SIGTERM, as clusters send it."""

import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from kdq_lightning.training.lightning_internals import pass_on_signal

ASK_SECONDS = 2.0
SAVE_SECONDS = 300.0  # epochs that take longer are saved in between


class Interruption(Callback):
    """Saves `last.ckpt` every five minutes of an epoch and at SIGTERM, by all processes after the same step.

    Lightning's handler of SIGTERM starts a collective call wherever its process happens to be, between those of a step
    (github.com/Lightning-AI/pytorch-lightning/issues/20806); its saving by time makes one every step. Here a signal is
    only noted, and every couple of seconds all processes ask each other.
    """

    def __init__(self) -> None:
        """Nobody has been told anything yet."""
        self.agreed = False
        self._sigterm_received = self._training = False
        self._last_sync_time = self._saved_at = 0.0
        self._last_sync_step = self._next_sync_step = -1

    def listen(self, trainer: LightningTrainer) -> None:
        """Take the place of Lightning's handler, which Lightning gives back when the run ends."""
        if trainer.world_size == 1 or threading.current_thread() is not threading.main_thread():
            return

        def note(signum: int, frame: FrameType | None) -> None:
            if not self._sigterm_received:
                pass_on_signal(trainer, signum)
            self._sigterm_received = True
            self.agreed |= not self._training

        signal.signal(signal.SIGTERM, note)

    def on_train_start(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        """Start the clocks."""
        self._training = True
        self._last_sync_time = self._saved_at = time.monotonic()
        self._last_sync_step = trainer.fit_loop.total_batch_idx

    def on_save_checkpoint(
        self, trainer: LightningTrainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note that something is saved."""
        self._saved_at = time.monotonic()

    def on_train_batch_end(
        self, trainer: LightningTrainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Ask all processes, at steps that all know: the next is as far as the slowest gets in `ASK_SECONDS`.

        Never while gradients are being accumulated, nor after an epoch's last step, whose validation comes first.
        """
        step = trainer.fit_loop.total_batch_idx
        is_between = (batch_idx + 1) % trainer.accumulate_grad_batches
        if step < self._next_sync_step or is_between or trainer.is_last_batch:
            return
        now = time.monotonic()
        seconds = (now - self._last_sync_time) / max(step - self._last_sync_step, 1)
        mine = torch.tensor([float(self._sigterm_received), seconds, now - self._saved_at], device=pl_module.device)
        told, slowest, unsaved = trainer.strategy.reduce(mine, reduce_op="max").tolist()
        self.agreed = told > 0
        self._last_sync_time, self._last_sync_step = now, step
        self._next_sync_step = step + max(1, int(ASK_SECONDS / slowest))
        if unsaved > SAVE_SECONDS:
            _save(trainer)

    def on_train_end(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        """After training, what is finished is on disk: each process stops for itself."""
        self._training = False
        self.agreed |= self._sigterm_received

    def on_exception(self, trainer: LightningTrainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Told to terminate within an epoch, keep what it has reached; within a validation, the epoch before stays."""
        if isinstance(exception, SIGTERMException) and self._training and trainer.training:
            _save(trainer)


def _save(trainer: LightningTrainer) -> None:
    """Save where the run's newest state is kept, if anything is kept."""
    for keeper in trainer.checkpoint_callbacks:
        if isinstance(keeper, ModelCheckpoint) and keeper.filename == "last" and keeper.dirpath:
            trainer.save_checkpoint(Path(keeper.dirpath, "last.ckpt"))
