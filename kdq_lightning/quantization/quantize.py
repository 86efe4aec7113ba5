"""Quantize a network at all bit widths in one walk, or in as few as the memory allows."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdq_lightning.errors import UserError
from kdq_lightning.quantization.codebooks import QuantizedWeight
from kdq_lightning.quantization.gram import layers_of
from kdq_lightning.quantization.layerwise import Calibration, LayerReport, Walk
from kdq_lightning.quantization.packing import save_packed
from kdq_lightning.quantization.probe import Profile, probe
from kdq_lightning.quantization.recipes import Recipe, make_recipe


@dataclass(frozen=True)
class Quantized:
    """A network at one bit width.

    Attributes:
        model: The quantized copy, in eval mode; a layer that moment matching gave a bias has it as a parameter.
        layers: What became of each layer, in execution order.
        weights: The quantized weights by module name.
    """

    model: nn.Module
    layers: list[LayerReport]
    weights: dict[str, QuantizedWeight]

    def save(self, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write the packed file: all that inference needs, and `metadata` for whoever reads it.

        Raises:
            UserError: If the file can't be written, or the model's weights have changed since.
        """
        save_packed(path, self.model, self.weights, metadata or {})


def quantize(
    model: nn.Module,
    calibration_batches: Iterable[Tensor],
    bits: Sequence[int] = (2, 3, 4, 5, 6, 7, 8),
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
        model: Any module with Conv1d, Conv2d or Linear layers; it is not changed.
        calibration_batches: Batches of inputs, read once; of a tuple or list, such as (images, labels), the first.
        bits: Bit widths, 1 to 8.
        solver: `gpfq`, `gptq`, `lsq`, `qronos` or `rounding`; None is the best known for the bit width, here and below.
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
        for width in bits
    ]
    if not recipes:
        raise UserError("there is no bit width to quantize at: give bits such as (2, 4)")
    layers = layers_of(model)
    if not layers:
        raise UserError("the model has no Conv1d, Conv2d or Linear layer to quantize")
    calibration = gather_calibration(calibration_batches, next(iter(layers.values())).weight, seed)
    profile = probe(model, calibration.images)
    if profile.channels_last:
        images = calibration.images.contiguous(memory_format=torch.channels_last)
        calibration = replace(calibration, images=images)
    groups = split_by_memory(model, profile, recipes, calibration.share, max_memory_gb * 1e9)
    total = len(profile.at_layer) * len(groups)
    done = 0

    def on_layer(name: str) -> None:
        nonlocal done
        done += 1
        (progress or print_progress)(done, total, name)

    results = {}
    for group in groups:
        walk = Walk(model, calibration, group, on_layer)
        walk.run()
        for i, recipe in enumerate(group):
            results[recipe.bits] = Quantized(walk.models[i], walk.reports[i], walk.weights[i])
    return results


def split_by_memory(
    model: nn.Module, profile: Profile, recipes: Sequence[Recipe], images: int, limit: float
) -> list[list[Recipe]]:
    """Split bit widths into groups that walk together within `limit` bytes, as few as can be.

    Raises:
        UserError: If a single bit width takes more.
    """
    for size in range(len(recipes), 0, -1):
        groups = [list(recipes[start : start + size]) for start in range(0, len(recipes), size)]
        need = max(profile.walk_bytes(model, group, images) for group in groups)
        if need <= limit:
            return groups
    gigabytes = f"{need / 1e9:.3g} GB"
    raise UserError(f"one bit width takes {gigabytes} on {images} images: raise max_memory_gb, or give fewer images")


def print_progress(done: int, total: int, name: str) -> None:
    """Draw a bar over the layers where someone watches."""
    if sys.stderr.isatty():
        bar = "#" * (30 * done // total)
        print(f"\rquantizing [{bar:<30}] {done}/{total} {name:<40}", end="\n" * (done == total), file=sys.stderr)


def gather_calibration(batches: Iterable[Tensor], like: Tensor, seed: int) -> Calibration:
    """Read the calibration images of this process and find their place among those of all.

    Raises:
        UserError: If there are none, their shapes differ, or they are not finite.
    """
    parts = [batch[0] if isinstance(batch, tuple | list) else batch for batch in batches]
    if not sum(map(len, parts)) and not dist.is_initialized():
        raise UserError("there are no calibration images: give at least one batch")
    if len({part.shape[1:] for part in parts}) > 1:
        raise UserError(f"calibration batches change their shape: {sorted({tuple(part.shape[1:]) for part in parts})}")
    images = torch.cat(parts).to(like) if parts else like.new_empty(0)
    counts = [len(images)]
    if dist.is_initialized():
        sizes = [torch.zeros(1, dtype=torch.int64, device=like.device) for _ in range(dist.get_world_size())]
        dist.all_gather(sizes, torch.tensor(counts, device=like.device))
        counts = [int(size) for size in sizes]
    rank = dist.get_rank() if dist.is_initialized() else 0
    if not min(counts):
        raise UserError(f"process {counts.index(0)} has no calibration images: give every process a share")
    if not bool(images.isfinite().all()):
        raise UserError("the calibration images are not finite: they hold NaN or infinity")
    return Calibration(images, sum(counts[:rank]), sum(counts), max(counts), seed)
