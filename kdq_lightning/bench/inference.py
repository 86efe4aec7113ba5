"""Files of a network and what it costs to run them: bytes, seconds to load, memory, images/s in torch and onnxruntime.

A weight-only low-bit file saves storage, not arithmetic: its network computes in float32.
"""

import copy
import io
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
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
from kdq_lightning.quantization import Quantized, load_packed, quantize
from kdq_lightning.runs.trained_network import state_dict_bytes

HONEST = (
    "A packed file saves storage, not arithmetic: its weights are dequantized and multiplied in float32."
    " Only a kernel that computes in fewer bits could be faster; the row of onnxruntime int8 shows whether it is here."
)
_SIDE, _CLASSES = 32, 10
_SHAPE = (3, _SIDE, _SIDE)
_REFERENCE = "torch float32"


@dataclass(frozen=True)
class Loading:
    """What it takes to load a file in a process of its own.

    Attributes:
        seconds: From the libraries being imported to the logits of one image.
        resident_mb: Memory that the process holds more after that, megabytes; None where the system doesn't tell.
    """

    seconds: float
    resident_mb: float | None


@dataclass(frozen=True)
class Engine:
    """Something that evaluates the network.

    Attributes:
        name: What the table calls it.
        evaluate: From images (batch, 3, h, w) on the CPU to logits; it waits until they are computed.
        content: The file that it reads.
        loader: A key of `LOADERS`; empty if loading is not measured.
    """

    name: str
    evaluate: Callable[[Tensor], object]
    content: bytes
    loader: str = ""

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return len(self.content)


LOADERS = {
    "torch": """
import torch
from safetensors.torch import load_file
from kdq_lightning.networks import build_network
from kdq_lightning.quantization import load_packed
from kdq_lightning.quantization.packing import is_packed
def load(path, network):
    module = build_network(network, 10).eval()
    load_packed(path, module) if is_packed(path) else module.load_state_dict(load_file(path), strict=False)
    with torch.inference_mode():
        module(torch.zeros(1, 3, 32, 32))
    return module
""",
    "onnx": """
import numpy, onnxruntime
def load(path, network):
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    session.run(None, {"images": numpy.zeros((1, 3, 32, 32), numpy.float32)})
    return session
""",
}
"""Programs that define `load(path, network)`; each runs in a process of its own."""

_MEASURE = """
import json, os, sys, time
def resident():
    try:
        return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except OSError:
        return None
before, start = resident(), time.perf_counter()
loaded = load(sys.argv[1], sys.argv[2])
seconds, after = time.perf_counter() - start, resident()
print(json.dumps({"seconds": seconds, "resident_mb": None if before is None else after - before}))
"""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the benchmark's options."""
    parser.add_argument("--network", type=str, default="resnet20", help="Network, freshly initialised.")
    parser.add_argument("--bits", type=list[int], default=[2], help="Bit widths of the low-bit files.")
    parser.add_argument("--batch_sizes", type=list[int], default=[1, 64], help="Images a call.")
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
    loadings = {engine.name: measure_loading(engine, args.network) for engine in engines if engine.loader}
    rates = []
    for batch_size in args.batch_sizes:
        images, calls = torch.randn(batch_size, 3, _SIDE, _SIDE), -(-args.images // batch_size)
        timings = interleaved({e.name: partial(_repeat, e.evaluate, images, calls) for e in engines}, args.repeats)
        reference = timings[_REFERENCE].median
        rates += [_rate(e, batch_size, timings[e.name], batch_size * calls, reference) for e in engines]
    print_table(
        f"Evaluation, {args.network}, {_SIDE}x{_SIDE} pixels, median of {args.repeats}",
        ["", "file, kB", "to load, s", "memory, MB", "batch", "images/s", "range", "ratio"],
        [_row(rate, loadings.get(rate["engine"])) for rate in rates],
    )
    for sentence in (*absent, HONEST):
        print(sentence)
    return {
        "network": args.network,
        "hardware": hardware(),
        "files": {engine.name: engine.file_bytes for engine in engines},
        "loading": {name: vars(loading) for name, loading in loadings.items()},
        "rates": rates,
        "absent": absent,
    }


def gather_engines(name: str, bits: Sequence[int]) -> tuple[list[Engine], list[str]]:
    """Return what can evaluate a network here, torch first, and a sentence for each that is not installed."""
    network = _as_if_trained(build_network(name, _CLASSES))
    # Rounding the weights makes files of the same bytes and speed as anything better.
    images = [torch.randn(2, 3, _SIDE, _SIDE)]
    low_bit = quantize(network, images, tuple(bits), solver="rounding", progress=lambda *_: None)
    engines = [Engine(_REFERENCE, _in_torch(network), state_dict_bytes(network), "torch")]
    engines += [_packed_engine(result, name, width) for width, result in low_bit.items()]
    if torch.cuda.is_available():
        engines.append(_cuda_engine(network))
    absent = []
    for more in (partial(_onnx_engines, network, low_bit), partial(_torchao_engines, network)):
        try:
            engines += more()
        except UserError as error:
            absent.append(f"Not measured: {error}.")
    return engines, absent


def _as_if_trained(network: nn.Module) -> nn.Module:
    """Give every BatchNorm numbers of its own: an exporter stores equal tensors, as fresh layers have them, once."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                assert tensor is not None
                nn.init.uniform_(tensor, 0.9, 1.1)
    return network.eval()


def measure_loading(engine: Engine, network: str) -> Loading:
    """Load an engine's file in a process of its own, with as many threads as here.

    Raises:
        UserError: If that process fails.
    """
    program = f"THREADS = {torch.get_num_threads()}\n" + LOADERS[engine.loader] + _MEASURE
    with TemporaryDirectory() as folder:
        path = Path(folder, "network.onnx" if engine.loader == "onnx" else "network.safetensors")
        path.write_bytes(engine.content)
        done = subprocess.run(
            [sys.executable, "-c", program, str(path), network], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise UserError(f"{engine.name} can't be loaded: {done.stderr.strip().splitlines()[-1]}")
    return Loading(**json.loads(done.stdout))


def _packed_engine(result: Quantized, name: str, bits: int) -> Engine:
    with TemporaryDirectory() as folder:
        path = Path(folder, "packed.safetensors")
        result.save(path)
        loaded = load_packed(path, build_network(name, _CLASSES).eval())
        return Engine(f"torch, {bits}-bit file", _in_torch(loaded), path.read_bytes(), "torch")


def _cuda_engine(network: nn.Module) -> Engine:
    """Transfer of images and logits included."""
    on_device = _in_torch(copy.deepcopy(network).cuda())
    name = f"{_REFERENCE}, {torch.cuda.get_device_name()}"
    return Engine(name, lambda images: on_device(images.cuda()).cpu(), state_dict_bytes(network))


def _onnx_engines(network: nn.Module, low_bit: Mapping[int, Quantized]) -> list[Engine]:
    """Return onnxruntime on files of float32, of low-bit weights both ways, and of int8 arithmetic."""
    files = {"onnxruntime float32": onnx_bytes(network, {}, {}, _SHAPE, "float")}
    for bits, result in low_bit.items():
        for kind in ("planes", "qdq"):
            content = onnx_bytes(result.model, result.weights, {}, _SHAPE, kind)
            files[f"onnxruntime {kind}, {bits} bits"] = content
    files["onnxruntime int8"] = _int8_bytes(files["onnxruntime float32"])
    return [Engine(name, onnx_session(content), content, "onnx") for name, content in files.items()]


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
    return [Engine("torchao int8, linear", _in_torch(own), file.getvalue())]


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


def _row(rate: dict[str, Any], loading: Loading | None) -> list[str]:
    memory = loading.resident_mb if loading else None
    return [
        rate["engine"],
        f"{rate['file_bytes'] / 1e3:,.0f}",
        f"{loading.seconds:.2f}" if loading else "-",
        f"{memory:.0f}" if memory is not None else "-",
        str(rate["batch_size"]),
        f"{rate['images_per_second']:,.0f}",
        f"{rate['slowest']:,.0f}-{rate['fastest']:,.0f}",
        f"{rate['ratio']:.2f}",
    ]
