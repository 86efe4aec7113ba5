"""Writes the results of one network at one bit width: its packed file and its record."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import nn

import kdq_lightning
from kdq_lightning.evaluation import Evaluation
from kdq_lightning.quantization import Quantized
from kdq_lightning.quantization.methods import DEFAULT_METHOD, MIXED_METHOD
from kdq_lightning.quantization.packing import mean_bits, metadata_bytes
from kdq_lightning.runs.identity import Identity
from kdq_lightning.runs.records import LayerRecord, Record, compute_added, compute_added_of_layer, packed_path
from kdq_lightning.runs.result_folder import ResultFolder
from kdq_lightning.runs.trained_network import state_dict_bytes
from kdq_lightning.training.source import Evaluations, Source


class QuantizedRun:
    """The results in a run's folder, to which a row is added at a time; every process has one.

    Attributes:
        source: The trained run.
    """

    def __init__(self, source: Source) -> None:
        """Name the run; its results are read when they are needed.

        Args:
            source: The trained run.
        """
        self.source = source

    @cached_property
    def results(self) -> ResultFolder:
        """The folder's results, for rank 0 alone: the others would read while it writes."""
        return ResultFolder(self.source.folder, self.source.config_hash, self.source.has_vectors)

    def missing(self, rows: Iterable[Identity]) -> list[Identity]:
        """Return those of the rows whose results are not in the folder."""
        missing: list[Identity] = []

        def look() -> None:
            missing.extend(row for row in rows if self.results.missing(row.name, [row.bits], row.method))

        self.source.on_rank_zero(look)
        return self.source.from_rank_zero(missing)

    def add_row(
        self,
        row: Identity,
        network: nn.Module,
        evaluations: Evaluations,
        *,
        quantized: Quantized | None = None,
        float_evaluations: Evaluations | None = None,
    ) -> None:
        """Pack a network, and record it with the images that it classifies correctly; a row stands for all of that.

        Args:
            row: Name of the network, method and bit width.
            network: With the weights that were evaluated.
            evaluations: Of it, on each split.
            quantized: What the packed file is made of; None for the float network, which has none.
            float_evaluations: Of the float network; None if there is no float network to compare with.

        Raises:
            UserError: If a file can't be written.
        """
        record = self._record(row, evaluations, float_evaluations, quantized)
        record = replace(record, unknown=record.unknown | compute_added(network, quantized))
        correct = {split: e.correct for split, e in evaluations.items() if isinstance(e, Evaluation)}
        reports = quantized.layers if quantized else []
        layers = [
            LayerRecord(
                **vars(report),
                network=row.name,
                method=row.method,
                bits=record.bits,
                budget=record.budget,
                unknown=compute_added_of_layer(quantized, report.name) if quantized else {},
            )
            for report in reports
        ]

        def write() -> None:
            if quantized is None:
                size = len(state_dict_bytes(network))
            else:
                path = packed_path(self.source.folder, record)
                quantized.save(path, self._metadata(row.name, vars(record)))
                size = path.stat().st_size
            self.results.add(replace(record, packed_bytes=size), correct, layers)

        self.source.on_rank_zero(write)

    def _record(
        self,
        row: Identity,
        evaluations: Evaluations,
        float_evaluations: Evaluations | None,
        quantized: Quantized | None,
    ) -> Record:
        """Return the row; the size of its file is not known yet."""
        source = self.source
        return Record(
            method=row.method,
            packed_bytes=0,
            config_hash=source.config_hash,
            version=kdq_lightning.__version__,
            **source.fields(row.name),
            **source.measured(evaluations, float_evaluations),
            **bits_fields(row, quantized),
            **quantization_fields(quantized),
        )

    def metadata_bytes(self, row: Identity) -> int:
        """Return how many bytes of a row's packed file its metadata take at most."""
        known = {"method": row.method, "bits": row.bits, "budget": row.bits, "config_hash": self.source.config_hash}
        return metadata_bytes(self._metadata(row.name, {**self.source.fields(row.name), **known}))

    def _metadata(self, name: str, fields: Mapping[str, Any]) -> dict[str, str]:
        """Return what the packed file of a network says of it, given the fields of its record."""
        keys = ["network", "dataset", "strategy", "peer", "seed", "bits", "config_hash"]
        keys += ["method"] * (fields["method"] != DEFAULT_METHOD) + ["budget"] * (fields["method"] == MIXED_METHOD)
        return {**{key: str(fields[key]) for key in keys}, **self.source.metadata(name)}


FLOAT_ROW = {"solver": "", "codebook": "", "levels": None, "relative_error": None, "seconds": None}
"""What the float network has in the fields that quantization fills."""


def bits_fields(row: Identity, quantized: Quantized | None) -> dict[str, Any]:
    """Return the fields of a record that say how many bits a network has."""
    if quantized is None or row.method != MIXED_METHOD:
        return {"bits": row.bits}
    return {"bits": round(mean_bits(quantized.weights.values()), 2), "budget": row.bits}


def quantization_fields(quantized: Quantized | None) -> dict[str, Any]:
    """Return the fields of a record that say how a network was quantized, over all its quantized layers.

    Args:
        quantized: The network; None for the float network. One that was trained after it was quantized has no layers
            reported, so it has no solver, error or time.
    """
    if quantized is None:
        return FLOAT_ROW
    weights = quantized.weights.values()
    layers = [layer for layer in quantized.layers if layer.codebook]
    return {
        "solver": "+".join(sorted({layer.solver for layer in layers})),
        "codebook": "+".join(sorted({weight.codebook for weight in weights})),
        "levels": max(weight.grid.numel() for weight in weights),
        "relative_error": sum(layer.relative_error for layer in layers) / len(layers) if layers else None,
        "seconds": sum(layer.seconds for layer in layers) if layers else None,
    }
