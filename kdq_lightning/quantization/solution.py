"""Quantizes one layer: computes levels and scales from its Gram matrices.

`greedy` is the loop that all solvers, and coordinate descent, run: q_t = Q(T_t - Σ_{s<t} q_s F_st), for all neurons and
all candidate scales at once. `match_moments` adjusts scales and biases after it. Weights are columns here,
(groups, N, neurons), in float64; levels are in units of the scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdq_lightning.quantization.codebooks import CODEBOOKS, Alphabet
from kdq_lightning.quantization.gram import Gram, Layer
from kdq_lightning.quantization.recipes import Recipe
from kdq_lightning.quantization.solvers import SOLVERS, Recursion

BLOCK = 64  # columns whose feedback is applied at once
OFFICIAL_RANGE = 1.16  # C of the published code: the levels reach to C times the mean over rows of max|w|
FLAT = 1e-5  # a variance below this part of its second moment may be float32's rounding alone
FEW_CHANGES = 1e-3  # a neuron is done once a sweep changes no more than this part of its codes
CACHED = 2**15  # numbers that stay in a processor's cache
SCALE_FACTORS = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5)


@dataclass
class Solution:
    """The quantized neurons of one layer.

    Attributes:
        levels: (groups, N, neurons) in units of the scale.
        scale: (groups, 1, neurons), the same everywhere if the scale is the layer's.
        bias_shift: (groups, 1, neurons), what moment matching adds to the bias.
        squared_error: |Xw + b - X̃q - b'|² of each neuron, (groups, 1, neurons).
    """

    levels: Tensor
    scale: Tensor
    bias_shift: Tensor
    squared_error: Tensor


def solve(gram: Gram, weight: Tensor, recipe: Recipe, *, noise: Tensor | float = 0.5) -> Solution:
    """Quantize the neurons of one layer.

    Args:
        gram: What the layer's inputs say.
        weight: (groups, N, neurons), the float weights.
        recipe: Solver, codebook and the steps around them.
        noise: 1/2, or the draws of stochastic rounding, (N, neurons).
    """
    weight = weight.double()
    ridged = gram.with_ridge(weight, recipe.ridge)
    recursion = SOLVERS[recipe.solver].recursion(ridged, weight)
    targets = recursion.targets
    if recipe.official:  # a dead column gives zero
        targets = targets.masked_fill(gram.A.diagonal(dim1=1, dim2=2).unsqueeze(2) == 0, 0.0)
    scale = choose_scale(ridged, recursion, candidate_scales(weight, recipe), recipe, noise)
    levels = greedy(targets / scale, recursion.feedback, recipe.alphabet, noise)
    del recursion, targets
    levels, scale, ahead = coordinate_descent(ridged, levels, scale, recipe)
    energy = gram.energy(levels, ahead)
    shift = torch.zeros_like(scale)
    if recipe.match_moments:
        scale, shift = match_moments(gram, levels, scale, energy)
    scale = scale.float().double()  # what the file holds
    return Solution(levels, scale, shift, _biased_error(gram, levels, scale, shift, energy))


def choose_scale(
    gram: Gram, recursion: Recursion, candidates: Tensor, recipe: Recipe, noise: Tensor | float = 0.5
) -> Tensor:
    """Return the candidate scale of least error, (groups, 1, neurons), for each neuron or for the layer.

    All are solved at once in float32, which is enough to compare them.

    Args:
        gram: Of the layer.
        recursion: Of the solver.
        candidates: (candidates, groups, 1, neurons).
        recipe: Says for whom to choose, and where to round.
        noise: As in `solve`.
    """
    count, groups, _, neurons = candidates.shape
    if count == 1:
        return candidates[0]
    scales = candidates.permute(1, 2, 0, 3).reshape(groups, 1, count * neurons).float()
    if isinstance(noise, Tensor):
        noise = noise.float().repeat(1, count)
    residual = recursion.targets.float().repeat(1, 1, count).div_(scales)
    feedback = None if recursion.feedback is None else recursion.feedback.float()
    levels = greedy(residual, feedback, recipe.alphabet, noise, residual=residual)
    levels, residual, scales = (x.view(groups, -1, count, neurons) for x in (levels, residual, scales))
    if recursion.score is None:
        errors = torch.stack([gram.error(levels[:, :, i].double() * candidates[i]) for i in range(count)])
    else:
        errors = recursion.score.errors(levels, residual, scales).movedim(2, 0)
    if recipe.scale == "layer":
        errors = errors.sum((1, 3), keepdim=True).expand_as(errors)
    return candidates.gather(0, errors.argmin(0, keepdim=True))[0]


def greedy(
    targets: Tensor,
    feedback: Tensor | None,
    alphabet: Alphabet,
    noise: Tensor | float = 0.5,
    *,
    residual: Tensor | None = None,
) -> Tensor:
    """Run q_t = Q(T_t - Σ_{s<t} q_s F_st) over the columns in order, all neurons at once.

    Args:
        targets: T in units of the scale, (groups, N, neurons).
        feedback: F, (groups, N, N), of which the strictly upper part is read; None for no feedback.
        alphabet: Where Q rounds to.
        noise: 1/2, or draws in [0, 1) for stochastic rounding, (N, neurons).
        residual: Where to put what each rounding left, value - level, (groups, N, neurons); may be `targets`.

    Returns:
        Levels, (groups, N, neurons).
    """
    if feedback is None:
        levels = alphabet.round(targets, noise)
        if residual is not None:
            torch.sub(targets, levels, out=residual)
        return levels
    levels = torch.zeros_like(targets)
    draws = list(noise) if isinstance(noise, Tensor) else [noise] * targets.shape[1]
    for start in range(0, targets.shape[1], BLOCK):
        stop = min(start + BLOCK, targets.shape[1])
        done = levels[:, start:stop]  # zero where still to come
        values = torch.baddbmm(targets[:, start:stop], feedback[:, :start, start:stop].mT, levels[:, :start], alpha=-1)
        near = feedback[:, start:stop, start:stop].triu(1).mT.contiguous()
        blocks = (torch.tensor_split(block, stop - start, 1) for block in (values, near, done))
        steps = zip(*blocks, draws[start:stop], strict=True)
        for value, within, level, draw in steps:
            value.baddbmm_(within, done, alpha=-1)
            alphabet.round(value, draw, out=level)
        if residual is not None:
            torch.sub(values, done, out=residual[:, start:stop])
    return levels


def coordinate_descent(gram: Gram, levels: Tensor, scale: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor, Tensor]:
    """Improve the codes c of weights s·c on |Xw - X̃sc|², in rounds of a sweep and the best scale for its codes.

    c_t <- Q(((Bw)_t/s - Σ_{r≠t} A_tr c_r)/A_tt): the recursion again, the columns still to come at their old levels.
    s <- cᵀBw / cᵀAc, summed over the layer if the scale is the layer's; kept where that is not a number, or not
    positive in a codebook whose scale may not be negative. A neuron is done once a sweep changes next to none of its
    codes; one scale a layer ties its neurons together, and they stop together.

    Returns:
        The levels, their scale, and `gram.ahead(levels)`.
    """
    ahead = gram.ahead(levels)
    if not recipe.refine:
        return levels, scale, ahead
    diagonal = gram.A.diagonal(dim1=1, dim2=2).unsqueeze(2)
    alive = diagonal > 0
    divisor = torch.where(alive, diagonal, 1.0)
    feedback = gram.A / divisor.mT
    levels, scale = levels.clone(), scale.clone()
    moving = torch.ones_like(scale, dtype=torch.bool)
    for sweep in range(recipe.refine):
        some = moving.any(0).flatten().nonzero().flatten()
        if not len(some):
            break
        part = gram.neurons(some) if len(some) < moving.shape[2] else gram
        old, old_scale, old_ahead, moves = (x[:, :, some] for x in (levels, scale, ahead, moving))
        targets = torch.where(alive, (part.BW / old_scale - old_ahead) / divisor, old)
        new = torch.where(moves, greedy(targets, feedback, recipe.alphabet), old)
        new_ahead = gram.ahead(new)
        levels[:, :, some], ahead[:, :, some] = new, new_ahead
        scale[:, :, some] = torch.where(moves, _best_scale(part, new, new_ahead, old_scale, recipe), old_scale)
        changed = (new != old).sum(1, keepdim=True)
        if recipe.scale == "layer":
            changed = changed.sum() / changed.numel()
        if sweep:  # the first one's codes have a new scale, which may move them yet
            moving[:, :, some] = moves & (changed > FEW_CHANGES * new.shape[1])
    return levels, scale, ahead


def _best_scale(gram: Gram, levels: Tensor, ahead: Tensor, scale: Tensor, recipe: Recipe) -> Tensor:
    """Return the scale of least error for given levels, or the old one where that can't be had."""
    overlap = (levels * gram.BW).sum(1, keepdim=True)
    energy = gram.energy(levels, ahead)
    if recipe.scale == "layer":
        overlap, energy = overlap.sum().expand_as(overlap), energy.sum().expand_as(energy)
    keep = (energy <= 0) | (overlap == 0) | ((overlap < 0) & (not CODEBOOKS[recipe.codebook].signed_scale))
    return torch.where(keep, scale, overlap / torch.where(keep, 1.0, energy))


def match_moments(gram: Gram, levels: Tensor, scale: Tensor, energy: Tensor) -> tuple[Tensor, Tensor]:
    """Give each output channel the float network's mean and deviation over the rows gathered.

    With y = Xw + b and ŷ = X̃q + b: s <- s·σ_y/σ_ŷ, b <- μ_y - (σ_y/σ_ŷ)(μ_ŷ - b). The ratio is 1 if there are fewer
    than two rows, or if either variance is so small a part of the second moment, of the sum or of its terms, that it
    may be noise.

    Args:
        gram: Of the layer.
        levels: (groups, N, neurons).
        scale: (groups, 1, neurons).
        energy: `gram.energy(levels)`.

    Returns:
        The scale and what the bias gains, (groups, 1, neurons) each.
    """
    weight = levels * scale
    y_mean = gram.y_sum / gram.rows
    q_mean = gram.x_sum @ weight / gram.rows
    y_variance = gram.y_square / gram.rows - y_mean.square()
    q_variance = scale.square() * energy / gram.rows - q_mean.square()
    terms = (weight.square() * gram.A.diagonal(dim1=1, dim2=2).unsqueeze(2)).sum(1, keepdim=True) / gram.rows
    flat = y_variance <= FLAT * torch.maximum(gram.y_square / gram.rows, terms)
    flat |= q_variance <= FLAT * torch.maximum(q_variance + q_mean.square(), terms)
    if gram.rows < 2:
        flat = torch.ones_like(flat)
    ratio = torch.where(flat, 1.0, y_variance / torch.where(flat, 1.0, q_variance)).clamp(min=0).sqrt()
    return scale * ratio, y_mean - ratio * q_mean


def rounded(gram: Gram, weight: Tensor, recipe: Recipe) -> Solution:
    """Round each weight to the nearest level at the scale of least weight error: what no solver may be worse than."""
    weight = weight.double()
    scale = plain_scales(weight, recipe)
    scale = torch.where(scale > 0, scale, 1.0).float().double()  # what the file holds
    levels = recipe.alphabet.round(weight / scale)
    return Solution(levels, scale, torch.zeros_like(scale), gram.error(levels * scale).clamp(min=0))


def working_bytes(layer: Layer, recipes: Sequence[Recipe]) -> int:
    """Return the memory that the Gram matrices of one layer and its solver take at most, all recipes together."""
    neurons, size = len(layer.weight), layer.weight[0].numel()
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    matrices = sum(1 + SOLVERS[recipe.solver].needs_cross for recipe in recipes) + 6  # one recipe at a time solves
    signs = max(2 if CODEBOOKS[recipe.codebook].signed_scale else 1 for recipe in recipes)
    candidates = signs * len(SCALE_FACTORS)
    while_choosing = 4 * 4 * candidates  # levels, what rounding left, its square, and that weighted, in float32
    return 8 * matrices * groups * size**2 + size * neurons * (while_choosing + 8 * 8)


def candidate_scales(weight: Tensor, recipe: Recipe) -> Tensor:
    """Return the scales to try, (candidates, groups, 1, neurons).

    One a layer is the published δ = C·mean max|w| / K. For one a channel, the scale of least weight error among 60
    between 0.1 and 1.1 of max|w| over the largest level is multiplied by `SCALE_FACTORS`. A codebook whose scale may be
    negative tries both signs.
    """
    scales = plain_scales(weight, recipe).unsqueeze(0)
    if recipe.scale == "channel":
        scales = scales * torch.tensor(SCALE_FACTORS, dtype=scales.dtype, device=scales.device).view(-1, 1, 1, 1)
    scales = torch.where(scales > 0, scales, 1.0)  # a channel of zeros
    scales = scales.float().double()  # what the file holds
    return torch.cat([scales, -scales]) if CODEBOOKS[recipe.codebook].signed_scale else scales


def plain_scales(weight: Tensor, recipe: Recipe) -> Tensor:
    """Return the scales that the weights alone suggest, (groups, 1, neurons), the same everywhere for one a layer."""
    top = weight.abs().amax(1, keepdim=True)
    if recipe.scale == "channel":
        return least_weight_error(weight, top, recipe.alphabet)
    factor = OFFICIAL_RANGE * CODEBOOKS[recipe.codebook].range_factor / 2 ** (recipe.bits - 1)
    scale: Tensor = factor * top.mean()
    return scale.expand_as(top)


def least_weight_error(weight: Tensor, top: Tensor, alphabet: Alphabet) -> Tensor:
    """Return the scale of each neuron that rounds its weights with the least squared error, (groups, 1, neurons)."""
    unit = top / float(alphabet.grid[-1])
    unit = torch.where(unit > 0, unit, 1.0)
    best_error = torch.full_like(top, torch.inf)
    best_scale = unit.clone()
    width = max(1, CACHED // (weight.shape[0] * weight.shape[1]))
    some = zip(
        *(torch.tensor_split(x, -(-weight.shape[2] // width), 2) for x in (weight, unit, best_error, best_scale)),
        strict=True,
    )
    for values, one, least, best in some:  # few neurons at a time, which stay in a processor's cache
        values = values.contiguous()
        for factor in torch.linspace(0.1, 1.1, 60).tolist():
            scale = factor * one
            error = alphabet.round(values / scale).mul_(scale).sub_(values).square_().sum(1, keepdim=True)
            better = error < least
            best.copy_(torch.where(better, scale, best))
            least.copy_(torch.where(better, error, least))
    return best_scale


def _biased_error(gram: Gram, levels: Tensor, scale: Tensor, shift: Tensor, energy: Tensor) -> Tensor:
    """|Xw - X̃q - d|² of each neuron for a bias shift d: |Xw - X̃q|² - 2d·Σ(Xw - X̃q) + m·d²."""
    overlap = (levels * gram.BW).sum(1, keepdim=True)
    error = scale * (scale * energy - 2 * overlap) + gram.y_square
    gap = gram.y_sum - scale * (gram.x_sum @ levels)
    return (error - 2 * shift * gap + gram.rows * shift.square()).clamp(min=0)  # a difference of large sums
