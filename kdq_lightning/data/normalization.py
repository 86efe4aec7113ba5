"""Channel statistics: from stored bytes to network inputs, and from one data set's statistics to another's."""

import torch
from torch import Tensor

Statistics = tuple[float, float, float]  # one value a channel, of images scaled to [0, 1]


def _channels(values: Statistics, like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None, None]


def normalize(images: Tensor, mean: Statistics, std: Statistics) -> Tensor:
    """Return (images / 255 - mean) / std as float32.

    Args:
        images: uint8, (batch, 3, h, w).
        mean: Channel means of images in [0, 1].
        std: Channel standard deviations of images in [0, 1].
    """
    scale = 1 / (255 * _channels(std, images))
    shift = _channels(mean, images) / _channels(std, images)
    return images.float().mul_(scale).sub_(shift)


def renormalize(images: Tensor, mean: Statistics, std: Statistics, to_mean: Statistics, to_std: Statistics) -> Tensor:
    """Turn images normalised with one mean and deviation into the same images normalised with another.

    Args:
        images: float, (batch, 3, h, w), normalised with `mean` and `std`.
        mean: Channel means that were subtracted.
        std: Channel deviations that were divided by.
        to_mean: Channel means wanted.
        to_std: Channel deviations wanted.

    Returns:
        float tensor of the same shape; `images` itself where nothing changes.
    """
    if tuple(mean) == tuple(to_mean) and tuple(std) == tuple(to_std):
        return images
    scale = _channels(std, images) / _channels(to_std, images)
    offset = (_channels(mean, images) - _channels(to_mean, images)) / _channels(to_std, images)
    return images * scale + offset
