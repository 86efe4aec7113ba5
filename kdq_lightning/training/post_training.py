"""The post-fit callback: the best checkpoint at every bit width, evaluated, recorded, packed and on the dashboard."""

from functools import partial
from pathlib import Path
from typing import Any

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
from kdq_lightning.quantization.recipes import make_recipe
from kdq_lightning.runs.identity import DEFAULT_METHOD
from kdq_lightning.runs.records import FLOAT_BITS, identity
from kdq_lightning.runs.result_folder import ResultFolder
from kdq_lightning.runs.versions import mark_finished
from kdq_lightning.training.dashboard import has_quantized, terminal_table, write_quantized
from kdq_lightning.training.progress_bars import QuantizationBars
from kdq_lightning.training.quantized_run import QuantizedRun
from kdq_lightning.training.trained_run import TrainedRun

METHODS: dict[str, dict[str, Any]] = {"default": {}}
"""Options of `quantize` that make a method: `default` is the best known for each bit width."""


class PostTrainingQuantization(Callback):
    """After training, quantizes the best checkpoint at each bit width; the trained module stays as it is.

    Results go into the run folder: `quantized.csv`, `correct.safetensors`, `layers.csv`, `packed/`, and the dashboard.
    A bit width whose results are there is not done again.
    """

    def __init__(
        self,
        bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8),
        calibration_images: int = 512,
        solver: str | None = None,
        codebook: str | None = None,
        test: bool = True,
        enabled: bool = True,
    ) -> None:
        """Choose what is done once training has ended.

        Args:
            bits: Bit widths, 1 to 8.
            calibration_images: Training images that the layers are solved on.
            solver: `gpfq`, `gptq`, `lsq`, `qronos` or `rounding`; the best known for the bit width if not given.
            codebook: `paper`, `int`, `signed`, `midrise`, `narrow`, `soft` or `hard`; likewise.
            test: Whether to evaluate on the test images, too; tuning runs leave them alone.
            enabled: Whether to quantize at all.

        Raises:
            UserError: If there is no bit width, one twice, or an option is unknown.
        """
        if not bits or len(set(bits)) != len(bits):
            raise UserError(f"bits are one or more different bit widths, got {list(bits)}")
        for width in bits:
            make_recipe(width, None, solver=solver, codebook=codebook)
        self.bits = tuple(sorted(bits))
        self.calibration_images = calibration_images
        self.solver, self.codebook = solver, codebook
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
        recovered = [identity(record).bits for record in results.records] if module.is_quantized else []
        widths = recovered or [*self.bits, FLOAT_BITS]
        return has_quantized(folder) and not any(results.missing(name, widths) for name in module.networks())

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
        """Evaluate a network in float, then quantize it by each method and evaluate it at each bit width."""
        missing = {method: run.missing(name, self.bits, method) for method in METHODS}
        float_is_missing = bool(run.missing(name, [FLOAT_BITS]))
        rows = sum(map(len, missing.values()))
        if not rows and not float_is_missing:
            return
        source = run.source
        network = source.network(name)
        bars.start(name, (1 + rows) * source.evaluation_images)
        floats = source.evaluate(name, network, bars.images)
        if float_is_missing:
            run.add_row(name, FLOAT_BITS, network, floats, float_evaluations=floats)
        for method, options in METHODS.items():
            if not missing[method]:
                continue
            with full_float32(source.device):
                images = normalize(calibration.to(source.device), source.statistics(name))
                quantized = quantize(
                    network,
                    [images],
                    missing[method],
                    solver=self.solver,
                    codebook=self.codebook,
                    progress=bars.layers,
                    **options,
                )
            for bits in missing[method]:
                result = quantized.pop(bits)  # so that its network's memory is free when it is done
                evaluations = source.evaluate(name, result.model, bars.images)
                run.add_row(
                    name, bits, result.model, evaluations, method=method, quantized=result, float_evaluations=floats
                )

    def _record_recovered(self, run: QuantizedRun, name: str, bars: QuantizationBars) -> None:
        """Evaluate and pack a network that was trained as a quantized one; no float network is its like."""
        source = run.source
        weights = source.packed_weights
        bits = max(weight.bits for weight in weights.values())
        if not run.missing(name, [bits]):
            return
        network = source.network(name)
        bars.start(name, source.evaluation_images)
        evaluations = source.evaluate(name, network, bars.images)
        packed = Quantized(network, [], weights)
        run.add_row(name, bits, network, evaluations, method=DEFAULT_METHOD, quantized=packed)


def publish(run: QuantizedRun) -> None:
    """Write the dashboard, print the table, and mark the version as finished."""
    folder, results = run.source.folder, run.results
    write_quantized(folder, results.records, results.layers, dict(run.source.module.hparams))
    mark_finished(folder)
    console = Console()
    console.print(terminal_table(results.records))
    console.print(f"records and packed files: {folder}", soft_wrap=True)
    console.print(f"curves (take the smoothing away): tensorboard --logdir {folder.parent.parent}", soft_wrap=True)
