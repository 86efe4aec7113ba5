"""The report on one layer: its settings and error, or why it stays float."""

import math
from dataclasses import dataclass, replace

from torch import nn

from kdq_lightning.quantization.codebooks import QuantizedWeight
from kdq_lightning.quantization.gram import Gram, Layer, layers_of
from kdq_lightning.quantization.packing import packed_bytes
from kdq_lightning.quantization.recipes import Recipe
from kdq_lightning.quantization.solution import Solution

FEW_ROWS_PER_COLUMN = 2


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer at one bit width.

    Attributes:
        name: Of the module.
        solver: One of `SOLVERS`; "" for a layer left in float, as the codebook.
        codebook: One of `CODEBOOKS`.
        levels: Number of values that a weight may take; 0 for a layer left in float.
        rows: Rows of its Gram matrices.
        scale_granularity: "layer" or "channel".
        relative_error: |Xw + b - X̃q - b'| / |Xw| over the rows, of the layer as stored.
        zeros: Fraction of the weights that are zero.
        packed_bytes: Codes, scales and bias in the packed file.
        seconds: Spent on gathering (shared by the bit widths that walk together) and solving.
        note: What a reader should know; "" if nothing.
    """

    name: str
    solver: str
    codebook: str
    levels: int
    rows: int
    scale_granularity: str
    relative_error: float
    zeros: float
    packed_bytes: int
    seconds: float
    note: str


def layer_report(
    name: str, recipe: Recipe, gram: Gram, solution: Solution, weight: QuantizedWeight, layer: Layer, seconds: float
) -> LayerReport:
    """Describe a layer that was just solved."""
    energy = float(gram.y_square.sum())
    few = gram.rows < FEW_ROWS_PER_COLUMN * gram.A.shape[1]
    return LayerReport(
        name=name,
        solver=recipe.solver,
        codebook=recipe.codebook,
        levels=len(weight.grid),
        rows=gram.rows,
        scale_granularity="channel" if len(weight.scale) > 1 else "layer",
        relative_error=math.sqrt(float(solution.squared_error.sum()) / energy) if energy else 0.0,
        zeros=float((weight.grid[weight.codes.long()] == 0).float().mean()),
        packed_bytes=packed_bytes(weight) + (0 if layer.bias is None else 4 * layer.bias.numel()),
        seconds=seconds,
        note=f"only {gram.rows} rows for {gram.A.shape[1]} columns" if few else "",
    )


def noted(entry: LayerReport, note: str) -> LayerReport:
    """Return a report with one more note."""
    return replace(entry, note="; ".join(filter(None, [entry.note, note])))


def left_in_float(model: nn.Module, name: str, reason: str) -> LayerReport:
    """Describe a layer, or a parameter of another module, that stays as it was."""
    layer = layers_of(model).get(name)
    parameters = [model.get_parameter(name)] if layer is None else layer.parameters(recurse=False)
    size = sum(parameter.nbytes for parameter in parameters)
    return LayerReport(name, "", "", 0, 0, "", 0.0, 0.0, size, 0.0, f"{reason}: left in float")
