"""Lightning's Trainer with this project's defaults, and `quantize` beside fit, validate, test and predict."""

import io
from pathlib import Path
from typing import Any, TypeAlias

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch import Callback, LightningDataModule, LightningModule

from kdq_lightning.data.base import ImageDataModule
from kdq_lightning.errors import UserError, check_range
from kdq_lightning.files import write_atomically
from kdq_lightning.modules.classifier import Classifier
from kdq_lightning.modules.muon import multiplies_bfloat16
from kdq_lightning.training.callbacks import LogSteps
from kdq_lightning.training.header import Header
from kdq_lightning.training.interruption import Interruption
from kdq_lightning.training.lightning_internals import StageTrainer
from kdq_lightning.training.post_training import PostTrainingQuantization

Limit: TypeAlias = int | float | None
"""A number of batches (1) or a share of them (1.0).

Lightning's own type is `Optional[Union[int, float]]`. `typing` keeps equal types once, in the order in which they were
met first, so that after an import of rich it is float that the command line tries first: 1 batch would become all.
"""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside the old one and then swaps them: a full disk or a kill leaves the old one whole.

    Lightning's own writes to the system's temporary folder first, from where moving it may be a copy.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None) -> None:
        """Write the file.

        Raises:
            UserError: If the disk is full or the folder can't be written to.
        """
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_atomically(Path(path), content.getvalue())


class Trainer(StageTrainer):
    """Lightning's Trainer with this project's defaults, atomic checkpoints, and a command `quantize`."""

    def __init__(
        self,
        *args: Any,
        precision: str = "auto",
        accelerator: str = "auto",
        default_root_dir: str = "runs",
        num_sanity_val_steps: int = 0,
        enable_model_summary: bool = False,
        plugins: Any = None,  # noqa: ANN401
        limit_train_batches: Limit = None,
        limit_val_batches: Limit = None,
        limit_test_batches: Limit = None,
        limit_predict_batches: Limit = None,
        log_every_n_steps: int | None = 0,
        **kwargs: Any,
    ) -> None:
        """Fill in this project's defaults.

        Args:
            *args: Lightning's.
            precision: One of Lightning's ("32-true", "bf16-mixed", ...), or "auto" for bf16-mixed where processor or
                GPU computes in it, else 32-true. Tests and quantization always compute in float32.
            accelerator: "auto" is a CUDA GPU where there is one, else the CPU.
            default_root_dir: Folder that run folders are made in.
            num_sanity_val_steps: Validation batches before training.
            enable_model_summary: Whether to print the table of layers.
            plugins: Lightning's; a plugin for checkpoints replaces ours.
            limit_train_batches: Number of batches (1), or share of them (1.0), that an epoch has; all if not given.
            limit_val_batches: Likewise, of a validation.
            limit_test_batches: Likewise, of a test.
            limit_predict_batches: Likewise, of a prediction.
            log_every_n_steps: Steps from one point of `train/loss_step` and `lr_step` to the next; 0 writes none. The
                means of each epoch are written in any case.
            **kwargs: Lightning's. `use_distributed_sampler` is off: the datamodule's sampler shards.
        """
        if accelerator == "auto":  # Apple's GPU has no float64, which the stateless random numbers need
            accelerator = "gpu" if torch.cuda.is_available() else "cpu"
        super().__init__(
            *args,
            precision=choose_precision(accelerator) if precision == "auto" else precision,  # type: ignore[arg-type]
            accelerator=accelerator,
            default_root_dir=default_root_dir,
            num_sanity_val_steps=num_sanity_val_steps,
            enable_model_summary=enable_model_summary,
            use_distributed_sampler=False,
            plugins=_with_checkpoint_io(plugins),
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            limit_test_batches=limit_test_batches,
            limit_predict_batches=limit_predict_batches,
            log_every_n_steps=log_every_n_steps or 0,
            **kwargs,
        )
        if log_every_n_steps:
            check_range("log_every_n_steps", log_every_n_steps, low=0)
            self.callbacks.insert(0, LogSteps(log_every_n_steps))  # type: ignore[attr-defined]  # set by Lightning
        self._quantizing = False
        self._interruption = Interruption()
        self.callbacks.insert(0, self._interruption)  # type: ignore[attr-defined]  # set by Lightning

    def should_terminate(self) -> bool:
        """Return whether to stop after this batch because of SIGTERM; see `Interruption`."""
        if self.world_size > 1:
            return self._interruption.agreed
        return super().should_terminate() and not self._interruption.accumulating

    def quantize(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Quantize a trained module as the callback does after training, into the logger's folder.

        Args:
            model: With its trained weights; the best checkpoint in the folder, if there is one, replaces them.
            datamodule: Calibration, validation and test images.
            ckpt_path: A checkpoint to load into the module first.
            weights_only: Whether that checkpoint may hold only tensors and plain data.

        Raises:
            UserError: If the callback is missing or switched off, or quantization fails.
        """
        if not self._quantizers:
            raise UserError("there is nothing to do with --quantization.enabled=false: leave it out")
        self._quantizing = True
        options = {} if weights_only is None else {"weights_only": weights_only}  # unknown to Lightning 2.5
        try:  # processes, data and device are those of a validation; `run_stage` does other work
            self.validate(model, ckpt_path=ckpt_path, verbose=False, datamodule=datamodule, **options)
        finally:
            self._quantizing = False

    @property
    def is_quantizing(self) -> bool:
        """Whether `quantize` is running."""
        return self._quantizing

    @property
    def _quantizers(self) -> list[PostTrainingQuantization]:
        """The post-fit callbacks that are switched on."""
        callbacks: list[Callback] = self.callbacks  # type: ignore[attr-defined]  # set by Lightning, unknown to its type
        return [
            callback for callback in callbacks if isinstance(callback, PostTrainingQuantization) and callback.enabled
        ]

    def run_stage(self) -> Any:  # noqa: ANN401 - what Lightning's stages return
        """Do the work of the command: quantize, or what Lightning does."""
        self._interruption.listen(self)
        module, data = self.lightning_module, self.datamodule  # type: ignore[attr-defined]
        for callback in self.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Header) and isinstance(module, Classifier) and isinstance(data, ImageDataModule):
                callback.announce(self, module, data)
        if not (self._quantizing or self.training):  # a test or prediction leaves nothing to save
            return super().run_stage()
        with self._interruption.stop_at_ctrl_c(self):
            if not self._quantizing:
                return super().run_stage()
            for callback in self._quantizers:
                callback.quantize(self, self.lightning_module)
            return []


def _with_checkpoint_io(plugins: Any) -> list[Any]:  # noqa: ANN401
    """Return the plugins as a list, ours for checkpoints among them unless there is one already."""
    given = list(plugins) if isinstance(plugins, list | tuple) else [plugins] if plugins is not None else []
    return given if any(isinstance(plugin, CheckpointIO) for plugin in given) else [*given, AtomicCheckpointIO()]


def choose_precision(accelerator: str = "auto") -> str:
    """Return "bf16-mixed" where the device multiplies bfloat16 natively (emulation is slower), else "32-true"."""
    on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if multiplies_bfloat16("cuda" if on_gpu else "cpu") else "32-true"
