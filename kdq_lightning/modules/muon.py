"""Muon for convolutional networks: orthogonalised updates of the kernels, SGD with momentum for everything else."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kdq_lightning.errors import UserError

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a, b, c: the steepest slope at 0 that keeps singular values near 1
NEWTON_SCHULZ_STEPS = 3


class Muon(torch.optim.Optimizer):
    """Momentum whose step is orthogonalised for convolution kernels and taken as it is for all other parameters.

    With gradient g, momentum m <- μm + g and u = g + μm (Nesterov), a group with `orthogonal` set does

        W <- W·√out / ‖W‖ - η·U,  U = `orthogonalize(u)`,

    where ‖W‖ is the Frobenius norm and out the number of filters; a weight whose layer is followed by BatchNorm has no
    scale of its own to lose. The other groups do W <- W - η·(u of g + decay·W): SGD with Nesterov momentum. After
    K. Jordan 2024, "Muon: An optimizer for hidden layers in neural networks", in its form for convolutions
    (github.com/KellerJordan/cifar10-airbench).
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float) -> None:
        """Take parameter groups.

        Args:
            groups: Each with `params`, and `orthogonal`, `lr`, `momentum`, `weight_decay` where the defaults (False,
                the argument, 0.9, 0.0) don't fit. Parameters of orthogonal groups have two or more dimensions, and no
                weight decay.
            lr: Learning rate of groups that name none.
        """
        super().__init__(groups, {"lr": lr, "momentum": 0.9, "weight_decay": 0.0, "orthogonal": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # noqa: ANN401
        """Update all parameters that have a gradient, and return what the closure returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if group["weight_decay"]:
            gradient = gradient.add(parameter, alpha=group["weight_decay"])
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].mul_(group["momentum"]).add_(gradient)
        update = gradient.add(momentum, alpha=group["momentum"])
        if group["orthogonal"]:
            parameter.mul_(len(parameter) ** 0.5 / parameter.norm())
            update = orthogonalize(update)
        parameter.add_(update, alpha=-group["lr"])


def orthogonalize(update: Tensor) -> Tensor:
    """Move all singular values of a kernel's update towards 1, keeping its singular vectors.

    Newton-Schulz steps X <- aX + (bA + cA²)X with A = XXᵀ, from X = update / ‖update‖, on the wide side of the matrix
    (Jordan 2024). Computed in bfloat16 where the device multiplies it natively, unless the update is float64.

    Args:
        update: (out, ...), seen as a matrix of `out` rows.

    Returns:
        Tensor of the update's shape and type.
    """
    a, b, c = NEWTON_SCHULZ
    X = update.flatten(1)
    X = X / (X.norm() + torch.finfo(X.dtype).tiny)
    if X.dtype == torch.float32 and multiplies_bfloat16(X.device.type):
        X = X.bfloat16()
    is_tall = X.shape[0] > X.shape[1]
    if is_tall:
        X = X.T
    for _ in range(NEWTON_SCHULZ_STEPS):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    orthogonal: Tensor = (X.T if is_tall else X).to(update.dtype).reshape(update.shape)
    return orthogonal


def multiplies_bfloat16(device_type: str) -> bool:
    """Return whether a device of this type ("cpu", "cuda") multiplies bfloat16 natively; emulation is slower."""
    if device_type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def kernels(networks: Iterable[nn.Module]) -> list[Tensor]:
    """Return the kernels that Muon trains: those of all convolutions but each network's first, the stem.

    Raises:
        UserError: If a network has no other convolution.
    """
    found: list[Tensor] = []
    for network in networks:
        own = [module.weight for module in network.modules() if isinstance(module, nn.modules.conv._ConvNd)][1:]
        if not own:
            raise UserError(
                f"optimizer muon trains the kernels of convolutions beyond the first, and {type(network).__name__} has"
                " none: leave --model.init_args.optimizer out"
            )
        found += own
    return found
