"""The commands that have a model, `kdq fit, validate, test, predict, quantize`: LightningCLI with our run folders."""

import os
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, LRSchedulerTypeTuple
from rich.console import Console
from torch.optim import Optimizer

from kdq_lightning.commands.arguments import check_class_given, check_given
from kdq_lightning.commands.model_parser import GROUPS, Parser
from kdq_lightning.commands.resuming import ResumedRun, find_resumed_run, unfinished_quantization
from kdq_lightning.errors import UserError
from kdq_lightning.files import file_digest
from kdq_lightning.quantization.packing import is_packed
from kdq_lightning.runs.checkpoints import find_checkpoint
from kdq_lightning.runs.config_hash import config_hash, version_hash
from kdq_lightning.runs.versions import is_finished, is_version, mark_finished
from kdq_lightning.training.callbacks import NameDeadRank, RunFolder, WritePredictions, checkpoint_callbacks
from kdq_lightning.training.dashboard import Dashboard
from kdq_lightning.training.header import LABEL, Header
from kdq_lightning.training.lightning_internals import EpochBar
from kdq_lightning.training.monitors import CheckMonitors
from kdq_lightning.training.post_training import PostTrainingQuantization
from kdq_lightning.training.result_tables import SCORES_EXPLAINED, quantize_command, scores_table
from kdq_lightning.training.trainer import Trainer


class CommandLine(LightningCLI):
    """`kdq fit, validate, test, predict, quantize`: LightningCLI with run folders named after their config.

    Attributes:
        root: Folder of all runs, absolute, as a checkpoint remembers its folder.
        run_name: Name of this command's run folder in it.
        resumed: The run that `fit` goes on with; None if it starts a new one.
        quantization: The post-fit callback.
    """

    # --- options

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Add `quantize` to Lightning's own."""
        return {**LightningCLI.subcommands(), "quantize": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's name and the post-fit callback, and let the data say how many classes there are."""
        parser.add_argument(
            "--name", type=str | None, default=None, help="Run folder; default: the config's file name."
        )
        if set(self.subcommands()) == {"predict"}:  # as the options of one command alone are collected
            parser.add_argument(
                "--images", type=str | None, default=None, help="Folder of images to predict; default: the test images."
            )
        own = {"network", "evaluate"}  # of modules that are not ours
        parser.add_class_arguments(PostTrainingQuantization, "quantization", sub_configs=True, skip=own)
        parser.callback_keys.append("quantization")
        parser.add_optimizer_args((Optimizer,))
        parser.add_lr_scheduler_args(LRSchedulerTypeTuple)
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")
        assert isinstance(parser, Parser) and parser.groups is not None
        parser.groups["lr_scheduler"].title = "Schedule of the learning rate, beside --optimizer"
        parser.add_group_help(GROUPS)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, then take `--ckpt_path` over from Lightning, which knows neither run folders nor state dicts."""
        super().parse_arguments(parser, args)
        config = self.config[self.config.subcommand]
        check_given(Trainer, config.trainer, "trainer")
        check_given(PostTrainingQuantization, config.quantization, "quantization")
        check_class_given(config.model, "model", later=["num_classes"])
        check_class_given(config.data, "data", later=["num_classes"])
        _expand_home(config)
        for key in ("max_epochs", "max_steps", "limit_train_batches"):
            if self.config.subcommand == "fit" and config.trainer[key] == 0:
                raise UserError(f"trainer.{key} 0 trains nothing: give more; what is trained, kdq quantize quantizes")
        if config.get("lr_scheduler") and not config.get("optimizer"):
            raise UserError("--lr_scheduler belongs to an optimizer that you choose: give --optimizer, too")
        self.root = Path(config.trainer.default_root_dir).absolute()
        self.run_name = config.name = config.name or (Path(str(config.config[0])).stem if config.config else "run")
        self.resumed: ResumedRun | None = None
        path, config.ckpt_path = config.ckpt_path, None
        if self.config.subcommand == "fit":
            self.resumed = find_resumed_run(path, self.root / self.run_name) if path else None
            return
        weights = path or config.model.init_args.get("weights")
        if weights is None:
            raise UserError(
                f"`kdq {self.config.subcommand}` needs trained weights: give --ckpt_path a run folder or a checkpoint"
                f" (for example {self.root / self.run_name})"
            )
        config.model.init_args.weights = str(find_checkpoint(weights))

    def hash_config(self) -> str:
        """Return the `config_hash` of this command's records."""
        config = self.config[self.config.subcommand]
        if self.config.subcommand == "fit":
            return config_hash(config.as_dict())
        path = Path(config.model.init_args.weights)
        trained = version_hash(path.parent.parent) if path.parent.name == "checkpoints" else None
        return config_hash(config.as_dict(), weights=trained or file_digest(path))

    # --- the module, the trainer and its run folder

    def before_instantiate_classes(self) -> None:
        """Forget the seed of an earlier command of this process, if this one has none."""
        if self.config[self.subcommand].seed_everything is False:
            os.environ.pop("PL_GLOBAL_SEED", None)

    def instantiate_classes(self) -> None:
        """Tell the module what options beside its own say of its training."""
        super().instantiate_classes()
        config = self.config[self.subcommand]
        self.model.is_seeded = config.seed_everything is not False
        if config.get("optimizer"):
            self.model.use_optimizer(config.optimizer.as_dict(), config.lr_scheduler and config.lr_scheduler.as_dict())

    def instantiate_trainer(self, **kwargs: Any) -> LightningTrainer:
        """Give the trainer the run folder, the callbacks and the bars that the command needs."""
        settings = self.config_init[self.subcommand]
        self.quantization: PostTrainingQuantization = settings.quantization
        if self.subcommand in ("fit", "quantize"):
            self.quantization.config_hash = self.hash_config()
        given = settings.trainer.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        if refused := [callback for callback in given if isinstance(callback, LearningRateFinder | BatchSizeFinder)]:
            raise UserError(
                f"{type(refused[0]).__name__} would train with other numbers than config and records say: leave it out,"
                " and give --model.init_args.learning_rate or --data.batch_size"
            )
        callbacks = [*given, NameDeadRank(), Header()]
        if settings.trainer.get("enable_progress_bar") is not False:
            callbacks.append(EpochBar(refresh_rate=20))
        keeps_checkpoints = settings.trainer.get("enable_checkpointing") is not False
        callbacks += self._callbacks_of_command(keeps_checkpoints)
        logger = self._run_logger(settings.trainer.get("logger"))
        if self.subcommand != "fit":  # which computes in float32, whatever the network was trained in
            kwargs["precision"] = "32-true"
        try:
            return super().instantiate_trainer(logger=logger, callbacks=callbacks, **kwargs)
        except (MisconfigurationException, ValueError, TypeError) as error:
            raise UserError(f"the trainer refuses its options: {error}") from error

    def _callbacks_of_command(self, keeps_checkpoints: bool) -> list[Callback]:
        if self.subcommand == "fit":
            return [CheckMonitors(), RunFolder(), *(checkpoint_callbacks() if keeps_checkpoints else [])]
        if self.subcommand == "quantize":
            return [RunFolder()]
        if self.subcommand == "predict":
            return [WritePredictions(self._predictions_path)]
        return []

    def _run_logger(self, given: Any) -> Any:  # noqa: ANN401 - one logger, several, or False for none
        """Return the dashboard of a run folder, or for `fit` the logger that the user gives; others have none."""
        if self.subcommand == "fit":
            if given not in (None, True):
                return given
            return self.resumed.dashboard() if self.resumed else Dashboard(self.root, self.run_name)
        if self.subcommand == "quantize":
            name, weights = f"{self.run_name}-quantized", Path(self.config.quantize.model.init_args.weights)
            number = unfinished_quantization(self.root / name, weights, self.quantization.config_hash)
            return Dashboard(self.root, name, number)
        return False

    def _predictions_path(self) -> Path:
        """Return the file for predictions, in the run folder that the weights lie in.

        Weights from elsewhere get a folder of their own, and a packed file gets a name of its own.
        """
        weights = Path(self.config.predict.model.init_args.weights).resolve()
        version = weights.parent.parent
        if not is_version(version):
            version = Path(Dashboard(self.root, f"{self.run_name}-predicted").log_dir)
        return version / (f"predictions-{weights.stem}.csv" if is_packed(weights) else "predictions.csv")

    def before_fit(self) -> None:
        """Claim the version before there are further processes, so that this one can remove it if one of them fails."""
        for logger in self.trainer.loggers:
            if isinstance(logger, Dashboard):
                logger.claim()

    before_quantize = before_fit

    def before_predict(self) -> None:
        """Let the datamodule predict the images of a folder, if one is given."""
        if folder := self.config.predict.images:
            self.datamodule.prepare_data()
            self.datamodule.predict_folder(Path(folder))

    # --- running

    def fit(self, **kwargs: Any) -> None:
        """Train; if the run is finished, do what quantization lacks.

        Raises:
            UserError: If another run is gone on with, or there is nothing left to do.
        """
        run = self.resumed
        if run is None:
            self.trainer.fit(**kwargs)
            return
        self.model.trainer = self.trainer
        self.trainer.datamodule = self.datamodule  # type: ignore[attr-defined]
        run.check_is_run_of(self.model)
        # Lightning loads the checkpoint after setup; what the run began with may be gone.
        self.model.weights, self.model.pretrained = None, False
        if run.has_ended(self.trainer):  # and was cut off before it could say so
            mark_finished(run.folder)
        if not is_finished(run.folder):
            self.trainer.fit(**kwargs | {"ckpt_path": str(run.path)})
        elif self.quantization.enabled and not self.quantization.is_complete(run.folder, self.model):
            self.trainer.quantize(self.model, self.datamodule, str(run.path))  # type: ignore[attr-defined]
        else:
            raise UserError(
                f"{run.folder} is finished: nothing is left to train or to quantize; leave out --ckpt_path to start a"
                " new version"
            )

    def test(self, verbose: bool = True, **kwargs: Any) -> None:
        """Evaluate on the test images, and print the table unless `verbose` is off."""
        self._evaluate("test", verbose, **kwargs)

    def validate(self, verbose: bool = True, **kwargs: Any) -> None:
        """Evaluate on the validation images, and print the table unless `verbose` is off."""
        self._evaluate("validate", verbose, **kwargs)

    def _evaluate(self, command: str, verbose: bool, **kwargs: Any) -> None:
        """Evaluate, and print our table in place of Lightning's, which has 14 decimals."""
        scores = getattr(self.trainer, command)(**kwargs, verbose=False)
        if verbose and self.trainer.is_global_zero and scores:
            split = "test" if command == "test" else "validation"
            title = f"{self.datamodule.dataset}: {split} images"
            Console().print(scores_table(title, scores[0], self.model.network_names()))
            print(SCORES_EXPLAINED)

    def after_fit(self) -> None:
        """Say how to quantize a run that has only been trained."""
        if self.trainer.is_global_zero and self.trainer.loggers and not self.quantization.enabled:
            folder = Path(self.trainer.loggers[0].log_dir or "")
            if (folder / "checkpoints" / "last.ckpt").is_file():
                print(f"{'next':<{LABEL}}{quantize_command(folder)}")


def _expand_home(config: Namespace) -> None:
    """Put the home folder in place of `~` in the options that are paths, as a shell does not in `--option=~/x`."""
    places = (
        *((config, "ckpt_path"), (config.trainer, "default_root_dir"), (config.data.get("init_args"), "root")),
        *((config.model.get("init_args"), key) for key in ("weights", "teacher", "teacher_cache", "packed")),
        (config, "images"),
    )
    for group, key in places:
        if group is not None and isinstance(path := group.get(key), str | Path) and str(path).startswith("~"):
            group[key] = type(path)(os.path.expanduser(path))
