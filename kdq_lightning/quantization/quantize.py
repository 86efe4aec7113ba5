"""Quantize a network at all bit widths in one walk, or in as few as the memory allows."""

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdq_lightning.errors import UserError
from kdq_lightning.quantization.copies import copy_for_walk
from kdq_lightning.quantization.gram import layers_of
from kdq_lightning.quantization.layerwise import Calibration
from kdq_lightning.quantization.mixed import candidate_recipes, check_budgets, quantize_mixed
from kdq_lightning.quantization.probe import Plan, fit_images, probe
from kdq_lightning.quantization.quantized import QuantizedNetworks
from kdq_lightning.quantization.recipes import make_recipe
from kdq_lightning.quantization.torch_state import isolated
from kdq_lightning.quantization.walks import Walks

ENOUGH = 0.95  # the share of quantized weights below which a warning says what is missing


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
    budgets: Sequence[int] = (),
    metadata_bytes: int = 0,
) -> QuantizedNetworks:
    """Quantize a copy of a network at each bit width, layer by layer, against the float network's outputs.

    Under an initialised process group each process gives its share of the calibration images, contiguous blocks of the
    global order by rank; all get the same result, that of a single process.

    Args:
        model: Any module with Conv1d, Conv2d or Linear layers; it is not changed. What else it has stays in float, and
            so does a layer that isn't the plain operation on its weight; `Quantized.layers` says why.
        calibration_batches: Batches of inputs, read once, tensors or arrays; of a tuple or list, such as (images,
            labels), the first. A single tensor is one batch.
        bits: Bit widths, 1 to 8, or one of them; with budgets there may be none.
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
        budgets: Sizes of packed files in bytes. For each one the layers get bit widths of their own, so that the file
            is no larger and the network suffers least.
        metadata_bytes: What each budget leaves for the metadata that `Quantized.save` will be given.

    Returns:
        The quantized networks by bit width; those of a budget are in its `mixed`.

    Raises:
        UserError: If an argument, the model or the calibration images can't be used; the message says why.
    """
    given: dict[str, Any] = {
        "solver": solver,
        "codebook": codebook,
        "scale": scale,
        "refine": refine,
        "match_moments": match_moments,
        "patch_fraction": patch_fraction,
        "stochastic": stochastic or None,
    }
    recipes = [
        make_recipe(width, mode, **given) for width in ([bits] if isinstance(bits, int) else dict.fromkeys(bits))
    ]
    if not recipes and not budgets:
        raise UserError("there is no bit width to quantize at: give bits such as (2, 4)")
    check_budgets(budgets)
    candidates = candidate_recipes(mode, **given) if budgets else []
    if not layers_of(model):
        raise UserError("the model has no Conv1d, Conv2d or Linear layer to quantize")
    images = gather_images(calibration_batches, next(model.parameters()).device)
    with isolated():
        network = copy_for_walk(model)
        with isolated():  # from what these forwards leave switched on
            calibration = place_among_all(fit_images(network, images) if len(images) else images, seed)
            plan = agreed(probe(network, model, calibration.images))
        walks = Walks(network, plan, calibration, max_memory_gb, progress or print_progress)
        walks.expect(recipes, candidates, len(budgets))
        results = QuantizedNetworks()
        results |= zip([recipe.bits for recipe in recipes], walks.run(recipes), strict=True)
        if budgets:
            results.mixed = quantize_mixed(walks, candidates, budgets, metadata_bytes)
    first = next(iter([*results.values(), *results.mixed.values()]))
    if first.share < ENOUGH:
        left = [layer for layer in first.layers if not layer.levels]
        warnings.warn(
            f"only {first.share:.1%} of the weights are quantized; {len(left)} layers and parameters stay in float,"
            f" first {left[0].name} ({left[0].note}): Quantized.layers names all",
            stacklevel=2,
        )
    return results


def agreed(plan: Plan) -> Plan:
    """Return the first process's plan in all, which look at other images: their walks must take the same steps."""
    if not dist.is_initialized():
        return plan
    plans = [plan]
    dist.broadcast_object_list(plans)
    return plans[0]


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
