"""ONNX files of quantized networks whose weights stay small: bit planes, or integers with DequantizeLinear.

The network is exported with its quantized weights as inputs, so that no optimizer folds them into anything; then each
of these inputs becomes a few initializers and the nodes that turn them into the float32 weight, which a runtime
computes once, while it loads the file. What is written has been run by onnxruntime.
"""

import importlib
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdq_lightning.commands.onnx_weights import IR_VERSIONS, OPSETS, WeightBuilder, integer_type
from kdq_lightning.errors import UserError
from kdq_lightning.quantization.codebooks import QuantizedWeight

if TYPE_CHECKING:
    import onnx_ir as ir

TOLERANCE = 1e-4  # of the largest logit: float32 sums in another order stay far below

KINDS = {"planes": "bit planes", "qdq": "integers with DequantizeLinear", "float": "float32"}
"""What `--weights` takes, and what the printed line calls it."""


def onnx_bytes(
    network: nn.Module,
    weights: Mapping[str, QuantizedWeight],
    metadata: Mapping[str, str],
    shape: tuple[int, int, int],
    kind: str = "planes",
) -> bytes:
    """Return a network as an ONNX file: `images` (batch, channels, height, width) to `logits` (batch, classes).

    Args:
        network: In eval mode, on the CPU, with the weights that `weights` stand for.
        weights: The quantized weights by layer; none of a float network.
        metadata: What the file tells its reader.
        shape: Channels, height and width of an image that the network takes; height and width are free in the
            file, where the network takes other ones.
        kind: A key of `KINDS`: how quantized weights are stored.

    Raises:
        UserError: If the extra [onnx] is missing or too old, torch can't export the network, or `qdq` can't hold a
            codebook.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f'ONNX files need {name}: pip install "kdq-lightning[onnx]"') from error
    kept = weights if kind != "float" else {}
    types = {name: integer_type(name, weight) for name, weight in kept.items()} if kind == "qdq" else {}
    opset = max((OPSETS[integer] for integer in types.values()), default=18)
    program = _exported(network, shape, opset)
    model = program.model
    inputs = {name: _as_input(model.graph, name, weight) for name, weight in kept.items()}
    with silence():
        program.optimize()
    for i, (name, weight) in enumerate(kept.items()):
        builder = WeightBuilder(model.graph, inputs[name], f"w{i}.")
        if kind == "qdq":
            builder.from_integers(weight, types[name])
        else:
            builder.from_planes(weight)
    model.ir_version = max([model.ir_version, *(IR_VERSIONS[integer] for integer in types.values())])
    _tidy(model, dict(metadata))
    if kept:
        _shorten_names(model.graph, {value.name for value in inputs.values()})
    content: bytes = program.model_proto.SerializeToString()
    return content


def _exported(network: nn.Module, shape: tuple[int, int, int], opset: int) -> Any:  # noqa: ANN401
    """Return torch's ONNX program of the network, not optimized yet."""
    free, free_if_possible = torch.export.Dim.DYNAMIC, torch.export.Dim.AUTO
    try:
        with silence():
            program = torch.onnx.export(
                network, (torch.zeros(2, *shape),), dynamo=True, verbose=False, optimize=False,
                input_names=["images"], output_names=["logits"], opset_version=opset,
                dynamic_shapes=({0: free, 2: free_if_possible, 3: free_if_possible},),
            )  # fmt: skip
    except Exception as error:  # torch wraps whatever it met
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise UserError(
            f"torch can't export {type(network).__name__} to ONNX ({reason[:200]}): its forward may depend on the"
            " values of the images; use --to state_dict"
        ) from error
    assert program is not None
    return program


def _as_input(graph: "ir.Graph", name: str, weight: QuantizedWeight) -> "ir.Value":
    """Turn the initializer that holds a layer's weight into an input of the graph.

    Raises:
        UserError: If no initializer holds these values.
    """
    values = weight.dequantize().numpy()
    names = sorted(graph.initializers, key=lambda other: other != f"{name}.weight")
    for key in names:
        tensor = graph.initializers[key].const_value
        if tensor is not None and tuple(tensor.shape) == values.shape and np.array_equal(tensor.numpy(), values):
            value = graph.initializers.pop(key)
            value.const_value = None
            graph.inputs.append(value)
            return value
    raise UserError(
        f"the weight of layer {name} is not in the ONNX graph as it is in the packed file: give --weights float"
    )


def _tidy(model: "ir.Model", metadata: dict[str, str]) -> None:
    """Name the free dimensions, and leave nothing of the exporter's own in the file."""
    import onnx_ir

    graph = model.graph
    images, logits = graph.inputs[0], graph.outputs[0]
    assert images.shape is not None and logits.shape is not None, "torch knows them"
    images.shape = onnx_ir.Shape(["batch", images.shape[1], "height", "width"])
    logits.shape = onnx_ir.Shape(["batch", logits.shape[-1]])
    for node in graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with the paths of whoever exported
        node.name = None
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in graph.outputs:
                value.shape, value.type = None, None
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()
    graph.metadata_props.clear()
    model.metadata_props.clear()
    model.metadata_props.update(metadata)


def _shorten_names(graph: "ir.Graph", weights: Collection[str | None]) -> None:
    """Give short names to all tensors but the inputs, the outputs and the weights.

    A name stands in the file wherever its tensor is used: the four of a BatchNorm took more bytes than its layer's
    codes may cost beside the packed file.

    Args:
        graph: Of the file.
        weights: Names of the dequantized weights, which keep them: a reader finds each layer by its weight.
    """
    kept = {value.name for value in (*graph.inputs, *graph.outputs)} | set(weights)
    numbers = count()
    stored = list(graph.initializers.values())
    for value in (*stored, *(output for node in graph.all_nodes() for output in node.outputs)):
        if value.name not in kept:
            value.name = f"{'t' if value in stored else 'v'}{next(numbers)}"


def onnx_session(content: bytes | str, fold: bool = True) -> Callable[[Tensor], Tensor]:
    """Return a function from images (batch, channels, h, w) to logits (batch, classes) of onnxruntime on the CPU.

    Args:
        content: An ONNX file's bytes or path; it runs on as many threads as torch does.
        fold: Whether weights are dequantized once, while the file is loaded, instead of in every run.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    if fold:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@torch.no_grad()
def check_onnx(
    content: bytes,
    network: nn.Module,
    weights: Mapping[str, QuantizedWeight],
    shape: tuple[int, int, int],
    weight_tolerance: float = 0.0,
) -> float:
    """Run an ONNX file in onnxruntime beside torch, and return the largest difference of a logit.

    Args:
        content: The file.
        network: What it was made of.
        weights: The weights that must come out, by layer.
        shape: Channels, height and width of an image that the network takes.
        weight_tolerance: Largest relative difference of a weight; 0 is to the bit.

    Raises:
        UserError: If a weight differs by more than the tolerance, or a logit by more than rounding explains.
    """
    for name, computed in _computed_weights(content, weights, shape).items():
        if not np.allclose(computed, weights[name].dequantize().numpy(), rtol=weight_tolerance, atol=0):
            raise UserError(f"onnxruntime computes other weights of layer {name}: nothing was written")
    run = onnx_session(content)
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for batch in (1, 5, 2):
        images = torch.randn((batch, *shape), generator=generator)
        expected, found = network(images), run(images)
        difference = float((found - expected).abs().max())
        if not difference <= TOLERANCE * float(expected.abs().max()):
            raise UserError(f"onnxruntime's logits differ from torch's by {difference:.1e}: nothing was written")
        worst = max(worst, difference)
    return worst


def _computed_weights(
    content: bytes, weights: Mapping[str, QuantizedWeight], shape: tuple[int, int, int]
) -> dict[str, NDArray[np.float32]]:
    """Return the weights that onnxruntime computes from a file, by layer: those that nodes of the file give."""
    import onnx
    import onnxruntime

    model = onnx.load_from_string(content)
    given = {output for node in model.graph.node for output in node.output}
    names = {name: f"{name}.weight" for name in weights if f"{name}.weight" in given}
    if not names:
        return {}
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=output) for output in names.values())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    images = {value.name: np.zeros((1, *shape), np.float32) for value in session.get_inputs()}
    return dict(zip(names, session.run(list(names.values()), images), strict=True))


@contextmanager
def silence() -> Iterator[None]:
    """Keep what exporters warn of, and log, off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
