"""The initializers and nodes of an ONNX file that a quantized weight becomes: bit planes, or DequantizeLinear."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kdq_lightning.errors import UserError
from kdq_lightning.quantization.bitstream import packed_size
from kdq_lightning.quantization.codebooks import QuantizedWeight

if TYPE_CHECKING:
    import onnx_ir as ir

_FLOAT = 1  # TensorProto.FLOAT
_INTEGERS = {2: "int2", 4: "int4", 8: "int8"}  # storage types of DequantizeLinear by their bits
OPSETS = {"int2": 25, "int4": 21, "int8": 18}
IR_VERSIONS = {"int2": 13, "int4": 10, "int8": 8}


class WeightBuilder:
    """Replaces one input of the graph by initializers and the nodes that compute it."""

    def __init__(self, graph: "ir.Graph", value: "ir.Value", prefix: str) -> None:
        """Take the input off the graph."""
        import onnx_ir

        self.ir, self.graph, self.value, self.prefix = onnx_ir, graph, value, prefix
        self.first = next(iter(graph))
        graph.inputs.remove(value)

    def from_planes(self, weight: QuantizedWeight) -> None:
        """Compute the weight from bit planes by Cast, Mul, Floor, MatMul, Reshape and Add of opset 13.

        A plane holds one bit of each code, eight codes a byte. Bit k of a byte x is floor(x/2^k) - 2·floor(x/2^(k+1)).
        """
        count, planes = weight.codes.numel(), (weight.grid.numel() - 1).bit_length()
        stored = self._constant("planes", bit_planes(weight.codes, planes)[:, :, None])
        shares = 0.5 ** np.arange(9, dtype=np.float32)
        halved = self._node("Mul", self._node("Cast", stored, to=_FLOAT), self._shared("halves", shares))
        differences = np.eye(9, 8, dtype=np.float32) - 2 * np.eye(9, 8, k=-1, dtype=np.float32)
        bits = self._node("MatMul", self._node("Floor", halved), self._shared("bits", differences))
        bits = self._node("Reshape", bits, self._shared(f"rows{planes}", np.array([planes, -1])))
        powers = 2 ** np.arange(planes, dtype=np.float32)[None]
        codes = self._node("MatMul", self._shared(f"powers{planes}", powers), bits)  # (1, 8·bytes)
        if count % 8:
            span = [self._constant(name, np.array([number])) for name, number in (("first", 0), ("end", count))]
            codes = self._node("Slice", codes, *span, self._shared("axis1", np.array([1])))
        codes = self._node("Reshape", codes, self._constant("shape", np.array(weight.codes.shape)))
        self._scaled(self._levels(codes, weight), weight)

    def _levels(self, codes: "ir.Value", weight: QuantizedWeight) -> "ir.Value":
        """Return the levels of codes: the codes plus the lowest level, or entries of a table."""
        grid = weight.grid.numpy()
        if np.array_equal(grid, grid[0] + np.arange(len(grid), dtype=np.float32)):
            return self._node("Add", codes, self._shared(f"lowest{grid[0]:g}", grid[0]))
        index = self._node("Cast", codes, to=7)  # TensorProto.INT64
        return self._node("Gather", self._constant("grid", grid), index)

    def _scaled(self, levels: "ir.Value", weight: QuantizedWeight) -> None:
        """Multiply by the scale, in the order in which torch does: the same float32 to the bit."""
        scale = weight.scale.numpy().reshape(-1, *[1] * (weight.codes.dim() - 1))
        self._node("Mul", levels, self._constant("scale", scale), output=self.value)

    def from_integers(self, weight: QuantizedWeight, integer: str) -> None:
        """Compute the weight by DequantizeLinear of signed integers, with a scale a channel or a layer."""
        import ml_dtypes

        integers, offset = _integers(weight)
        stored = self._constant("integers", integers.astype(np.dtype(getattr(ml_dtypes, integer, np.int8))))
        scale = weight.scale.numpy()
        axis = {"axis": 0} if scale.size > 1 else {}
        shape = scale.shape if scale.size > 1 else ()
        found = self._node(
            "DequantizeLinear", stored, self._constant("scale", scale.reshape(shape)),
            output=None if offset else self.value, **axis,
        )  # fmt: skip
        if offset:
            shift = np.float32(offset) * scale.reshape(-1, *[1] * (weight.codes.dim() - 1))
            self._node("Add", found, self._constant("shift", shift), output=self.value)

    def _node(
        self, operator: str, *inputs: "ir.Value", output: "ir.Value | None" = None, **attributes: int
    ) -> "ir.Value":
        listed = [self.ir.AttrInt64(name, value) for name, value in attributes.items()]
        node = self.ir.Node("", operator, inputs, listed, outputs=None if output is None else [output])
        self.graph.insert_before(self.first, node)
        return node.outputs[0]

    def _constant(self, name: str, values: NDArray[Any]) -> "ir.Value":
        """Add an initializer of this weight's own."""
        return self._initializer(f"{self.prefix}{name}", np.asarray(values))

    def _shared(self, name: str, values: NDArray[Any] | np.float32) -> "ir.Value":
        """Return an initializer that all weights share."""
        key = f"kdq.{name}"
        return self.graph.initializers[key] if key in self.graph.initializers else self._initializer(key, values)

    def _initializer(self, name: str, values: Any) -> "ir.Value":  # noqa: ANN401
        value: ir.Value = self.ir.Value(name=name, const_value=self.ir.tensor(np.asarray(values), name=name))
        self.graph.register_initializer(value)
        return value


def bit_planes(codes: Tensor, planes: int) -> NDArray[np.uint8]:
    """Return the bits of non-negative codes of any shape as planes, uint8 (planes, ⌈codes / 8⌉), lowest bit first."""
    flat = codes.flatten().numpy().astype(np.uint16)
    bits = (flat[None] >> np.arange(planes, dtype=np.uint16)[:, None]) & 1
    return np.packbits(bits.astype(np.uint8), axis=1, bitorder="little")


def bits_of_a_weight(weights: Mapping[str, QuantizedWeight]) -> tuple[float, float]:
    """Return how many bits of a file a weight takes, mean over all layers: as bit planes, and in a packed file.

    L levels take ⌈log2 L⌉ planes and hardly more than log2 L packed bits: five levels 3 and 2.33.
    """
    codes = [(weight.codes.numel(), weight.grid.numel()) for weight in weights.values()]
    total = sum(count for count, _ in codes)
    planes = sum(count * (levels - 1).bit_length() for count, levels in codes)
    packed = sum(8 * packed_size(count, levels) for count, levels in codes)
    return planes / total, packed / total


def _integers(weight: QuantizedWeight) -> tuple[NDArray[np.int64], float]:
    """Return the levels of a weight as integers, and what has to be added to them: 0, or 1/2 for `midrise`.

    Raises:
        UserError: If the levels are not evenly spaced around them.
    """
    levels = weight.grid.double().numpy()
    offset = float(levels[0] % 1)
    if not np.array_equal(levels - offset, np.round(levels - offset)):
        raise UserError(f"codebook {weight.codebook} has levels that are no integers")
    return np.round(levels - offset).astype(np.int64)[weight.codes.numpy()], offset


def integer_type(name: str, weight: QuantizedWeight) -> str:
    """Return the smallest integer type of DequantizeLinear that holds a weight's levels and that is known here.

    Raises:
        UserError: If no type holds them, or onnx and onnxruntime are too old for it.
    """
    try:
        integers, _ = _integers(weight)
    except UserError as error:
        raise UserError(f"layer {name}: {error}, which --weights qdq needs: give --weights planes") from error
    highest = int(max(integers.max(), -integers.min() - 1))
    fitting = [integer for bits, integer in _INTEGERS.items() if highest < 2 ** (bits - 1)]
    if not fitting:
        raise UserError(
            f"layer {name}: the {weight.grid.numel()} levels of codebook {weight.codebook} don't fit a signed byte,"
            " which --weights qdq needs: give --weights planes"
        )
    if fitting[0] == "int2" and _too_old("int2"):  # then four bits will do
        fitting = fitting[1:]
    if too_old := _too_old(fitting[0]):
        raise UserError(f"{too_old}: install a newer one, or give --weights planes")
    return fitting[0]


_NEEDED: dict[str, dict[str, tuple[int, int]]] = {
    "int2": {"onnx": (1, 20), "onnxruntime": (1, 24)},
    "int4": {"onnx": (1, 16), "onnxruntime": (1, 20)},
    "int8": {},
}
"""Versions that know a storage type."""


def _versions() -> dict[str, str]:
    return {package: version(package) for package in ("onnx", "onnxruntime")}


def _too_old(integer: str) -> str:
    """Say which installed package is too old for an integer type; empty if none is."""
    here = _versions()
    for package, needed in _NEEDED[integer].items():
        if tuple(map(int, here[package].split(".")[:2])) < needed:
            return f"{integer} weights need {package} {'.'.join(map(str, needed))}, and {here[package]} is here"
    return ""
