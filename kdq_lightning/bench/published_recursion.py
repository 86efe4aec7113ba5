"""GPFQ the way its authors publish it: the baseline of the speed figures, and a second opinion on mode `official`.

Zhang, Zhou, Saab 2023 (arXiv 2201.11113), algorithm 1: a layer goes column by column, all its neurons at once, and
for each layer both networks run again from the images up to it. Unlike in their code, all layers see the same images.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdq_lightning.quantization.draws import draw_positions

RANGE = 1.16  # C of the published code: the levels reach to C times the mean over rows of max|w|
FRACTION = 0.25  # of an image's patches

Layer = nn.Conv2d | nn.Linear


@torch.inference_mode()
def quantize_published(model: nn.Module, images: Tensor, bits: int, seed: int = 0) -> nn.Module:
    """Return a copy of a network of 2-D convolutions and linear layers, quantized by the published recursion.

    Args:
        model: In eval mode; it is not changed.
        images: Normalised calibration images, (images, channels, h, w).
        bits: Bit width; a weight takes one of 2^bits + 1 levels, with one scale a layer.
        seed: Seed of the patches, which are those of the engine's mode `official`.

    Returns:
        The quantized network.
    """
    quantized = copy.deepcopy(model)
    for index, name in enumerate(execution_order(model, images[:1])):
        layer, target = model.get_submodule(name), quantized.get_submodule(name)
        assert isinstance(layer, Layer) and isinstance(target, Layer)
        x = columns(layer, inputs_of(model, layer, images), index, seed)
        x_quantized = columns(target, inputs_of(quantized, target, images), index, seed)
        step = RANGE * layer.weight.flatten(1).abs().amax(1).mean() / 2 ** (bits - 1)
        weights = layer.weight.view(len(x), -1, x.shape[2])
        solved = [solve(*group, step, bits) for group in zip(weights, x, x_quantized, strict=True)]
        target.weight.copy_(torch.cat(solved).view_as(target.weight))
    return quantized


def solve(weight: Tensor, x: Tensor, x_quantized: Tensor, step: Tensor, bits: int) -> Tensor:
    """Quantize the neurons of one group: u += w_t x_t, q_t = Q(<x̃_t, u> / |x̃_t|²), u -= q_t x̃_t (equation 4).

    The expressions are those of the published code, one outer product in memory at a time.

    Args:
        weight: (neurons, N).
        x: The float network's inputs, (m, N).
        x_quantized: The quantized network's inputs, (m, N).
        step: Distance of two levels.
        bits: Bit width.
    """
    half = 2 ** (bits - 1)
    residual = x.new_zeros(len(weight), len(x))
    solved = torch.zeros_like(weight)
    for t in range(weight.shape[1]):
        residual += weight[:, t].unsqueeze(1) * x[:, t].unsqueeze(0)
        energy = torch.linalg.norm(x_quantized[:, t]) ** 2
        if energy > 0:
            value = residual @ x_quantized[:, t] / energy
            solved[:, t] = step * (value / step + 0.5).floor().clamp(-half, half)
        residual -= solved[:, t].unsqueeze(1) * x_quantized[:, t].unsqueeze(0)
    return solved


def columns(layer: Layer, inputs: Tensor, index: int, seed: int) -> Tensor:
    """Return the rows that a layer is solved on, (groups, m, N).

    Patches of a convolution are cut side by side (stride = kernel size) and drawn with replacement; a linear layer
    uses all of its inputs.
    """
    if isinstance(layer, nn.Linear):
        return inputs.reshape(1, -1, layer.in_features)
    assert isinstance(layer.padding, tuple)
    patches = F.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, stride=layer.kernel_size)
    images, size, positions = patches.shape
    drawn = draw_positions(
        seed, index, torch.arange(images), int(FRACTION * positions + 1), positions, replacement=True
    )
    chosen = patches.gather(2, drawn.unsqueeze(1).expand(-1, size, -1))
    return chosen.transpose(1, 2).reshape(-1, layer.groups, size // layer.groups).transpose(0, 1)


def execution_order(model: nn.Module, image: Tensor) -> list[str]:
    """Return the names of the layers in the order in which they are first called."""
    names: dict[str, None] = {}
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: names.setdefault(name))
        for name, module in model.named_modules()
        if isinstance(module, Layer)
    ]
    model(image)
    for hook in hooks:
        hook.remove()
    return list(names)


class _Reached(Exception):  # noqa: N818 (not an error)
    """The layer was called with these inputs: nothing beyond it needs to run."""


def inputs_of(model: nn.Module, layer: Layer, images: Tensor) -> Tensor:
    """Run a network up to a layer, and return the inputs of that layer."""

    def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        raise _Reached(inputs[0])

    hook = layer.register_forward_pre_hook(stop)
    try:
        model(images)
    except _Reached as reached:
        inputs: Tensor = reached.args[0]
        return inputs
    finally:
        hook.remove()
    raise AssertionError("unreachable: the layer is one of the execution order")
