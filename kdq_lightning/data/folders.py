"""Class folders `<split>/<class>/<image>` -> labelled images in memory, decoded once and cached beside the split."""

import hashlib
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kdq_lightning.data.decoding import decode_file
from kdq_lightning.data.images import ImageSet, canonical_order, canonical_set
from kdq_lightning.errors import UserError
from kdq_lightning.files import write_atomically

_THREADS = 4
_FORMAT = "3"  # counts up when the same files would give other tensors
_OF_SYSTEMS = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "picasa.ini", "@eadir", "__macosx")
"""Names, in lower case, of what systems and photo programs leave in folders of images."""


def class_folders(split: Path) -> list[str]:
    """Return the names of the class folders in a split's folder, sorted; hidden ones don't count.

    Raises:
        UserError: If there is no such folder or no class in it.
    """
    names = [entry.name for entry in _entries(split)[0] if entry.is_dir()]
    if not names:
        raise UserError(
            f"no class folders in {split}: put images there as <class>/<image>, "
            "or try configs/quickstart.yaml, whose digits need no download"
        )
    return names


def read_class_folders(
    split: Path, class_names: list[str], size: int, cache: Path | None = None, may_lack_classes: bool = False
) -> ImageSet:
    """Return a whole split; it comes from its cache if that is intact and was made from the same files.

    Hidden files and those that systems leave behind, such as `Thumbs.db`, are skipped; the set's notes count them.

    Args:
        split: Folder that holds one folder a class.
        class_names: Names of those folders; a name's place is its label.
        size: Side in pixels; other images are scaled and cropped to it about their centre.
        cache: Folder of the cache; the one that the split's folder is in if not given.
        may_lack_classes: Whether a class may have no image.

    Raises:
        UserError: If a class has no folder or no image, a folder is not a known class, or a file is not an image.
    """
    if unknown := sorted(set(class_folders(split)) - set(class_names)):
        raise UserError(f"{split / unknown[0]} is not a class of the training images: remove the folder or rename it")
    files, skipped = {}, 0
    for name in class_names:
        files[name], others = _entries(split / name)
        skipped += others
        if not files[name] and not may_lack_classes:
            raise UserError(f"no images of class {name!r} in {split}: each class needs its folder in train and in test")
    notes = (skipped_note(skipped, split),) if skipped else ()
    names = [f"{split.name}/{name}/{entry.name}" for name, entries in files.items() for entry in entries]

    path = (cache or split.parent) / f".{split.name}-{size}px.safetensors"
    key = _listing_hash(files)
    if (cached := _load(path, key)) is not None:
        images, labels, order = cached
        return ImageSet(images, labels, class_names, [names[i] for i in order.tolist()], notes)
    paths = [entry.path for entries in files.values() for entry in entries]
    given = np.repeat(np.arange(len(files)), [len(entries) for entries in files.values()])
    pixels = decode_files(paths, size)
    order = torch.tensor(canonical_order(pixels, given), dtype=torch.int64)
    found = canonical_set(pixels, given, class_names, names)
    _save(path, key, found, order)
    return replace(found, notes=notes)


def read_any_folder(folder: Path, class_names: list[str], size: int) -> ImageSet:
    """Return the images in a folder and in all folders below it, labelled or not, in order of their paths.

    Args:
        folder: An image's label is the class that the folder nearest to it is named after; -1 if there is none.
        class_names: Name of each label.
        size: Side in pixels; other images are scaled and cropped to it about their centre.

    Raises:
        UserError: If there is no such folder or no image in it, or a file is not an image.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give one that holds images")
    files, skipped = [], 0
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_no_image(name)]
        kept = [name for name in names if not is_no_image(name)]
        skipped += len(names) - len(kept)
        files += [Path(place, name).relative_to(folder) for name in kept]
    if not files:
        raise UserError(f"there is no image in {folder}")
    files.sort()
    pixels = torch.from_numpy(decode_files([str(folder / file) for file in files], size)).permute(0, 3, 1, 2)
    labels = torch.tensor([_label(file, class_names) for file in files])
    notes = (skipped_note(skipped, folder),) if skipped else ()
    return ImageSet(pixels.contiguous(), labels, class_names, [file.as_posix() for file in files], notes)


def _label(file: Path, class_names: list[str]) -> int:
    known = [name for name in reversed(file.parent.parts) if name in class_names]
    return class_names.index(known[0]) if known else -1


def skipped_note(count: int, folder: Path) -> str:
    """Return the sentence that says how many files in a folder are no images by their names."""
    return f"{count} files in {folder} skipped, which are hidden or of the system, such as Thumbs.db"


def is_no_image(name: str) -> bool:
    """Return whether a file or folder is hidden, or left behind by a system or a photo program, by its name."""
    return name.startswith(".") or name.lower() in _OF_SYSTEMS


def _entries(folder: Path) -> tuple[list[os.DirEntry[str]], int]:
    """Return what is in a folder, sorted by name, and how many files are left out as `is_no_image` says."""
    if not folder.is_dir():
        return [], 0
    with os.scandir(folder) as entries:  # several times as fast as pathlib, and a data set has many files
        found = list(entries)
    kept = sorted((entry for entry in found if not is_no_image(entry.name)), key=lambda entry: entry.name)
    return kept, len(found) - len(kept)


def decode_files(paths: list[str], size: int) -> NDArray[np.uint8]:
    """Return image files as uint8 (images, size, size, 3); see `decode_file`."""
    pixels = np.empty((len(paths), size, size, 3), dtype=np.uint8)
    with ThreadPoolExecutor(_THREADS) as pool:
        for place, image in enumerate(pool.map(partial(decode_file, size=size), paths)):
            pixels[place] = image
    return pixels


def _listing_hash(files: dict[str, list[os.DirEntry[str]]]) -> str:
    """Return a hash of names, sizes and times of change, which shows that images were added, removed or replaced."""
    digest = hashlib.sha256(_FORMAT.encode())
    for name, entries in files.items():
        for entry in entries:
            status = entry.stat()
            # Names are bytes to the system; those that are no UTF-8 hold surrogates here.
            digest.update(os.fsencode(f"\n{name}/{entry.name}\0{status.st_size}\0{status.st_mtime_ns}"))
    return digest.hexdigest()


def _checksum(*tensors: Tensor) -> str:
    checksum = 0
    for tensor in tensors:
        checksum = zlib.crc32(tensor.numpy().data, checksum)
    return str(checksum)


def _load(cache: Path, key: str) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return images, labels, and each image's place in the listing.

    Returns:
        None if there is no cache, it was made from other files, or it is damaged.
    """
    try:
        with safe_open(cache, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != key:
                return None
            images, labels, order = map(file.get_tensor, ("images", "labels", "order"))
    except (OSError, SafetensorError):
        return None
    return (images, labels, order) if metadata.get("checksum") == _checksum(images, labels, order) else None


def _save(cache: Path, key: str, found: ImageSet, order: Tensor) -> None:
    """Write the cache if the folder can be written to; no reader or second writer ever finds half a file."""
    metadata = {"key": key, "checksum": _checksum(found.images, found.labels, order)}
    content = save({"images": found.images, "labels": found.labels, "order": order}, metadata)
    with suppress(UserError):  # a folder that can't be written to is decoded each time
        write_atomically(cache, content)
