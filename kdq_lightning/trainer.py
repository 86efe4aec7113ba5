"""Lightning's Trainer with this project's defaults: a precision that the hardware has, checkpoints written whole."""

import io
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch import Trainer as LightningTrainer

from kdq_lightning.files import write_atomically


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and then moves it there: a full disk or a kill leaves the old one whole.

    Lightning's own writes to the system's temporary folder, from where the last step may be a copy.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None) -> None:
        """Write the file.

        Raises:
            UserError: If the disk is full or the folder can't be written to.
        """
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_atomically(Path(path), content.getvalue())


class Trainer(LightningTrainer):
    """Lightning's Trainer; `precision="auto"` is bf16-mixed where processor or GPU computes in it, else 32-true."""

    def __init__(
        self,
        *args: Any,
        precision: str = "auto",
        accelerator: str = "auto",
        default_root_dir: str = "runs",
        num_sanity_val_steps: int = 0,
        enable_model_summary: bool = False,
        plugins: Any = None,  # noqa: ANN401
        **kwargs: Any,
    ) -> None:
        """Fill in the defaults.

        Args:
            *args: Lightning's.
            precision: "auto", or one of Lightning's ("32-true", "bf16-mixed", ...). Tests and quantization always
                compute in float32.
            accelerator: "auto" is a CUDA GPU where there is one, else the CPU.
            default_root_dir: Folder that run folders are made in.
            num_sanity_val_steps: Validation batches before training.
            enable_model_summary: Whether to print the table of layers.
            plugins: Lightning's; one for checkpoints replaces ours.
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
            **kwargs,
        )


def _with_checkpoint_io(plugins: Any) -> list[Any]:  # noqa: ANN401
    """Return the plugins as a list, ours for checkpoints among them unless there is one already."""
    given = list(plugins) if isinstance(plugins, list | tuple) else [plugins] if plugins is not None else []
    return given if any(isinstance(plugin, CheckpointIO) for plugin in given) else [*given, AtomicCheckpointIO()]


def choose_precision(accelerator: str = "auto") -> str:
    """Return "bf16-mixed" where the device multiplies bfloat16 natively (emulation is slower), else "32-true"."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if native else "32-true"
