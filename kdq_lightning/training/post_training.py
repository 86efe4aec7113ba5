"""What is done after training: the best checkpoint is quantized by each method at each bit width."""

from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from torch import Tensor

from kdq_lightning.data.normalization import normalize
from kdq_lightning.errors import UserError
from kdq_lightning.evaluation import full_float32
from kdq_lightning.modules.classifier import Classifier
from kdq_lightning.quantization import Quantized, quantize
from kdq_lightning.quantization.methods import DEFAULT_METHOD, METHODS, choose_methods
from kdq_lightning.quantization.recipes import make_recipe
from kdq_lightning.runs.identity import Identity
from kdq_lightning.runs.records import FLOAT_BITS, identity
from kdq_lightning.runs.result_folder import ResultFolder
from kdq_lightning.runs.versions import mark_finished
from kdq_lightning.training.dashboard import has_quantized, write_quantized
from kdq_lightning.training.progress_bars import QuantizationBars
from kdq_lightning.training.quantized_run import QuantizedRun
from kdq_lightning.training.result_tables import terminal_table
from kdq_lightning.training.trained_run import TrainedRun

FLOAT_METHOD = ""  # of the float network's row


class PostTrainingQuantization(Callback):
    """After training, quantizes the best checkpoint by each method at each bit width; the module itself stays as it is.

    Results go into the run folder: `quantized.csv`, `correct.safetensors`, `layers.csv`, `packed/`, and the dashboard.
    What has its results there is not done again.
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
    ) -> None:
        """Choose what is done once training has ended.

        Args:
            bits: Bit widths, 1 to 8.
            calibration_images: Training images that the layers are solved on.
            methods: `default`, the best known, and `gpfq`, the published recursion; both, side by side, if not given.
            solver: `gpfq`, `gptq`, `least_squares`, `qronos` or `rounding`, in place of the best known for the bit
                width; makes `default` the method `custom`.
            codebook: `paper`, `int`, `signed`, `midrise`, `narrow`, `soft` or `hard`; likewise.
            test: Whether to evaluate on the test images, too; tuning runs leave them alone.
            enabled: Whether to quantize at all.

        Raises:
            UserError: If there is no bit width or method, one twice, or an option is unknown.
        """
        if not bits or len(set(bits)) != len(bits):
            raise UserError(f"bits are one or more different bit widths, got {list(bits)}")
        self.methods = choose_methods(methods, solver, codebook)
        for width in bits:
            make_recipe(width, None, solver=solver, codebook=codebook)
        self.bits = tuple(sorted(bits))
        self.calibration_images = calibration_images
        self.test, self.enabled = test, enabled
        self.config_hash = ""  # set by the command line, which knows the configuration

    def setup(self, trainer: LightningTrainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse before training what quantization would refuse after it."""
        if self.enabled and stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.datamodule.calibration_images(self.calibration_images)  # type: ignore[attr-defined]

    def on_train_end(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        """Quantize, and say how to repeat it if that fails: the checkpoint is safe by then.

        Raises:
            UserError: If quantization failed, so that the command's exit code tells.
        """
        if not self.enabled or trainer.fast_dev_run or trainer.logger is None:  # type: ignore[attr-defined]
            return
        folder = trainer.log_dir  # a collective call, so every rank makes it
        try:
            self.quantize(trainer, pl_module)
        except (UserError, OSError, MemoryError, torch.OutOfMemoryError) as error:
            raise UserError(
                f"training is finished and its checkpoint kept, but quantization failed: {error}; to repeat only that:"
                f" kdq fit --config {folder}/config.yaml --ckpt_path {folder}"
            ) from error

    def is_complete(self, folder: Path, module: Classifier) -> bool:
        """Return whether a version's folder holds every result of the module's networks."""
        results = ResultFolder(folder, self.config_hash)
        recovered = [identity(record) for record in results.records] if module.is_quantized else []
        wanted = recovered or [row for name in module.networks() for row in self.rows(name)]
        missing = [row for row in wanted if results.missing(row.name, [row.bits], row.method)]
        return has_quantized(folder) and not missing

    def rows(self, name: str) -> list[Identity]:
        """Return the rows of a float network: itself, then each method at each bit width."""
        float_row = Identity(name, FLOAT_METHOD, FLOAT_BITS)
        return [float_row, *(Identity(name, method, bits) for method in self.methods for bits in self.bits)]

    def quantize(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        """Do what the run folder lacks, network by network, then write dashboard and table.

        Raises:
            UserError: If the network or an option can't be used, or a file can't be written.
        """
        assert isinstance(pl_module, Classifier)
        source = TrainedRun(trainer, pl_module, self.test)
        calibration = source.calibration_share(self.calibration_images)  # refused, if it is, before anything is written
        run = QuantizedRun(source, self.config_hash)
        bar = trainer.progress_bar_callback
        if isinstance(bar, RichProgressBar):
            bar.teardown(trainer, pl_module, "fit")  # only one display can be live at a time
        shown = trainer.is_global_zero and bar is not None
        with QuantizationBars(shown, after_update=source.stop_if_terminated) as bars:
            for name in pl_module.networks():
                if pl_module.is_quantized:
                    self._record_recovered(run, name, bars)
                else:
                    self._quantize_network(run, name, calibration, bars)
        source.on_rank_zero(partial(publish, run))

    def _quantize_network(self, run: QuantizedRun, name: str, calibration: Tensor, bars: QuantizationBars) -> None:
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
        for method, options in self.methods.items():
            rows = [row for row in missing if row.method == method]
            if not rows:
                continue
            with full_float32(source.device):
                images = normalize(calibration.to(source.device), source.statistics(name))
                widths = [row.bits for row in rows]
                quantized = quantize(network, [images], widths, progress=bars.layers, **options)
            for row in rows:
                result = quantized.pop(row.bits)  # so that its network's memory is free when it is done
                evaluations = source.evaluate(name, result.model, bars.images)
                run.add_row(row, result.model, evaluations, quantized=result, float_evaluations=floats)

    def _record_recovered(self, run: QuantizedRun, name: str, bars: QuantizationBars) -> None:
        """Evaluate and pack a network that was trained as a quantized one; no float network is its like."""
        source = run.source
        weights = source.packed_weights
        row = Identity(name, DEFAULT_METHOD, max(weight.bits for weight in weights.values()))
        if not run.missing([row]):
            return
        network = source.network(name)
        bars.start(name, source.evaluation_images)
        evaluations = source.evaluate(name, network, bars.images)
        run.add_row(row, network, evaluations, quantized=Quantized(network, [], weights))


def publish(run: QuantizedRun) -> None:
    """Write the dashboard, print the table, and mark the version as finished."""
    folder, results = run.source.folder, run.results
    main = run.source.splits.get("test") or run.source.splits["val"]
    write_quantized(folder, results.records, results.layers, len(main.labels), dict(run.source.module.hparams))
    mark_finished(folder)
    console = Console()
    console.print(terminal_table(results.records))
    console.print(f"records and packed files: {folder}", soft_wrap=True)
    console.print(f"curves (take the smoothing away): tensorboard --logdir {folder.parent.parent}", soft_wrap=True)
