"""The post-fit callback: the best checkpoint at every bit width, evaluated, recorded, packed and on the dashboard."""

from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from torch import Tensor, nn

from kdq_lightning.data.normalization import normalize
from kdq_lightning.errors import UserError
from kdq_lightning.evaluation import evaluate, full_float32
from kdq_lightning.modules.classifier import Classifier
from kdq_lightning.quantization import quantize
from kdq_lightning.quantization.recipes import make_recipe
from kdq_lightning.runs.checkpoints import FINISHED
from kdq_lightning.runs.records import FLOAT_BITS
from kdq_lightning.runs.result_folder import ResultFolder
from kdq_lightning.training.dashboard import has_quantized, terminal_table, write_quantized
from kdq_lightning.training.progress_bars import QuantizationBars
from kdq_lightning.training.quantized_run import Evaluations, QuantizedRun


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
        """Tell whether a version's folder holds every result of the module's networks."""
        results = ResultFolder(folder, self.config_hash)
        carried = [record.bits for record in results.records] if module.is_quantized else []
        widths = carried or [*self.bits, FLOAT_BITS]
        return has_quantized(folder) and not any(results.missing(name, widths) for name in module.networks())

    def quantize(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        """Do what the run folder lacks, network by network, then write dashboard and table.

        Raises:
            UserError: If the network or an option can't be used, or a file can't be written.
        """
        assert isinstance(pl_module, Classifier)
        run = QuantizedRun(trainer, pl_module, self.config_hash, self.test)
        calibration = run.calibration_share(self.calibration_images)  # refused, if it is, before anything is written
        bar = trainer.progress_bar_callback
        if isinstance(bar, RichProgressBar):
            bar.teardown(trainer, pl_module, "fit")  # only one display can be live at a time
        with QuantizationBars(shown=trainer.is_global_zero and bar is not None) as bars:
            for name in pl_module.networks():
                self._quantize_network(run, name, calibration, bars)
        run.on_rank_zero(partial(self._publish, run))

    def _quantize_network(self, run: QuantizedRun, name: str, calibration: Tensor, bars: QuantizationBars) -> None:
        carried = {weight.bits for weight in run.carried.values()}
        missing = run.missing(name, [max(carried)] if carried else [*self.bits, FLOAT_BITS])
        if not missing:
            return
        network, statistics = run.network(name), run.statistics(name)
        bars.start(name, len({*missing, FLOAT_BITS}) * sum(len(split.labels) for split in run.splits.values()))

        def on_images(count: int) -> None:
            bars.images(count)
            run.stop_if_terminated()

        def on_layer(done: int, total: int, layer: str) -> None:
            bars.layers(done, total)
            run.stop_if_terminated()

        def measure(candidate: nn.Module) -> Evaluations:
            return {key: evaluate(candidate, split, statistics, on_images) for key, split in run.splits.items()}

        floats = measure(network)
        if carried:  # it is quantized already
            run.save_carried(name, network, floats)
            return
        if FLOAT_BITS in missing:
            run.save_float(name, network, floats)
        widths = [width for width in missing if width != FLOAT_BITS]
        if not widths:
            return
        with full_float32(run.device):
            images = normalize(calibration.to(run.device), statistics)
            quantized = quantize(
                network, [images], widths, solver=self.solver, codebook=self.codebook, progress=on_layer
            )
        for width in widths:
            result = quantized.pop(width)  # so that its network goes when it is done
            run.save_quantized(name, width, result, measure(result.model), floats)

    def _publish(self, run: QuantizedRun) -> None:
        """Write the dashboard, and show the table; what is finished is marked so."""
        results = run.results
        write_quantized(run.folder, results.records, results.layers, dict(run.module.hparams))
        (run.folder / FINISHED).touch()
        console = Console()
        console.print(terminal_table(results.records))
        console.print(f"records and packed files: {run.folder}", soft_wrap=True)
        console.print(
            f"curves (take the smoothing away): tensorboard --logdir {run.folder.parent.parent}", soft_wrap=True
        )
