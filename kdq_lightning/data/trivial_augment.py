"""TrivialAugmentWide on batches: each image gets one operation of its own, at a strength of its own."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as V

_BINS = 31
OPERATIONS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast",
    "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip


def trivial_augment_wide(images: Tensor, operation: Tensor, magnitude: Tensor, sign: Tensor) -> Tensor:
    """Apply one random operation to each image (Müller and Hutter 2021, the wide space, as in torchvision).

    Args:
        images: uint8, (batch, 3, h, w).
        operation: Uniform numbers in [0, 1) that choose one of the 14 operations, (batch,).
        magnitude: Uniform numbers in [0, 1) that choose one of 31 strengths, (batch,).
        sign: Uniform numbers in [0, 1) that choose the direction, (batch,).

    Returns:
        uint8, (batch, 3, h, w); what geometry moves in is black.
    """
    chosen = (operation * len(OPERATIONS)).long()
    strength = (magnitude * _BINS).long().float() / (_BINS - 1)
    strength = torch.where(_is(chosen, "solarize", "posterize") | (sign < 0.5), strength, -strength)
    result = images.clone()
    for names, apply in _GROUPS:
        rows = _is(chosen, *names).nonzero().squeeze(1)
        if len(rows):
            result[rows] = apply(images[rows], chosen[rows], strength[rows])
    return result


def _is(chosen: Tensor, *names: str) -> Tensor:
    wanted = torch.zeros(len(OPERATIONS), dtype=torch.bool, device=chosen.device)
    wanted[[OPERATIONS.index(name) for name in names]] = True
    return wanted[chosen]


def _geometry(images: Tensor, chosen: Tensor, strength: Tensor) -> Tensor:
    """Shear, translate or rotate with nearest neighbours."""
    height, width = images.shape[2:]

    def only(name: str, scale: float) -> Tensor:
        return torch.where(_is(chosen, name), strength * scale, 0.0)

    # Torchvision shears about the top left corner, by tangent `m` through the arctangent and back.
    shear_x, shear_y = only("shear_x", 0.99), only("shear_y", 0.99)
    angle = only("rotate", 135.0) * (math.pi / 180)
    shift_x, shift_y = only("translate_x", 32.0).trunc(), only("translate_y", 32.0).trunc()
    cosine, sine = angle.cos(), angle.sin()
    # Output pixel -> input pixel, in pixels from the centre; only one of the five differs from "do nothing".
    rows = torch.stack([cosine, -sine - shear_x, -shift_x - shear_x * height / 2], 1)
    columns = torch.stack([sine - shear_y, cosine, -shift_y - shear_y * width / 2], 1)
    y = torch.arange(height, device=images.device) + 0.5 - height / 2
    x = torch.arange(width, device=images.device) + 0.5 - width / 2
    ones = torch.ones(height, width, device=images.device)
    points = torch.stack([x.expand(height, width), y[:, None].expand(height, width), ones])
    source_x = (torch.einsum("bk,khw->bhw", rows, points) + (width - 1) / 2).round().long()
    source_y = (torch.einsum("bk,khw->bhw", columns, points) + (height - 1) / 2).round().long()
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    flat = (source_y.clamp(0, height - 1) * width + source_x.clamp(0, width - 1)).flatten(1)
    moved = images.flatten(2).gather(2, flat[:, None].expand(-1, 3, -1)).view_as(images)
    return torch.where(inside[:, None], moved, 0)


def _blend(images: Tensor, other: Tensor, strength: Tensor) -> Tensor:
    factor = (1 + 0.99 * strength)[:, None, None, None]
    return (factor * images + (1 - factor) * other).clamp(0, 255).to(torch.uint8)


def _brightness(images: Tensor, chosen: Tensor, strength: Tensor) -> Tensor:
    return _blend(images, torch.zeros((), device=images.device), strength)


def _color(images: Tensor, chosen: Tensor, strength: Tensor) -> Tensor:
    return _blend(images, V.rgb_to_grayscale(images), strength)


def _contrast(images: Tensor, chosen: Tensor, strength: Tensor) -> Tensor:
    grey = V.rgb_to_grayscale(images).float()
    return _blend(images, grey.mean(dim=(1, 2, 3), keepdim=True), strength)


def _sharpness(images: Tensor, chosen: Tensor, strength: Tensor) -> Tensor:
    kernel = torch.tensor([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]], device=images.device) / 13
    smooth = images.float()
    inner = F.conv2d(smooth, kernel.expand(3, 1, 3, 3), groups=3).round()
    smooth = smooth.clone()
    smooth[:, :, 1:-1, 1:-1] = inner
    return _blend(images, smooth, strength)


def _posterize(images: Tensor, chosen: Tensor, strength: Tensor) -> Tensor:
    bits = 8 - (strength * 6).round().long()
    mask = (256 - (1 << (8 - bits))).to(torch.uint8)
    return images & mask[:, None, None, None]


def _solarize(images: Tensor, chosen: Tensor, strength: Tensor) -> Tensor:
    threshold = (255 * (1 - strength))[:, None, None, None]
    return torch.where(images >= threshold, 255 - images, images)


def _autocontrast(images: Tensor, chosen: Tensor, strength: Tensor) -> Tensor:
    result: Tensor = V.autocontrast(images)
    return result


def _equalize(images: Tensor, chosen: Tensor, strength: Tensor) -> Tensor:
    result: Tensor = V.equalize(images)
    return result


_GROUPS = (
    (("shear_x", "shear_y", "translate_x", "translate_y", "rotate"), _geometry),
    (("brightness",), _brightness),
    (("color",), _color),
    (("contrast",), _contrast),
    (("sharpness",), _sharpness),
    (("posterize",), _posterize),
    (("solarize",), _solarize),
    (("autocontrast",), _autocontrast),
    (("equalize",), _equalize),
)
