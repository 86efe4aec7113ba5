"""Views depend on (seed, epoch, index) alone, and are what a slow loop over single images draws."""

import numpy as np
import pytest
import torch

from kdq_lightning.data.augmentation import View, augment, shrink
from kdq_lightning.data.datamodules import CIFARDataModule, DigitsDataModule
from kdq_lightning.data.normalization import Statistics, normalize, to_unit_range
from kdq_lightning.errors import UserError
from kdq_lightning.losses import mixup
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


STATISTICS = Statistics((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))


def normalize_bytes(images: torch.Tensor, statistics: Statistics) -> torch.Tensor:
    """Return what networks were fed before views were floats: bytes, scaled and shifted in one go."""
    mean, std = (torch.tensor(values)[:, None, None] for values in statistics)
    return images.float() * (1 / (255 * std)) - mean / std


def renormalize(images: torch.Tensor, before: Statistics, after: Statistics) -> torch.Tensor:
    """Return images normalised with one network's statistics as another's, as teachers got them."""
    mean, std, to_mean, to_std = (torch.tensor(values)[:, None, None] for values in (*before, *after))
    return images * (std / to_std) + (mean - to_mean) / to_std


def test_normalize():
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in STATISTICS)
    exact = (IMAGES.double() / 255 - mean) / std
    images = normalize(IMAGES, STATISTICS)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, exact.float(), rtol=1e-6, atol=1e-6)


def test_every_byte_is_normalised_as_before():
    """To the bit, from the byte itself and from the float in [0, 1] that it becomes in the datamodule."""
    images = torch.arange(256, dtype=torch.uint8).repeat(3, 1)[None, :, None]
    unit = to_unit_range(images)
    assert unit.min() == 0 and unit.max() == 1
    for data in (DigitsDataModule(), CIFARDataModule("cifar10"), CIFARDataModule("cifar100")):
        statistics = data.statistics
        before = normalize_bytes(images, statistics)
        assert torch.equal(normalize(images, statistics), before)
        assert torch.equal(normalize(unit, statistics), before)
    assert images.max() == 255 and unit.max() == 1, "nothing is changed in place"


@pytest.mark.parametrize("size", [32, 20])
@pytest.mark.parametrize("lam", [1.0, 0.3])
def test_training_inputs_are_those_of_before(size: int, lam: float):
    """Mixed, smaller and a teacher's images: normalising last equals normalising first, mixing, shrinking, by 1e-5."""
    other = Statistics((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    images = torch.randint(256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    view = View(mixup(to_unit_range(images), lam), torch.zeros(6), torch.arange(6), size)
    before = mixup(normalize_bytes(images, STATISTICS), lam)
    torch.testing.assert_close(normalize(view.resized, STATISTICS), shrink(before, size), rtol=0, atol=1e-5)
    torch.testing.assert_close(normalize(view.images, other), renormalize(before, STATISTICS, other), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("mean", "std", "name"),
    [((1.1, 0, 0), (1, 1, 1), "a"), ((0, 0, 0), (0, 1, 1), "b"), ((-0.1, 0, 0), (1, 1, 1), "a"), ((0.5,), (1, 1), "b")],
)
def test_statistics_of_other_images_are_refused(mean, std, name: str):
    with pytest.raises(UserError, match=rf"^{name} belongs to images scaled to \[0, 1\]"):
        Statistics(mean, std).check("a", "b")


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
