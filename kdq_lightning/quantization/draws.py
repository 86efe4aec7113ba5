"""The random choices of quantization: which patches a layer is solved on, and the noise of stochastic rounding.

Which images are used is decided in data/base.py.
"""

import torch
from torch import Tensor

from kdq_lightning.random_draws import random_integers


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
    values = random_integers(seed, layer, images[:, None], draw)
    if replacement:
        return values % positions
    first, end = draw * positions // draws, (draw + 1) * positions // draws
    return first + values % (end - first)


def draw_uniform(seed: int, layer: int, columns: int, neurons: int) -> Tensor:
    """Return (columns, neurons) float64 in [0, 1), the noise of stochastic rounding."""
    values = random_integers(seed, layer, torch.arange(columns)[:, None], torch.arange(neurons))
    return (values >> 10).double() / 2**53
