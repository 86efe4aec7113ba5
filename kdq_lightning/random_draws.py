"""Random numbers computed from keys such as (seed, image). The same keys always give the same number.

Images, patches and splits are drawn from here, so their order, the batch size, a resumed run and the number of
processes never change a draw.
"""

import torch
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB  # 2**64 / golden ratio, as int64: the increment of SplitMix64
_FIRST_MIX = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_SECOND_MIX = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB


def random_uniform(*keys: int | Tensor) -> Tensor:
    """Draw uniform numbers in [0, 1) from a hash of integer keys.

    Args:
        keys: Integers, or int64 tensors of shapes that broadcast. Different numbers of keys, and the same keys in
            another order, give unrelated draws.

    Returns:
        float64 tensor of the keys' broadcast shape, 53 random bits each.
    """
    return _shift_right(_hash(keys), 11).double() * 2.0**-53


def random_integers(*keys: int | Tensor) -> Tensor:
    """Draw integers in [0, 2^63) from a hash of integer keys, as `random_uniform` does: int64."""
    return _hash(keys) & 0x7FFFFFFFFFFFFFFF


def _hash(keys: tuple[int | Tensor, ...]) -> Tensor:
    """Chain the finalizer of SplitMix64 over the keys (Steele et al. 2014, Fast splittable pseudorandom generators)."""
    state = torch.zeros((), dtype=torch.int64)
    for key in keys:
        state = state + key + _GOLDEN
        state = (state ^ _shift_right(state, 30)) * _FIRST_MIX
        state = (state ^ _shift_right(state, 27)) * _SECOND_MIX
        state = state ^ _shift_right(state, 31)
    return state


def _shift_right(state: Tensor, count: int) -> Tensor:
    """Shift as on uint64; torch's own shift repeats the sign, so it is masked away."""
    return (state >> count) & ((1 << (64 - count)) - 1)
