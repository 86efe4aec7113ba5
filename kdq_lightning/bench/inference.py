"""Images/s of a network in torch and of its exports, each beside the size of its file.

A weight-only low-bit file saves storage, not arithmetic: its network computes in float32.
"""

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor, nn

from kdq_lightning.bench.measure import Timing, hardware, interleaved, print_table
from kdq_lightning.commands.onnx_export import onnx_bytes, onnx_session, silence
from kdq_lightning.errors import UserError, check_range
from kdq_lightning.networks import build_network
from kdq_lightning.quantization import load_packed, quantize
from kdq_lightning.runs.checkpoints import state_dict_bytes

HONEST = (
    "A packed file saves storage, not arithmetic: its weights are dequantized and multiplied in float32."
    " Fewer bits are faster only where a kernel computes in them, as onnxruntime's int8."
)
_SIDE, _CLASSES = 32, 10
_REFERENCE = "torch float32"


@dataclass(frozen=True)
class Engine:
    """Something that evaluates the network.

    Attributes:
        name: What the table calls it.
        evaluate: From images (batch, 3, h, w) on the CPU to logits; it waits until they are computed.
        file_bytes: Size of the file that it reads.
    """

    name: str
    evaluate: Callable[[Tensor], object]
    file_bytes: int


def add_arguments(parser: ArgumentParser) -> None:
    """Add the benchmark's options."""
    parser.add_argument("--network", type=str, default="resnet20", help="Network, freshly initialised.")
    parser.add_argument("--bits", type=int, default=2, help="Bit width of the packed file.")
    parser.add_argument("--batch_sizes", type=list[int], default=[1, 32, 256], help="Images a call.")
    parser.add_argument("--images", type=int, default=256, help="Images of one measurement; at least one call.")
    parser.add_argument("--repeats", type=int, default=5, help="Measurements of each, in turns.")


def run(args: Namespace) -> dict[str, Any]:
    """Print images/s of each engine and what is missing, and return the figures.

    Raises:
        UserError: If the network is unknown or a number is out of range.
    """
    for name, value in (("repeats", args.repeats), ("batch_sizes", min(args.batch_sizes, default=0))):
        check_range(name, value, low=1, including_low=True)
    engines, absent = gather_engines(args.network, args.bits)
    rates = []
    for batch_size in args.batch_sizes:
        images, calls = torch.randn(batch_size, 3, _SIDE, _SIDE), -(-args.images // batch_size)
        timings = interleaved({e.name: partial(_repeat, e.evaluate, images, calls) for e in engines}, args.repeats)
        reference = timings[_REFERENCE].median
        rates += [_rate(e, batch_size, timings[e.name], batch_size * calls, reference) for e in engines]
    print_table(
        f"Evaluation, {args.network}, {_SIDE}x{_SIDE} pixels, median of {args.repeats}",
        ["", "file, MB", "batch", "images/s", "range", "ratio"],
        [_row(rate) for rate in rates],
    )
    for sentence in (*absent, HONEST):
        print(sentence)
    return {"network": args.network, "hardware": hardware(), "rates": rates, "absent": absent}


def gather_engines(name: str, bits: int) -> tuple[list[Engine], list[str]]:
    """Return what can evaluate a network here, torch first, and a sentence for each that is not installed."""
    network = build_network(name, _CLASSES).eval()
    engines, absent = [_float_engine(network), _packed_engine(network, name, bits)], []
    if torch.cuda.is_available():
        engines.append(_cuda_engine(network))
    for more in (_onnx_engines, _torchao_engines):
        try:
            engines += more(network)
        except UserError as error:
            absent.append(f"Not measured: {error}.")
    return engines, absent


def _float_engine(network: nn.Module) -> Engine:
    return Engine(_REFERENCE, _in_torch(network), len(state_dict_bytes(network)))


def _packed_engine(network: nn.Module, name: str, bits: int) -> Engine:
    """Round the weights, which is as fast to evaluate as anything better."""
    images = torch.randn(2, 3, _SIDE, _SIDE)
    result = quantize(network, [images], (bits,), solver="rounding", progress=lambda *_: None)[bits]
    with TemporaryDirectory() as folder:
        path = Path(folder, "packed.safetensors")
        result.save(path)
        loaded = load_packed(path, build_network(name, _CLASSES).eval())
        return Engine(f"torch, {bits}-bit file", _in_torch(loaded), path.stat().st_size)


def _cuda_engine(network: nn.Module) -> Engine:
    """Transfer of images and logits included."""
    on_device = _in_torch(copy.deepcopy(network).cuda())
    name = f"{_REFERENCE}, {torch.cuda.get_device_name()}"
    return Engine(name, lambda images: on_device(images.cuda()).cpu(), len(state_dict_bytes(network)))


def _onnx_engines(network: nn.Module) -> list[Engine]:
    content = onnx_bytes(network, {}, {}, "float")
    int8 = _int8_bytes(content)
    return [
        Engine("onnxruntime float32", onnx_session(content), len(content)),
        Engine("onnxruntime int8", onnx_session(int8), len(int8)),
    ]


def _int8_bytes(content: bytes) -> bytes:
    """Quantize weights and activations of an ONNX file; calibrated on noise, which is enough to time it."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Noise(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter([{"images": torch.randn(16, 3, _SIDE, _SIDE).numpy()}])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    with TemporaryDirectory() as folder, silence():
        path = Path(folder, "int8.onnx")
        # Unsigned activations with signed weights: what onnxruntime's x86 kernels are made for.
        quantize_static(
            onnx.load_from_string(content), path, Noise(), per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
        return path.read_bytes()


def _torchao_engines(network: nn.Module) -> list[Engine]:
    """Weight-only int8: torchao has it for linear layers, so a convolutional network stays almost as it is."""
    try:
        with silence():
            from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise UserError("torchao's int8 weights need torchao: pip install torchao") from error
    own = copy.deepcopy(network)
    quantize_(own, Int8WeightOnlyConfig())
    file = io.BytesIO()
    torch.save(own.state_dict(), file)
    return [Engine("torchao int8, linear", _in_torch(own), file.tell())]


def _in_torch(network: nn.Module) -> Callable[[Tensor], Tensor]:
    network = network.to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def evaluate(images: Tensor) -> Tensor:
        logits: Tensor = network(images.contiguous(memory_format=torch.channels_last))
        return logits

    return evaluate


def _repeat(evaluate: Callable[[Tensor], object], images: Tensor, calls: int) -> None:
    for _ in range(calls):
        evaluate(images)


def _rate(engine: Engine, batch_size: int, timing: Timing, images: int, reference: float) -> dict[str, Any]:
    return {
        "engine": engine.name,
        "file_bytes": engine.file_bytes,
        "batch_size": batch_size,
        "images_per_second": images / timing.median,
        "slowest": images / timing.slowest,
        "fastest": images / timing.fastest,
        "ratio": reference / timing.median,
    }


def _row(rate: dict[str, Any]) -> list[str]:
    return [
        rate["engine"],
        f"{rate['file_bytes'] / 1e6:.2f}",
        str(rate["batch_size"]),
        f"{rate['images_per_second']:,.0f}",
        f"{rate['slowest']:,.0f}-{rate['fastest']:,.0f}",
        f"{rate['ratio']:.2f}",
    ]
