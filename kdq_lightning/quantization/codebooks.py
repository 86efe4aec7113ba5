"""Alphabets: a codebook and a bit width give the levels that a weight may take, in units of its scale."""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from kdq_lightning.errors import UserError

CODEBOOKS = ("paper", "int", "signed", "midrise", "narrow", "soft", "hard")

THRESHOLD = 0.1
"""λ of the sparse alphabets, as a fraction of the range C·mean max|w| that the levels cover."""


@dataclass(frozen=True)
class QuantizedWeight:
    """The weight of one layer as integers: level `grid[code]` times the scale of its layer or output channel.

    Attributes:
        codes: int16, shape of the weight, indices in [0, levels).
        grid: (levels,) float32, ascending, the unscaled level of each index.
        scale: float32, (out_channels,) or (1,); may be negative for codebook `signed`.
        codebook: One of `CODEBOOKS`.
        bits: Nominal bit width, 1 to 8.
    """

    codes: Tensor
    grid: Tensor
    scale: Tensor
    codebook: str
    bits: int

    def dequantize(self) -> Tensor:
        """Return scale * grid[codes], float32 in the shape of the weight: exactly what the quantized model holds."""
        scale = self.scale.reshape(-1, *[1] * (self.codes.dim() - 1))
        return scale * self.grid[self.codes.long()]


@dataclass(frozen=True)
class Alphabet:
    """Rounds to the levels of a codebook; values and levels are in units of the scale.

    Raises:
        UserError: From `grid`, when the levels are first needed.
    """

    codebook: str
    bits: int

    @cached_property
    def grid(self) -> Tensor:
        """(levels,) float32, ascending."""
        return grid(self.codebook, self.bits)

    @cached_property
    def _offset(self) -> float:
        return 0.5 if self.codebook == "midrise" else 0.0

    @cached_property
    def _range(self) -> tuple[float, float]:
        return float(self.grid[0]), float(self.grid[-1])

    def round(self, values: Tensor, noise: Tensor | float = 0.5, *, out: Tensor | None = None) -> Tensor:
        """Return the level that each value rounds to, same shape and dtype.

        Args:
            values: Any shape.
            noise: 1/2 rounds to the nearest level, ties upwards; uniform draws from [0, 1) round to floor or ceiling
                with probability by distance.
            out: Where to put the levels; None makes room for them.
        """
        if self.codebook == "hard":
            threshold = hard_threshold(self.bits)
            steps = (values.abs() - threshold + noise).floor_().clamp_(0, 2 ** (self.bits - 1))
            return torch.mul((steps + threshold) * values.sign(), values.abs() > threshold, out=out)
        if self.codebook == "soft":
            values = F.softshrink(values, soft_threshold(self.bits))
        levels = torch.add(values, noise - self._offset, out=out).floor_()
        if self._offset:
            levels += self._offset
        return levels.clamp_(*self._range)

    def encode(self, levels: Tensor) -> Tensor:
        """Return the int16 index in `grid` of each level."""
        middles = (self.grid[1:] + self.grid[:-1]) / 2
        return torch.bucketize(levels.contiguous(), middles.to(levels)).to(torch.int16)


def grid(codebook: str, bits: int) -> Tensor:
    """Return the unscaled levels of a codebook at a bit width, (levels,) float32 ascending.

    With K = 2^(bits-1): `paper` and `soft` {-K..K}, `int` and `signed` {-K..K-1}, `narrow` {1-K..K-1},
    `midrise` ±(k + 1/2) for k < K, `hard` {0} and ±(λ + k) for k <= K.

    Raises:
        UserError: If the codebook is unknown, bits is outside 1 to 8, or one level alone would be left.
    """
    if codebook not in CODEBOOKS:
        raise UserError(f"unknown codebook {codebook!r}: choose one of {', '.join(CODEBOOKS)}")
    if not 1 <= bits <= 8:
        raise UserError(f"bits must be between 1 and 8, got {bits}")
    half = 2 ** (bits - 1)
    if codebook == "narrow" and half == 1:
        raise UserError("codebook 'narrow' has a single level at 1 bit: use 2 bits or more, or another codebook")
    if codebook == "hard":
        positive = hard_threshold(bits) + torch.arange(half + 1)
        return torch.cat([-positive.flip(0), torch.zeros(1), positive])
    low = {"narrow": 1 - half, "midrise": 0.5 - half}.get(codebook, -half)
    high = {"paper": half, "soft": half, "midrise": half - 0.5}.get(codebook, half - 1)
    return torch.arange(low, high + 1, dtype=torch.float32)


def hard_threshold(bits: int) -> float:
    """Return λ/δ, the smallest positive level of `hard`, where δ = (range - λ)/K and λ = THRESHOLD·range."""
    return float(2 ** (bits - 1)) * THRESHOLD / (1 - THRESHOLD)


def soft_threshold(bits: int) -> float:
    """Return λ/δ of `soft`, where δ = range/K and λ = THRESHOLD·range."""
    return float(2 ** (bits - 1)) * THRESHOLD
