"""One layer: from its Gram matrices to the levels and scales of its weights.

Every solver is one recursion, q_t = Q(T_t - Σ_{s<t} q_s F_st), and so is a sweep of coordinate descent. All neurons and
all candidate scales run through it at once. Weights are columns here, (groups, N, neurons), in float64; levels are in
units of the scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdq_lightning.quantization.codebooks import CODEBOOKS, Alphabet
from kdq_lightning.quantization.gram import Gram, Layer
from kdq_lightning.quantization.recipes import Recipe
from kdq_lightning.quantization.solvers import SOLVERS

BLOCK = 64  # columns whose feedback is applied at once
OFFICIAL_RANGE = 1.16  # C of the published code: the levels reach to C times the mean over rows of max|w|
FLAT = 1e-5  # a variance below this part of its second moment may be float32's rounding alone
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
    candidates = candidate_scales(weight, recipe)
    ridged = gram.with_ridge(weight, recipe.ridge)
    targets, feedback = SOLVERS[recipe.solver].recursion(ridged, weight)
    if recipe.official:  # a dead column gives zero
        targets = targets.masked_fill(gram.A.diagonal(dim1=1, dim2=2).unsqueeze(2) == 0, 0.0)
    levels, scale = _best(ridged, targets, feedback, candidates, recipe, noise)
    levels, scale = coordinate_descent(ridged, levels, scale, recipe)
    shift = torch.zeros_like(scale)
    if recipe.match_moments:
        scale, shift = match_moments(gram, levels, scale)
    scale = scale.float().double()  # what the file holds
    return Solution(levels, scale, shift, _biased_error(gram, levels * scale, shift))


def greedy(targets: Tensor, feedback: Tensor | None, alphabet: Alphabet, noise: Tensor | float = 0.5) -> Tensor:
    """Run q_t = Q(T_t - Σ_{s<t} q_s F_st) over the columns in order, all neurons at once.

    Args:
        targets: T in units of the scale, (groups, N, neurons).
        feedback: F, (groups, N, N), of which the strictly upper part is read; None for no feedback.
        alphabet: Where Q rounds to.
        noise: 1/2, or draws in [0, 1) for stochastic rounding, (N, neurons).

    Returns:
        Levels, (groups, N, neurons).
    """
    if feedback is None:
        return alphabet.round(targets, noise)
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
    return levels


def coordinate_descent(gram: Gram, levels: Tensor, scale: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Improve the codes c of weights s·c on |Xw - X̃sc|², in rounds of a sweep and the best scale for its codes.

    c_t <- Q(((Bw)_t/s - Σ_{r≠t} A_tr c_r)/A_tt): the recursion again, the columns still to come at their old levels.
    s <- cᵀBw / cᵀAc, summed over the layer if the scale is the layer's; kept where that is not a number, or not
    positive in a codebook whose scale may not be negative.
    """
    if not recipe.refine:
        return levels, scale
    diagonal = gram.A.diagonal(dim1=1, dim2=2).unsqueeze(2)
    alive = diagonal > 0
    divisor = torch.where(alive, diagonal, 1.0)
    upper = gram.A.triu(1)
    feedback = upper / divisor.mT
    ahead = upper @ levels
    for _ in range(recipe.refine):
        targets = torch.where(alive, (gram.BW / scale - ahead) / divisor, levels)
        levels = greedy(targets, feedback, recipe.alphabet)
        ahead = upper @ levels
        overlap = (levels * gram.BW).sum(1, keepdim=True)
        energy = (levels * (2 * ahead + diagonal * levels)).sum(1, keepdim=True)
        if recipe.scale == "layer":
            overlap, energy = overlap.sum().expand_as(overlap), energy.sum().expand_as(energy)
        keep = (energy <= 0) | (overlap == 0) | ((overlap < 0) & (not CODEBOOKS[recipe.codebook].signed_scale))
        scale = torch.where(keep, scale, overlap / torch.where(keep, 1.0, energy))
    return levels, scale


def match_moments(gram: Gram, levels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Give each output channel the float network's mean and deviation over the rows gathered.

    With y = Xw + b and ŷ = X̃q + b: s <- s·σ_y/σ_ŷ, b <- μ_y - (σ_y/σ_ŷ)(μ_ŷ - b). The ratio is 1 if there are fewer
    than two rows, or if either variance is so small a part of the second moment, of the sum or of its terms, that it
    may be noise.

    Returns:
        The scale and what the bias gains, (groups, 1, neurons) each.
    """
    weight = levels * scale
    y_mean = gram.y_sum / gram.rows
    q_mean = gram.x_sum @ weight / gram.rows
    y_variance = gram.y_square / gram.rows - y_mean.square()
    q_variance = (weight * (gram.A @ weight)).sum(1, keepdim=True) / gram.rows - q_mean.square()
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
    matrices = sum(1 + SOLVERS[recipe.solver].needs_cross for recipe in recipes) + 6
    candidates = 2 * len(SCALE_FACTORS)
    return 8 * size * (matrices * groups * size + 3 * candidates * neurons)


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
    best_scale = unit
    for factor in torch.linspace(0.1, 1.1, 60).tolist():
        scale = factor * unit
        error = (alphabet.round(weight / scale) * scale - weight).square_().sum(1, keepdim=True)
        best_scale = torch.where(error < best_error, scale, best_scale)
        best_error = torch.minimum(error, best_error)
    return best_scale


def _best(
    gram: Gram,
    targets: Tensor,
    feedback: Tensor | None,
    candidates: Tensor,
    recipe: Recipe,
    noise: Tensor | float,
) -> tuple[Tensor, Tensor]:
    """Solve for every candidate scale at once and keep the one of least error, for each neuron or for the layer."""
    count, groups, _, neurons = candidates.shape
    scales = candidates.permute(1, 2, 0, 3).reshape(groups, 1, count * neurons)
    if isinstance(noise, Tensor):
        noise = noise.repeat(1, count)
    levels = greedy(targets.repeat(1, 1, count) / scales, feedback, recipe.alphabet, noise)
    if count == 1:
        return levels, scales
    levels = levels.view(groups, -1, count, neurons)
    errors = torch.stack([gram.error(levels[:, :, i] * candidates[i]) for i in range(count)])
    if recipe.scale == "layer":
        errors = errors.sum((1, 3), keepdim=True).expand_as(errors)
    best = errors.argmin(0, keepdim=True)  # (1, groups, 1, neurons)
    scale = candidates.gather(0, best)[0]
    chosen = levels.gather(2, best[0].unsqueeze(1).expand(-1, levels.shape[1], 1, -1))
    return chosen.squeeze(2), scale


def _biased_error(gram: Gram, weight: Tensor, shift: Tensor) -> Tensor:
    """|Xw - X̃q - d|² of each neuron for a bias shift d: |Xw - X̃q|² - 2d·Σ(Xw - X̃q) + m·d²."""
    gap = gram.y_sum - gram.x_sum @ weight
    error = gram.error(weight) - 2 * shift * gap + gram.rows * shift.square()
    return error.clamp(min=0)  # the rounding of a difference of large sums
