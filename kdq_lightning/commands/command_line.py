"""The commands that have a model, `kdq fit, validate, test, predict, quantize`: LightningCLI with our run folders."""

import signal
from pathlib import Path
from typing import Any, NamedTuple

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException

from kdq_lightning.commands.arguments import OneLineErrors, check_class_given, check_given
from kdq_lightning.commands.messages import quieten
from kdq_lightning.data.base import ImageDataModule
from kdq_lightning.data.datamodules import CIFARDataModule, DigitsDataModule, ImageFolderDataModule
from kdq_lightning.errors import UserError
from kdq_lightning.files import file_digest
from kdq_lightning.modules.classifier import Classifier
from kdq_lightning.modules.dkd import DecoupledKD
from kdq_lightning.modules.dml import MutualLearning
from kdq_lightning.modules.hint import HintKD
from kdq_lightning.modules.mixup import MixupKD
from kdq_lightning.modules.recover import Recover
from kdq_lightning.modules.vanilla import VanillaKD
from kdq_lightning.runs.checkpoints import FINISHED, find_checkpoint, read_checkpoint, versions
from kdq_lightning.runs.config_hash import config_hash, version_hash
from kdq_lightning.runs.records import read_records
from kdq_lightning.training.callbacks import NameDeadRank, RunFolder, SaveConfig, WritePredictions, checkpoint_callbacks
from kdq_lightning.training.dashboard import Dashboard
from kdq_lightning.training.lightning_internals import WithoutRunning, completed_epochs
from kdq_lightning.training.post_training import PostTrainingQuantization
from kdq_lightning.training.trainer import Trainer

STRATEGIES = (Classifier, VanillaKD, MixupKD, DecoupledKD, HintKD, MutualLearning, Recover)
SOURCES = (CIFARDataModule, ImageFolderDataModule, DigitsDataModule)


class Parser(OneLineErrors, LightningArgumentParser):
    """LightningCLI's parser."""

    def hint(self, sentence: str) -> str:
        """Name the classes there are where one is unknown."""
        for key, classes in (("model", STRATEGIES), ("data", SOURCES)):
            if f'key "{key}"' in sentence and "Expected a dot import path" in sentence:
                return f"; known: {', '.join(known.__name__ for known in classes)}"
        return ""


class CommandLine(LightningCLI):
    """`kdq fit, validate, test, predict, quantize`: LightningCLI with run folders named after their config."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Add `quantize` to Lightning's own."""
        return {**LightningCLI.subcommands(), "quantize": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's name and the post-fit callback, and let the data say how many classes there are."""
        parser.add_argument(
            "--name", type=str | None, default=None, help="Run folder; default: the config's file name."
        )
        parser.add_lightning_class_args(PostTrainingQuantization, "quantization")
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, then take `--ckpt_path` over from Lightning, which knows neither run folders nor state dicts."""
        super().parse_arguments(parser, args)
        config = self.config[self.config.subcommand]
        check_given(Trainer, config.trainer, "trainer")
        check_given(PostTrainingQuantization, config.quantization, "quantization")
        check_class_given(config.model, "model", later=["num_classes"])
        check_class_given(config.data, "data", later=["num_classes"])
        self.root = Path(config.trainer.default_root_dir).absolute()  # a checkpoint remembers its folder
        self.run_name = config.name = config.name or (Path(str(config.config[0])).stem if config.config else "run")
        self.resumed: Path | None = None
        path, config.ckpt_path = config.ckpt_path, None
        if self.config.subcommand == "fit":
            self.resumed = self._resume_from(path) if path else None
            return
        weights = path or config.model.init_args.get("weights")
        if weights is None:
            raise UserError(
                f"`kdq {self.config.subcommand}` needs trained weights: give --ckpt_path a run folder or a checkpoint"
                f" (for example {self.root / self.run_name})"
            )
        config.model.init_args.weights = str(find_checkpoint(weights))

    def _resume_from(self, path: str) -> Path:
        """Return the checkpoint that training goes on from: the named one, or the newest version's last one."""
        place = self.root / self.run_name if path == "last" else Path(path)
        if place.is_dir() and not (place / "checkpoints").is_dir():
            place = next(reversed(versions(place)), place)
        checkpoint = (place / "checkpoints" / "last.ckpt" if place.is_dir() else place).resolve()
        if not checkpoint.is_file():
            raise UserError(f"{checkpoint} does not exist: there is nothing to go on from, leave out --ckpt_path")
        if checkpoint.parent.name != "checkpoints" or checkpoint.parent.parent not in versions(checkpoint.parents[2]):
            raise UserError(
                f"{checkpoint} lies in no run folder (version_N/checkpoints), so training can't go on there;"
                " to start from its weights, give --model.init_args.weights"
            )
        self.checkpoint = read_checkpoint(checkpoint)
        return checkpoint

    def instantiate_trainer(self, **kwargs: Any) -> LightningTrainer:
        """Give the trainer its run folder, checkpoints and bars."""
        settings = self.config_init[self.subcommand]
        config = settings.trainer
        given = config.get("callbacks") or []
        callbacks = [*(given if isinstance(given, list) else [given]), NameDeadRank()]
        if config.get("enable_progress_bar") is not False:
            callbacks.append(RichProgressBar(refresh_rate=20))
        self.quantization: PostTrainingQuantization = settings.quantization
        if self.subcommand in ("fit", "quantize"):
            self.quantization.config_hash = self.hash_config()
        logger: Any = False
        if self.subcommand == "quantize":
            logger = self._quantization_dashboard()
            callbacks.append(RunFolder())
        elif self.subcommand == "fit":
            logger = self._dashboard() if config.get("logger") in (None, True) else config["logger"]
            callbacks.append(RunFolder())
            if config.get("enable_checkpointing") is not False:
                callbacks += checkpoint_callbacks()
        elif self.subcommand == "predict":
            callbacks.append(WritePredictions(self._predictions_folder))
        try:
            return super().instantiate_trainer(logger=logger, callbacks=callbacks, **kwargs)
        except (MisconfigurationException, ValueError) as error:
            raise UserError(f"the trainer refuses its options: {error}") from error

    def hash_config(self) -> str:
        """Return what the records of this command have as their `config_hash`."""
        config = self.config[self.config.subcommand]
        if self.config.subcommand == "fit":
            return config_hash(config.as_dict())
        path = Path(config.model.init_args.weights)
        trained = version_hash(path.parent.parent) if path.parent.name == "checkpoints" else None
        weights = trained or file_digest(path)
        return config_hash(config.as_dict(), weights=weights)

    def _dashboard(self) -> Dashboard:
        """Return the logger of a new version, or of the one that is gone on with."""
        if self.resumed is None:
            return Dashboard(self.root, self.run_name)
        version = self.resumed.parent.parent
        number = int(version.name.removeprefix("version_"))
        after_step = None if (version / FINISHED).exists() else self.checkpoint["global_step"]
        return Dashboard(version.parent.parent, version.parent.name, number, after_step)

    def _quantization_dashboard(self) -> Dashboard:
        """Return the logger of the newest version, if that is an unfinished one of this config and these weights."""
        name = f"{self.run_name}-quantized"
        newest = next(reversed(versions(self.root / name)), None)
        if newest is None or (newest / FINISHED).exists():
            return Dashboard(self.root, name)
        if Path(self.config.quantize.model.init_args.weights).stat().st_mtime > newest.stat().st_mtime:
            return Dashboard(self.root, name)  # trained again since
        if any(record.config_hash != self.quantization.config_hash for record in read_records(newest)):
            return Dashboard(self.root, name)
        return Dashboard(self.root, name, int(newest.name.removeprefix("version_")))

    def _predictions_folder(self) -> Path:
        """Return the run folder that the weights lie in; weights from elsewhere get a folder of their own."""
        version = Path(self.config.predict.model.init_args.weights).resolve().parent.parent
        if version in versions(version.parent):
            return version
        return Path(Dashboard(self.root, f"{self.run_name}-predicted").log_dir)

    def fit(self, **kwargs: Any) -> None:
        """Train; of a finished run, do only what quantization lacks."""
        if self.resumed is None:
            self.trainer.fit(**kwargs)
            return
        folder = self.resumed.parent.parent
        self._refuse_another_run()
        self.model.weights = None  # Lightning loads the checkpoint after setup; what the run began with may be gone
        if self._has_ended():  # and was cut off before it could say so
            (folder / FINISHED).touch()
        if not (folder / FINISHED).exists():
            self.trainer.fit(**kwargs | {"ckpt_path": str(self.resumed)})
        elif self.quantization.enabled and not self.quantization.is_complete(folder, self.model):
            self.trainer.quantize(self.model, self.datamodule, str(self.resumed))  # type: ignore[attr-defined]
        else:
            raise UserError(f"{folder} is finished: nothing is left to train or to quantize")

    def _has_ended(self) -> bool:
        """Whether the checkpoint that is gone on with is that of the last step."""
        reached = (
            (completed_epochs(self.checkpoint), self.trainer.max_epochs),
            (self.checkpoint["global_step"], self.trainer.max_steps),
        )
        return any(limit is not None and 0 < limit <= done for done, limit in reached)

    def _refuse_another_run(self) -> None:
        """Compare the checkpoint's plan with this command's."""
        self.model.trainer = self.trainer
        self.trainer.datamodule = self.datamodule  # type: ignore[attr-defined]
        now = {
            **self.model.resume_requirements(),
            "num_classes": self.model.num_classes,
            "networks": self.model.network_names(),
        }
        then = {
            **self.checkpoint["plan"],
            "num_classes": self.checkpoint["data"]["num_classes"],
            "networks": {name: entry["network"] for name, entry in self.checkpoint["networks"].items()},
        }
        for name, value in now.items():
            if then.get(name, "sgd" if name == "optimizer" else None) != value:
                raise UserError(
                    f"{self.resumed} was trained with {name} {then.get(name, 'sgd')}, this command says {value}:"
                    f" give the same, or leave out --ckpt_path"
                )


class ConfigReader(WithoutRunning, CommandLine):
    """Parses a command and goes no further."""


class Settings(NamedTuple):
    """What a command would run with.

    Attributes:
        config: All options.
        config_hash: Of its records.
    """

    config: dict[str, Any]
    config_hash: str


def read_settings(args: list[str]) -> Settings:
    """Return what `kdq fit` or `kdq quantize` would run with, without running it.

    Args:
        args: Such as ["fit", "--config", "configs/quickstart.yaml"].

    Raises:
        UserError: If the command needs weights and there are none.
        SystemExit: If an option is unknown or malformed; a sentence has been printed then.
    """
    quieten()
    command_line = build_command_line(ConfigReader, args)
    return Settings(command_line.config[command_line.subcommand].as_dict(), command_line.hash_config())


def build_command_line(kind: type[CommandLine], args: ArgsType) -> CommandLine:
    """Parse a command and run it, if the kind does."""
    return kind(
        Classifier,
        ImageDataModule,
        trainer_class=Trainer,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        parser_class=Parser,
        parser_kwargs={
            "prog": "kdq",
            "description": "Distil image classifiers, quantize them, and compare at equal bytes.",
            "epilog": "Without a model: kdq bench, kdq export, kdq report, kdq study; each has --help.",
            "default_env": True,
            "env_prefix": "KDQ",
        },
        args=args,
    )


def run_command(args: ArgsType = None) -> int:
    """Run `kdq fit`, `validate`, `test`, `predict` or `quantize`, and return the exit code.

    Args:
        args: The command and its options; those of the process if not given.

    Raises:
        SystemExit: With 2 if an option is unknown or malformed, with 143 if the process was told to terminate.
    """
    quieten()
    try:
        build_command_line(CommandLine, args)
    except SIGTERMException as stop:  # Lightning's own leave with 0
        raise SystemExit(128 + signal.SIGTERM) from stop
    return 0
