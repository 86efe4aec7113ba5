"""Random draws that depend on counters alone, so that sharding and micro-batches never change them."""

import torch
from torch import Tensor


def counter_hash(*counters: Tensor | int) -> Tensor:
    """Hash broadcastable integer counters to int64 in [0, 2^63), by SplitMix64's finalizer (Steele et al. 2014)."""
    state = torch.zeros((), dtype=torch.int64)
    for counter in counters:
        state = state + counter - 0x61C8864680B583EB
        state = (state ^ _shift_right(state, 30)) * -0x40A7B892E31B1A47
        state = (state ^ _shift_right(state, 27)) * -0x6B2FB644ECCEEE15
        state = state ^ _shift_right(state, 31)
    return state & 0x7FFFFFFFFFFFFFFF


def _shift_right(state: Tensor, count: int) -> Tensor:
    return (state >> count) & ((1 << (64 - count)) - 1)  # torch's own shift drags the sign along


def draw_positions(
    seed: int, layer: int, images: Tensor, draws: int, positions: int, *, replacement: bool = False
) -> Tensor:
    """Draw some of the positions at which a layer looks at each image.

    Without replacement the positions are cut into `draws` runs of about equal length and one is drawn from each: all
    are distinct, and they cover the image evenly.

    Args:
        seed: The run's seed.
        layer: Index of the layer in execution order.
        images: (images,) int64, indices in the whole calibration set.
        draws: Positions wanted of each image.
        positions: Number of positions there are.
        replacement: Draw independently, as the published code does.

    Returns:
        (images, draws) int64 in [0, positions).
    """
    draw = torch.arange(draws)
    if not replacement and draws == positions:
        return draw.expand(len(images), draws)
    values = counter_hash(seed, layer, images[:, None], draw)
    if replacement:
        return values % positions
    first, end = draw * positions // draws, (draw + 1) * positions // draws
    return first + values % (end - first)


def draw_uniform(seed: int, layer: int, columns: int, neurons: int) -> Tensor:
    """Return (columns, neurons) float64 in [0, 1), the noise of stochastic rounding."""
    values = counter_hash(seed, layer, torch.arange(columns)[:, None], torch.arange(neurons))
    return (values >> 10).double() / 2**53
