"""Labelled images in memory, in an order that doesn't depend on their source; random samples of them, by a seed."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from kdq_lightning.random_draws import random_uniform


class Batch(NamedTuple):
    """A batch: bytes as they are stored, or floats in [0, 1] once on the device."""

    images: Tensor  # (batch, channels, h, w), uint8 or float32 in [0, 1]
    labels: Tensor  # (batch,), int64
    index: Tensor  # type: ignore[assignment]  # (batch,), int64, canonical index of the image within its split


@dataclass(frozen=True)
class ImageSet(Dataset[Batch]):
    """One split, whole, in canonical order; an item is a whole batch.

    Attributes:
        images: uint8, (images, channels, h, w).
        labels: int64, (images,); -1 where the class isn't known.
        class_names: Name of each label.
        files: The file of each image, relative to the folder of the data; empty if the data come without files.
        notes: Sentences on what a user should know of the set.
    """

    images: Tensor
    labels: Tensor
    class_names: list[str]
    files: list[str] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    def __getitem__(self, index: Tensor) -> Batch:
        """Return the batch of these canonical indices, int64, (batch,)."""
        return Batch(self.images.index_select(0, index), self.labels[index], index)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def take(self, index: Tensor) -> "ImageSet":
        """Return the set of these canonical indices, int64, (images,), without the notes."""
        files = [self.files[i] for i in index.tolist()] if self.files else []
        return ImageSet(self.images[index], self.labels[index], self.class_names, files)


def joined(first: ImageSet, second: ImageSet) -> tuple[ImageSet, Tensor]:
    """Return two sets of the same classes as one, sorted by label, and the indices of the second one's images in it."""
    labels = torch.cat([first.labels, second.labels])
    order = labels.argsort(stable=True)
    files = first.files + second.files
    images = torch.cat([first.images, second.images])[order]
    files = [files[i] for i in order.tolist()] if files else []
    whole = ImageSet(images, labels[order], first.class_names, files, first.notes + second.notes)
    return whole, (order >= len(first)).nonzero().squeeze(1)


def canonical_order(pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> list[int]:
    """Return the places of the images, sorted by label, then by a hash of their pixels; see `canonical_set`."""
    digests = [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in pixels]
    return sorted(range(len(labels)), key=lambda i: (labels[i], digests[i]))


def canonical_set(
    pixels: NDArray[np.uint8], labels: NDArray[np.int64], class_names: list[str], files: Sequence[str] = ()
) -> ImageSet:
    """Return the images in canonical order: sorted by label, then by a hash of their pixels.

    Args:
        pixels: (images, height, width, channels), in any order.
        labels: (images,).
        class_names: Name of each label.
        files: Of each image, if they come from files.
    """
    order = canonical_order(pixels, labels)
    images = torch.empty((len(pixels), pixels.shape[3], *pixels.shape[1:3]), dtype=torch.uint8)
    for place, i in enumerate(order):  # one by one: a second copy of the set would double the memory
        images[place] = torch.from_numpy(pixels[i]).permute(2, 0, 1)
    return ImageSet(images, torch.from_numpy(labels[order]), class_names, [files[i] for i in order] if files else [])


def stratified_sample(labels: Tensor, count: int, seed: int) -> Tensor:
    """Return `count` random positions, of each class in its proportion, by a hash of (seed, position).

    Classes get the whole part of their proportional share; what is left goes to the largest remainders.

    Args:
        labels: int64, (images,).
        count: Number of positions, at most images.
        seed: Seed of the choice.

    Returns:
        Chosen positions in random order, int64, (count,).
    """
    rank = random_uniform(seed, torch.arange(len(labels)))
    sizes = labels.bincount()
    shares = sizes * count // len(labels)
    remainders = sizes * count % len(labels)
    shares[remainders.argsort(descending=True, stable=True)[: count - int(shares.sum())]] += 1
    chosen = []
    for label, share in enumerate(shares.tolist()):
        members = (labels == label).nonzero().squeeze(1)
        chosen.append(members[rank[members].argsort()[:share]])
    positions = torch.cat(chosen)
    return positions[rank[positions].argsort()]
