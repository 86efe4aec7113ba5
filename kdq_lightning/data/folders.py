"""Class folders `<split>/<class>/<image>` -> labelled images in memory, decoded once and cached beside the split."""

import hashlib
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kdq_lightning.data.images import ImageSet, canonical_set
from kdq_lightning.errors import UserError
from kdq_lightning.files import write_atomically

_THREADS = 4
_FORMAT = "1"  # counts up when the same files would give other tensors


def class_folders(split: Path) -> list[str]:
    """Return the names of the class folders in a split's folder, sorted; hidden ones don't count.

    Raises:
        UserError: If there is no such folder or no class in it.
    """
    names = [entry.name for entry in _entries(split) if entry.is_dir()]
    if not names:
        raise UserError(
            f"no class folders in {split}: put images there as <class>/<image>, "
            "or try configs/quickstart.yaml, whose digits need no download"
        )
    return names


def read_class_folders(split: Path, class_names: list[str], size: int) -> ImageSet:
    """Return a whole split; it comes from its cache if that is intact and was made from the same files.

    Args:
        split: Folder that holds one folder a class.
        class_names: Names of those folders; a name's place is its label.
        size: Side in pixels; other images are scaled and cropped to it about their centre.

    Raises:
        UserError: If a class has no folder or no image, a folder is not a known class, or a file is not an image.
    """
    if unknown := sorted(set(class_folders(split)) - set(class_names)):
        raise UserError(f"{split / unknown[0]} is not a class of the training images: remove the folder or rename it")
    files = {name: _entries(split / name) for name in class_names}
    for name, entries in files.items():
        if not entries:
            raise UserError(f"no images of class {name!r} in {split}: each class needs its folder in train and in test")

    cache = split.parent / f".{split.name}-{size}px.safetensors"
    key = _listing_hash(files)
    if (cached := _load(cache, key)) is not None:
        return ImageSet(*cached, class_names)
    paths = [entry.path for entries in files.values() for entry in entries]
    labels = np.repeat(np.arange(len(files)), [len(entries) for entries in files.values()])
    images = canonical_set(_decode_all(paths, size), labels, class_names)
    _save(cache, key, images)
    return images


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return what is in a folder and isn't hidden, sorted by name; nothing if there is no folder."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:  # several times as fast as pathlib, and a data set has many files
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _decode_all(paths: list[str], size: int) -> NDArray[np.uint8]:
    pixels = np.empty((len(paths), size, size, 3), dtype=np.uint8)
    with ThreadPoolExecutor(_THREADS) as pool:
        for place, image in enumerate(pool.map(partial(_decode, size=size), paths)):
            pixels[place] = image
    return pixels


def _decode(path: str, size: int) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size)))
    except Exception as error:  # Pillow's decoders raise whatever a broken file makes them stumble over
        raise UserError(f"{path} is not a readable image: repair or remove it ({error})") from error


def _listing_hash(files: dict[str, list[os.DirEntry[str]]]) -> str:
    """Return a hash of names, sizes and times of change, which shows that images were added, removed or replaced."""
    digest = hashlib.sha256(_FORMAT.encode())
    for name, entries in files.items():
        for entry in entries:
            status = entry.stat()
            digest.update(f"\n{name}/{entry.name}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    return digest.hexdigest()


def _checksum(images: Tensor, labels: Tensor) -> str:
    return str(zlib.crc32(labels.numpy().data, zlib.crc32(images.numpy().data)))


def _load(cache: Path, key: str) -> tuple[Tensor, Tensor] | None:
    """Return images and labels; None if there is no cache, or it was made from other files, or it is damaged."""
    try:
        with safe_open(cache, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != key:
                return None
            images, labels = file.get_tensor("images"), file.get_tensor("labels")
    except (OSError, SafetensorError):
        return None
    return (images, labels) if metadata.get("checksum") == _checksum(images, labels) else None


def _save(cache: Path, key: str, images: ImageSet) -> None:
    """Write the cache if the folder can be written to; no reader or second writer ever finds half a file."""
    metadata = {"key": key, "checksum": _checksum(images.images, images.labels)}
    content = save({"images": images.images, "labels": images.labels}, metadata)
    with suppress(UserError):  # a folder that can't be written to is decoded each time
        write_atomically(cache, content)
