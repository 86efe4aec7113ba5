"""Scales bytes to [0, 1], and normalises images: (image - mean) / std."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from kdq_lightning.errors import UserError

Channels = tuple[float, ...]  # one value a channel, of images in [0, 1]


class Statistics(NamedTuple):
    """Mean and standard deviation of images in [0, 1], which a network expects to be taken out of its inputs.

    Attributes:
        mean: One value a channel, subtracted.
        std: One value a channel, divided by.
    """

    mean: Channels
    std: Channels

    def check(self, mean_name: str = "mean", std_name: str = "std") -> None:
        """Refuse values that can't be those of images in [0, 1].

        Args:
            mean_name: What the message calls the mean.
            std_name: What the message calls the deviation.

        Raises:
            UserError: If a mean is outside [0, 1], a deviation outside (0, 1], or one has more values than the other.
        """
        for name, values, good in (
            (mean_name, self.mean, all(0 <= value <= 1 for value in self.mean)),
            (std_name, self.std, all(0 < value <= 1 for value in self.std) and len(self.mean) == len(self.std)),
        ):
            if not good:
                raise UserError(f"{name} belongs to images scaled to [0, 1], one value a channel, got {list(values)}")


def to_unit_range(images: Tensor) -> Tensor:
    """Return uint8 images as float32 in [0, 1], of the same shape."""
    # By a tensor on the device: dividing by a Python number multiplies by its rounded inverse on a GPU.
    return images.float().div_(_byte_range(images.device))


def normalize(images: Tensor, statistics: Statistics) -> Tensor:
    """Return (images - mean) / std as float32, of the same shape.

    Bytes and the same bytes `to_unit_range` give equal results, bit for bit: 255 · (byte / 255) is the byte again.

    Args:
        images: (batch, channels, h, w), float in [0, 1], or uint8 for 0 to 255.
        statistics: Those that the network expects.
    """
    pixels = images.float() if images.dtype == torch.uint8 else 255 * images.float()
    scale, shift = _scale_and_shift(statistics, images.device)
    return pixels.mul_(scale).sub_(shift)


# Kept a device: copying a few numbers to a GPU makes the host wait until the GPU has done all that it was told.
@cache
def _byte_range(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(255.0, dtype=torch.float32, device=device)


@cache
def _scale_and_shift(statistics: Statistics, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return 1 / (255 · std) and mean / std, each float32, (channels, 1, 1)."""
    with torch.inference_mode(False):
        mean, std = (torch.tensor(values, dtype=torch.float32, device=device)[:, None, None] for values in statistics)
        return 1 / (255 * std), mean / std
