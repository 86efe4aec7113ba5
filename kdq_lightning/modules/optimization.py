"""Optimizer and learning rates of a training: SGD, Muon for the convolutions' kernels, or what the user names."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch.cli import LightningCLI, instantiate_class
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


class GivenOptimizer(NamedTuple):
    """An optimizer that the user names, with its schedule, as LightningCLI takes them.

    Attributes:
        optimizer: `class_path` and `init_args`.
        lr_scheduler: Likewise; None for a constant learning rate. It is stepped once an epoch.
    """

    optimizer: Mapping[str, Any]
    lr_scheduler: Mapping[str, Any] | None

    def configure(self, parameters: Iterable[nn.Parameter]) -> Any:  # noqa: ANN401 - one of Lightning's forms
        """Return what a LightningModule's `configure_optimizers` returns.

        Args:
            parameters: Those of the module; the ones that need no gradient are left out.

        Raises:
            UserError: If the optimizer or the scheduler refuses its arguments.
        """
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        try:
            optimizer = instantiate_class((trained,), dict(self.optimizer))
            scheduler = self.lr_scheduler and instantiate_class((optimizer,), dict(self.lr_scheduler))
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"the optimizer or its scheduler can't be made ({error}): look at its arguments") from error
        return LightningCLI.configure_optimizers(None, optimizer, scheduler)  # type: ignore[arg-type]

    @property
    def optimizer_text(self) -> str:
        """The optimizer's class and arguments."""
        return _call_text(self.optimizer)

    @property
    def lr_scheduler_text(self) -> str | None:
        """The scheduler's class and arguments; None if there is none."""
        return _call_text(self.lr_scheduler) if self.lr_scheduler else None


def _call_text(given: Mapping[str, Any]) -> str:
    """Return a class and the arguments that are not None as `torch.optim.AdamW(lr=0.001)`."""
    arguments = sorted((given.get("init_args") or {}).items())
    return f"{given['class_path']}({', '.join(f'{key}={value}' for key, value in arguments if value is not None)})"


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
