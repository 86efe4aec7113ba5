"""Photographs for tests: JPEGs of many sizes, whose class is a pattern in any colours, so that it can be learnt."""

from pathlib import Path

import numpy as np
from PIL import Image

PATTERNS = ("disks", "horizontal stripes", "checks", "vertical stripes")


def draw(pattern: str, generator: np.random.Generator) -> Image.Image:
    """Return an image of 70 to 150 pixels a side, in two random colours with noise."""
    height, width = generator.integers(70, 151, 2)
    y, x = np.mgrid[:height, :width] + generator.integers(0, 40, 2)[:, None, None]
    period = generator.uniform(18, 34)
    waves = np.sin(2 * np.pi * y / period), np.sin(2 * np.pi * x / period)
    shape = {
        "disks": waves[0] + waves[1] - 0.4,
        "horizontal stripes": waves[0],
        "checks": waves[0] * waves[1],
        "vertical stripes": waves[1],
    }[pattern]
    dark, bright = generator.uniform(0, 110, 3), generator.uniform(145, 255, 3)
    if generator.random() < 0.5:
        dark, bright = bright, dark
    pixels = np.where((shape > 0)[..., None], bright, dark) + generator.normal(0, 12, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_jpegs(root: Path, train: int, test: int) -> None:
    """Write `{train,test}/<pattern>/<number>.jpg`, so many of each pattern."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for pattern in PATTERNS:
            folder = root / split / pattern
            folder.mkdir(parents=True)
            for i in range(count):
                draw(pattern, generator).save(folder / f"{i:04d}.jpg", quality=90)
