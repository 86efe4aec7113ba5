"""Makes a copy that can be quantized: eval mode, plain parameters. Its lazy layers are filled in by probe.py."""

import copy
from itertools import chain

from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from kdq_lightning.errors import UserError


def copy_for_walk(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode whose computed weights are baked in; the model given stays as it is.

    A weight is computed where `torch.nn.utils.parametrizations`, `weight_norm`, `spectral_norm` or `prune` made it so.

    Raises:
        UserError: If the model can't be copied.
    """
    # Reading a parametrized weight in training mode would move its buffers, so the copy comes first. What a forward
    # with gradients has left in attributes can't be copied as it is, only its values.
    computed = [
        value
        for module in model.modules()
        for value in chain(module.__dict__.values(), module._buffers.values())
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    memo = {id(value): value.detach().clone() for value in computed}
    try:
        network = copy.deepcopy(model, memo).eval()
    except Exception as error:
        raise UserError(f"the {type(model).__name__} can't be copied ({error}): quantize a module that can") from error
    for module in list(network.modules()):
        _bake(module)
    return network


def _bake(module: nn.Module) -> None:
    """Replace a module's computed weights by parameters that hold their values."""
    if parametrize.is_parametrized(module):
        # Not with remove_parametrizations: it changes the class, which the copy shares with the model given.
        values = {name: getattr(module, name) for name in module.parametrizations}  # type: ignore[union-attr]
        trained = {name for name in values if any(p.requires_grad for p in module.parametrizations[name].parameters())}  # type: ignore[index, union-attr]
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module.parametrizations
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value.detach().clone(), name in trained))
    for key, hook in list(module._forward_pre_hooks.items()):
        learns = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        if isinstance(hook, WeightNorm | SpectralNorm):
            hook.remove(module)
            del module._forward_pre_hooks[key]
            getattr(module, hook.name).requires_grad_(learns)
        elif isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)  # type: ignore[no-untyped-call]


def is_lazy(model: nn.Module) -> bool:
    """Whether the model has parameters that get their shape from the first input."""
    return any(nn.parameter.is_lazy(tensor) for tensor in chain(model.parameters(), model.buffers()))
