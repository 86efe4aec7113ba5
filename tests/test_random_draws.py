"""The counter hash is SplitMix64, and its draws are uniform."""

import torch

from kdq_lightning.random_draws import random_integers, random_uniform


def splitmix(*keys: int) -> int:
    """The hash in Python's integers."""
    mask, state = 2**64 - 1, 0
    for key in keys:
        state = (state + key + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state


def test_hash_is_splitmix64():
    # The first output of the generator seeded with 1234567, as published with its reference implementation.
    assert splitmix(1234567) == 6457827717110365317
    keys = [(0,), (3, 0, 50_000, 7), (2**40, -1), (0, 0), (1, 2), (2, 1)]
    assert [random_uniform(*key).item() for key in keys] == [(splitmix(*key) >> 11) / 2**53 for key in keys]
    table = random_uniform(5, torch.arange(3)[:, None], torch.arange(4))
    assert table.dtype == torch.float64
    assert table.tolist() == [[(splitmix(5, i, j) >> 11) / 2**53 for j in range(4)] for i in range(3)]
    integers = random_integers(3, 7, torch.arange(5))
    assert integers.tolist() == [splitmix(3, 7, i) & (2**63 - 1) for i in range(5)]


def test_hash_is_uniform_and_uncorrelated():
    draws = random_uniform(torch.arange(4)[:, None, None], torch.arange(100)[:, None], torch.arange(1000))
    counts = torch.histc(draws, 100, 0, 1)
    assert ((counts - 4000) ** 2 / 4000).sum() < 160  # chi-squared, 99 degrees of freedom: p = 1e-4
    shifted = draws - 0.5
    for other in (shifted.roll(1, 0), shifted.roll(1, 1), shifted.roll(1, 2)):
        assert abs((shifted * other).mean() * 12) < 4.5 / 400_000**0.5
