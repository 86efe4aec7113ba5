"""Test accuracy of quantized networks, by method, bit width and calibration draw."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from kdq_lightning.bench.measure import peak_memory
from kdq_lightning.bench.peers import PEERS, quantize_brevitas
from kdq_lightning.data.normalization import Statistics, normalize
from kdq_lightning.evaluation import Split, evaluate
from kdq_lightning.quantization import Quantized, quantize
from kdq_lightning.quantization.methods import DEFAULT_METHOD, METHODS
from kdq_lightning.quantization.packing import save_packed
from kdq_lightning.runs.trained_network import state_dict_bytes

BATCH = 256  # calibration images

COMPARED: dict[str, dict[str, Any]] = {
    "gpfq": METHODS["gpfq"],
    "rounding": {"solver": "rounding", "codebook": "int", "scale": "channel", "refine": 0, "match_moments": False},
    DEFAULT_METHOD: METHODS[DEFAULT_METHOD],
}
"""Arguments of `quantize` by method: those of `METHODS`, and plain rounding with the best scale a channel."""


@dataclass
class Accuracy:
    """Accuracies of one method at one bit width.

    Attributes:
        method: One of `COMPARED` or `PEERS`; `float` for the float network.
        bits: Bit width.
        levels: Number of values that a weight may take, the most of any layer; 0 for the float network.
        recipe: Solver and codebook.
        packed_bytes: Size of the packed file; for the float network of its plain safetensors file; 0 for a peer's.
        top1: Test accuracy of each calibration draw, percent.
    """

    method: str
    bits: int
    levels: int
    recipe: str
    packed_bytes: int
    top1: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Mean over the draws, percent."""
        return fmean(self.top1)


@dataclass
class QuantizationCost:
    """What one method takes for all bit widths of one draw.

    Attributes:
        method: One of `COMPARED` or `PEERS`.
        seconds: Wall time of `quantize`.
        peak_gb: Most memory that the process held meanwhile, interpreter and data included, in units of 2^30 bytes.
    """

    method: str
    seconds: float
    peak_gb: float


def measure_accuracy(
    model: nn.Module,
    draws: Sequence[Tensor],
    test: Split,
    statistics: Statistics,
    bits: Sequence[int],
    methods: Sequence[str] = tuple(COMPARED),
) -> tuple[list[Accuracy], list[QuantizationCost]]:
    """Quantize a network with each method on each draw, and test it at each bit width.

    Args:
        model: The float network, in eval mode, on the device to use.
        draws: Calibration images, uint8, (images, 3, h, w) each; the number of a draw seeds its patches, too.
        test: Images that the networks are tested on.
        statistics: Those of the inputs that the network expects.
        bits: Bit widths.
        methods: Some of `COMPARED` and `PEERS`.

    Returns:
        Accuracies, the float network's first, and costs.
    """

    def score(network: nn.Module) -> float:
        return evaluate(network, test, statistics).top1

    rows = {("float", 32): Accuracy("float", 32, 0, "", len(state_dict_bytes(model)), [score(model)])}
    costs = []
    for method in methods:
        for seed, images in enumerate(draws):
            with peak_memory() as peak:
                start = time.perf_counter()
                batches = [normalize(batch, statistics) for batch in torch.split(images, BATCH)]
                results = quantize_by(method, model, batches, bits, seed)
                costs.append(QuantizationCost(method, time.perf_counter() - start, 0.0))
            costs[-1].peak_gb = peak()
            for width, (network, packed) in results.items():
                row = rows.setdefault((method, width), _describe(method, width, packed))
                row.top1.append(score(network))
    return list(rows.values()), costs


def quantize_by(
    method: str, model: nn.Module, batches: Sequence[Tensor], bits: Sequence[int], seed: int
) -> dict[int, tuple[nn.Module, Quantized | None]]:
    """Return the quantized networks by bit width, each with its `Quantized`; None in its place for a peer's."""
    if method in PEERS:
        return {width: (quantize_brevitas(model, batches, width, method), None) for width in bits}
    results = quantize(model, batches, bits, seed=seed, **COMPARED[method])
    return {width: (result.model, result) for width, result in results.items()}


def _describe(method: str, bits: int, result: Quantized | None) -> Accuracy:
    """Return the description of a quantized network, without accuracies yet."""
    if result is None:
        return Accuracy(method, bits, 2**bits - 1, "", 0)
    recipes = sorted({f"{layer.solver}/{layer.codebook}" for layer in result.layers if layer.codebook})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "packed.safetensors"
        save_packed(file, result.model, result.weights, {})
        packed_bytes = file.stat().st_size
    return Accuracy(method, bits, max(layer.levels for layer in result.layers), " ".join(recipes), packed_bytes)
