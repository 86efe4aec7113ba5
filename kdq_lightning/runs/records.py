"""One record for each network, method and bit width. All parts of the program use this class.

A version's folder holds `quantized.csv`, a line for each record; `correct.safetensors`, which images each network got
right; and `layers.csv`, what became of each layer.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from kdq_lightning.errors import UserError
from kdq_lightning.files import write_atomically
from kdq_lightning.quantization import Quantized
from kdq_lightning.quantization.layer_report import LayerReport
from kdq_lightning.quantization.methods import DEFAULT_METHOD, MIXED_METHOD
from kdq_lightning.quantization.solvers import RENAMED_SOLVERS
from kdq_lightning.runs.identity import Identity
from kdq_lightning.runs.tables import (
    Absent,
    Renamed,
    TableRow,
    annotation,
    columns,
    format_value,
    header,
    read_table,
    write_table,
)

RECORDS = "quantized.csv"
CORRECT = "correct.safetensors"
LAYERS = "layers.csv"
FLOAT_BITS = 32


class Measure(NamedTuple):
    """How a number of the records is shown; of a column that a user adds to `MEASURES` also how it is computed.

    Attributes:
        caption: Stands above its table; without a caption it has no table under "Fidelity" in the report.
        decimals: In its table.
        best: Picks the best of a column, `max` or `min`; None if no value is better than another.
        axis: Label of the y axis of its figure against the bit width; without a label it has no such figure.
        log: Whether the y axis of its figure is logarithmic.
        compute: Of an added column: takes a network in eval mode and what it was quantized to, None for the float
            network; returns the number of its row in the records, None if there is none.
        compute_layer: Of an added column: takes a quantized network and a layer's name; returns the number of the
            layer's row in `layers.csv`, None if there is none. Without it `layers.csv` has no such column.
    """

    caption: str = ""
    decimals: int = 2
    best: Callable[[list[float]], float] | None = None
    axis: str = ""
    log: bool = False
    compute: Callable[[nn.Module, Quantized | None], float | None] | None = None
    compute_layer: Callable[[Quantized, str], float | None] | None = None


def _default_method(values: Mapping[str, Any]) -> str:
    """Return the method of a row that was written before methods had names."""
    return "" if values.get("bits") == FLOAT_BITS else DEFAULT_METHOD


@dataclass(frozen=True)
class Record(TableRow):
    """One network at one bit width; the float network has 32 bits. What doesn't exist is None, and empty in the file.

    Columns are read by name: one that a file lacks is None, one that this class lacks is kept in `unknown`.

    `agreement_*`, `flips`, `nll` and `ece` are those of the test images; of the validation images if the test set was
    left alone.

    Attributes:
        run: Name of the run.
        dataset: Name of the data.
        strategy: How the network was trained.
        network: Its name, by which it is built.
        peer: `peer0`, ... of mutual learning, else empty.
        seed: Of the run; None if it was not seeded.
        method: How it was quantized: `default`, `gpfq`, `mixed` or `custom`; "" for the float network.
        solver: Of the layers; several are joined by "+".
        codebook: Of the layers; several are joined by "+".
        bits: Bit width; of a file of mixed bits the mean bits of a quantized weight, two decimals.
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
        budget: Of a file of mixed bits, in bytes; the column is there only if the table has such a file.
    """

    run: str
    dataset: str
    strategy: str
    network: str
    peer: str
    seed: int | None
    method: Annotated[str, Absent(_default_method)]
    solver: Annotated[str, Renamed(RENAMED_SOLVERS)]
    codebook: str
    bits: int | float
    levels: int | None
    packed_bytes: int
    val_top1: Annotated[float | None, Measure(best=max)]
    val_top5: Annotated[float | None, Measure(best=max)]
    test_top1: Annotated[float | None, Measure(best=max, axis="test accuracy, %")]  # its table is the main one
    test_top5: Annotated[float | None, Measure(best=max)]
    agreement_float: Annotated[float | None, Measure(best=max)]
    agreement_teacher: Annotated[
        float | None,
        Measure(
            "Test images that get the teacher's class, percent", best=max, axis="images with the teacher's class, %"
        ),
    ]
    flips: Annotated[
        float | None,
        Measure("Flips: test images right in float and wrong at b bits, or the other way round, percent", best=min),
    ]
    nll: Annotated[float | None, Measure(best=min)]
    ece: Annotated[float | None, Measure("Expected calibration error, percent", best=min)]
    relative_error: Annotated[
        float | None,
        Measure(
            "Relative error of the layers' outputs on the calibration images, mean over layers",
            decimals=4,
            best=min,
            axis="relative error of layer outputs",
            log=True,
        ),
    ]
    seconds: float | None
    epochs: int | None
    partial: bool
    config_hash: str
    version: str
    budget: int | None = None

    @property
    def name(self) -> str:
        """The network's name within its run: the peer, or the architecture."""
        return self.peer or self.network

    @property
    def top1(self) -> float | None:
        """Test accuracy in percent; validation accuracy if the test set was left alone."""
        return self.val_top1 if self.test_top1 is None else self.test_top1

    def number(self, name: str) -> float | None:
        """Return the number of a column in `MEASURES`, whether it is a field or was added by a user.

        Raises:
            UserError: If the text of an added column is no number.
        """
        if name not in self.unknown:
            number: float | None = getattr(self, name, None)
            return number
        text = self.unknown[name]
        try:
            return float(text) if text else None
        except ValueError as error:
            raise UserError(f"a record of {self.run} has {text!r} as {name}, which is not a number") from error

    def correct_key(self, split: str) -> str:
        """Return the key of its vector for a split, "val" or "test", in `read_correct`."""
        return identity(self).correct_key(split)


HEADER = header(Record)

_MEASURES = {column.name: measure for column in columns(Record) if (measure := annotation(column, Measure))}
MEASURES = {name: _MEASURES[name] for name in sorted(_MEASURES, key=lambda name: not name.startswith("test_"))}
"""How each number of the records is shown, by its field, in the order of tables: what was tested comes first.

A user adds a column by an entry of its own with `compute`: `MEASURES["joules"] = Measure("Joules", compute=f)`.
"""


def added_measures(records: Iterable[Record]) -> list[str]:
    """Return the names of the columns added to `MEASURES` that some of the records have."""
    there = {name for record in records for name in record.unknown}
    return [name for name in MEASURES if name in there]


def compute_added(network: nn.Module, quantized: Quantized | None) -> dict[str, str]:
    """Return the texts of all added columns for the row of a network; see `Measure.compute`.

    Raises:
        UserError: If one has the name of a column that is there without it.
    """
    own = {column.name for kind in (Record, LayerRecord) for column in columns(kind)}
    if taken := [name for name, m in MEASURES.items() if (m.compute or m.compute_layer) and name in own]:
        raise UserError(f"the records have a column {taken[0]} already: give the one that you add another name")
    numbers = {name: m.compute(network, quantized) for name, m in MEASURES.items() if m.compute}
    return {name: format_value(number) for name, number in numbers.items()}


def compute_added_of_layer(quantized: Quantized, layer: str) -> dict[str, str]:
    """Return the texts of all added columns for the row of a layer; see `Measure.compute_layer`."""
    numbers = {name: m.compute_layer(quantized, layer) for name, m in MEASURES.items() if m.compute_layer}
    return {name: format_value(number) for name, number in numbers.items()}


@dataclass(frozen=True)
class LayerRecord(LayerReport, TableRow):
    """One layer of one network at one bit width.

    Attributes:
        network: `Record.name` of the network.
        method: See `Record`.
        bits: Bit width; see `Record`.
        budget: See `Record`.
    """

    solver: Annotated[str, Renamed(RENAMED_SOLVERS)]
    network: str
    method: Annotated[str, Absent(_default_method)]
    bits: int | float
    budget: int | None = None


def identity(row: Record | LayerRecord) -> Identity:
    """Return what tells a row of a run's results from its others; the rows of its layers share it."""
    name = row.name if isinstance(row, Record) else row.network
    return Identity(name, row.method, int(row.budget or 0) if row.method == MIXED_METHOD else int(row.bits))


def packed_path(version: Path, record: Record) -> Path:
    """Return where a version's folder holds the packed file of a row."""
    return version / "packed" / identity(record).packed_name(record.codebook)


def read_records(folder: Path) -> list[Record]:
    """Return the records of a version's folder; none if it has no such file.

    Raises:
        UserError: If the file is damaged.
    """
    return read_table(folder / RECORDS, Record)


def read_layers(folder: Path) -> list[LayerRecord]:
    """Return the layers of all rows; see `read_records`."""
    return read_table(folder / LAYERS, LayerRecord)


def write_records(folder: Path, records: Iterable[Record]) -> None:
    """Write the records of a version's folder, whole or not at all.

    Raises:
        UserError: If the file can't be written.
    """
    write_table(folder / RECORDS, Record, records)


def write_layers(folder: Path, layers: Iterable[LayerRecord]) -> None:
    """Write the layers of all rows; see `write_records`."""
    write_table(folder / LAYERS, LayerRecord, layers)


def read_correct(folder: Path) -> dict[str, Tensor]:
    """Return which images were classified correctly; nothing if the folder has no such file.

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
