"""What a network computes on its way to the logits: the features of a layer, from which hints are taken."""

import copy

import torch
from torch import Tensor, nn

from kdq_lightning.errors import UserError
from kdq_lightning.networks.catalogue import find_network

SHOWN = 24  # names of layers in a message


class _ReachedError(Exception):
    """Ends a forward at a layer: what comes after it would be computed, and would count in BatchNorm, for nothing."""

    def __init__(self, features: object) -> None:
        super().__init__()
        self.features = features


def check_hint_layer(name: str, network: nn.Module, layer: str | None, option: str) -> str:
    """Return the name of the layer that hints are taken from: the one given, or the network's own.

    Args:
        name: Of the network.
        network: That network.
        layer: The user's choice; None for the one that `NETWORKS` names.
        option: What the user chooses it with, for messages.

    Raises:
        UserError: If no layer is named, or the network has no such layer.
    """
    layer = layer or find_network(name).hint_layer
    names = [key for key, _ in network.named_modules() if key and key.count(".") < 2]
    if layer is not None and layer in dict(network.named_modules()) and layer:
        return layer
    shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    problem = f"{name} has no layer {layer!r}" if layer else f"nothing says which layer of {name} hints are taken from"
    raise UserError(f"{problem}: give --model.init_args.{option} one of {shown}")


def features_at(network: nn.Module, layer: str, images: Tensor) -> Tensor:
    """Return the features (batch, channels, h, w) that a layer gives, without running what comes after it.

    Args:
        network: The network.
        layer: Name of one of its modules, such as `layer2` or `features.3`.
        images: Normalised, (batch, channels, h, w).

    Raises:
        UserError: If the network doesn't call the layer, or its output has another form.
    """

    def stop(module: nn.Module, inputs: object, output: object) -> None:
        raise _ReachedError(output)

    handle = network.get_submodule(layer).register_forward_hook(stop)
    try:
        network(images)
    except _ReachedError as reached:
        features = reached.features
    else:
        raise UserError(f"the network never calls its layer {layer}: take hints from another one")
    finally:
        handle.remove()
    if not isinstance(features, Tensor) or features.ndim != 4:
        found = f"a tensor of {features.ndim} dimensions" if isinstance(features, Tensor) else type(features).__name__
        raise UserError(f"hints need features (batch, channels, h, w), and layer {layer} gives {found}: name another")
    return features


@torch.no_grad()
def strided_on_one_pixel(network: nn.Module, images: Tensor) -> str | None:
    """Return the name of a convolution with a stride whose input is a single pixel; None if there is none.

    torch 2.14 computes wrong gradients of its weight on a CPU in bfloat16: it leaves memory unwritten.

    Args:
        network: It stays as it is.
        images: Normalised, (batch, channels, h, w).
    """
    trial, found = copy.deepcopy(network).eval(), []
    for name, layer in trial.named_modules():
        if isinstance(layer, nn.Conv2d) and max(layer.stride) > 1:
            layer.register_forward_pre_hook(
                lambda _, inputs, name=name: found.append(name) if inputs[0].shape[-2:] == (1, 1) else None
            )
    trial(images)
    return found[0] if found else None


def parameters_before(network: nn.Module, layer: str, images: Tensor) -> set[str]:
    """Return the names of the parameters that the features of a layer depend on.

    Args:
        network: It stays as it is.
        layer: Name of one of its modules.
        images: Normalised, (batch, channels, h, w); any will do.
    """
    trial = copy.deepcopy(network).eval()
    parameters = dict(trial.named_parameters())
    with torch.enable_grad():
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        total = features_at(trial, layer, images).sum()
        gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
