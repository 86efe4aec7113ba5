"""What is done after training: the best checkpoint is quantized by each method at each bit width."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from torch import nn

from kdq_lightning.data.base import ImageDataModule
from kdq_lightning.errors import UserError
from kdq_lightning.evaluation import full_float32
from kdq_lightning.files import parse_bytes
from kdq_lightning.modules.classifier import Classifier
from kdq_lightning.quantization import Quantized, quantize
from kdq_lightning.quantization.methods import CUSTOM_METHOD, METHODS, MIXED_METHOD, choose_methods
from kdq_lightning.quantization.mixed import check_budgets, check_least
from kdq_lightning.quantization.recipes import make_recipe
from kdq_lightning.runs.identity import Identity
from kdq_lightning.runs.records import FLOAT_BITS, identity
from kdq_lightning.runs.result_folder import ResultFolder
from kdq_lightning.runs.versions import is_version, mark_finished
from kdq_lightning.training.dashboard import has_quantized, publish_quantized
from kdq_lightning.training.plain_run import Evaluate, PlainRun
from kdq_lightning.training.progress_bars import QuantizationBars
from kdq_lightning.training.quantized_run import QuantizedRun
from kdq_lightning.training.result_tables import closing_lines, terminal_table
from kdq_lightning.training.source import Source
from kdq_lightning.training.trained_run import TrainedRun

FLOAT_METHOD = ""  # of the float network's row


class PostTrainingQuantization(Callback):
    """After training, quantizes the best checkpoint by each method at each bit width; the module itself stays as it is.

    Works in any Lightning project. Results go into the folder of the first logger, or into the trainer's
    `default_root_dir` without one: `quantized.csv`, `correct.safetensors`, `layers.csv`, `packed/`; the accuracies go
    to every logger. What has its results there is not done again: after a kill, call `trainer.fit` with the last
    checkpoint once more.
    """

    def __init__(
        self,
        bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8),
        calibration_images: int = 512,
        methods: tuple[str, ...] = tuple(METHODS),
        solver: str | None = None,
        codebook: str | None = None,
        test: bool = True,
        enabled: bool = True,
        network: str | None = None,
        evaluate: Evaluate | None = None,
        budgets: tuple[int | str, ...] = (),
    ) -> None:
        """Choose what is done once training has ended.

        Args:
            bits: Bit widths, 1 to 8.
            calibration_images: Training images that the layers are solved on; all of them where there are fewer.
            methods: `default`, the best known, and `gpfq`, the published recursion; both, side by side, if not given.
            solver: `gpfq`, `gptq`, `least_squares`, `qronos` or `rounding`, in place of the best known for the bit
                width; makes `default` the method `custom`.
            codebook: `paper`, `int`, `signed`, `midrise`, `narrow`, `soft` or `hard`; likewise.
            test: Whether to evaluate on the test images, too; tuning runs leave them alone.
            enabled: Whether to quantize at all.
            network: Name of the network among the module's submodules; if not given, what the module's `networks()`
                returns by name, or its only child with parameters.
            evaluate: Takes a network in eval mode and a loader of the validation or test images, and returns numbers
                by name; `top1`, in percent, is drawn as the accuracy. If not given, batches are (inputs, labels), and
                the network's accuracy on them is measured.
            budgets: Sizes of packed files, such as 100kB, 1.5MB or 50000 bytes. For each one the layers get bit widths
                of their own, so that the file is no larger and the network suffers least; the method `mixed`.

        Raises:
            UserError: If there is no bit width or method, one twice, an option is unknown, or a budget is no size.
        """
        if not bits or len(set(bits)) != len(bits):
            raise UserError(f"bits are one or more different bit widths, got {list(bits)}")
        self.methods = choose_methods(methods, solver, codebook)
        for width in bits:
            make_recipe(width, None, solver=solver, codebook=codebook)
        self.bits = tuple(sorted(bits))
        self.budgets = tuple(sorted(map(parse_bytes, budgets)))
        check_budgets(self.budgets)
        self.calibration_images = calibration_images
        self.test, self.enabled = test, enabled
        self.network, self.evaluate = network, evaluate
        self.config_hash = ""  # set by the command line, which knows the configuration
        self._has_trained = False

    # --- when

    def setup(self, trainer: LightningTrainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse before training what quantization would refuse after it."""
        self._has_trained = False
        quantizes = stage == "fit" or getattr(trainer, "is_quantizing", False)
        if self._is_idle(trainer) or not quantizes or not is_ours(trainer, pl_module):
            return
        if self.network is not None or self.evaluate is not None:
            raise UserError("network and evaluate are for modules of other projects: leave them out")
        trainer.datamodule.calibration_images(self.calibration_images)  # type: ignore[attr-defined]
        if isinstance(pl_module, Classifier) and not pl_module.is_quantized:
            self._check_budgets(pl_module.networks().values())

    def on_train_start(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        """Refuse before the first step what needs the loaders to be seen.

        Raises:
            UserError: If networks or images can't be found.
        """
        self._has_trained = True
        if not self._is_idle(trainer) and not is_ours(trainer, pl_module):
            run = self._plain_run(trainer, pl_module)
            run.check(self.calibration_images)
            self._check_budgets(map(run.network, run.names))

    def _check_budgets(self, networks: Iterable[nn.Module]) -> None:
        for network in networks:
            check_least(network, self.budgets, **self.methods.get(CUSTOM_METHOD, {}))

    def on_train_end(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        """Quantize, and say how to repeat it if that fails: the checkpoint is safe by then.

        Raises:
            UserError: If quantization failed, so that the command's exit code tells.
        """
        if not self._is_idle(trainer):
            self._quantize_after_training(trainer, pl_module)

    def on_fit_end(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        """Quantize a run that is gone on with where nothing was left to train: Lightning calls no other hook then."""
        if not self._has_trained and trainer.ckpt_path is not None and not self._is_idle(trainer):
            self._quantize_after_training(trainer, pl_module)

    def _is_idle(self, trainer: LightningTrainer) -> bool:
        return not self.enabled or bool(trainer.fast_dev_run)  # type: ignore[attr-defined]

    def _quantize_after_training(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        source = self._source(trainer, pl_module)
        try:
            self._quantize(source)
        except (UserError, OSError, MemoryError, torch.OutOfMemoryError) as error:
            raise UserError(
                f"training is finished and its checkpoint kept, but quantization failed: {error}; to repeat only that:"
                f" {source.repeat}"
            ) from error

    # --- what

    def is_complete(self, folder: Path, module: Classifier) -> bool:
        """Return whether a version's folder holds every result of the module's networks."""
        results = ResultFolder(folder, self.config_hash)
        recovered = [identity(record) for record in results.records] if module.is_quantized else []
        wanted = recovered or [row for name in module.networks() for row in self.rows(name)]
        missing = [row for row in wanted if results.missing(row.name, [row.bits], row.method)]
        return has_quantized(folder) and not missing

    def rows(self, name: str) -> list[Identity]:
        """Return the rows of a float network: itself, each method at each bit width, and mixed bits at each budget."""
        float_row = Identity(name, FLOAT_METHOD, FLOAT_BITS)
        uniform = [Identity(name, method, bits) for method in self.methods for bits in self.bits]
        return [float_row, *uniform, *(Identity(name, MIXED_METHOD, budget) for budget in self.budgets)]

    def quantize(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        """Do what the results' folder lacks, network by network, then write dashboard and table.

        Raises:
            UserError: If the network or an option can't be used, or a file can't be written.
        """
        self._quantize(self._source(trainer, pl_module))

    def _source(self, trainer: LightningTrainer, pl_module: LightningModule) -> Source:
        if isinstance(pl_module, Classifier) and is_ours(trainer, pl_module):
            return TrainedRun(trainer, pl_module, self.test, self.config_hash)
        source = self._plain_run(trainer, pl_module)
        options = {"images": self.calibration_images, "test": self.test}
        source.identify(**options, custom=self.methods.get(CUSTOM_METHOD))
        return source

    def _plain_run(self, trainer: LightningTrainer, pl_module: LightningModule) -> PlainRun:
        return PlainRun(trainer, pl_module, self.network, self.evaluate, self.test)

    def _quantize(self, source: Source) -> None:
        source.inputs(source.names[0], self.calibration_images)  # refused, if they are, before anything is written
        run = QuantizedRun(source)
        trainer = source.trainer
        bar = trainer.progress_bar_callback
        if isinstance(bar, RichProgressBar):
            bar.teardown(trainer, trainer.lightning_module, "fit")  # only one display can be live at a time
        shown = trainer.is_global_zero and bar is not None
        with QuantizationBars(shown, after_update=source.stop_if_terminated) as bars:
            for name in source.names:
                if source.packed_weights:
                    self._record_recovered(run, name, bars)
                else:
                    self._quantize_network(run, name, bars)
        source.on_rank_zero(partial(publish, run))

    def _quantize_network(self, run: QuantizedRun, name: str, bars: QuantizationBars) -> None:
        """Evaluate a network in float, once, then quantize it by each method and evaluate it at each bit width."""
        missing = run.missing(self.rows(name))
        if not missing:
            return
        source = run.source
        network = source.network(name)
        float_is_missing = missing[0].method == FLOAT_METHOD
        bars.start(name, (len(missing) + (not float_is_missing)) * source.evaluation_images)
        floats = source.evaluate(name, network, bars.images)
        if float_is_missing:
            run.add_row(missing[0], network, floats, float_evaluations=floats)
        mixed = {MIXED_METHOD: self.methods.get(CUSTOM_METHOD, {})}
        for method, options in {**self.methods, **mixed}.items():
            rows = [row for row in missing if row.method == method]
            if not rows:
                continue
            with full_float32(source.device):
                images = [source.inputs(name, self.calibration_images)]
                sizes = [row.bits for row in rows]
                if method == MIXED_METHOD:
                    room = max(map(run.metadata_bytes, rows))
                    quantized = quantize(
                        network, images, (), budgets=sizes, metadata_bytes=room, progress=bars.layers, **options
                    ).mixed
                else:
                    quantized = quantize(network, images, sizes, progress=bars.layers, **options)
            for row in rows:
                result = quantized.pop(row.bits)  # so that its network's memory is free when it is done
                evaluations = source.evaluate(name, result.model, bars.images)
                run.add_row(row, result.model, evaluations, quantized=result, float_evaluations=floats)

    def _record_recovered(self, run: QuantizedRun, name: str, bars: QuantizationBars) -> None:
        """Evaluate and pack a network that was trained as a quantized one; no float network is its like."""
        source = run.source
        weights = source.packed_weights
        row = Identity(name, *source.packed_row)
        if not run.missing([row]):
            return
        network = source.network(name)
        bars.start(name, source.evaluation_images)
        evaluations = source.evaluate(name, network, bars.images)
        run.add_row(row, network, evaluations, quantized=Quantized(network, [], weights))


def is_ours(trainer: LightningTrainer, module: LightningModule) -> bool:
    """Return whether a run is one of this project, whose networks know the statistics of their inputs."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    return isinstance(module, Classifier) and isinstance(data, ImageDataModule)


def publish(run: QuantizedRun) -> None:
    """Write the results to the loggers, print the table, and mark a version of ours as finished."""
    source, results = run.source, run.results
    publish_quantized(
        source.trainer.loggers,
        results.records,
        results.layers,
        source.splits[source.main_split],
        source.hyperparameters,
    )
    if isinstance(source, TrainedRun) and is_version(source.folder):
        mark_finished(source.folder)
    Console().print(terminal_table(results.records))
    print("\n".join(closing_lines(source.folder, has_quantized(source.folder))), flush=True)
