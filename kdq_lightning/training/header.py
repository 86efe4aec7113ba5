"""The first lines of a command: what it works on."""

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Callback
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.trainer.states import TrainerFn

from kdq_lightning.data.base import ImageDataModule
from kdq_lightning.modules.classifier import Classifier
from kdq_lightning.runs.class_names import shorten_names

WIDTH, LABEL = 80, 11  # columns


class Header(Callback):
    """Prints network, data, device and folder, and where weights and teacher come from; the Trainer asks for it."""

    def announce(self, trainer: LightningTrainer, module: Classifier, data: ImageDataModule) -> None:
        """Print the lines; every process calls this, once all files are read.

        Args:
            trainer: Of the command.
            module: Its module, set up.
            data: Its images, set up.
        """
        folder = trainer.log_dir if trainer.loggers else None  # a collective call
        if trainer.is_global_zero:
            print("\n".join(header_lines(trainer, module, data, folder)), flush=True)


def header_lines(trainer: LightningTrainer, module: Classifier, data: ImageDataModule, folder: str | None) -> list[str]:
    """Return the lines, at most 80 columns wide unless a path is longer.

    Args:
        trainer: Of the command.
        module: Its module, set up.
        data: Its images, set up.
        folder: That the command writes into; None if it writes into none.
    """
    sizes = [sum(parameter.numel() for parameter in network.parameters()) for network in module.networks().values()]
    names = " + ".join(module.network_names().values())
    counts = f"{len(data.train_index):,} to train, {len(data.val_index):,} to validate"
    if trainer.state.fn == TrainerFn.TESTING:  # other commands may have to leave the test images alone
        counts = f"{len(data.test_set):,} to test"
    shape = " x ".join(map(str, data.image_shape))
    processes = f", {trainer.world_size} processes" if trainer.world_size > 1 else ""
    teacher = getattr(module, "teacher", None)
    given = module.given_optimizer if trainer.state.fn == TrainerFn.FITTING else None
    facts = [
        ("network", [f"{names}, {' + '.join(f'{size:,}' for size in sizes)} parameters"]),
        ("data", [f"{data.dataset}, images of {shape}: {counts}"]),
        ("classes", [f"{data.num_classes}: {shorten_names(data.class_names, shown=8)}"]),
        ("device", [f"{trainer.strategy.root_device}, {trainer.precision}{processes}"]),
        ("trained by", [given.optimizer_text, given.lr_scheduler_text or "constant learning rate"] if given else []),
        ("folder", [relative_path(folder)] if folder else []),
        ("weights", [relative_path(module.origin[0]), *module.origin[1:]] if module.origin else []),
        ("teacher", [relative_path(teacher.origin[0]), *teacher.origin[1:]] if teacher and teacher.origin else []),
        ("note", [*module.notes, *data.notes]),
    ]
    return [line for label, texts in facts for line in _labelled(label, texts)]


def _labelled(label: str, texts: Sequence[str]) -> list[str]:
    """Return texts wrapped to 80 columns, the label before the first line."""
    lines = []
    for text in texts:
        lines += textwrap.wrap(text, WIDTH - LABEL, break_long_words=False, break_on_hyphens=False)
    return [f"{'' if i else label:<{LABEL}}{line}" for i, line in enumerate(lines)]


def relative_path(path: str) -> str:
    """Return a path relative to the working folder, if it is below it."""
    here, there = Path.cwd(), Path(os.path.abspath(path))
    return str(there.relative_to(here)) if there.is_relative_to(here) else path
