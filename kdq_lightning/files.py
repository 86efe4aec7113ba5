"""Writes a file completely or not at all; computes file digests; reads and prints sizes in bytes."""

import hashlib
import os
import re
import secrets
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from kdq_lightning.errors import UserError

LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}")  # the name of an unfinished file
FRESH_SECONDS = 60  # another process may still be writing it


_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?(?:e\d\d?)?) ?(?P<unit>|B|kB|MB|GB)", re.IGNORECASE)
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def parse_bytes(text: str | float, name: str = "a budget") -> int:
    """Return the number of bytes that a size stands for, such as 100kB, 1.5MB or 50000; units are decimal.

    Args:
        text: The size.
        name: What it is the size of, for the message.

    Raises:
        UserError: If it is no size, or not even one byte.
    """
    found = _SIZE.fullmatch(str(text).strip())
    size = int(float(found["number"]) * _UNITS[found["unit"].lower()] + 1e-6) if found else 0
    if size < 1:
        raise UserError(f"{name} is a size such as 50000, 100kB or 1.5MB, got {text!r}")
    return size


def format_bytes(size: float) -> str:
    """Return a size in decimal units with three digits, such as "89.3 kB"."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= 0.9995 * unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.0f} B"


def file_digest(path: Path) -> str:
    """Return a hash of a file's content, 32 hexadecimal digits."""
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path` beside the old file and swap them at the end; missing folders are made.

    Args:
        path: The file; what it held before stays intact if anything fails, and nothing is left beside it.
        content: All of its bytes.

    Raises:
        UserError: If the disk is full, the folder can't be written to, or the path is a folder.
    """
    # Not tempfile: its files are private to the user, and the mode would survive the swap.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{path} could not be written ({reason}): free some space or choose another folder") from error


def remove_leftovers(folder: Path) -> None:
    """Remove the unfinished files that killed processes have left in a folder and below; keep what is fresh."""
    with suppress(FileNotFoundError):  # another run tidies up its own, too
        for path in folder.rglob(".*"):
            if LEFTOVER.fullmatch(path.name) and time.time() - path.stat().st_mtime > FRESH_SECONDS:
                path.unlink(missing_ok=True)


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders one after the other, up to the first that isn't empty or is gone."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
