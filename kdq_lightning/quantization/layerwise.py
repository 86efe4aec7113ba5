"""The float network and its copies run forward together, one layer at a time: this is a walk.

A layer is quantized when the forward first reaches it, on all calibration images at once. In each copy, one for each
bit width, later layers get the outputs of the layers quantized so far.
"""

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdq_lightning.errors import UserError
from kdq_lightning.quantization.codebooks import QuantizedWeight
from kdq_lightning.quantization.comparison import holds_first
from kdq_lightning.quantization.draws import draw_positions, draw_uniform
from kdq_lightning.quantization.forwards import PARTS, Forwards, part_images, share_tensors
from kdq_lightning.quantization.gram import Gram, Layer, Patches, Rows, columns, layers_of
from kdq_lightning.quantization.layer_choice import (
    ROWS_PER_COLUMN,
    is_held_out,
    never_worse_than_rounding,
    solve_by_shares,
)
from kdq_lightning.quantization.layer_report import LayerReport, layer_report, left_in_float, noted
from kdq_lightning.quantization.memory import tensors_in
from kdq_lightning.quantization.observation import NOT_IMAGES_FIRST
from kdq_lightning.quantization.probe import Plan
from kdq_lightning.quantization.recipes import NetworkRecipe, Recipe, recipe_of
from kdq_lightning.quantization.solution import Solution
from kdq_lightning.quantization.solvers import SOLVERS

FEW_IMAGES = 256  # rows of one image resemble each other: with fewer images even many rows may mislead a solver
COMPUTES_OTHERWISE = (
    "the quantized network computes something else than its layers did one by one: a hook or a cache changes the"
    " weights of a layer; remove it from the model"
)


@dataclass(frozen=True)
class Calibration:
    """The calibration images of this process and their place among all.

    Attributes:
        images: (images, ...), on the model's device.
        first: Index of the first of them in the whole calibration set.
        total: Size of the whole calibration set.
        share: The most that any process has.
        seed: Of the patches drawn, and of stochastic rounding.
    """

    images: Tensor
    first: int
    total: int
    share: int
    seed: int

    def parts(self) -> list[Tensor]:
        """Return the images in parts small enough for a forward, cut at multiples of their size in the whole set."""
        size = part_images(self.total)
        ends = range(size - self.first % size, len(self.images), size)
        return list(self.images.tensor_split(list(ends)))


class Walk:
    """Quantizes one network at several bit widths in one forward.

    Attributes:
        models: The quantized copies, one a recipe.
        weights: Their quantized weights by module name.
        reports: What became of their layers, in execution order, then what was left in float.
    """

    def __init__(
        self,
        network: nn.Module,
        plan: Plan,
        calibration: Calibration,
        recipes: Sequence[NetworkRecipe],
        on_layer: Callable[[str], None],
    ) -> None:
        """Copy the network once a recipe; `on_layer` is called with the name of each layer that is done."""
        self.plan = plan
        self.calibration = calibration
        self.recipes = recipes
        self.on_layer = on_layer
        self.models = [copy.deepcopy(network) for _ in recipes]
        self._network = network
        self._layers = [layers_of(model) for model in self.models]
        self.weights: list[dict[str, QuantizedWeight]] = [{} for _ in recipes]
        self.reports: list[list[LayerReport]] = [[] for _ in recipes]
        self._left = dict(plan.left)
        self._solved = 0

    @torch.no_grad()
    def run(self) -> None:
        """Walk, and add what stays in float to the reports.

        Raises:
            UserError: If the images decide which layer comes next, activations aren't finite, or the quantized networks
                compute something else than their streams did.
        """
        layers = layers_of(self._network)
        repeated: set[str] = set()
        forwards = Forwards(
            share_tensors(self._network),
            self.plan.samples,
            self.calibration.parts(),
            1 + len(self.recipes),
            own_copies=self.plan.own_copies,
            clone_images=self.plan.clone_images,
        )
        try:
            while (name := forwards.layer) is not None:
                if name in self.weights[0] or name in self._left:
                    repeated.add(name)
                elif name in self.plan.tied and self.plan.tied[name] in self.weights[0]:
                    self._share(name, self.plan.tied[name])
                elif takes_images_first(self.plan, self.calibration, name, forwards.inputs):
                    self._solve(name, layers[name], forwards.inputs)
                else:
                    self._left[name] = NOT_IMAGES_FIRST
                forwards.resume([layers[name], *(layers[name] for layers in self._layers)])
            self._check_outputs(forwards.outputs[0])
        finally:
            forwards.close()
        self._finish_reports(repeated)

    def _solve(self, name: str, layer: Layer, parts: Sequence[Sequence[Tensor]]) -> None:
        """Solve a layer on what its streams are given, and put the results into the quantized copies."""
        start = time.perf_counter()
        recipes = [recipe_of(recipe, name) for recipe in self.recipes]
        patches = Patches(layer, disjoint=recipes[0].official)
        rows = choose_rows(self.plan.samples[name], self.calibration, self._solved, patches, parts, recipes[0])
        grams = rows.collect([SOLVERS[recipe.solver].needs_cross for recipe in recipes])
        gathering = time.perf_counter() - start
        weight = columns(layer.weight, patches.groups).double()
        solutions, shares = [], []
        for recipe, gram in zip(recipes, grams, strict=True):
            start = time.perf_counter()
            check_finite(name, gram)
            noise: Tensor | float = 0.5
            if recipe.stochastic:
                noise = draw_uniform(self.calibration.seed, self._solved, *weight.shape[1:]).to(weight.device)
            solutions.append(solve_by_shares(gram, weight, recipe, noise))
            shares.append(gathering + time.perf_counter() - start)
        chosen = never_worse_than_rounding(rows, grams, weight, recipes, solutions)
        for i, (recipe, gram, solution, note) in enumerate(chosen):
            self._store(i, name, recipe, solution)
            entry = layer_report(name, recipe, gram, solution, self.weights[i][name], self._layers[i][name], shares[i])
            self.reports[i].append(noted(entry, note))
        self._solved += 1
        self.on_layer(name)

    def _store(self, i: int, name: str, recipe: Recipe, solution: Solution) -> None:
        """Put a solution into the quantized copy, in the type, the memory format and the state of the float weight."""
        layer = self._layers[i][name]
        levels = solution.levels.mT.reshape(layer.weight.shape)
        scale = solution.scale.flatten()
        if recipe.scale == "layer" and not recipe.match_moments:
            scale = scale[:1]
        alphabet = recipe.alphabet
        weight = QuantizedWeight(
            alphabet.encode(levels).cpu(), alphabet.grid, scale.float().cpu(), recipe.codebook, recipe.bits
        )
        self.weights[i][name] = weight
        trained = layer.weight.requires_grad
        values = torch.empty_like(layer.weight).copy_(weight.dequantize())
        layer.weight = nn.Parameter(values, trained)
        if recipe.match_moments:
            shift = solution.bias_shift.flatten().to(layer.weight)
            if layer.bias is None:
                layer.bias = nn.Parameter(shift, trained)
            else:
                layer.bias = nn.Parameter(layer.bias + shift, layer.bias.requires_grad)

    def _share(self, name: str, first: str) -> None:
        """Give a layer the quantized weight of the one that it shares its weight with."""
        for weights, layers, reports in zip(self.weights, self._layers, self.reports, strict=True):
            weights[name] = weights[first]
            layers[name].weight = layers[first].weight
            entry = next(report for report in reports if report.name == first)
            bias = layers[name].bias
            size = 0 if bias is None else bias.nbytes
            shared = replace(entry, name=name, rows=0, relative_error=0.0, packed_bytes=size, seconds=0.0, note="")
            reports.append(noted(shared, f"shares the weight of {first}, which was solved on that one's inputs"))
        self.on_layer(name)

    def _check_outputs(self, streams: Sequence[object]) -> None:
        """Compare the quantized networks with their streams on the first image."""
        image = self.calibration.images[:1]
        for model, outputs in zip(self.models, streams[1:], strict=True):
            found = tensors_in(model(image.clone()))
            if not all(
                holds_first(stream, alone, self.plan.tolerance)
                for stream, alone in zip(tensors_in(outputs), found, strict=False)
            ):
                raise UserError(COMPUTES_OTHERWISE)
        for layers, weights in zip(self._layers, self.weights, strict=True):
            for name, weight in weights.items():
                if not torch.equal(layers[name].weight, weight.dequantize().to(layers[name].weight)):
                    raise UserError(COMPUTES_OTHERWISE)

    def _finish_reports(self, repeated: set[str]) -> None:
        """Note layers that were called again, and add what stays in float."""
        left = dict(self._left)
        for name in self.plan.samples:
            if name not in self.weights[0]:
                left.setdefault(name, "never reached")
        for model, reports in zip(self.models, self.reports, strict=True):
            for i, entry in enumerate(reports):
                if entry.name in repeated:
                    reports[i] = noted(entry, "called more than once: solved on its first call")
            reports += [left_in_float(model, name, reason) for name, reason in left.items()]


def takes_images_first(plan: Plan, calibration: Calibration, name: str, parts: Sequence[Sequence[Tensor]]) -> bool:
    """Whether every stream of every part, in every process, gives a layer as many samples an image as the probe."""
    samples, shape = plan.samples[name], parts[0][0].shape[1:]
    expected = [(samples * len(images), *shape) for images in calibration.parts()]
    found = all(inputs.shape == size for streams, size in zip(parts, expected, strict=True) for inputs in streams)
    if not dist.is_initialized():
        return found
    flag = torch.tensor(int(found), device=parts[0][0].device)
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def choose_rows(
    per_image: int,
    calibration: Calibration,
    index: int,
    patches: Patches,
    parts: Sequence[Sequence[Tensor]],
    recipe: Recipe,
) -> Rows:
    """Draw the patches that a layer is solved on, and the images that it is tried on.

    Args:
        per_image: Samples that an image makes in the layer's input.
        calibration: The images.
        index: Of the layer among those that are solved, in execution order.
        patches: How the layer cuts its inputs.
        parts: Inputs of the layer, by part and stream.
        recipe: Of the layer; of several bit widths, any of them.
    """
    inputs = parts[0][0]
    first, samples = calibration.first * per_image, len(calibration.images) * per_image
    total = calibration.total * per_image
    positions = math.prod(patches.grid(inputs))
    draws = draws_of(patches, positions, total, recipe)
    numbers = torch.arange(first, first + samples)
    replacement = recipe.official and not isinstance(patches.layer, nn.Linear)
    chosen = draw_positions(calibration.seed, index, numbers, draws, positions, replacement=replacement)
    held_out = None
    few = calibration.total < FEW_IMAGES or total * draws < ROWS_PER_COLUMN * patches.columns
    if recipe.may_fall_back and few and calibration.total > 1:
        held_out = is_held_out(numbers // per_image, calibration.total).to(inputs.device)
    # The published method's sums, and so its codes, stay what they have always been.
    together = None if recipe.official else 1 << max(0, (total // PARTS).bit_length() - 1)
    return Rows(patches, parts, chosen.to(inputs.device), first, held_out, together)


def draws_of(patches: Patches, positions: int, samples: int, recipe: Recipe) -> int:
    """Return how many positions of each sample a layer is solved on."""
    if recipe.official:
        return positions if isinstance(patches.layer, nn.Linear) else int(recipe.patch_fraction * positions + 1)
    wanted = max(recipe.patch_fraction * positions, ROWS_PER_COLUMN * patches.columns / samples)
    return min(positions, math.ceil(wanted))


def check_finite(name: str, gram: Gram) -> None:
    """Refuse activations that are NaN or infinite, naming the layer where they are first seen."""
    for verb, total in (("is given", gram.A.diagonal(dim1=1, dim2=2).sum()), ("computes", gram.y_square.sum())):
        if not bool(total.isfinite()):
            raise UserError(f"layer {name} {verb} activations that are not finite: check the network's weights")
