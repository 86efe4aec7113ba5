"""Class folders `<split>/<class>/<image>` -> labelled images in memory."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from kdq_lightning.data.images import ImageSet, canonical_set
from kdq_lightning.errors import UserError

_THREADS = 4


def class_folders(split: Path) -> list[str]:
    """Return the names of the class folders in a split's folder, sorted; hidden ones don't count.

    Raises:
        UserError: If there is no such folder or no class in it.
    """
    names = sorted(p.name for p in split.iterdir() if p.is_dir() and p.name[0] != ".") if split.is_dir() else []
    if not names:
        raise UserError(
            f"no class folders in {split}: put images there as <class>/<image>, "
            "or try configs/quickstart.yaml, whose digits need no download"
        )
    return names


def read_class_folders(split: Path, class_names: list[str], size: int) -> ImageSet:
    """Decode a whole split.

    Args:
        split: Folder that holds one folder a class.
        class_names: Folders to read; a folder's place is its label.
        size: Side in pixels; other images are scaled and cropped to it about their centre.

    Raises:
        UserError: If a class has no folder or no image, a folder is not a known class, or a file is not an image.
    """
    found = class_folders(split)
    if odd := sorted(set(found) ^ set(class_names)):
        raise UserError(f"{split} has {'no' if odd[0] not in found else 'an unexpected'} class folder {odd[0]!r}")
    paths, labels = [], []
    for label, name in enumerate(class_names):
        files = sorted(p for p in (split / name).iterdir() if p.name[0] != ".")
        if not files:
            raise UserError(f"the class folder {split / name} is empty")
        paths += files
        labels += [label] * len(files)
    pixels = np.empty((len(paths), size, size, 3), dtype=np.uint8)
    with ThreadPoolExecutor(_THREADS) as pool:
        for place, image in enumerate(pool.map(partial(_decode, size=size), paths)):
            pixels[place] = image
    return canonical_set(pixels, np.asarray(labels, dtype=np.int64), class_names)


def _decode(path: Path, size: int) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size)))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is not a readable image ({error}): repair or remove it") from error
