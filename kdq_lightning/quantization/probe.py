"""What a network does with two images, before it is walked on: which layers can be quantized, in how much memory.

A layer is quantized if it is called with images along its first dimension, computes the plain operation on its weight
and bias, and no other module uses that weight. Every other matrix stays in float, and the report says why.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from kdq_lightning.errors import UserError
from kdq_lightning.quantization.comparison import all_close, close, holds_first, same
from kdq_lightning.quantization.copies import is_lazy
from kdq_lightning.quantization.forwards import Forwards, share_tensors
from kdq_lightning.quantization.gram import layers_of, weight_name
from kdq_lightning.quantization.memory import Activations, tensors_in
from kdq_lightning.quantization.observation import NOT_IMAGES_FIRST, NOT_PLAIN, Run, metered, observed

TOLERANCE = 1e-3  # of two ways to compute the same, as a part of the largest value; half precision has more


@dataclass(frozen=True)
class Plan:
    """What a walk needs to know of a network.

    Attributes:
        samples: Of the layers to quantize, in the order of their first calls, how many samples an image makes in their
            input.
        tied: Of each layer to quantize that shares its weight with one called before: the name of that one.
        left: Why every other parameter of two or more dimensions stays in float; layers by name, other parameters by
            theirs.
        activations: Memory that the float network's activations take.
        own_copies: Whether each forward needs a copy of the network to itself.
        clone_images: Whether the network changes its input.
        tolerance: How far two ways to compute the same may lie apart, as a part of the largest value.
    """

    samples: dict[str, int]
    tied: dict[str, str]
    left: dict[str, str]
    activations: Activations
    own_copies: bool
    clone_images: bool
    tolerance: float


def fit_images(network: nn.Module, images: Tensor) -> Tensor:
    """Return the images as the network can take them, and let lazy layers find their shapes.

    That is as they are, in the faster memory format if the network runs on it; floats of another type than the
    network's become of its type if it doesn't run on theirs.

    Raises:
        UserError: If the network doesn't run on them.
    """
    kinds = {parameter.dtype for parameter in network.parameters() if parameter.is_floating_point()}
    candidates: list[Callable[[Tensor], Tensor]] = [lambda images: images]
    if images.is_floating_point() and len(kinds) == 1 and images.dtype not in kinds:
        (own,) = kinds
        candidates.append(lambda images: images.to(own))
    errors = []
    for convert in candidates:
        formats = [torch.channels_last] if images.dim() == 4 and images.is_floating_point() else []
        for memory_format in (*formats, torch.contiguous_format):
            try:
                network(convert(images[:2]).clone(memory_format=memory_format))
            except Exception as error:  # a `view` that wants contiguous activations, another type
                errors.append(error)
            else:
                return convert(images).contiguous(memory_format=memory_format)
    if is_lazy(network):
        raise UserError("the model is lazy and can't be initialised: run it on a batch first") from errors[-1]
    reason = f"{type(errors[0]).__name__}: {str(errors[0]).strip().partition(chr(10))[0]}"
    raise UserError(
        f"the model doesn't run on the calibration images, {images.dtype} of shape {tuple(images.shape)} ({reason}):"
        " give batches that its forward takes as its only argument"
    ) from errors[0]


def probe(network: nn.Module, model: nn.Module, images: Tensor) -> Plan:
    """Run a network on two of the calibration images.

    Args:
        network: A copy of the model in eval mode, its weights plain parameters, on which `fit_images` has run.
        model: The model given, which nothing has changed.
        images: (images, ...), as `fit_images` returns them.

    Raises:
        UserError: If in eval mode the network changes its buffers, isn't deterministic, or mixes the images of a batch.
    """
    pair = _two_images(images)
    given = pair.clone()
    outputs, activations, meter = metered(network, given)
    used_by, tolerance = meter.used_by, max(TOLERANCE, 4 * meter.resolution)
    clone_images = not same(given, pair)
    before = dict(chain(model.named_parameters(), model.named_buffers()))
    for name, tensor in chain(network.named_parameters(), network.named_buffers()):
        if name in before and not nn.parameter.is_lazy(before[name]) and not same(tensor, before[name]):
            raise UserError(f"the model changes {name} in eval mode, so a walk would not see what inference sees")
    together, first, second = (observed(network, part.clone(), tolerance) for part in (pair, pair[:1], pair[1:]))
    if not all_close(outputs, together.outputs, tolerance):
        raise UserError("the model gives other outputs for the same images in eval mode: make it deterministic")
    if not all(
        holds_first(both, alone, tolerance) for both, alone in zip(together.outputs, first.outputs, strict=False)
    ):
        raise UserError("the model mixes the images of a batch in eval mode: it can't be calibrated image by image")
    reasons = _layer_reasons(network, together, (first, second), used_by, tolerance)
    samples = {name: len(first.inputs[name]) for name in together.inputs if not reasons[name]}
    own_copies = bool(samples) and _keeps_state(network, list(samples), pair, (first, second), tolerance)
    tied = tied_layers(network, samples)
    left = _left_in_float(network, samples, reasons, used_by)
    return Plan(samples, tied, left, activations, own_copies, clone_images, tolerance)


def _two_images(images: Tensor) -> Tensor:
    """Return the first image and one that differs from it, mirrored if there is no other."""
    differs = (images != images[:1]).flatten(1).any(1) if images.dim() > 1 else images != images[0]
    if bool(differs.any()):
        other = int(differs.int().argmax())
        return torch.cat([images[:1], images[other : other + 1]])
    return torch.cat([images[:1], images[:1].flip(-1)])


def _layer_reasons(
    network: nn.Module, together: Run, runs: Sequence[Run], used_by: Mapping[str, set[str]], tolerance: float
) -> dict[str, str]:
    """Return why each layer stays in float, "" for one that is quantized, by name."""
    layers = layers_of(network)
    reasons = {}
    for name, layer in layers.items():
        owners = {other for other, candidate in layers.items() if candidate.weight is layer.weight}
        users = set().union(*(used_by.get(weight_name(owner), set()) for owner in owners)) - owners
        called = any(name in run.problems for run in (together, *runs))
        if "forward" in layer.__dict__:
            reasons[name] = "its forward was replaced on the instance"
        elif not called:
            reasons[name] = "its weight is used outside the layer's own forward" if users else "never reached"
        elif not all(name in run.problems for run in (together, *runs)):
            reasons[name] = "the images decide whether it is called"
        elif together.problems[name]:
            reasons[name] = together.problems[name]
        elif users or weight_name(name) not in used_by:
            reasons[name] = "its weight is used elsewhere, too" if users else NOT_PLAIN
        else:
            reasons[name] = (
                "" if _images_first(together.inputs[name], runs[0].inputs.get(name), tolerance) else NOT_IMAGES_FIRST
            )
    for name, layer in layers.items():  # of layers that share a weight all are quantized, or none
        for other, candidate in layers.items():
            if not reasons[name] and candidate.weight is layer.weight and other in together.problems and reasons[other]:
                reasons[name] = f"shares its weight with {other}, which stays in float"
    return reasons


def _images_first(both: Tensor, alone: Tensor | None, tolerance: float) -> bool:
    """Whether the first half of what two images give a layer is what the first image gives it alone."""
    if alone is None or not len(alone) or both.shape != (2 * len(alone), *alone.shape[1:]):
        return False
    return close(both[: len(alone)], alone, tolerance)


def tied_layers(network: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return which of these layers share their weight with one that comes before, and the name of that one."""
    layers = layers_of(network)
    firsts: dict[int, str] = {}
    tied = {}
    for name in names:
        first = firsts.setdefault(id(layers[name].weight), name)
        if first != name:
            tied[name] = first
    return tied


def _left_in_float(
    network: nn.Module, samples: Mapping[str, int], reasons: Mapping[str, str], used_by: Mapping[str, set[str]]
) -> dict[str, str]:
    """Return why each parameter of two or more dimensions that isn't quantized stays in float."""
    layers = layers_of(network)
    owners = {id(layer.weight): name for name, layer in layers.items()}
    quantized = {id(layers[name].weight) for name in samples}
    left = {}
    for name, parameter in network.named_parameters():
        module, _, attribute = name.rpartition(".")
        if parameter.dim() < 2 or id(parameter) in quantized:
            continue
        if id(parameter) in owners:
            left[owners[id(parameter)]] = reasons[owners[id(parameter)]]
        elif name not in used_by:
            left[name] = "never reached"
        else:
            owner = type(network.get_submodule(module)).__name__
            left[name] = f"{attribute} of {owner} is not the weight of a Conv1d, Conv2d or Linear layer"
    return left


def _keeps_state(network: nn.Module, names: list[str], pair: Tensor, runs: Sequence[Run], tolerance: float) -> bool:
    """Rehearse the walk with the float network: whether forwards that take turns need a copy of the network each.

    Raises:
        UserError: If even then they compute something else than one by one.
    """
    for own_copies in (False, True):
        try:
            if _rehearse(network, names, pair, runs, own_copies, tolerance):
                return own_copies
        except Exception:  # another forward's state was in the way
            if own_copies:
                raise
    raise UserError(
        "the model keeps something outside its modules between two layers, so its forwards can't take turns:"
        " keep it in the module, or in local variables"
    )


def _rehearse(
    network: nn.Module, names: list[str], pair: Tensor, runs: Sequence[Run], own_copies: bool, tolerance: float
) -> bool:
    """Walk with the float layers, and compare with the forwards one by one."""
    layers = layers_of(network)
    parts = [pair[:1].clone(), pair[1:].clone()]
    forwards = Forwards(share_tensors(network), names, parts, 1, own_copies=own_copies)
    seen: set[str] = set()
    try:
        while (name := forwards.layer) is not None:
            if name not in seen:
                seen.add(name)
                for (inputs,), run in zip(forwards.inputs, runs, strict=True):
                    if name not in run.inputs or not close(inputs, run.inputs[name], tolerance):
                        return False
            forwards.resume([layers[name]])
        return all(
            all_close(tensors_in(outputs), run.outputs, tolerance)
            for outputs, run in zip(forwards.outputs, runs, strict=True)
        )
    finally:
        forwards.close()
