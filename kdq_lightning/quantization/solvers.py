"""The solvers: each gives the targets T and the feedback F of the loop q_t = Q(T_t - Σ_{s<t} q_s F_st).

The loop is `solution.greedy`: for each column t it rounds T_t, minus the feedback of the columns done before, to a
level; Q is this rounding and q_t the level. Weights are columns here, (groups, N, neurons), in float64.
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
        score: How the recursion's own residuals tell the layer's error; None where they don't.
    """

    targets: Tensor
    feedback: Tensor | None
    score: "Score | None" = None


class Score(NamedTuple):
    """The error |Xw - X̃q|² of each neuron, up to a constant: Σ curvature·z² + Σ linear·q - damping·Σ q².

    z_t = T_t - Σ_{s<t} q_s F_st - q_t is what rounding column t leaves. With H = A + λI = UUᵀ and a recursion around v
    the first sum is (q - v)ᵀH(q - v), so no product with A is needed.

    Attributes:
        curvature: U_tt², (groups, N, 1).
        linear: (groups, N, neurons).
        damping: λ, (groups, 1, 1).
    """

    curvature: Tensor
    linear: Tensor
    damping: Tensor

    def errors(self, levels: Tensor, residual: Tensor, scale: Tensor) -> Tensor:
        """Return the errors for several scales of each neuron, in the type of the levels.

        Args:
            levels: In units of the scale, (groups, N, candidates, neurons).
            residual: z in units of the scale, of that shape.
            scale: (groups, 1, candidates, neurons).

        Returns:
            (groups, 1, candidates, neurons), each neuron's with a constant of its own.
        """
        curvature, linear, damping = (part.to(levels).unsqueeze(2) for part in self)
        convex = (residual.square() * curvature).sum(1, keepdim=True)
        convex -= damping * levels.square().sum(1, keepdim=True)
        return scale * (scale * convex + (levels * linear).sum(1, keepdim=True))


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
    upper, damping = _damped_factor(gram)
    curvature = _curvature(upper)
    linear = 2 * (gram.A @ weight + damping * weight - gram.BW)
    feedback = upper.div_(curvature.sqrt().mT)
    return Recursion(feedback.mT @ weight, feedback, Score(curvature, linear, damping))


def least_squares(gram: Gram, weight: Tensor) -> Recursion:
    """Round as `gptq` does, around the least-squares weights v = (A + λI)⁻¹(Bw + λw).

    Their targets are Mᵀv = (Uᵀv) / diag U = U⁻¹(Bw + λw) / diag U: v itself is never needed.
    """
    upper, damping = _damped_factor(gram)
    curvature = _curvature(upper)
    targets = torch.linalg.solve_triangular(upper, gram.BW + damping * weight, upper=True).div_(curvature.sqrt())
    return Recursion(targets, upper.div_(curvature.sqrt().mT), Score(curvature, 2 * damping * weight, damping))


def qronos(gram: Gram, weight: Tensor) -> Recursion:
    """Round as `least_squares` does, the first column as if the other weights stayed float.

    Zhang et al. 2025, arXiv 2505.11695.
    """
    targets, feedback, _ = least_squares(gram, weight)
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
    damped = gram.A.flip(1, 2)
    damped.diagonal(dim1=1, dim2=2).add_(damping.squeeze(2))
    return torch.linalg.cholesky(damped).flip(1, 2), damping


def _curvature(upper: Tensor) -> Tensor:
    """Return U_tt², (groups, N, 1)."""
    return upper.diagonal(dim1=1, dim2=2).square().unsqueeze(2)


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
