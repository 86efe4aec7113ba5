"""Refuses callbacks and schedules that watch what a run doesn't log, before it trains an epoch for nothing."""

import re
from collections.abc import Iterator
from difflib import get_close_matches

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks import ModelCheckpoint as LightningModelCheckpoint

from kdq_lightning.errors import UserError
from kdq_lightning.modules.trained import TrainedModule
from kdq_lightning.training.lightning_internals import ModelCheckpoint

LIBRARIES = ("kdq_lightning", "lightning")  # whose classes log nothing that isn't known
COUNTERS = {"epoch", "step"}  # that a ModelCheckpoint can watch, too


class CheckMonitors(Callback):
    """Looks at what EarlyStopping, ModelCheckpoint and schedules watch, where all that is logged is known.

    A user's own module or callback may log more, and a loss has parts that are known after a step: those names are left
    to Lightning, which looks at the end of the epoch.
    """

    def on_train_start(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        """Compare the names.

        Raises:
            UserError: If one isn't logged.
        """
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning
        owners = (pl_module, *callbacks)
        if any(type(owner).__module__.partition(".")[0] not in LIBRARIES for owner in owners):
            return
        assert isinstance(pl_module, TrainedModule)
        names = pl_module.logged_names()
        if not sum(trainer.num_val_batches):
            names = [name for name in names if not name.startswith("val/")]
        for watcher, monitor in _monitors(trainer, callbacks):
            known = {*names, *(COUNTERS if watcher == "ModelCheckpoint" else ())}
            if monitor not in known and not monitor.startswith("train/"):
                meant = re.sub("acc(uracy)?$", "top1", monitor)  # as other projects call it
                near = get_close_matches(meant, names, 1, cutoff=0.8) or [n for n in names if n.endswith(f"/{meant}")]
                hint = f"did you mean {near[0]}? It logs" if near else "give its monitor one of"
                raise UserError(f"{watcher} watches {monitor}, which this run doesn't log: {hint} {', '.join(names)}")


def _monitors(trainer: LightningTrainer, callbacks: list[Callback]) -> Iterator[tuple[str, str]]:
    """Yield what watches, by the name of its class, and what it watches."""
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint):  # ours, which does without
            continue
        if isinstance(callback, EarlyStopping | LightningModelCheckpoint) and callback.monitor:
            yield type(callback).__name__, callback.monitor
    for schedule in trainer.lr_scheduler_configs:
        if schedule.reduce_on_plateau and schedule.monitor:
            yield type(schedule.scheduler).__name__, schedule.monitor
