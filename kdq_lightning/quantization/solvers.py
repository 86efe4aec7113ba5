"""Solvers: each is one recursion over the columns of a layer, q_t = Q(T_t - Σ_{s<t} q_s F_st).

A solver says what its targets T and its feedback F are; running the recursion is `solution.greedy`'s work. Weights are
columns here, (groups, N, neurons), in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kdq_lightning.quantization.gram import Gram

DAMPING = 0.01
"""λ of the solvers that factorise A + λI, as a fraction of the mean of A's diagonal."""


class Recursion(NamedTuple):
    """What a solver makes of a layer.

    Attributes:
        targets: T, (groups, N, neurons).
        feedback: F, (groups, N, N), of which the strictly upper part is read; None for no feedback.
    """

    targets: Tensor
    feedback: Tensor | None


def gpfq(gram: Gram, weight: Tensor) -> Recursion:
    """T = tril(B)w / diag A, F = triu(A, 1) / diag A; a dead column (A_tt = 0) rounds its own weight.

    Zhang, Zhou, Saab 2023, arXiv 2201.11113.
    """
    assert gram.B is not None
    diagonal = gram.A.diagonal(dim1=1, dim2=2).unsqueeze(2)
    dead = diagonal == 0
    divisor = torch.where(dead, 1.0, diagonal)
    targets = torch.where(dead, weight, gram.B.tril() @ weight / divisor)
    return Recursion(targets, gram.A.triu(1) / divisor.mT)


def gptq(gram: Gram, weight: Tensor) -> Recursion:
    """Round around the float weights.

    With A + λI = UUᵀ, U upper triangular, M = U / diag U: q_t = Q(w_t + Σ_{s<t} (w_s - q_s) M_st), the optimum of the
    columns still free, so F = M. Frantar et al. 2022, arXiv 2210.17323.
    """
    upper = _damped_factor(gram)[0]
    return _around(weight, upper)


def least_squares(gram: Gram, weight: Tensor) -> Recursion:
    """Round as `gptq` does, around the least-squares weights v = (A + λI)⁻¹(Bw + λw)."""
    upper, damping = _damped_factor(gram)
    solved = torch.linalg.solve_triangular(upper, gram.BW + damping * weight, upper=True)
    return _around(torch.linalg.solve_triangular(upper.mT, solved, upper=False), upper)


def qronos(gram: Gram, weight: Tensor) -> Recursion:
    """Round as `least_squares` does, the first column as if the other weights stayed float.

    Zhang et al. 2025, arXiv 2505.11695.
    """
    targets, feedback = least_squares(gram, weight)
    diagonal = gram.A[:, :1, 0]
    alive = diagonal > 0
    first = gram.BW[:, 0] - (gram.A[:, :1, 1:] @ weight[:, 1:]).squeeze(1)
    targets[:, 0] = torch.where(alive, first / torch.where(alive, diagonal, 1.0), weight[:, 0])
    return Recursion(targets, feedback)


def rounding(gram: Gram, weight: Tensor) -> Recursion:
    """Round each weight by itself: T = w, no feedback."""
    return Recursion(weight, None)


def _damped_factor(gram: Gram) -> tuple[Tensor, Tensor]:
    """Return U of A + λI = UUᵀ, (groups, N, N), and λ, (groups, 1, 1)."""
    diagonal = gram.A.diagonal(dim1=1, dim2=2)
    damping = DAMPING * diagonal.mean(1, keepdim=True).unsqueeze(2)
    damping = torch.where(damping == 0, 1.0, damping)
    damped = gram.A.clone()
    damped.diagonal(dim1=1, dim2=2).add_(damping.squeeze(2))
    return torch.linalg.cholesky(damped.flip(1, 2)).flip(1, 2), damping


def _around(target: Tensor, upper: Tensor) -> Recursion:
    """Return the recursion whose feedback corrects the columns still free around `target`."""
    feedback = upper / upper.diagonal(dim1=1, dim2=2).unsqueeze(1)
    return Recursion(feedback.mT @ target, feedback)


@dataclass(frozen=True)
class Solver:
    """A solver; an entry of `SOLVERS` is all that the engine needs to know of it.

    Attributes:
        recursion: Takes the layer's Gram matrices and its float weights, (groups, N, neurons), and returns the
            recursion.
        needs_cross: Whether it reads `Gram.B`, the products with the float network's inputs, which cost as much again.
    """

    recursion: Callable[[Gram, Tensor], Recursion]
    needs_cross: bool = False


SOLVERS: dict[str, Solver] = {
    "gpfq": Solver(gpfq, needs_cross=True),
    "gptq": Solver(gptq),
    "least_squares": Solver(least_squares),
    "qronos": Solver(qronos),
    "rounding": Solver(rounding),
}
"""The solvers by name; add an entry, and it can be quantized with."""

RENAMED_SOLVERS = {"lsq": "least_squares"}
"""What solvers were called in older releases. LSQ is another method's name: learned step size quantization."""
