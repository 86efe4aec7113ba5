"""Codebooks: the levels that a weight may take at each bit width, in units of its scale.

Three words are kept apart: a *level* is a value in units of the scale; the *grid* is the ascending list of a codebook's
levels; a *code* is the index of a level in it. weight = scale · level = scale · grid[code].
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from kdq_lightning.errors import UserError

THRESHOLD = 0.1
"""λ of the sparse codebooks, as a fraction of the range C·mean max|w| that the levels cover."""


@dataclass(frozen=True)
class QuantizedWeight:
    """The weight of one layer as integer codes: scale · grid[code] is the weight.

    Attributes:
        codes: int16, shape of the weight, indices in [0, levels).
        grid: (levels,) float32, ascending, the level of each code.
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
    """The levels of a codebook at one bit width, and rounding to them; values and levels are in units of the scale.

    Attributes:
        codebook: A key of `CODEBOOKS`.
        bits: 1 to 8.

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
    def range(self) -> tuple[float, float]:
        """The lowest and the highest level."""
        return float(self.grid[0]), float(self.grid[-1])

    @cached_property
    def _rounding(self) -> "Rounding":
        return CODEBOOKS[self.codebook].rounding

    def round(self, values: Tensor, noise: Tensor | float = 0.5, *, out: Tensor | None = None) -> Tensor:
        """Return the level that each value rounds to, same shape and dtype.

        Args:
            values: Any shape.
            noise: 1/2 rounds to the nearest level, ties upwards; uniform draws from [0, 1) round to floor or ceiling
                with probability by distance.
            out: Where to put the levels; None makes room for them.
        """
        return self._rounding(self, values, noise, out)

    def encode(self, levels: Tensor) -> Tensor:
        """Return the code of each level, int16 in the shape given."""
        middles = (self.grid[1:] + self.grid[:-1]) / 2
        return torch.bucketize(levels.contiguous(), middles.to(levels)).to(torch.int16)


Rounding = Callable[[Alphabet, Tensor, Tensor | float, Tensor | None], Tensor]
"""What `Alphabet.round` does: takes the alphabet, values, noise and `out`, and returns the levels."""


def round_evenly(alphabet: Alphabet, values: Tensor, noise: Tensor | float, out: Tensor | None) -> Tensor:
    """Round to levels that are one step apart: ⌊x + noise⌋, shifted to where the levels lie, clipped to their range."""
    low, high = alphabet.range
    offset = low % 1
    levels = torch.add(values, noise - offset, out=out).floor_()
    if offset:
        levels += offset
    return levels.clamp_(low, high)


def round_soft(alphabet: Alphabet, values: Tensor, noise: Tensor | float, out: Tensor | None) -> Tensor:
    """Round sign(x)·max(|x| - λ, 0)."""
    return round_evenly(alphabet, F.softshrink(values, soft_threshold(alphabet.bits)), noise, out)


def round_hard(alphabet: Alphabet, values: Tensor, noise: Tensor | float, out: Tensor | None) -> Tensor:
    """Round |x| <= λ to 0, and what |x| has above λ to whole steps."""
    threshold = hard_threshold(alphabet.bits)
    steps = (values.abs() - threshold + noise).floor_().clamp_(0, 2 ** (alphabet.bits - 1))
    return torch.mul((steps + threshold) * values.sign(), values.abs() > threshold, out=out)


def hard_threshold(bits: int) -> float:
    """Return λ/δ, the smallest positive level of `hard`, where δ = (range - λ)/K and λ = THRESHOLD·range."""
    return float(2 ** (bits - 1)) * THRESHOLD / (1 - THRESHOLD)


def soft_threshold(bits: int) -> float:
    """Return λ/δ of `soft`, where δ = range/K and λ = THRESHOLD·range."""
    return float(2 ** (bits - 1)) * THRESHOLD


@dataclass(frozen=True)
class Codebook:
    """How a codebook is made; an entry of `CODEBOOKS` is all that the engine needs to know of it.

    Attributes:
        levels: Takes K = 2^(bits-1) and returns the levels in units of the scale, (levels,) float32, ascending.
        rounding: See `Rounding`.
        signed_scale: Whether the scale of a channel may be negative.
        range_factor: The published scale of a layer makes K steps reach to this many times C·mean max|w|.
    """

    levels: Callable[[int], Tensor]
    rounding: Rounding = round_evenly
    signed_scale: bool = False
    range_factor: float = 1.0


def evenly(low: float, high: float) -> Tensor:
    """Return low, low + 1, ..., high as float32."""
    return torch.arange(low, high + 1, dtype=torch.float32)


def hard_levels(half: int) -> Tensor:
    """Return 0 and ±(λ + k) for k <= K."""
    positive = hard_threshold(half.bit_length()) + torch.arange(half + 1)
    return torch.cat([-positive.flip(0), torch.zeros(1), positive])


CODEBOOKS: dict[str, Codebook] = {
    "paper": Codebook(lambda half: evenly(-half, half)),
    "int": Codebook(lambda half: evenly(-half, half - 1)),
    "signed": Codebook(lambda half: evenly(-half, half - 1), signed_scale=True),
    "midrise": Codebook(lambda half: evenly(0.5 - half, half - 0.5)),
    "narrow": Codebook(lambda half: evenly(1 - half, half - 1)),
    "soft": Codebook(lambda half: evenly(-half, half), round_soft),
    "hard": Codebook(hard_levels, round_hard, range_factor=1 - THRESHOLD),
}
"""The codebooks by name; add an entry, and it can be quantized with, packed and loaded."""


def grid(codebook: str, bits: int) -> Tensor:
    """Return the levels of a codebook at a bit width, (levels,) float32, ascending.

    Raises:
        UserError: If the codebook is unknown, bits is outside 1 to 8, or one level alone would be left.
    """
    if codebook not in CODEBOOKS:
        raise UserError(f"unknown codebook {codebook!r}: choose one of {', '.join(CODEBOOKS)}")
    if not 1 <= bits <= 8:
        raise UserError(f"bits must be between 1 and 8, got {bits}")
    levels = CODEBOOKS[codebook].levels(2 ** (bits - 1))
    if len(levels) < 2:
        raise UserError(f"codebook {codebook!r} has a single level at {bits} bit: use more bits or another codebook")
    return levels
