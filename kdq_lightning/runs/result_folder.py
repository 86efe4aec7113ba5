"""Reads and adds to the results in a run folder. Each result is saved at once."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from kdq_lightning.quantization.methods import DEFAULT_METHOD
from kdq_lightning.runs.identity import Identity
from kdq_lightning.runs.records import (
    FLOAT_BITS,
    LayerRecord,
    Record,
    identity,
    packed_path,
    read_correct,
    read_layers,
    read_records,
    write_correct,
    write_layers,
    write_records,
)


class ResultFolder:
    """The results of one configuration in a version's folder, to which a row is added at a time.

    What another configuration left there counts for nothing, and goes when the first row is added.

    Attributes:
        records: Sorted by their identity.
        layers: In the same order.
        correct: Which images were classified correctly, bool (images,), by `Record.correct_key`.
    """

    def __init__(self, folder: Path, config_hash: str, has_vectors: bool = True) -> None:
        """Read what is there.

        Args:
            folder: Of the version.
            config_hash: Of the records that count.
            has_vectors: Whether a row has vectors, without which it is not whole.

        Raises:
            UserError: If a file is damaged.
        """
        self.folder = folder
        self.has_vectors = has_vectors
        self.records = [record for record in read_records(folder) if record.config_hash == config_hash]
        known = {identity(record) for record in self.records}
        self.layers = [layer for layer in read_layers(folder) if identity(layer) in known]
        kept = {row.correct_key(split) for row in known for split in ("val", "test")}
        self.correct = {key: vector for key, vector in read_correct(folder).items() if key in kept}

    def missing(self, name: str, bits: Iterable[int], method: str = DEFAULT_METHOD) -> list[int]:
        """Return those bit widths of a network of which the record, a vector or the packed file is not there.

        Args:
            name: Of the network.
            bits: Bit widths, among them `FLOAT_BITS` for the float network; budgets in bytes for mixed bits.
            method: Method of all but the float network.
        """
        done = {
            identity(record)
            for record in self.records
            if (not self.has_vectors or any(record.correct_key(split) in self.correct for split in ("val", "test")))
            and (record.bits == FLOAT_BITS or packed_path(self.folder, record).exists())
        }
        wanted = {width: Identity(name, "" if width == FLOAT_BITS else method, width) for width in bits}
        return [width for width, row in wanted.items() if row not in done]

    def add(self, record: Record, correct: Mapping[str, Tensor], layers: Iterable[LayerRecord] = ()) -> None:
        """Write the results of one row; its record is written last, so that a record stands for all of it.

        Args:
            record: The row.
            correct: bool vectors (images,) by split, "val" or "test".
            layers: What became of the layers.

        Raises:
            UserError: If a file can't be written.
        """
        added = identity(record)
        others = [layer for layer in self.layers if identity(layer) != added]
        self.layers = sorted([*others, *layers], key=identity)
        self.correct |= {record.correct_key(split): vector for split, vector in correct.items()}
        self.records = sorted([*(row for row in self.records if identity(row) != added), record], key=_order)
        write_layers(self.folder, self.layers)
        write_correct(self.folder, self.correct)
        write_records(self.folder, self.records)


def _order(record: Record) -> tuple[str, bool, Identity]:
    """Return the sorting key of a record: by network, then method and bits, the float network last."""
    row = identity(record)
    return row.name, record.bits == FLOAT_BITS, row
