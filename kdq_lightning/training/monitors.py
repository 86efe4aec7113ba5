"""Refuses callbacks and schedules that watch what a run doesn't log, before it trains an epoch for nothing."""

import re
from collections.abc import Iterator
from difflib import get_close_matches
from typing import cast

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks import ModelCheckpoint as LightningModelCheckpoint
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from kdq_lightning.errors import UserError
from kdq_lightning.modules.trained import TrainedModule
from kdq_lightning.training.lightning_internals import ModelCheckpoint

LIBRARIES = ("kdq_lightning", "lightning")  # whose classes log nothing that isn't known
COUNTERS = {"epoch", "step"}  # that a ModelCheckpoint can watch, too
BETTER = {"top1": "max", "top5": "max", "agreement": "max", "loss": "min", "ece": "min"}
"""Whether more or less of a score is better, by its name without split and peer."""


class CheckMonitors(Callback):
    """Looks at what EarlyStopping, ModelCheckpoint and schedules watch, where all that is logged is known.

    A user's own module or callback may log more: those names are left to Lightning, which looks at the end of the
    epoch. The parts of a loss are known once it has been taken.
    """

    def __init__(self) -> None:
        """Nothing is checked yet."""
        self._is_checked = False

    def on_train_start(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        """Look at all names but those of the parts of a loss.

        Raises:
            UserError: If one isn't logged, or is watched for getting worse.
        """
        _check(trainer, pl_module, except_for="train/")
        self._is_checked = False

    def on_before_backward(self, trainer: LightningTrainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Look at all names, before the first step is taken.

        Raises:
            UserError: If one isn't logged.
        """
        if not self._is_checked:
            _check(trainer, pl_module)
            self._is_checked = True


def _check(trainer: LightningTrainer, module: LightningModule, except_for: str | None = None) -> None:
    """Compare what is watched with what is logged.

    Args:
        trainer: Of the run.
        module: Its module.
        except_for: Beginning of the names that are passed over.

    Raises:
        UserError: If a name isn't logged, or is watched for getting worse.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning
    owners = (module, *callbacks)
    if any(type(owner).__module__.partition(".")[0] not in LIBRARIES for owner in owners):
        return
    assert isinstance(module, TrainedModule)
    names = module.logged_names()
    if not sum(trainer.num_val_batches):
        names = [name for name in names if not name.startswith("val/")]
    for watcher, monitor, mode in _monitors(trainer, callbacks):
        known = {*names, *(COUNTERS if watcher == "ModelCheckpoint" else ())}
        if monitor not in known and not (except_for and monitor.startswith(except_for)):
            meant = re.sub("acc(uracy)?$", "top1", monitor)  # as other projects call it
            near = get_close_matches(meant, names, 1, cutoff=0.8) or [n for n in names if n.endswith(f"/{meant}")]
            hint = f"did you mean {near[0]}? It logs" if near else "give its monitor one of"
            raise UserError(f"{watcher} watches {monitor}, which this run doesn't log: {hint} {', '.join(names)}")
        better = BETTER.get([*monitor.split("/"), ""][1])
        if better and mode != better:
            more = "more" if better == "max" else "less"
            raise UserError(
                f"{watcher} watches {monitor} with mode {mode}, but {more} of it is better: give it mode {better}"
            )


def _monitors(trainer: LightningTrainer, callbacks: list[Callback]) -> Iterator[tuple[str, str, str]]:
    """Yield what watches, by the name of its class, what it watches, and for the least (`min`) or the most (`max`)."""
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint):  # ours, which does without
            continue
        if isinstance(callback, EarlyStopping | LightningModelCheckpoint) and callback.monitor:
            yield type(callback).__name__, callback.monitor, callback.mode
    for schedule in trainer.lr_scheduler_configs:
        if schedule.reduce_on_plateau and schedule.monitor:
            plateau = cast(ReduceLROnPlateau, schedule.scheduler)
            yield type(plateau).__name__, schedule.monitor, plateau.mode
