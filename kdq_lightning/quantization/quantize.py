"""Quantize a network at all bit widths in one walk, or in as few as the memory allows."""

import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdq_lightning.errors import UserError
from kdq_lightning.quantization.codebooks import QuantizedWeight
from kdq_lightning.quantization.copies import copy_for_walk
from kdq_lightning.quantization.forwards import PART_IMAGES
from kdq_lightning.quantization.gram import layers_of
from kdq_lightning.quantization.layer_report import LayerReport
from kdq_lightning.quantization.layerwise import Calibration, Walk
from kdq_lightning.quantization.packing import save_packed
from kdq_lightning.quantization.probe import Plan, fit_images, probe
from kdq_lightning.quantization.recipes import Recipe, make_recipe
from kdq_lightning.quantization.solution import working_bytes
from kdq_lightning.quantization.torch_state import isolated

ENOUGH = 0.95  # the share of quantized weights below which a warning says what is missing


@dataclass(frozen=True)
class Quantized:
    """A network at one bit width.

    Attributes:
        model: The quantized copy, in eval mode; a layer that moment matching gave a bias has it as a parameter, and
            weights that the model given computes (weight norm, pruning) are plain parameters.
        layers: What became of each layer, in execution order, then why other parameters of two or more dimensions stay
            in float.
        weights: The quantized weights by module name.
    """

    model: nn.Module
    layers: list[LayerReport]
    weights: dict[str, QuantizedWeight]

    @property
    def share(self) -> float:
        """The quantized part of the numbers in parameters of two or more dimensions, 0 to 1."""
        matrices = {id(parameter): parameter.numel() for parameter in self.model.parameters() if parameter.dim() > 1}
        quantized = {id(self.model.get_submodule(name).weight): weight for name, weight in self.weights.items()}
        return sum(weight.codes.numel() for weight in quantized.values()) / max(1, sum(matrices.values()))

    def save(self, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write the packed file: all that inference needs, and `metadata` for whoever reads it.

        `quantized_share` is added to the metadata if a part of the weights stays in float.

        Raises:
            UserError: If the file can't be written, or the model's weights have changed since.
        """
        told = {"quantized_share": f"{self.share:.4g}"} if self.share < 1 else {}
        save_packed(path, self.model, self.weights, {**(metadata or {}), **told})


def quantize(
    model: nn.Module,
    calibration_batches: Iterable[Tensor] | Tensor,
    bits: Sequence[int] | int = (2, 3, 4, 5, 6, 7, 8),
    *,
    solver: str | None = None,
    codebook: str | None = None,
    scale: str | None = None,
    refine: int | None = None,
    match_moments: bool | None = None,
    patch_fraction: float | None = None,
    mode: str | None = None,
    max_memory_gb: float = 8.0,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
    stochastic: bool = False,
) -> dict[int, Quantized]:
    """Quantize a copy of a network at each bit width, layer by layer, against the float network's outputs.

    Under an initialised process group each process gives its share of the calibration images, contiguous blocks of the
    global order by rank; all get the same result, that of a single process.

    Args:
        model: Any module with Conv1d, Conv2d or Linear layers; it is not changed. What else it has stays in float, and
            so does a layer that isn't the plain operation on its weight; `Quantized.layers` says why.
        calibration_batches: Batches of inputs, read once, tensors or arrays; of a tuple or list, such as (images,
            labels), the first. A single tensor is one batch.
        bits: Bit widths, 1 to 8, or one of them.
        solver: `gpfq`, `gptq`, `least_squares`, `qronos` or `rounding`; None is the best known for the bit width, here
            and below.
        codebook: `paper`, `int`, `signed`, `midrise`, `narrow`, `soft` or `hard`.
        scale: `channel`, chosen by the layer's error, or `layer`, the published formula.
        refine: Rounds of coordinate descent after the solver.
        match_moments: Give each output channel the float network's mean and deviation, through scale and bias.
        patch_fraction: Least fraction of its patches that a layer is solved on; one with few gets four rows a column.
        mode: `official` for the published recursion with its alphabet, scale and patches.
        max_memory_gb: As many bit widths walk together as fit into this many GB; the result is the same.
        seed: Of the patches and of stochastic rounding.
        progress: Called after each layer with layers done, layers in all, and its name; None: a bar on a terminal.
        stochastic: Round to floor or ceiling with probability by distance.

    Returns:
        The quantized networks by bit width.

    Raises:
        UserError: If an argument, the model or the calibration images can't be used; the message says why.
    """
    recipes = [
        make_recipe(
            width,
            mode,
            solver=solver,
            codebook=codebook,
            scale=scale,
            refine=refine,
            match_moments=match_moments,
            patch_fraction=patch_fraction,
            stochastic=stochastic or None,
        )
        for width in ([bits] if isinstance(bits, int) else dict.fromkeys(bits))
    ]
    if not recipes:
        raise UserError("there is no bit width to quantize at: give bits such as (2, 4)")
    if not layers_of(model):
        raise UserError("the model has no Conv1d, Conv2d or Linear layer to quantize")
    images = gather_images(calibration_batches, next(model.parameters()).device)
    with isolated():
        results = _quantize(model, images, recipes, max_memory_gb, seed, progress or print_progress)
    first = results[recipes[0].bits]
    if first.share < ENOUGH:
        left = [layer for layer in first.layers if not layer.levels]
        warnings.warn(
            f"only {first.share:.1%} of the weights are quantized; {len(left)} layers and parameters stay in float,"
            f" first {left[0].name} ({left[0].note}): Quantized.layers names all",
            stacklevel=2,
        )
    return results


def _quantize(
    model: nn.Module,
    images: Tensor,
    recipes: Sequence[Recipe],
    max_memory_gb: float,
    seed: int,
    progress: Callable[[int, int, str], None],
) -> dict[int, Quantized]:
    network = copy_for_walk(model)
    calibration = place_among_all(fit_images(network, images) if len(images) else images, seed)
    plan = agreed(probe(network, model, calibration.images))
    groups = split_by_memory(network, plan, recipes, calibration.share, max_memory_gb * 1e9)
    total = len(plan.samples) * len(groups)
    done = 0

    def on_layer(name: str) -> None:
        nonlocal done
        done += 1
        progress(done, total, name)

    results = {}
    for group in groups:
        walk = Walk(network, plan, calibration, group, on_layer)
        walk.run()
        for i, recipe in enumerate(group):
            results[recipe.bits] = Quantized(walk.models[i], walk.reports[i], walk.weights[i])
    return results


def agreed(plan: Plan) -> Plan:
    """Return the first process's plan in all, which look at other images: their walks must take the same steps."""
    if not dist.is_initialized():
        return plan
    plans = [plan]
    dist.broadcast_object_list(plans)
    return plans[0]


def split_by_memory(
    network: nn.Module, plan: Plan, recipes: Sequence[Recipe], images: int, limit: float
) -> list[list[Recipe]]:
    """Split bit widths into groups that walk together within `limit` bytes, as few as can be.

    Raises:
        UserError: If a single bit width takes more.
    """
    for size in range(len(recipes), 0, -1):
        groups = [list(recipes[start : start + size]) for start in range(0, len(recipes), size)]
        need = max(walk_bytes(network, plan, group, images) for group in groups)
        if need <= limit:
            return groups
    gigabytes = f"{need / 1e9:.3g} GB"
    raise UserError(f"one bit width takes {gigabytes} on {images} images: raise max_memory_gb, or give fewer images")


def walk_bytes(network: nn.Module, plan: Plan, recipes: Sequence[Recipe], images: int) -> float:
    """Return the memory that a walk over all these recipes at once takes at its peak, beside the networks."""
    layers, memory = layers_of(network), plan.activations
    stacked = images * (1 + len(recipes))
    solving = (memory.at_layer[name] * stacked + working_bytes(layers[name], recipes) for name in plan.samples)
    return images * memory.image + PART_IMAGES * memory.peak + max(solving, default=0.0)


def print_progress(done: int, total: int, name: str) -> None:
    """Draw a bar over the layers where someone watches."""
    if sys.stderr.isatty():
        bar = "#" * (30 * done // total)
        print(f"\rquantizing [{bar:<30}] {done}/{total} {name:<40}", end="\n" * (done == total), file=sys.stderr)


def gather_images(batches: Iterable[Tensor] | Tensor, device: torch.device) -> Tensor:
    """Read the calibration images of this process, in the type that they have.

    Raises:
        UserError: If there are none, they aren't tensors, their shapes differ, or they are not finite.
    """
    if isinstance(batches, Tensor | np.ndarray):
        batches = [torch.as_tensor(batches)]
    parts = [_inputs(batch) for batch in batches]
    if not sum(map(len, parts)) and not dist.is_initialized():
        raise UserError("there are no calibration images: give at least one batch")
    if len({part.shape[1:] for part in parts}) > 1:
        raise UserError(f"calibration batches change their shape: {sorted({tuple(part.shape[1:]) for part in parts})}")
    images = torch.cat(parts).to(device) if parts else torch.empty(0, device=device)
    if not bool(images.isfinite().all()):
        raise UserError("the calibration images are not finite: they hold NaN or infinity")
    return images


def _inputs(batch: object) -> Tensor:
    """Return the images of one batch.

    Raises:
        UserError: If it isn't a tensor, an array, or a tuple or list that begins with one.
    """
    inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if isinstance(inputs, np.ndarray):
        inputs = torch.as_tensor(inputs)
    if not isinstance(inputs, Tensor) or not inputs.dim():
        kind = "a single number" if isinstance(inputs, Tensor) else f"a {type(inputs).__name__}"
        raise UserError(f"a calibration batch is {kind}: give tensors, or tuples that begin with one")
    return inputs.detach()


def place_among_all(images: Tensor, seed: int) -> Calibration:
    """Find the place of this process's images among those of all.

    Raises:
        UserError: If a process has none.
    """
    counts = [len(images)]
    if dist.is_initialized():
        sizes = [torch.zeros(1, dtype=torch.int64, device=images.device) for _ in range(dist.get_world_size())]
        dist.all_gather(sizes, torch.tensor(counts, device=images.device))
        counts = [int(size) for size in sizes]
    rank = dist.get_rank() if dist.is_initialized() else 0
    if not min(counts):
        raise UserError(f"process {counts.index(0)} has no calibration images: give every process a share")
    return Calibration(images, sum(counts[:rank]), sum(counts), max(counts), seed)
