"""Writing a file so that it is either there, whole, or not there at all, and telling files apart."""

import hashlib
import os
import re
import secrets
import time
from contextlib import suppress
from pathlib import Path

from kdq_lightning.errors import UserError

LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}")  # the name of an unfinished file
FRESH_SECONDS = 60  # another process may still be writing it


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
