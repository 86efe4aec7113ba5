"""Augmentation of whole batches: a view depends on the seed, the epoch and the image's index alone."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kdq_lightning.random_draws import random_uniform

_ALTERNATE = 8  # the draw that decides in which epochs an image is mirrored


@dataclass(frozen=True)
class View:
    """A training batch as one epoch shows it.

    Attributes:
        images: float32 in [0, 1], (batch, channels, h, w), augmented, in the stored size: what a teacher gets.
        labels: int64, (batch,), class indices.
        index: int64, (batch,), canonical index of each image within the training set.
        size: Side in pixels of the images that the trained network gets in this epoch.
    """

    images: Tensor
    labels: Tensor
    index: Tensor
    size: int

    @property
    def resized(self) -> Tensor:
        """Return the images for the trained network, (batch, channels, size, size)."""
        return shrink(self.images, self.size)


def augment(
    images: Tensor,
    index: Tensor,
    *,
    seed: int,
    epoch: int,
    crop: int = 0,
    flip: bool | Literal["alternate"] = False,
    cutout: int = 0,
    fill: tuple[int, ...] = (0, 0, 0),
) -> Tensor:
    """Return one random view of each image: crop, flip, cutout, in this order.

    Args:
        images: uint8, (batch, channels, height, width).
        index: Canonical index of each image, int64, (batch,).
        seed: Seed of the run.
        epoch: Epoch that the view belongs to.
        crop: Random shift by up to this many pixels in each direction; zeros move in (He et al. 2015).
        flip: Mirror every other image on average, drawn anew each epoch; "alternate" draws once an image, and mirrors
            it in every second epoch, so that two epochs show both of its sides (Jordan 2024).
        cutout: Side in pixels of a square that is painted over, 0 for none; its centre is uniform over the image, so
            part of it may lie outside (DeVries and Taylor 2017).
        fill: Colour of the cutout square, one value in 0..255 a channel.

    Returns:
        uint8, of the images' shape and on their device.
    """
    streams = torch.arange(5, device=index.device)
    shift_y, shift_x, mirror, centre_y, centre_x = random_uniform(seed, epoch, index[:, None], streams).unbind(1)
    if crop and len(images):
        images = _crop(images, shift_y, shift_x, crop)
    if flip == "alternate":
        is_first = random_uniform(seed, index, _ALTERNATE) < 0.5
        images = _mirror(images, is_first ^ bool(epoch % 2))
    elif flip:
        images = _mirror(images, mirror < 0.5)
    if cutout:
        images = _cut_out(images, centre_y, centre_x, cutout, fill)
    return images


def _mirror(images: Tensor, chosen: Tensor) -> Tensor:
    # index_select copies whole images; torch.where goes byte by byte and takes five times as long.
    return torch.cat([images, images.flip(3)]).index_select(0, _places(images) + len(images) * chosen)


def _crop(images: Tensor, shift_y: Tensor, shift_x: Tensor, padding: int) -> Tensor:
    batch, channels, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    image, plane, row, _ = padded.stride()
    # A view with one overlapping entry for every byte that a crop can start at, so that index_select can copy crops.
    last = image * (batch - 1) + 2 * padding * (row + 1)
    windows = padded.as_strided((last + 1, channels, height, width), (1, plane, row, 1))
    top = (shift_y * (2 * padding + 1)).long()
    left = (shift_x * (2 * padding + 1)).long()
    return windows.index_select(0, image * _places(images) + row * top + left)


def _places(images: Tensor) -> Tensor:
    return torch.arange(len(images), device=images.device)


def _cut_out(images: Tensor, centre_y: Tensor, centre_x: Tensor, side: int, fill: tuple[int, ...]) -> Tensor:
    def inside(centre: Tensor, length: int) -> Tensor:
        first = (centre * length).long()[:, None] - side // 2
        position = torch.arange(length, device=images.device)
        return (position >= first) & (position < first + side)

    height, width = images.shape[2:]
    square = inside(centre_y, height)[:, None, :, None] & inside(centre_x, width)[:, None, None, :]
    colour = torch.tensor(fill, dtype=images.dtype, device=images.device)[:, None, None]
    return images * ~square + colour * square  # twelve times as fast as torch.where on bytes


def shrink(images: Tensor, size: int) -> Tensor:
    """Return float images (batch, channels, h, w) resized to (batch, channels, size, size), antialiased."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)
