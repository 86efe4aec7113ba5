"""Solves a layer, split over the processes.

It takes plain rounding instead where the solver was worse.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kdq_lightning.quantization.gram import Gram, Rows
from kdq_lightning.quantization.recipes import Recipe
from kdq_lightning.quantization.solution import Solution, rounded, solve

ROWS_PER_COLUMN = 4  # fewer rows a column overfit, refinement first
HELD_OUT = 8  # one of so many images is held out where rows or images are few; up to half of very few
MARGIN = 0.25  # over √n: the part of the error on n rows held out that a solution must win by


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
