"""A teacher's logits on training views, kept on disk for other runs: a view depends on seed, epoch and image alone."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from kdq_lightning.errors import UserError
from kdq_lightning.files import remove_leftovers, write_atomically

TOLERANCE = 0.05  # of the logits' spread: devices and numbers of threads differ in the last digits


class LogitCache:
    """One file an epoch, in a folder named after what the logits depend on.

    A file holds what a whole epoch asked for; an epoch that isn't seen from its first step to its last leaves none.
    """

    def __init__(self, folder: str | Path, key: Mapping[str, object]) -> None:
        """Make the folder.

        Args:
            folder: Folder of all caches.
            key: What the logits depend on beside the epoch: teacher, data, seed, augmentation.

        Raises:
            UserError: If it can't be made.
        """
        digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=8).hexdigest()
        self.folder = Path(folder) / digest
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder} can't be made ({error.strerror}): choose another teacher_cache") from error
        remove_leftovers(self.folder)
        self.pending: list[tuple[Tensor, Tensor]] = []  # image indices and logits of each batch that the teacher got
        self._row = self._logits = torch.empty(0)
        self._known = self._checked = False

    def path(self, epoch: int) -> Path:
        """Return the file of an epoch."""
        return self.folder / f"epoch-{epoch}.safetensors"

    def start(self, epoch: int, images: int, device: torch.device) -> bool:
        """Read an epoch's file.

        Args:
            epoch: That begins.
            images: How many the epoch asks for.
            device: That the logits are wanted on.

        Returns:
            Whether the file is there and holds as many images: those of the same epoch, in the same order.

        Raises:
            UserError: If the file is broken.
        """
        self.pending, self._known, self._checked = [], False, False
        path = self.path(epoch)
        if not path.is_file():
            return False
        try:
            content = safetensors.torch.load_file(path)
            index, self._logits = content["index"].long(), content["logits"].to(device)
        except (SafetensorError, KeyError) as error:
            raise UserError(f"{path} is broken ({error}): delete it, and it is made again") from error
        self._row = torch.zeros(int(index.max()) + 1, dtype=torch.int64)
        self._row[index] = torch.arange(len(index))
        self._row = self._row.to(device)
        self._known = len(index) == images
        return self._known

    def disable(self) -> None:
        """Ask the teacher throughout this epoch, because another process has no file."""
        self._known = False

    def logits(self, index: Tensor, ask: Callable[[], Tensor]) -> Tensor:
        """Return the teacher's logits (batch, classes) on this epoch's views.

        Args:
            index: Canonical indices of the images, (batch,).
            ask: Computes them. It is called if they aren't known, and for the first batch, which is compared.

        Raises:
            UserError: If the file's logits are not those that the teacher gives.
        """
        if not self._known:
            answers = ask()
            self.pending.append((index, answers.detach()))
            return answers
        stored = self._logits[self._row[index]]
        if not self._checked:
            self._checked = True
            if (stored - ask()).abs().mean() > TOLERANCE * stored.float().std():
                raise UserError(f"{self.folder} holds other logits than the teacher gives: delete that folder")
        return stored

    def write(self, epoch: int, index: Tensor, logits: Tensor) -> None:
        """Write an epoch's file.

        Args:
            epoch: That has ended.
            index: Canonical indices of all images that it asked for, (images,).
            logits: The teacher's answers, (images, classes), in the precision that they were computed in.
        """
        content = {"index": index.cpu().int(), "logits": logits.cpu().contiguous()}
        write_atomically(self.path(epoch), safetensors.torch.save(content))


class KnownLogits(LogitCache):
    """Logits that are known before anyone asks, all zero: for measuring a step that finds its teacher's logits."""

    def __init__(self, num_classes: int) -> None:
        """Take the width of the logits; no file is read or written."""
        self.pending = []
        self.num_classes = num_classes

    def start(self, epoch: int, images: int, device: torch.device) -> bool:
        """Return True: every epoch's logits are there."""
        return True

    def logits(self, index: Tensor, ask: Callable[[], Tensor]) -> Tensor:
        """Return zeros, (batch, classes), without asking the teacher."""
        return torch.zeros(len(index), self.num_classes, device=index.device)
