"""Views depend on (seed, epoch, index) alone, and are what a slow loop over single images draws."""

import numpy as np
import pytest
import torch

from kdq_lightning.data.augmentation import augment, shrink
from kdq_lightning.data.normalization import normalize, renormalize
from tests.test_random_draws import splitmix

IMAGES = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
INDEX = torch.arange(64) * 7 + 3
EVERYTHING = {"crop": 4, "flip": True, "cutout": 8}


@pytest.mark.parametrize("options", [{"crop": 4}, {"flip": True}, {"cutout": 8}, EVERYTHING], ids=str)
def test_view_depends_on_seed_epoch_and_index_alone(options):
    def views(order, seed=1, epoch=2):
        return augment(IMAGES[order], INDEX[order], seed=seed, epoch=epoch, **options)

    whole = views(torch.arange(64))
    torch.manual_seed(99)
    order = torch.randperm(64)
    assert torch.equal(views(order), whole[order])
    ranks = [views(torch.arange(first, first + 16)) for first in range(0, 64, 16)]
    assert torch.equal(torch.cat(ranks), whole)
    assert torch.equal(torch.cat([views(torch.tensor([i])) for i in range(64)]), whole)
    assert views(torch.arange(0)).shape == (0, 3, 32, 32)
    assert not torch.equal(views(torch.arange(64), seed=0), whole)
    assert not torch.equal(views(torch.arange(64), epoch=3), whole)
    same_image = augment(IMAGES[:1].expand(64, -1, -1, -1), INDEX, seed=1, epoch=2, **options)
    assert len(same_image.flatten(1).unique(dim=0)) > 1


@pytest.mark.parametrize("size", [(32, 32), (5, 9)])
def test_crop_flip_and_cutout_equal_a_loop(size):
    height, width = size
    fill = (10, 20, 30)
    images = IMAGES[:, :, :height, :width]
    views = augment(images, INDEX, seed=3, epoch=1, crop=4, flip=True, cutout=5, fill=fill)
    shifts = set()
    for image, index, view in zip(images.numpy(), INDEX.tolist(), views.numpy(), strict=True):
        top, left, mirror, centre_y, centre_x = ((splitmix(3, 1, index, stream) >> 11) / 2**53 for stream in range(5))
        top, left = int(top * 9), int(left * 9)
        shifts.add((top, left))
        expected = np.pad(image, ((0, 0), (4, 4), (4, 4)))[:, top : top + height, left : left + width].copy()
        if mirror < 0.5:
            expected = expected[:, :, ::-1].copy()
        centre_y, centre_x = int(centre_y * height), int(centre_x * width)
        for y in range(max(0, centre_y - 2), min(height, centre_y + 3)):
            for x in range(max(0, centre_x - 2), min(width, centre_x + 3)):
                expected[:, y, x] = fill
        np.testing.assert_array_equal(view, expected)
    assert len(shifts) > 30


def test_nothing_asked_for_is_nothing_done():
    assert torch.equal(augment(IMAGES, INDEX, seed=0, epoch=0), IMAGES)
    before = IMAGES.clone()
    augment(IMAGES, INDEX, seed=0, epoch=0, **EVERYTHING)
    assert torch.equal(IMAGES, before)


def test_shrink_keeps_the_mean_and_removes_the_finest_grain():
    images = torch.zeros(1, 3, 32, 32)
    images[:, :, ::2] = 1
    small = shrink(images, 16)
    assert small.shape == (1, 3, 16, 16)
    assert torch.allclose(small[:, :, 2:-2], torch.tensor(0.5), atol=0.15)
    assert shrink(images, 32) is images


def test_normalize_and_renormalize():
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    exact = (IMAGES.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    images = normalize(IMAGES, mean, std)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, exact.float(), rtol=1e-6, atol=1e-6)
    to_mean, to_std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    changed = renormalize(images, mean, std, to_mean, to_std)
    torch.testing.assert_close(changed, normalize(IMAGES, to_mean, to_std), rtol=1e-5, atol=2e-6)
    assert renormalize(images, mean, std, mean, std) is images


def test_alternate_flip_shows_both_sides_in_two_epochs():
    """Each image is mirrored in every second epoch, about half of them in the first, others with another seed."""
    images = torch.arange(200 * 3 * 4, dtype=torch.uint8).reshape(200, 3, 1, 4)
    index = torch.arange(200)

    def mirrored(epoch: int, seed: int = 0) -> torch.Tensor:
        views = augment(images, index, seed=seed, epoch=epoch, flip="alternate")
        is_mirrored = (views == images.flip(3)).flatten(1).all(1)
        assert torch.equal(is_mirrored, ~(views == images).flatten(1).all(1))
        return is_mirrored

    assert torch.equal(mirrored(0), ~mirrored(1)) and torch.equal(mirrored(0), mirrored(2))
    assert 70 < mirrored(0).sum() < 130
    assert not torch.equal(mirrored(0), mirrored(0, seed=1))
