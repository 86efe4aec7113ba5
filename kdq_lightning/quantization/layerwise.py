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
from kdq_lightning.quantization.forwards import Forwards, part_images, share_tensors
from kdq_lightning.quantization.gram import Gram, Layer, Patches, Rows, columns, layers_of
from kdq_lightning.quantization.memory import tensors_in
from kdq_lightning.quantization.packing import packed_bytes
from kdq_lightning.quantization.probe import NOT_IMAGES_FIRST, Plan, holds_first
from kdq_lightning.quantization.recipes import Recipe
from kdq_lightning.quantization.solution import Solution, rounded, solve
from kdq_lightning.quantization.solvers import SOLVERS

ROWS_PER_COLUMN = 4  # fewer rows a column overfit, refinement first
FEW_IMAGES = 256  # rows of one image resemble each other: with fewer images even many rows may mislead a solver
HELD_OUT = 8  # one of so many images is held out where rows or images are few; up to half of very few
MARGIN = 0.25  # over √n: the part of the error on n rows held out that a solution must win by
COMPUTES_OTHERWISE = (
    "the quantized network computes something else than its layers did one by one: a hook or a cache changes the"
    " weights of a layer; remove it from the model"
)
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
        reports: What became of their layers, in execution order, then what was left in float.
    """

    def __init__(
        self,
        network: nn.Module,
        plan: Plan,
        calibration: Calibration,
        recipes: Sequence[Recipe],
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
                elif self._images_first(name, forwards.inputs):
                    self._solve(name, layers[name], forwards.inputs)
                else:
                    self._left[name] = NOT_IMAGES_FIRST
                forwards.resume([layers[name], *(layers[name] for layers in self._layers)])
            self._check_outputs(forwards.outputs[0])
        finally:
            forwards.close()
        self._finish_reports(repeated)

    def _images_first(self, name: str, parts: Sequence[Sequence[Tensor]]) -> bool:
        """Whether every stream of every part, in every process, gives a layer as many samples an image as the probe."""
        samples, shape = self.plan.samples[name], parts[0][0].shape[1:]
        expected = [(samples * len(images), *shape) for images in self.calibration.parts()]
        found = all(inputs.shape == size for streams, size in zip(parts, expected, strict=True) for inputs in streams)
        if not dist.is_initialized():
            return found
        flag = torch.tensor(int(found), device=parts[0][0].device)
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        return bool(flag)

    def _solve(self, name: str, layer: Layer, parts: Sequence[Sequence[Tensor]]) -> None:
        """Solve a layer on what its streams are given, and put the results into the quantized copies."""
        start = time.perf_counter()
        patches = Patches(layer, disjoint=self.recipes[0].official)
        rows = self._choose_rows(name, patches, parts)
        grams = rows.collect([SOLVERS[recipe.solver].needs_cross for recipe in self.recipes])
        gathering = time.perf_counter() - start
        weight = columns(layer.weight, patches.groups).double()
        solutions, shares = [], []
        for recipe, gram in zip(self.recipes, grams, strict=True):
            start = time.perf_counter()
            check_finite(name, gram)
            noise: Tensor | float = 0.5
            if recipe.stochastic:
                noise = draw_uniform(self.calibration.seed, self._solved, *weight.shape[1:]).to(weight.device)
            solutions.append(solve_by_shares(gram, weight, recipe, noise))
            shares.append(gathering + time.perf_counter() - start)
        chosen = never_worse_than_rounding(rows, grams, weight, self.recipes, solutions)
        for i, (recipe, gram, solution, note) in enumerate(chosen):
            self._store(i, name, recipe, solution)
            entry = report(name, recipe, gram, solution, self.weights[i][name], self._layers[i][name], shares[i])
            self.reports[i].append(noted(entry, note))
        self._solved += 1
        self.on_layer(name)

    def _choose_rows(self, name: str, patches: Patches, parts: Sequence[Sequence[Tensor]]) -> Rows:
        """Draw the patches that a layer is solved on, and the images that it is tried on."""
        calibration, recipe, inputs = self.calibration, self.recipes[0], parts[0][0]
        per_image = self.plan.samples[name]
        first, samples = calibration.first * per_image, len(calibration.images) * per_image
        total = calibration.total * per_image
        positions = math.prod(patches.grid(inputs))
        draws = self._draws(patches, positions, total)
        numbers = torch.arange(first, first + samples)
        replacement = recipe.official and not isinstance(patches.layer, nn.Linear)
        chosen = draw_positions(calibration.seed, self._solved, numbers, draws, positions, replacement=replacement)
        held_out = None
        few = calibration.total < FEW_IMAGES or total * draws < ROWS_PER_COLUMN * patches.columns
        if recipe.may_fall_back and few and calibration.total > 1:
            held_out = is_held_out(numbers // per_image, calibration.total).to(inputs.device)
        return Rows(patches, parts, chosen.to(inputs.device), first, held_out)

    def _draws(self, patches: Patches, positions: int, samples: int) -> int:
        """Return how many positions of each sample the layer is solved on."""
        recipe = self.recipes[0]
        if recipe.official:
            return positions if isinstance(patches.layer, nn.Linear) else int(recipe.patch_fraction * positions + 1)
        wanted = max(recipe.patch_fraction * positions, ROWS_PER_COLUMN * patches.columns / samples)
        return min(positions, math.ceil(wanted))

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


def is_held_out(images: Tensor, total: int) -> Tensor:
    """Tell which images a layer is tried on instead of solved: one in eight, up to half of very few.

    Args:
        images: int64 indices in the whole calibration set.
        total: Size of the whole calibration set, at least 2.

    Returns:
        bool, in the shape of `images`.
    """
    one_in = min(HELD_OUT, max(2, total // 4))
    return images % one_in == one_in - 1


def never_worse_than_rounding(
    rows: Rows, grams: Sequence[Gram], weight: Tensor, recipes: Sequence[Recipe], solutions: Sequence[Solution]
) -> list[tuple[Recipe, Gram, Solution, str]]:
    """Take plain rounding where a solution is worse.

    If the solver had few rows, or rows of few images, they are compared on images that it hasn't seen, and the fewer
    rows these have the more the solution has to win by. If it had few rows and all of one image, nothing can be known,
    and rounding is taken. Where there is enough of both, the errors on what it has seen are known well enough.

    Returns:
        The recipe that was followed, the sums it was solved on, its solution, and a note for the report.
    """
    few = grams[0].rows < ROWS_PER_COLUMN * grams[0].A.shape[1]
    if not recipes[0].may_fall_back:
        return [(recipe, gram, one, "") for recipe, gram, one in zip(recipes, grams, solutions, strict=True)]
    round_layer = rounded if rows.held_out is None else solve_by_shares
    plain = [round_layer(gram, weight, recipe.plain) for gram, recipe in zip(grams, recipes, strict=True)]
    pairs = list(zip(solutions, plain, strict=True))
    needed, reason = 1.0, "was worse"
    if rows.held_out is not None:
        errors, tried = rows.errors([[(one.levels * one.scale, one.bias_shift) for one in pair] for pair in pairs])
        needed, reason = 1 - MARGIN / math.sqrt(tried), "was not better on rows held out"
    elif few:
        errors, reason = [[1.0, 0.0] for _ in pairs], "had few rows, all of one image"
    else:
        errors = [[float(one.squared_error.sum()) for one in pair] for pair in pairs]
    worse = [solved > needed * simple for solved, simple in errors]
    if rows.held_out is not None and any(worse):  # rounding chooses its scales on all rows
        everything = replace(rows, held_out=None).collect([False for _ in recipes])
        grams = [whole if bad else gram for whole, gram, bad in zip(everything, grams, worse, strict=True)]
    chosen = []
    for recipe, gram, solution, is_worse in zip(recipes, grams, solutions, worse, strict=True):
        if is_worse:
            fallback = solve_by_shares(gram, weight, recipe.plain)
            chosen.append((recipe.plain, gram, fallback, f"rounded, as {recipe.solver} {reason}"))
        else:
            chosen.append((recipe, gram, solution, ""))
    return chosen


def check_finite(name: str, gram: Gram) -> None:
    """Refuse activations that are NaN or infinite, naming the layer where they are first seen."""
    for verb, total in (("is given", gram.A.diagonal(dim1=1, dim2=2).sum()), ("computes", gram.y_square.sum())):
        if not bool(total.isfinite()):
            raise UserError(f"layer {name} {verb} activations that are not finite: check the network's weights")


def solve_by_shares(gram: Gram, weight: Tensor, recipe: Recipe, noise: Tensor | float = 0.5) -> Solution:
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


def noted(entry: LayerReport, note: str) -> LayerReport:
    """Return a report with one more note."""
    return replace(entry, note="; ".join(filter(None, [entry.note, note])))


def left_in_float(model: nn.Module, name: str, reason: str) -> LayerReport:
    """Describe a layer, or a parameter of another module, that stays as it was."""
    layer = layers_of(model).get(name)
    parameters = [model.get_parameter(name)] if layer is None else layer.parameters(recurse=False)
    size = sum(parameter.nbytes for parameter in parameters)
    return LayerReport(name, "", "", 0, 0, "", 0.0, 0.0, size, 0.0, f"{reason}: left in float")
