"""Quantize a network at all bit widths in one walk, or in as few as the memory allows."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdq_lightning.errors import UserError
from kdq_lightning.quantization.alphabet import QuantizedWeight
from kdq_lightning.quantization.recipes import make_recipe
from kdq_lightning.quantization.walk import Calibration, LayerReport, Walk, layers_of


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
    layers = layers_of(model)
    if not layers:
        raise UserError("the model has no Conv1d, Conv2d or Linear layer to quantize")
    calibration = gather_calibration(calibration_batches, next(iter(layers.values())).weight, seed)
    walk = Walk(model, calibration, recipes, lambda name: None)
    walk.run()
    results = zip(recipes, walk.models, walk.reports, walk.weights, strict=True)
    return {recipe.bits: Quantized(copy, reports, weights) for recipe, copy, reports, weights in results}


def gather_calibration(batches: Iterable[Tensor], like: Tensor, seed: int) -> Calibration:
    """Read the calibration images of this process and find their place among those of all.

    Raises:
        UserError: If there are none, their shapes differ, or they are not finite.
    """
    parts = [batch[0] if isinstance(batch, tuple | list) else batch for batch in batches]
    if not sum(map(len, parts)):
        raise UserError("there are no calibration images: give at least one batch")
    if len({part.shape[1:] for part in parts}) > 1:
        raise UserError(f"calibration batches change their shape: {sorted({tuple(part.shape[1:]) for part in parts})}")
    images = torch.cat(list(parts)).to(like)
    if not bool(images.isfinite().all()):
        raise UserError("the calibration images are not finite: they hold NaN or infinity")
    if images.dim() == 4:
        images = images.contiguous(memory_format=torch.channels_last)
    counts = [len(images)]
    if dist.is_initialized():
        sizes = [torch.zeros(1, dtype=torch.int64, device=like.device) for _ in range(dist.get_world_size())]
        dist.all_gather(sizes, torch.tensor(counts, device=like.device))
        counts = [int(size) for size in sizes]
    rank = dist.get_rank() if dist.is_initialized() else 0
    return Calibration(images, sum(counts[:rank]), sum(counts), seed)
