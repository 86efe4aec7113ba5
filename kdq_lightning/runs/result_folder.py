"""The results of a run while they grow: each bit width is written as soon as it is known, and never computed again."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from kdq_lightning.runs.records import (
    FLOAT_BITS,
    LayerRecord,
    Record,
    read_correct,
    read_layers,
    read_records,
    write_correct,
    write_layers,
    write_records,
)


class ResultFolder:
    """The results of one configuration in a version's folder, growing by a network and bit width at a time.

    What another configuration left there counts for nothing, and goes when the first result is added.

    Attributes:
        records: Sorted by network and bit width.
        layers: In the same order.
    """

    def __init__(self, folder: Path, config_hash: str) -> None:
        """Read what is there.

        Raises:
            UserError: If a file is damaged.
        """
        self.folder = folder
        self.records = [record for record in read_records(folder) if record.config_hash == config_hash]
        known = {(record.name, record.bits) for record in self.records}
        self.layers = [layer for layer in read_layers(folder) if (layer.network, layer.bits) in known]
        kept = tuple(f"{record.name}/{split}/{record.bits}" for record in self.records for split in ("val", "test"))
        self.correct = {key: vector for key, vector in read_correct(folder).items() if key in kept}

    def packed_path(self, name: str, codebook: str, bits: int) -> Path:
        """Return where the packed file of a network and bit width lies."""
        return self.folder / "packed" / f"{name}-{codebook}-{bits}bit.safetensors"

    def missing(self, name: str, bits: Iterable[int]) -> list[int]:
        """Return those bit widths of a network of which the row, a vector or the packed file is not there."""
        done = {
            record.bits
            for record in self.records
            if record.name == name
            and any(record.correct_key(split) in self.correct for split in ("val", "test"))
            and (record.bits == FLOAT_BITS or self.packed_path(name, record.codebook, record.bits).exists())
        }
        return [width for width in bits if width not in done]

    def add(self, record: Record, correct: Mapping[str, Tensor], layers: Iterable[LayerRecord] = ()) -> None:
        """Write the results of one network at one bit width; the row comes last, so a row stands for all of it.

        Args:
            record: The row.
            correct: bool vectors (images,) by split, "val" or "test".
            layers: What became of the layers.

        Raises:
            UserError: If a file can't be written.
        """
        key = (record.name, record.bits)
        others = [layer for layer in self.layers if (layer.network, layer.bits) != key]
        self.layers = sorted([*others, *layers], key=lambda layer: (layer.network, layer.bits))
        self.correct |= {record.correct_key(split): vector for split, vector in correct.items()}
        kept = [other for other in self.records if (other.name, other.bits) != key]
        self.records = sorted([*kept, record], key=lambda record: (record.name, record.bits))
        write_layers(self.folder, self.layers)
        write_correct(self.folder, self.correct)
        write_records(self.folder, self.records)
