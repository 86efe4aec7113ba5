"""The parser of the commands that have a model: which classes its options take, and what is said of wrong ones."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import callbacks, loggers
from lightning.pytorch.cli import LightningArgumentParser
from torch import optim

from kdq_lightning.commands.arguments import OneLineErrors, read_yaml
from kdq_lightning.data.datamodules import CIFARDataModule, DigitsDataModule, ImageFolderDataModule
from kdq_lightning.modules.classifier import Classifier
from kdq_lightning.modules.dkd import DecoupledKD
from kdq_lightning.modules.dml import MutualLearning
from kdq_lightning.modules.hint import HintKD
from kdq_lightning.modules.mixup import MixupKD
from kdq_lightning.modules.recover import Recover
from kdq_lightning.modules.vanilla import VanillaKD

STRATEGY_CLASSES = (Classifier, VanillaKD, MixupKD, DecoupledKD, HintKD, MutualLearning, Recover)
SOURCES = (CIFARDataModule, ImageFolderDataModule, DigitsDataModule)

CLASSES = {
    "model": [known.__name__ for known in STRATEGY_CLASSES],
    "data": [known.__name__ for known in SOURCES],
    "trainer.callbacks": callbacks.__all__,
    "trainer.logger": loggers.__all__,
    "optimizer": [name for name in optim.__all__ if name[0].isupper() and name != "Optimizer"],
    "lr_scheduler": [name for name in optim.lr_scheduler.__all__ if name[0].isupper() and name != "LRScheduler"],
}
"""Names of the classes that an option takes; those of other files take their module, too."""

GROUPS = ("trainer", "model", "data", "quantization", "optimizer", "lr_scheduler")
"""Groups of options that `--help.<group>` lists."""


class Parser(OneLineErrors, LightningArgumentParser):
    """LightningCLI's parser."""

    def parse_path(self, cfg_path: Any, *args: Any, **kwargs: Any) -> Namespace:  # noqa: ANN401 - as jsonargparse's
        """Parse a config, after a look at what is in it.

        Raises:
            UserError: If it is empty, no text, or not valid YAML.
        """
        if (path := Path(str(cfg_path))).is_file():  # what a shell's <(...) gives can be read only once
            read_yaml(path, "configs/quickstart.yaml")
        parsed: Namespace = super().parse_path(cfg_path, *args, **kwargs)
        return parsed

    def hint(self, names: Sequence[str], message: str) -> str:
        """Name the classes there are where one is unknown, or say where a file with one is looked for."""
        if "Problem with given class_path" in message and "No module named" in message:
            return ": run the command in the folder that holds the file, or install it"
        if "expected one argument" in message and names[0] in ("model", "data"):
            return f"; so with --{names[0]}.name=value"
        if "required" in message and names[0].endswith((".model", ".data")):
            return ": begin with --config configs/quickstart.yaml"
        missing = re.search(r"Expected a dot import path string: (\S+)", message)
        known = CLASSES.get(names[0].removesuffix(".help"), ()) if names else ()
        if missing is None or not known:
            return ""
        near = get_close_matches(missing[1], known, 1)
        return f": did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"

    def help_option(self, names: Sequence[str], message: str) -> str:
        """Return the option that lists the options of a group, or of the class that has them."""
        group = names[0].partition(".")[0] if names and "." in names[0] else ""
        if found := re.search(r"class_path '([^']+)'", message) if group in ("model", "data") else None:
            return f"--{group}.help {found[1].rpartition('.')[2]}"
        return f"--help.{group}" if group in GROUPS else "--help"


@cache
def parser_of(command: str) -> type[Parser]:
    """Return the class of a command's parsers, those that jsonargparse makes for classes among them.

    Args:
        command: As one types it, such as "kdq fit".
    """
    return type("Parser", (Parser,), {"command": command})
