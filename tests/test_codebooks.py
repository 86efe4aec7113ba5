"""Codebooks against their definitions, one value at a time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdq_lightning.errors import UserError
from kdq_lightning.quantization.codebooks import CODEBOOKS, Alphabet, QuantizedWeight, grid

LEVELS = {"paper": 5, "int": 4, "signed": 4, "midrise": 4, "narrow": 3, "soft": 5, "hard": 7}


def definition(codebook: str, bits: int, x: float) -> float:
    """The formulas of the codebooks for a scale of one."""
    half = 2 ** (bits - 1)
    nearest = math.floor(x + 0.5)
    clip = lambda value, low, high: min(max(value, low), high)  # noqa: E731
    sign = (x > 0) - (x < 0)
    if codebook in ("int", "signed"):
        return clip(nearest, -half, half - 1)
    if codebook == "narrow":
        return clip(nearest, 1 - half, half - 1)
    if codebook == "midrise":
        return clip(math.floor(x), -half, half - 1) + 0.5
    if codebook == "hard":
        threshold = half * 0.1 / 0.9
        if abs(x) <= threshold:
            return 0
        return sign * (threshold + min(math.floor(abs(x) - threshold + 0.5), half))
    if codebook == "soft":
        nearest = math.floor(sign * max(abs(x) - 0.1 * half, 0) + 0.5)
    return clip(nearest, -half, half)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@settings(deadline=None, max_examples=50)
@given(bits=st.integers(2, 8), values=st.lists(st.floats(-300, 300), min_size=1, max_size=20))
def test_rounding_is_the_definition(codebook, bits, values):
    # Exactly on a threshold the float32 grid and the formula may fall on different sides.
    alphabet = Alphabet(codebook, bits)
    levels = alphabet.round(torch.tensor(values, dtype=torch.float64))
    expected = torch.tensor([definition(codebook, bits, x) for x in values], dtype=torch.float64)
    torch.testing.assert_close(levels, expected, rtol=0, atol=1e-6)
    codes = alphabet.encode(levels)
    torch.testing.assert_close(alphabet.grid.double()[codes.long()], levels, rtol=0, atol=1e-5)


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_number_of_levels_is_printed_honestly(codebook):
    assert len(grid(codebook, 2)) == LEVELS[codebook]
    for bits in range(2, 9):
        levels = grid(codebook, bits)
        assert len(levels) == 2**bits + LEVELS[codebook] - 4
        assert (levels.diff() > 0).all()


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_stochastic_rounding_is_unbiased_inside_the_range(codebook):
    value = torch.full((200_000,), 1.3, dtype=torch.float64)
    noise = torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean = float(Alphabet(codebook, 3).round(value, noise).mean())
    assert mean == pytest.approx(0.9 if codebook == "soft" else 1.3, abs=0.01)


def test_dequantize_scales_each_channel():
    weight = QuantizedWeight(
        torch.tensor([[[0, 1]], [[3, 2]]], dtype=torch.int16), grid("int", 2), torch.tensor([0.5, -2.0]), "signed", 2
    )
    assert weight.dequantize().tolist() == [[[-1.0, -0.5]], [[-2.0, 0.0]]]


@pytest.mark.parametrize(("codebook", "bits"), [("narrow", 1), ("int", 0), ("int", 9), ("ternary", 2)])
def test_impossible_codebooks_are_refused(codebook, bits):
    with pytest.raises(UserError):
        grid(codebook, bits)
