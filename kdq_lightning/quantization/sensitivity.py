"""How much a network suffers from each of its layers alone being quantized, at each bit width.

The layers are solved on the float network's inputs for this. The weights of a walk would not do: they make up for the
errors of the layers before them, so they say little about the layer's own.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kdq_lightning.quantization.forwards import Forwards, share_tensors
from kdq_lightning.quantization.gram import Layer, Patches, at_least_float32, columns, layers_of
from kdq_lightning.quantization.layer_choice import solve_by_shares
from kdq_lightning.quantization.layerwise import Calibration, check_finite, choose_rows, takes_images_first
from kdq_lightning.quantization.memory import tensors_in
from kdq_lightning.quantization.probe import Plan
from kdq_lightning.quantization.recipes import Recipe
from kdq_lightning.quantization.solution import Solution
from kdq_lightning.random_draws import random_uniform

TEMPERATURE = 4.0
"""Softens the softmax that labels are drawn from. A trained network is sure of most training images, so that a few of
them decide at 1. The errors at 4 follow best what each layer of a resnet20 costs on held-out training images: their
logarithms scatter by 0.35 around the divergences measured, at 2 by 0.41, at 1 by 0.86."""
LABEL_DRAWS = 2  # labels drawn for an image


class Change(NamedTuple):
    """What quantization adds to a layer.

    Attributes:
        weight: float32, in the shape of the layer's weight.
        bias: float32, (channels,).
    """

    weight: Tensor
    bias: Tensor


@dataclass
class Call:
    """A call of a layer by the float network.

    Attributes:
        name: Of the layer.
        layer: The layer.
        inputs: What it was given.
        outputs: What it returned, in the graph of the network's outputs.
        gradients: With respect to its outputs, one a draw of labels.
    """

    name: str
    layer: Layer
    inputs: Tensor
    outputs: Tensor
    gradients: list[Tensor] = field(default_factory=list)


def own_errors(
    network: nn.Module,
    plan: Plan,
    calibration: Calibration,
    recipes: Sequence[Recipe],
    on_layer: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:
    """Return by how much each layer alone moves the network's softmax away from the float one, in nats.

    This is the Kullback-Leibler divergence to second order, ½ E[(Σ g·d)²]: d is the change of the layer's outputs, g
    the gradient with respect to them of the cross-entropy at a label drawn from the float softmax, and the sum runs
    over all outputs of an image. It is the Fisher information along the change of the weights, exact but for the draws.
    Where gradients are missing it is ½ E[Σ d²], and a warning says so.

    Args:
        network: In eval mode.
        plan: Of a walk over it.
        calibration: The images of this process; the mean is over those of all.
        recipes: To compare.
        on_layer: Called with the name of each layer that is solved.

    Returns:
        For each layer to quantize, in execution order, an error for each recipe. Layers that share a weight count as
        one, under the name of the first.
    """
    changes = solve_on_float(network, plan, calibration, recipes, on_layer)
    sums = _squares(network, plan, calibration, changes, with_gradients=True)
    missing = torch.tensor(float(sums is None), device=calibration.images.device)
    if dist.is_initialized():
        dist.all_reduce(missing)
    if sums is None or bool(missing):
        warnings.warn("some layers have no gradients, so the outputs of all layers count alike (h = 1)", stacklevel=2)
        sums = _squares(network, plan, calibration, changes, with_gradients=False)
    assert sums is not None
    sums = sums.to(calibration.images.device)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return dict(zip(changes, (sums / (2 * calibration.total)).tolist(), strict=True))


@torch.no_grad()
def solve_on_float(
    network: nn.Module,
    plan: Plan,
    calibration: Calibration,
    recipes: Sequence[Recipe],
    on_layer: Callable[[str], None],
) -> dict[str, list[Change]]:
    """Solve each layer by each recipe, as if all layers before it were float."""
    layers = layers_of(network)
    changes: dict[str, list[Change]] = {}
    forwards = Forwards(
        share_tensors(network),
        plan.samples,
        calibration.parts(),
        1,
        own_copies=plan.own_copies,
        clone_images=plan.clone_images,
    )
    try:
        while (name := forwards.layer) is not None:
            layer, inputs = layers[name], forwards.inputs
            is_new = name not in changes and plan.tied.get(name) not in changes
            if is_new and takes_images_first(plan, calibration, name, inputs):
                both = [[part[0], part[0]] for part in inputs]  # the quantized network's inputs are the float ones
                patches = Patches(layer, disjoint=recipes[0].official)
                rows = choose_rows(plan.samples[name], calibration, len(changes), patches, both, recipes[0])
                (gram,) = replace(rows, held_out=None).collect([False])
                check_finite(name, gram)
                gram = replace(gram, B=gram.A)
                weight = columns(layer.weight, patches.groups).double()
                on_layer(name)
                changes[name] = [_change(layer, weight, solve_by_shares(gram, weight, recipe)) for recipe in recipes]
            forwards.resume([layer])
    finally:
        forwards.close()
    return changes


def _change(layer: Layer, weight: Tensor, solution: Solution) -> Change:
    difference = (solution.levels * solution.scale - weight).mT.reshape(layer.weight.shape)
    return Change(difference.float(), solution.bias_shift.flatten().float())


def _squares(
    network: nn.Module,
    plan: Plan,
    calibration: Calibration,
    changes: dict[str, list[Change]],
    *,
    with_gradients: bool,
) -> Tensor | None:
    """Return Σ (Σ g·d)² over the images of this process, Σ d² without gradients; None if a gradient is missing.

    Returns:
        float64, (layers, recipes).
    """
    sums = torch.zeros(len(changes), max(map(len, changes.values()), default=0), dtype=torch.float64)
    parts = [part for part in calibration.parts() if len(part)]
    first = calibration.first
    for part in parts:
        numbers = torch.arange(first, first + len(part))
        first += len(part)
        with observed(network, plan, changes, with_gradients) as calls:
            if with_gradients:
                outputs = _outputs_with_graph(network, part)
                if outputs is None or not _add_gradients(outputs, calls, calibration.seed, numbers):
                    return None
            else:
                network(part.clone())
        for row, (name, options) in zip(sums, changes.items(), strict=True):
            own = [call for call in calls if plan.tied.get(call.name, call.name) == name]
            row += torch.stack([_square(own, change, name, len(part)) for change in options]).double().cpu()
    return sums


@contextmanager
def observed(network: nn.Module, plan: Plan, names: Iterable[str], with_gradients: bool) -> Iterator[list[Call]]:
    """Yield a list that gets the calls of some layers, and of those that share their weights, by the network's forward.

    Args:
        network: The network.
        plan: Of a walk over it.
        names: Of the layers.
        with_gradients: Whether the layers' outputs shall be in the graph of what follows.
    """
    calls: list[Call] = []
    layers = layers_of(network)

    def keep(name: str, layer: Layer, inputs: tuple[Tensor, ...], outputs: Tensor) -> Tensor:
        if with_gradients and not outputs.requires_grad:
            outputs.requires_grad_()
        calls.append(Call(name, layer, inputs[0].detach(), outputs))
        return outputs.clone()  # an operation in place may follow

    wanted = set(names)
    hooks = [
        layers[name].register_forward_hook(partial(keep, name))
        for name in plan.samples
        if plan.tied.get(name, name) in wanted
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@torch.enable_grad()
def _outputs_with_graph(network: nn.Module, images: Tensor) -> Tensor | None:
    """Return the network's first output as (images, numbers) with its graph; None if it has none."""
    try:
        outputs = tensors_in(network(images.clone()))
    except RuntimeError:  # an inference tensor, or an operation without a derivative
        return None
    found = [output for output in outputs if output.requires_grad and len(output) == len(images)]
    return found[0].flatten(1) if found and found[0].dim() > 1 else None


@torch.enable_grad()
def _add_gradients(logits: Tensor, calls: list[Call], seed: int, images: Tensor) -> bool:
    """Give each call the gradients at each draw of labels; return False if one is missing.

    Args:
        logits: (images, classes), with their graph.
        calls: Whose outputs they depend on.
        seed: Of the draws.
        images: (images,) int64, indices in the whole calibration set.
    """
    logits = at_least_float32(logits) / TEMPERATURE
    likely = logits.detach().double().softmax(1).cumsum(1)
    for draw in range(LABEL_DRAWS):
        chance = random_uniform(seed, images, draw).to(likely)
        labels = torch.searchsorted(likely, chance[:, None] * likely[:, -1:]).squeeze(1)
        loss = TEMPERATURE * F.cross_entropy(logits, labels, reduction="sum")
        try:
            found = torch.autograd.grad(loss, [call.outputs for call in calls], retain_graph=True, allow_unused=True)
        except RuntimeError:  # an operation without a derivative
            return False
        for call, gradient in zip(calls, found, strict=True):
            if gradient is None:
                return False
            call.gradients.append(at_least_float32(gradient))
    return True


def _square(calls: Sequence[Call], change: Change, name: str, images: int) -> Tensor:
    """Return Σ (Σ g·d)² over some images, the mean of the draws; Σ d² without gradients.

    Args:
        calls: Of all layers that share the weight.
        change: Of the weight, and of the bias of the layer that was solved.
        name: Of that layer.
        images: Number of images.
    """
    moved = [_moved(call, change.weight, change.bias if call.name == name else None) for call in calls]
    if not any(call.gradients for call in calls):
        return torch.stack([d.square().sum() for d in moved]).sum()
    slopes = zip(*(call.gradients for call in calls), strict=True)
    along = [sum((g * d).reshape(images, -1).sum(1) for g, d in zip(draw, moved, strict=True)) for draw in slopes]
    return torch.stack([total.square().sum() for total in along]).mean()


def _moved(call: Call, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the change of a layer's outputs."""
    inputs = at_least_float32(call.inputs)
    weight, bias = weight.to(inputs), None if bias is None else bias.to(inputs)
    if isinstance(call.layer, nn.Linear):
        return F.linear(inputs, weight, bias)
    outputs: Tensor = call.layer._conv_forward(inputs, weight, bias)
    return outputs
