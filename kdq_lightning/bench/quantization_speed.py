"""Seconds of a walk, of its floor (forwards and Gram products alone) and of the published recursion.

All figures are processor seconds of one thread. The functions run in turns, so that other processes disturb all alike.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kdq_lightning.bench.measure import Timing, interleaved, peak_memory
from kdq_lightning.bench.published_recursion import quantize_published
from kdq_lightning.quantization import LayerReport, quantize

PLAIN: dict[str, Any] = {
    "solver": "gpfq",
    "codebook": "paper",
    "scale": "layer",
    "refine": 0,
    "match_moments": False,
}
"""The recursion without the steps around it: arguments of `quantize`."""

PATCHES: dict[str, dict[str, Any]] = {
    "published": {"mode": "official"},
    "all": {**PLAIN, "patch_fraction": 1.0},
    "10 %": {**PLAIN, "patch_fraction": 0.1},
    "default": {},
}
"""Arguments of `quantize` for the patches to solve on; `default` is all that `kdq quantize` does."""

FORWARD_IMAGES = 64  # the fastest batch of a forward on a processor
WIDTHS = (2, 3, 4, 5, 6, 7, 8)


@dataclass
class Speed:
    """Seconds of one way to quantize a network.

    Attributes:
        what: "walk", "floor" or "published" recursion.
        patches: One of `PATCHES`.
        images: Calibration images.
        widths: Number of bit widths.
        seconds: Processor time, median of the runs.
        fastest: Wall time of the fastest run, seconds.
        slowest: Wall time of the slowest run, seconds.
        peak_gb: Most memory that the process held meanwhile, interpreter and images included, in units of 2^30 bytes.
    """

    what: str
    patches: str
    images: int
    widths: int
    seconds: float
    fastest: float
    slowest: float
    peak_gb: float


def measure_speed(
    model: nn.Module,
    images: Tensor,
    repeats: int = 5,
    chosen: Sequence[str] = tuple(PATCHES),
    max_memory_gb: float = 8.0,
) -> list[Speed]:
    """Return the seconds of the walk, its floor and the published recursion on the same images and patches.

    Args:
        model: In eval mode, on the CPU; of 2-D convolutions and linear layers.
        images: Normalised calibration images, (images, 3, h, w).
        repeats: Calls of each that are counted.
        chosen: Some of `PATCHES`.
        max_memory_gb: Of a walk; see `quantize`.
    """
    walk = partial(quantize, max_memory_gb=max_memory_gb)
    half, quarter = images[: len(images) // 2], images[: len(images) // 4]
    cases: list[tuple[tuple[str, str, int, int], Callable[[], object]]] = []
    for patches, batch, widths in (
        ("published", images, WIDTHS[2:3]),
        ("all", quarter, WIDTHS[2:3]),
        ("10 %", half, WIDTHS[2:3]),
        ("10 %", images, WIDTHS[2:3]),
        ("10 %", images, WIDTHS),
        ("default", images, WIDTHS),
    ):
        if patches not in chosen:
            continue
        case = (patches, len(batch), len(widths))
        reports = walk(model, [batch], widths[:1], **PATCHES[patches])[widths[0]].layers
        cases.append((("floor", *case), floor(model, batch, reports, len(widths))))
        cases.append((("walk", *case), partial(walk, model, [batch], widths, **PATCHES[patches])))
    if "published" in chosen:
        recursion = partial(quantize_published, model, images, WIDTHS[2])
        cases.append((("published", "published", len(images), 1), recursion))
    peaks: dict[str, float] = {}
    with one_thread():
        timings = interleaved({str(case): _watched(function, peaks, str(case)) for case, function in cases}, repeats)
    return [Speed(*case, *_seconds(timings[str(case)]), peaks[str(case)]) for case, _ in cases]


def _watched(function: Callable[[], object], peaks: dict[str, float], name: str) -> Callable[[], None]:
    """Return the function, which writes its peak memory into `peaks`, too."""

    def run() -> None:
        with peak_memory() as peak:
            function()
        peaks[name] = max(peaks.get(name, 0.0), peak())

    return run


def floor(model: nn.Module, images: Tensor, layers: Sequence[LayerReport], widths: int) -> Callable[[], None]:
    """Return a function that does what no walk can leave out: forwards of all networks, and X̃ᵀX̃ and X̃ᵀX.

    Args:
        model: The network.
        images: Its inputs.
        layers: Reports that say how many rows each layer is solved on.
        widths: Number of bit widths.
    """
    shapes = Counter(_input_shape(model.get_submodule(layer.name), layer.rows) for layer in layers)
    batches = torch.split(images.contiguous(memory_format=torch.channels_last), FORWARD_IMAGES)

    @torch.inference_mode()
    def run() -> None:
        for _ in range(1 + widths):
            for batch in batches:
                model(batch)
        for shape, count in shapes.items():
            x, x_quantized = torch.ones(2, *shape)
            for _ in range(count * widths):
                torch.matmul(x_quantized.mT, x_quantized)
                torch.matmul(x_quantized.mT, x)

    return run


def _input_shape(layer: nn.Module, rows: int) -> tuple[int, int, int]:
    """Return the shape of a layer's inputs: (groups, rows, N)."""
    assert isinstance(layer.weight, Tensor)
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    return groups, rows, layer.weight[0].numel()


def _seconds(timing: Timing) -> tuple[float, float, float]:
    return timing.processor, timing.fastest, timing.slowest


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread within the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
