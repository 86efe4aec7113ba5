"""One forward of a network, observed: what each layer is given, in how much memory, and whether it can be quantized."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdq_lightning.quantization.comparison import close
from kdq_lightning.quantization.forwards import own_forward, share_tensors
from kdq_lightning.quantization.gram import Layer, layers_of
from kdq_lightning.quantization.memory import Activations, Meter, tensors_in

NOT_PLAIN = "its forward is not the plain operation on its weight and bias"
NOT_IMAGES_FIRST = "is not given the images along its first dimension"


@dataclass
class Run:
    """One forward.

    Attributes:
        outputs: The tensors in what the network returned.
        inputs: What each layer was given at its first call, by name.
        problems: Why a layer can't be quantized, "" if it can, by name.
    """

    outputs: list[Tensor] = field(default_factory=list)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)


def metered(network: nn.Module, pair: Tensor) -> tuple[list[Tensor], Activations, Meter]:
    """Run once and return the outputs, the memory, and what was noted on the way."""
    network = share_tensors(network)
    meter = Meter(network)
    at_layer: dict[str, float] = {}

    def call(name: str, layer: Layer, *args: Tensor, **kwargs: Tensor) -> Tensor:
        at_layer.setdefault(name, meter.live() / len(pair))
        meter.inside.append(name)
        try:
            return own_forward(layer, *args, **kwargs)
        finally:
            meter.inside.pop()

    _intercept(network, call)
    with meter:
        outputs = tensors_in(network(pair))
    image = pair[0].numel() * pair.element_size()
    return outputs, Activations(image, meter.peak / len(pair), at_layer), meter


def observed(network: nn.Module, images: Tensor, tolerance: float) -> Run:
    """Run once and look at what each layer is given at its first call."""
    weights = {name: layer.weight for name, layer in layers_of(network).items()}
    network = share_tensors(network)
    run = Run()
    inside: list[str] = []

    def call(name: str, layer: Layer, *args: Tensor, **kwargs: Tensor) -> Tensor:
        if name not in run.problems:
            inputs = kwargs["input"] if not args and kwargs.keys() == {"input"} else args[0] if args else None
            run.problems[name] = (
                f"is called by layer {inside[-1]}"
                if inside
                else _problem(layer, inputs, len(args) + len(kwargs), weights[name], tolerance)
            )
            if isinstance(inputs, Tensor) and not run.problems[name]:
                run.inputs[name] = inputs.clone()
        inside.append(name)
        try:
            return own_forward(layer, *args, **kwargs)
        finally:
            inside.pop()

    _intercept(network, call)
    run.outputs = tensors_in(network(images))
    return run


def _intercept(network: nn.Module, call: Callable[..., Tensor]) -> None:
    """Let `call` stand in for the forward of each layer, unless somebody else's function does already."""
    for name, layer in layers_of(network).items():
        if "forward" not in layer.__dict__:
            layer.forward = partial(call, name, layer)  # type: ignore[method-assign]


def _problem(layer: Layer, inputs: object, arguments: int, weight: Tensor, tolerance: float) -> str:
    """Return why a layer that is called so can't be quantized; "" if nothing is known against it."""
    if arguments != 1:
        return "is called with more than its input"
    if not isinstance(inputs, Tensor) or type(inputs) not in (Tensor, nn.Parameter) or inputs.is_nested:
        return "is not given a plain tensor"
    if torch._C._functorch.is_functorch_wrapped_tensor(inputs):
        return "is called inside torch.func, which hides the images"
    if layer.weight is not weight:
        return "its weight is replaced during the forward"
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        return f"its weight is not a plain parameter of real numbers ({type(weight).__name__}, {weight.dtype})"
    if inputs.dim() < 2 or (not isinstance(layer, nn.Linear) and inputs.dim() != layer.weight.dim()):
        return NOT_IMAGES_FIRST
    return "" if _is_plain(layer, inputs, tolerance) else NOT_PLAIN


def _is_plain(layer: Layer, inputs: Tensor, tolerance: float) -> bool:
    """Whether a subclass computes what its base does, on any weight, bias and input: tried on random ones."""
    if type(layer) in (nn.Linear, nn.Conv1d, nn.Conv2d):
        return True
    other = share_tensors(layer)
    other.__dict__.pop("forward", None)
    generator = torch.Generator().manual_seed(0)

    def random(shape: Sequence[int], like: Tensor) -> Tensor:
        return torch.randn(*shape, generator=generator).to(like)

    assert isinstance(other, Layer)
    other.weight = nn.Parameter(random(layer.weight.shape, layer.weight) / math.sqrt(layer.weight[0].numel()))
    other.bias = nn.Parameter(random(layer.weight.shape[:1], layer.weight))
    strange = inputs * 2 + random(inputs.shape, inputs) * inputs.std(correction=0)
    try:
        return all(close(own_forward(other, given), _plain(other, given), tolerance) for given in (inputs, strange))
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False


def _plain(layer: Layer, inputs: Tensor) -> Tensor:
    """Return the plain operation of a layer on its weight and bias."""
    if isinstance(layer, nn.Linear):
        return F.linear(inputs, layer.weight, layer.bias)
    kind: Any = nn.Conv1d if isinstance(layer, nn.Conv1d) else nn.Conv2d
    outputs: Tensor = kind._conv_forward(layer, inputs, layer.weight, layer.bias)
    return outputs
