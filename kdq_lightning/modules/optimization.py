"""Optimizer and learning rates of a training: SGD, or Muon for the convolutions' kernels."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn

from kdq_lightning.errors import UserError
from kdq_lightning.modules.muon import Muon, kernels
from kdq_lightning.modules.schedule import Cycle

Cycles = Sequence[tuple[list[nn.Module], Cycle]]
"""Groups of modules, each with its learning rate over the steps as a share of the peak."""

MUON_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
KERNEL_LEARNING_RATE = 0.2
MOMENTUM, KERNEL_MOMENTUM = 0.9, 0.6


def muon_kernels(networks: Iterable[nn.Module], precision: str) -> set[int]:
    """Return the identities of the parameters that Muon trains.

    Args:
        networks: Those that are trained.
        precision: The Trainer's.

    Raises:
        UserError: If the precision keeps weights in less than float32.
    """
    if precision not in MUON_PRECISIONS:
        raise UserError(
            f"optimizer muon keeps its weights in float32: give --trainer.precision one of"
            f" {', '.join(MUON_PRECISIONS)}, not {precision}"
        )
    return {id(kernel) for kernel in kernels(networks)}


def configure_optimizer(
    cycles: Cycles,
    kernel_cycles: Cycles,
    kernel_ids: set[int],
    learning_rate: float,
    kernel_learning_rate: float,
    weight_decay: float,
) -> OptimizerLRSchedulerConfig:
    """Return the optimizer, and the schedule that is stepped with it.

    SGD has Nesterov momentum 0.9. Weight decay is for matrices and kernels alone, not for BatchNorm and biases.

    Args:
        cycles: Modules with their learning rates.
        kernel_cycles: The same modules with those of Muon's kernels.
        kernel_ids: Identities of the parameters that Muon trains; with none, SGD trains them all.
        learning_rate: Peak of SGD's learning rate.
        kernel_learning_rate: Peak of Muon's.
        weight_decay: L2 penalty.
    """
    groups: list[dict[str, Any]] = []
    shapes: list[Cycle] = []
    for (modules, shape), (_, kernel_shape) in zip(cycles, kernel_cycles, strict=True):
        parameters = [parameter for module in modules for parameter in module.parameters()]
        for decayed in (True, False):
            chosen = [p for p in parameters if (p.ndim > 1) == decayed and id(p) not in kernel_ids]
            groups.append({"params": chosen, "weight_decay": weight_decay if decayed else 0.0})
            shapes.append(shape)
        if chosen := [parameter for parameter in parameters if id(parameter) in kernel_ids]:
            group = {"params": chosen, "lr": kernel_learning_rate, "momentum": KERNEL_MOMENTUM, "orthogonal": True}
            groups.append(group)
            shapes.append(kernel_shape)
    optimizer: torch.optim.Optimizer = (
        Muon(groups, learning_rate)
        if kernel_ids
        else torch.optim.SGD(groups, learning_rate, momentum=MOMENTUM, nesterov=True)
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, shapes)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
