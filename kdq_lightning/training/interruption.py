"""Saves `last.ckpt` every few minutes of a long epoch, and when SIGTERM arrives.

The first Ctrl-C does as SIGTERM does; a second one stops at once, and the last checkpoint stays.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from kdq_lightning.training.lightning_internals import pass_on_signal

ASK_SECONDS = 2.0  # between two rounds in which all processes ask each other
SAVE_SECONDS = 300.0  # between two checkpoints of an epoch that takes longer


class StoppedByUser(SIGTERMException):
    """Ctrl-C has ended a run after its step; `str` says what is saved, and the command that goes on."""


class Interruption(Callback):
    """Saves `last.ckpt` every five minutes of an epoch and at SIGTERM, in all processes after the same step.

    Lightning's handler of SIGTERM starts a collective call wherever its process happens to be, between those of a step
    (github.com/Lightning-AI/pytorch-lightning/issues/20806); its saving by time makes one every step. Here a signal is
    only noted, and every couple of seconds all processes ask each other whether one of them has received it.

    Gradients are no part of a checkpoint, so nothing stops or is saved while they are being accumulated.

    Attributes:
        agreed: Whether all processes know that one of them has received SIGTERM, and stop after this step.
        accumulating: Whether the optimizer has yet to step on the gradients of the batches so far.
    """

    def __init__(self) -> None:
        """Start without a signal."""
        self.agreed = self.accumulating = False
        self._sigterm_received = self._training = False
        self._last_sync_time = self._saved_at = 0.0
        self._last_sync_step = self._next_sync_step = -1

    def listen(self, trainer: LightningTrainer) -> None:
        """Replace Lightning's handler of SIGTERM if there are several processes; Lightning removes it at the end."""
        if trainer.world_size == 1 or threading.current_thread() is not threading.main_thread():
            return

        def note(signum: int, frame: FrameType | None) -> None:
            if not self._sigterm_received:
                pass_on_signal(trainer, signum)
            self._sigterm_received = True
            self.agreed |= not self._training

        signal.signal(signal.SIGTERM, note)

    @contextmanager
    def stop_at_ctrl_c(self, trainer: LightningTrainer) -> Iterator[None]:
        """Let the first Ctrl-C stop as SIGTERM does, after the step; the next one stops at once.

        Raises:
            StoppedByUser: In place of Lightning's exception, if it was Ctrl-C.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        pressed, before = [], signal.getsignal(signal.SIGINT)

        def note(signum: int, frame: FrameType | None) -> None:
            signal.signal(signal.SIGINT, before)
            pressed.append(signum)
            print("stopping after this step (Ctrl-C once more stops at once)", file=sys.stderr, flush=True)
            signal.raise_signal(signal.SIGTERM)

        signal.signal(signal.SIGINT, note)
        try:
            yield
        except SIGTERMException as stop:
            if pressed:
                raise StoppedByUser(self._where_it_stopped(trainer)) from stop
            raise
        finally:
            signal.signal(signal.SIGINT, before)

    def on_train_start(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        """Start the clocks."""
        self._training = True
        self._last_sync_time = self._saved_at = time.monotonic()
        self._last_sync_step = trainer.fit_loop.total_batch_idx

    def on_save_checkpoint(
        self, trainer: LightningTrainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note when something is saved."""
        self._saved_at = time.monotonic()

    def on_train_batch_end(
        self, trainer: LightningTrainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Ask all processes for signals and for the time since the last checkpoint, at steps that all of them know.

        The next such step is the one that the slowest process reaches in `ASK_SECONDS`. It is none at which gradients
        are being accumulated, nor an epoch's last one, which is followed by the validation and a checkpoint.
        """
        self.accumulating = bool((batch_idx + 1) % trainer.accumulate_grad_batches) and not trainer.is_last_batch
        step = trainer.fit_loop.total_batch_idx
        if step < self._next_sync_step or self.accumulating or trainer.is_last_batch:
            return
        now = time.monotonic()
        seconds = (now - self._last_sync_time) / max(step - self._last_sync_step, 1)
        mine = torch.tensor([float(self._sigterm_received), seconds, now - self._saved_at], device=pl_module.device)
        received, slowest, unsaved = trainer.strategy.reduce(mine, reduce_op="max").tolist()
        self.agreed = received > 0
        self._last_sync_time, self._last_sync_step = now, step
        self._next_sync_step = step + max(1, int(ASK_SECONDS / slowest))
        if unsaved > SAVE_SECONDS:
            _save(trainer)

    def on_train_end(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        """Let each process stop for itself from here on: what is finished is on disk."""
        self._training = self.accumulating = False
        self.agreed |= self._sigterm_received

    def on_exception(self, trainer: LightningTrainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save at SIGTERM within an epoch's training; within a validation, the last epoch's checkpoint stays."""
        if isinstance(exception, SIGTERMException) and self._training and trainer.training:
            _save(trainer)

    def _where_it_stopped(self, trainer: LightningTrainer) -> str:
        """Say in which epoch a run has stopped, and how to go on."""
        where = "stopped"
        if trainer.training:
            where += f" in epoch {trainer.current_epoch + 1}" if self._training else " after training"
        for keeper in trainer.checkpoint_callbacks:
            if isinstance(keeper, ModelCheckpoint) and keeper.filename == "last" and keeper.dirpath:
                version = Path(os.path.relpath(Path(keeper.dirpath).parent))
                if (version / "checkpoints" / "last.ckpt").is_file():
                    command = f"kdq fit --config {version / 'config.yaml'} --ckpt_path {version}"
                    return f"{where}, saved; go on with: {command}"
        if getattr(trainer, "is_quantizing", False):
            return f"{where}; what is quantized is kept, and the same command goes on"
        return f"{where}; nothing is saved yet"


def _save(trainer: LightningTrainer) -> None:
    """Save `last.ckpt`, unless the run keeps no checkpoints."""
    for keeper in trainer.checkpoint_callbacks:
        if isinstance(keeper, ModelCheckpoint) and keeper.filename == "last" and keeper.dirpath:
            trainer.save_checkpoint(Path(keeper.dirpath, "last.ckpt"))
