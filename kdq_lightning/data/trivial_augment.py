"""TrivialAugmentWide on batches: each image gets one operation of its own, at a strength of its own."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as V

_STRONGEST = 30  # levels are 0..30
OPERATIONS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast",
    "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip


def trivial_augment_wide(images: Tensor, operation: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """Apply one random operation to each image (Müller and Hutter 2021, the wide space, as in torchvision).

    Args:
        images: uint8, (batch, 3, h, w).
        operation: Uniform numbers in [0, 1) that choose one of the 14 operations, (batch,).
        level: Uniform numbers in [0, 1) that choose one of 31 strengths, (batch,).
        sign: Uniform numbers in [0, 1) that choose the direction, (batch,).

    Returns:
        uint8, (batch, 3, h, w); what geometry moves in is black.
    """
    chosen = (operation * len(OPERATIONS)).long()
    level = (level * (_STRONGEST + 1)).long()
    direction = torch.where(sign < 0.5, 1, -1)
    result = images.clone()
    for names, apply in _GROUPS:
        rows = torch.isin(chosen, torch.tensor([OPERATIONS.index(name) for name in names]).to(chosen)).nonzero()[:, 0]
        if len(rows):
            group = images.index_select(0, rows)
            result.index_copy_(0, rows, apply(group, chosen[rows], level[rows], direction[rows]))
    return result


def _geometry(images: Tensor, chosen: Tensor, level: Tensor, direction: Tensor) -> Tensor:
    """Shear, translate or rotate with nearest neighbours."""
    height, width = images.shape[2:]
    strength = (level * direction).float() / _STRONGEST

    def only(name: str, strongest: float) -> Tensor:
        return torch.where(chosen == OPERATIONS.index(name), strength * strongest, 0.0)

    shear_x, shear_y = only("shear_x", 0.99), only("shear_y", 0.99)  # about the top left corner
    shift_x, shift_y = only("translate_x", 32.0).trunc(), only("translate_y", 32.0).trunc()  # pixels, as for ImageNet
    angle = only("rotate", math.radians(135))
    # Where a pixel comes from, both in pixels from the centre; each image uses one of the five and leaves four at zero.
    from_x = torch.stack([angle.cos(), shear_x - angle.sin(), shear_x * height / 2 - shift_x], 1)
    from_y = torch.stack([shear_y + angle.sin(), angle.cos(), shear_y * width / 2 - shift_y], 1)
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    y = torch.arange(height, device=images.device)[:, None] - (height - 1) / 2
    points = torch.stack([x.expand(height, width), y.expand(height, width), torch.ones_like(x + y)]).flatten(1)
    column = (from_x @ points + (width - 1) / 2).round().long()
    row = (from_y @ points + (height - 1) / 2).round().long()
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    source = (row * width + column).masked_fill_(~inside, 0)
    moved = images.flatten(2).gather(2, source[:, None].expand(-1, 3, -1)) * inside[:, None]
    return moved.view_as(images)


def _blend(images: Tensor, other: Tensor, level: Tensor, direction: Tensor) -> Tensor:
    """Move away from `other` (direction 1) or towards it (-1), by up to 99 % of the distance."""
    strength = (level * direction)[:, None, None, None] * (0.99 / _STRONGEST)
    images = images.float()
    return (images + strength * (images - other)).clamp_(0, 255).to(torch.uint8)


def _brightness(images: Tensor, chosen: Tensor, level: Tensor, direction: Tensor) -> Tensor:
    return _blend(images, images.new_zeros(()), level, direction)


def _color(images: Tensor, chosen: Tensor, level: Tensor, direction: Tensor) -> Tensor:
    return _blend(images, V.rgb_to_grayscale(images), level, direction)


def _contrast(images: Tensor, chosen: Tensor, level: Tensor, direction: Tensor) -> Tensor:
    grey = V.rgb_to_grayscale(images).float()
    return _blend(images, grey.mean(dim=(1, 2, 3), keepdim=True), level, direction)


def _sharpness(images: Tensor, chosen: Tensor, level: Tensor, direction: Tensor) -> Tensor:
    kernel = torch.tensor([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]], device=images.device) / 13
    smooth = images.float()
    inner = F.conv2d(smooth, kernel.expand(3, 1, 3, 3), groups=3).round_()
    smooth[:, :, 1:-1, 1:-1] = inner  # the border stays as it is
    return _blend(images, smooth, level, direction)


def _posterize(images: Tensor, chosen: Tensor, level: Tensor, direction: Tensor) -> Tensor:
    dropped_bits = (level * (6 / _STRONGEST)).round().long()
    mask = 256 - (1 << dropped_bits)
    return images & mask.to(torch.uint8)[:, None, None, None]


def _solarize(images: Tensor, chosen: Tensor, level: Tensor, direction: Tensor) -> Tensor:
    threshold = (255 - level * (255 / _STRONGEST))[:, None, None, None]
    return torch.where(images >= threshold, 255 - images, images)


def _autocontrast(images: Tensor, chosen: Tensor, level: Tensor, direction: Tensor) -> Tensor:
    result: Tensor = V.autocontrast(images)
    return result


def _equalize(images: Tensor, chosen: Tensor, level: Tensor, direction: Tensor) -> Tensor:
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
