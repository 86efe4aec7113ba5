"""SIGTERM, as clusters send it before they take a machine away: processes that train together stop together."""

import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch import Trainer as LightningTrainer

AGREE_SECONDS = 2.0


class StopTogether(Callback):
    """Ends the training of several processes after the same step once one of them was told to terminate.

    Lightning's own handler starts a collective call wherever its process happens to be, between those of a step
    (github.com/Lightning-AI/pytorch-lightning/issues/20806). Here it is only noted, and every couple of seconds all
    processes ask each other.
    """

    def __init__(self) -> None:
        """Nobody has been told anything yet."""
        self.agreed = False
        self._told = self._training = False
        self._asked_at = 0.0
        self._asked_after = self._asks_after = -1

    def listen(self, trainer: LightningTrainer) -> None:
        """Take the place of Lightning's handler, which Lightning gives back when the run ends."""
        if trainer.world_size == 1 or threading.current_thread() is not threading.main_thread():
            return

        def note(signum: int, frame: FrameType | None) -> None:
            launcher = trainer.strategy.launcher
            if not self._told and launcher is not None:
                launcher.kill(signum)  # which passes it on to the processes that this one has started
            self._told = True
            self.agreed |= not self._training

        signal.signal(signal.SIGTERM, note)

    def on_train_start(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._training = True
        self._asked_at, self._asked_after = time.monotonic(), trainer.fit_loop.total_batch_idx

    def on_train_batch_end(self, trainer: LightningTrainer, pl_module: LightningModule, *_: Any) -> None:
        """Ask all processes, at steps that all know: the next is as far as the slowest gets in `AGREE_SECONDS`."""
        step = trainer.fit_loop.total_batch_idx
        if trainer.world_size == 1 or step < self._asks_after:
            return
        seconds = (time.monotonic() - self._asked_at) / max(step - self._asked_after, 1)
        mine = torch.tensor([float(self._told), seconds], device=pl_module.device)
        told, slowest = trainer.strategy.reduce(mine, reduce_op="max").tolist()
        self.agreed = told > 0
        self._asked_at, self._asked_after = time.monotonic(), step
        self._asks_after = step + max(1, int(AGREE_SECONDS / slowest))

    def on_train_end(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        """After training, what is finished is on disk: each process stops for itself."""
        self._training = False
        self.agreed |= self._told
