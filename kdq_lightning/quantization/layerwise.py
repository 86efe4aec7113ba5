"""One walk over the float network and its quantized copies, solving each layer on the way.

The float network and its copies at each bit width are streams of one forward, in the network's own order. Each layer is
solved when it is first reached, on all calibration images at once, and what follows sees what its quantized weights
make of them.
"""

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kdq_lightning.errors import UserError
from kdq_lightning.quantization.codebooks import QuantizedWeight
from kdq_lightning.quantization.draws import draw_positions, draw_uniform
from kdq_lightning.quantization.forwards import Forwards, part_images
from kdq_lightning.quantization.gram import Gram, Layer, Patches, collect, columns, layers_of
from kdq_lightning.quantization.packing import packed_bytes
from kdq_lightning.quantization.recipes import Recipe
from kdq_lightning.quantization.solution import Solution, solve
from kdq_lightning.quantization.solvers import SOLVERS

ROWS_PER_COLUMN = 4  # fewer rows a column overfit, refinement first
FEW_ROWS_PER_COLUMN = 2


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer at one bit width.

    Attributes:
        name: Of the module.
        solver: One of `SOLVERS`; "" for a layer left in float, as the codebook.
        codebook: One of `CODEBOOKS`.
        levels: Number of values that a weight may take; 0 for a layer left in float.
        rows: Rows of its Gram matrices.
        scale_granularity: "layer" or "channel".
        relative_error: |Xw + b - X̃q - b'| / |Xw| over the rows, of the layer as stored.
        zeros: Fraction of the weights that are zero.
        packed_bytes: Codes, scales and bias in the packed file.
        seconds: Spent on gathering (shared by the bit widths that walk together) and solving.
        note: What a reader should know; "" if nothing.
    """

    name: str
    solver: str
    codebook: str
    levels: int
    rows: int
    scale_granularity: str
    relative_error: float
    zeros: float
    packed_bytes: int
    seconds: float
    note: str


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
        reports: Their layers in execution order.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Calibration,
        recipes: Sequence[Recipe],
        on_layer: Callable[[str], None],
    ) -> None:
        """Copy the model once a recipe; `on_layer` is called with the name of each solved layer."""
        self.calibration = calibration
        self.recipes = recipes
        self.on_layer = on_layer
        self.models = [copy.deepcopy(model).eval() for _ in recipes]
        self._model = model
        self._layers = [layers_of(model) for model in self.models]
        self.weights: list[dict[str, QuantizedWeight]] = [{} for _ in recipes]
        self.reports: list[list[LayerReport]] = [[] for _ in recipes]
        self._repeated: set[str] = set()

    @torch.no_grad()
    def run(self) -> None:
        """Walk, and add the layers that were never reached to the reports."""
        parts = self.calibration.parts()
        forwards = Forwards(copy.deepcopy(self._model).eval(), parts, 1 + len(self.recipes))
        layers = layers_of(self._model)
        while (name := forwards.layer) is not None:
            if name in self.weights[0]:
                self._repeated.add(name)
            else:
                self._solve(name, layers[name], forwards.inputs)
            forwards.resume([layers[name], *(layers[name] for layers in self._layers)])
        for reports in self.reports:
            for i, entry in enumerate(reports):
                if entry.name in self._repeated:
                    note = "called more than once: solved on its first call"
                    reports[i] = replace(entry, note="; ".join(filter(None, [entry.note, note])))
            reports += [left_in_float(name, layer) for name, layer in layers.items() if name not in self.weights[0]]

    def _solve(self, name: str, layer: Layer, parts: Sequence[Sequence[Tensor]]) -> None:
        start = time.perf_counter()
        index = len(self.weights[0])
        patches = Patches(layer, disjoint=self.recipes[0].official)
        grams = self._collect(name, patches, parts)
        gathering = time.perf_counter() - start
        weight = columns(layer.weight, patches.groups).double()
        for i, (recipe, gram) in enumerate(zip(self.recipes, grams, strict=True)):
            start = time.perf_counter()
            check_finite(name, gram)
            noise: Tensor | float = 0.5
            if recipe.stochastic:
                noise = draw_uniform(self.calibration.seed, index, *weight.shape[1:]).to(weight.device)
            solution = solve_by_shares(gram, weight, recipe, noise)
            self._store(i, name, solution)
            seconds = gathering + time.perf_counter() - start
            self.reports[i].append(
                report(name, recipe, gram, solution, self.weights[i][name], self._layers[i][name], seconds)
            )
        self.on_layer(name)

    def _collect(self, name: str, patches: Patches, parts: Sequence[Sequence[Tensor]]) -> list[Gram]:
        """Draw the patches of a layer, and gather its Gram matrices."""
        calibration, recipe, inputs = self.calibration, self.recipes[0], parts[0][0]
        samples = sum(len(part[0]) for part in parts)
        if samples % len(calibration.images):
            raise UserError(f"layer {name} is not given the images along its first dimension: it can't be calibrated")
        per_image = samples // len(calibration.images)
        first = calibration.first * per_image
        positions = math.prod(patches.grid(inputs))
        draws = self._draws(patches, positions, calibration.total * per_image)
        numbers = torch.arange(first, first + samples)
        index = len(self.weights[0])
        replacement = recipe.official and not isinstance(patches.layer, nn.Linear)
        chosen = draw_positions(calibration.seed, index, numbers, draws, positions, replacement=replacement)
        cross = [SOLVERS[recipe.solver].needs_cross for recipe in self.recipes]
        return collect(patches, parts, chosen.to(inputs.device), first_sample=first, cross=cross)

    def _draws(self, patches: Patches, positions: int, samples: int) -> int:
        """Return how many positions of each sample the layer is solved on."""
        recipe = self.recipes[0]
        if recipe.official:
            return positions if isinstance(patches.layer, nn.Linear) else int(recipe.patch_fraction * positions + 1)
        wanted = max(recipe.patch_fraction * positions, ROWS_PER_COLUMN * patches.columns / samples)
        return min(positions, math.ceil(wanted))

    def _store(self, i: int, name: str, solution: Solution) -> None:
        """Put a solution into the quantized copy."""
        recipe, layer = self.recipes[i], self._layers[i][name]
        levels = solution.levels.mT.reshape(layer.weight.shape)
        scale = solution.scale.flatten()
        if recipe.scale == "layer" and not recipe.match_moments:
            scale = scale[:1]
        alphabet = recipe.alphabet
        weight = QuantizedWeight(
            alphabet.encode(levels).cpu(), alphabet.grid, scale.float().cpu(), recipe.codebook, recipe.bits
        )
        self.weights[i][name] = weight
        layer.weight = nn.Parameter(weight.dequantize().to(layer.weight))
        if recipe.match_moments:
            shift = solution.bias_shift.flatten().to(layer.weight)
            layer.bias = nn.Parameter(shift if layer.bias is None else layer.bias + shift)


def check_finite(name: str, gram: Gram) -> None:
    """Refuse activations that are NaN or infinite, naming the layer where they are first seen."""
    for verb, total in (("is given", gram.A.diagonal(dim1=1, dim2=2).sum()), ("computes", gram.y_square.sum())):
        if not bool(total.isfinite()):
            raise UserError(f"layer {name} {verb} activations that are not finite: check the network's weights")


def solve_by_shares(gram: Gram, weight: Tensor, recipe: Recipe, noise: Tensor | float) -> Solution:
    """Solve a layer; where processes share the work, each takes some of the neurons and all get the whole."""
    neurons = weight.shape[2]
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1 or recipe.scale == "layer" or neurons < world:
        return solve(gram, weight, recipe, noise=noise)
    bounds = [neurons * rank // world for rank in range(world + 1)]
    rank = dist.get_rank()
    mine = slice(bounds[rank], bounds[rank + 1])
    part = solve(
        gram.neurons(mine), weight[:, :, mine], recipe, noise=noise[:, mine] if isinstance(noise, Tensor) else noise
    )
    packed = torch.cat([part.levels, part.scale, part.bias_shift, part.squared_error], 1)
    width = -(-neurons // world)
    parts = [packed.new_empty(*packed.shape[:2], width) for _ in range(world)]
    dist.all_gather(parts, F.pad(packed, (0, width - packed.shape[2])).contiguous())
    widths = [stop - start for start, stop in pairwise(bounds)]
    whole = torch.cat([part[:, :, :width] for part, width in zip(parts, widths, strict=True)], 2)
    return Solution(whole[:, :-3], *whole[:, -3:].chunk(3, 1))


def report(
    name: str, recipe: Recipe, gram: Gram, solution: Solution, weight: QuantizedWeight, layer: Layer, seconds: float
) -> LayerReport:
    """Describe a layer that was just solved."""
    energy = float(gram.y_square.sum())
    few = gram.rows < FEW_ROWS_PER_COLUMN * gram.A.shape[1]
    return LayerReport(
        name=name,
        solver=recipe.solver,
        codebook=recipe.codebook,
        levels=len(weight.grid),
        rows=gram.rows,
        scale_granularity="channel" if len(weight.scale) > 1 else "layer",
        relative_error=math.sqrt(float(solution.squared_error.sum()) / energy) if energy else 0.0,
        zeros=float((weight.grid[weight.codes.long()] == 0).float().mean()),
        packed_bytes=packed_bytes(weight) + (0 if layer.bias is None else 4 * layer.bias.numel()),
        seconds=seconds,
        note=f"only {gram.rows} rows for {gram.A.shape[1]} columns" if few else "",
    )


def left_in_float(name: str, layer: Layer) -> LayerReport:
    """Describe a layer that the forward never called."""
    size = sum(4 * parameter.numel() for parameter in layer.parameters())
    return LayerReport(name, "", "", 0, 0, "", 0.0, 0.0, size, 0.0, "never reached: left in float")
