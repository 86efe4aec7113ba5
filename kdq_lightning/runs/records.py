"""The one record of a quantized accuracy: the callback writes it, dashboard and report read it.

A version's folder holds `quantized.csv`, a row a network and bit width; `correct.safetensors`, which images each of
them got right; and `layers.csv`, what became of each layer.
"""

import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from kdq_lightning.errors import UserError
from kdq_lightning.files import write_atomically
from kdq_lightning.quantization.layerwise import LayerReport

RECORDS = "quantized.csv"
CORRECT = "correct.safetensors"
LAYERS = "layers.csv"
FLOAT_BITS = 32


@dataclass(frozen=True)
class Record:
    """One network at one bit width; the float network has 32 bits. What doesn't exist is None, and empty in the file.

    `agreement_*`, `flips`, `nll` and `ece` are those of the test images; of the validation images if the test set was
    left alone.

    Attributes:
        run: Name of the run.
        dataset: Name of the data.
        strategy: How the network was trained.
        network: Its name in `networks.NETWORKS`.
        peer: `peer0`, ... of mutual learning, else empty.
        seed: Of the run.
        solver: Of the layers; several are joined by "+".
        codebook: Of the layers; several are joined by "+".
        bits: Bit width.
        levels: Values that a weight may take, the most of any layer.
        packed_bytes: Size of the packed file; of the float network, of its float32 `.safetensors` file.
        val_top1: Percent.
        val_top5: Percent.
        test_top1: Percent.
        test_top5: Percent.
        agreement_float: Images that get the float network's class, percent.
        agreement_teacher: Images that get the teacher's class, percent.
        flips: Images that the float network gets right and this one wrong, or the other way round, percent (Dutta et
            al. 2024, Accuracy is Not All You Need). An image that moves from one wrong class to another disagrees with
            the float network and is no flip.
        nll: Mean cross-entropy, nats.
        ece: Expected calibration error over 15 bins, percent.
        relative_error: Of the layers' outputs on the calibration images, mean over the layers (a share, not percent).
        seconds: Spent on quantizing it; bit widths that walk together share the gathering of the layers' inputs.
        epochs: That the training was planned for.
        partial: Whether a limit left images out of the evaluation.
        config_hash: See `config_hash`.
        version: Of this package.
    """

    run: str
    dataset: str
    strategy: str
    network: str
    peer: str
    seed: int
    solver: str
    codebook: str
    bits: int
    levels: int | None
    packed_bytes: int
    val_top1: float | None
    val_top5: float | None
    test_top1: float | None
    test_top5: float | None
    agreement_float: float | None
    agreement_teacher: float | None
    flips: float | None
    nll: float | None
    ece: float | None
    relative_error: float | None
    seconds: float | None
    epochs: int | None
    partial: bool
    config_hash: str
    version: str

    @property
    def name(self) -> str:
        """The network's name within its run: the peer, or the architecture."""
        return self.peer or self.network

    @property
    def top1(self) -> float | None:
        """Test accuracy in percent; validation accuracy if the test set was left alone."""
        return self.val_top1 if self.test_top1 is None else self.test_top1

    def correct_key(self, split: str) -> str:
        """Return the key of its vector for a split, "val" or "test", in `read_correct`."""
        return f"{self.name}/{split}/{self.bits}"


HEADER = tuple(field.name for field in fields(Record))


@dataclass(frozen=True)
class LayerRecord(LayerReport):
    """One layer of one network at one bit width.

    Attributes:
        network: `Record.name` of the network.
        bits: Bit width.
    """

    network: str
    bits: int


Row = TypeVar("Row", Record, LayerRecord)


def read_records(folder: Path) -> list[Record]:
    """Read the records of a version's folder; none if it has no such file.

    Raises:
        UserError: If the file is damaged, or of another format.
    """
    return _read_table(folder / RECORDS, Record)


def read_layers(folder: Path) -> list[LayerRecord]:
    """Read what became of the layers, a network, bit width and layer after the other; see `read_records`."""
    return _read_table(folder / LAYERS, LayerRecord)


def write_records(folder: Path, records: Iterable[Record]) -> None:
    """Write the records of a version's folder, whole or not at all.

    Raises:
        UserError: If the file can't be written.
    """
    _write_table(folder / RECORDS, Record, records)


def write_layers(folder: Path, layers: Iterable[LayerRecord]) -> None:
    """Write what became of the layers; see `write_records`."""
    _write_table(folder / LAYERS, LayerRecord, layers)


def _read_table(path: Path, kind: type[Row]) -> list[Row]:
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = list(csv.reader(file)) or [[]]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete it and quantize again") from error
    if header != [field.name for field in fields(kind)]:
        raise UserError(f"{path} has another header than this release writes: use the release that wrote it")
    try:
        return [
            kind(**{field.name: _parse(field.type, text) for field, text in zip(fields(kind), row, strict=True)})
            for row in rows
        ]
    except ValueError as error:
        raise UserError(f"{path} has a damaged row ({error}): delete the file and quantize again") from error


def _write_table(path: Path, kind: type[Row], rows: Iterable[Row]) -> None:
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(field.name for field in fields(kind))
    writer.writerows([_format(value) for value in astuple(row)] for row in rows)
    write_atomically(path, table.getvalue().encode())


def _parse(kind: Any, text: str) -> Any:  # noqa: ANN401 - a field's type and a value of it
    options = get_args(kind) or (kind,)
    if type(None) in options and not text:
        return None
    if bool in options:
        if text not in ("True", "False"):
            raise ValueError(f"{text!r} is neither True nor False")
        return text == "True"
    return options[0](text)


def _format(value: str | float | None) -> str:
    if value is None:
        return ""
    return repr(round(value, 6)) if isinstance(value, float) else str(value)


def read_correct(folder: Path) -> dict[str, Tensor]:
    """Read which images were classified correctly; nothing if the folder has no such file.

    Returns:
        bool vectors (images,), in canonical order, by `Record.correct_key`.

    Raises:
        UserError: If the file is damaged.
    """
    path = folder / CORRECT
    if not path.exists():
        return {}
    try:
        with safetensors.safe_open(path, framework="np") as file:
            counts = json.loads(file.metadata()["images"])
            packed = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it isn't a mapping)
        return {
            key: torch.from_numpy(np.unpackbits(vector, count=counts[key.split("/")[1]]).astype(bool))
            for key, vector in packed.items()
        }
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it and quantize again") from error


def write_correct(folder: Path, correct: Mapping[str, Tensor]) -> None:
    """Write which images were classified correctly, whole or not at all.

    One bit an image, the first image in the highest bit of the first byte (`np.packbits`). The metadata key `images`
    tells in JSON how many images each split has: {"val": ..., "test": ...}.

    Args:
        folder: Of the version.
        correct: bool vectors (images,), in canonical order, by `Record.correct_key`; one length a split.

    Raises:
        UserError: If the file can't be written.
    """
    counts = {key.split("/")[1]: len(vector) for key, vector in sorted(correct.items())}
    packed = {key: torch.from_numpy(np.packbits(vector.numpy())) for key, vector in correct.items()}
    write_atomically(folder / CORRECT, safetensors.torch.save(packed, {"images": json.dumps(counts)}))


def find_records(*folders: Path) -> dict[Path, list[Record]]:
    """Return the records of every version below these folders, by the version's folder, in order of path.

    Raises:
        UserError: If a folder doesn't exist or a file is damaged.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder: give one that holds run folders")
    found = sorted({path.parent for folder in folders for path in folder.rglob(RECORDS)})
    return {folder: read_records(folder) for folder in found}
