"""Lightning's Trainer with this project's defaults: a precision that the hardware has, and our own sharded sampler."""

from typing import Any

import torch
from lightning.pytorch import Trainer as LightningTrainer


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
        **kwargs: Any,
    ) -> None:
        """Fill in the defaults.

        Args:
            *args: Lightning's.
            precision: "auto", or one of Lightning's ("32-true", "bf16-mixed", ...). Tests and quantization always
                compute in float32.
            accelerator: "auto", "cpu", "gpu", ...
            default_root_dir: Folder that run folders are made in.
            num_sanity_val_steps: Validation batches before training.
            enable_model_summary: Whether to print the table of layers.
            **kwargs: Lightning's. `use_distributed_sampler` is off: the datamodule's sampler shards.
        """
        super().__init__(
            *args,
            precision=choose_precision(accelerator) if precision == "auto" else precision,  # type: ignore[arg-type]
            accelerator=accelerator,
            default_root_dir=default_root_dir,
            num_sanity_val_steps=num_sanity_val_steps,
            enable_model_summary=enable_model_summary,
            use_distributed_sampler=False,
            **kwargs,
        )


def choose_precision(accelerator: str = "auto") -> str:
    """Return "bf16-mixed" where the device multiplies bfloat16 natively (emulation is slower), else "32-true"."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if native else "32-true"
