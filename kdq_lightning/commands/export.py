"""Write a trained or packed network as a file that other tools read; low-bit weights are dequantized to float32."""

import importlib
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from kdq_lightning.commands.arguments import OneLineErrors
from kdq_lightning.errors import UserError
from kdq_lightning.files import write_atomically
from kdq_lightning.networks import build_network
from kdq_lightning.runs.checkpoints import (
    TrainedNetwork,
    add_network_arguments,
    load_network,
    packed_metadata,
    state_dict_bytes,
)

TOLERANCE = 1e-4  # of the largest logit: float32 sums in another order stay far below


def main(args: list[str]) -> int:
    """Run `kdq export`."""
    parser = OneLineErrors(prog="kdq export", description=__doc__)
    parser.add_argument(
        "packed", metavar="PACKED", type=Path, help="Packed file; a run folder, checkpoint or state dict will do, too."
    )
    parser.add_argument("--to", choices=list(FORMATS), required=True, help="What to write.")
    parser.add_argument("--out", type=Path, required=True, help="The file; missing folders are made.")
    add_network_arguments(parser)
    options = parser.parse_args(args)
    trained = load_network(options.packed, options)
    if options.out.resolve() == trained.path.resolve():
        raise UserError(f"--out {options.out} is the file that is exported: choose another name")
    content, remark = FORMATS[options.to](trained)
    write_atomically(options.out, content)
    print(f"{options.out}: {trained.network}, {trained.num_classes} classes, {len(content) / 1e6:.2f} MB; {remark}")
    mean, std = map(list, trained.statistics)
    print(f"inputs: RGB images in [0, 1], minus {mean}, divided by {std}")
    return 0


def to_state_dict(trained: TrainedNetwork) -> tuple[bytes, str]:
    """Return a plain float32 safetensors state dict, and a remark for the user.

    Layers that gained a bias by moment matching hold it under the plain key, such as `conv1.bias`. `load_trained` makes
    room for them; elsewhere, where the network's layers are built without:

        state = safetensors.torch.load_file(path)
        for name, layer in network.named_modules():
            if f"{name}.bias" in state and layer.bias is None:
                layer.bias = nn.Parameter(torch.zeros(len(layer.weight)))
        network.load_state_dict(state)
    """
    network = trained.build()
    own = build_network(trained.network, trained.num_classes).state_dict()
    gained = [name for name in network.state_dict() if name not in own]
    remark = f"{len(gained)} biases gained by quantization, such as {gained[0]}" if gained else "float32"
    return state_dict_bytes(network), remark


def to_onnx(trained: TrainedNetwork) -> tuple[bytes, str]:
    """Return an ONNX file that onnxruntime reads with torch's outputs, and a remark for the user.

    Raises:
        UserError: If the extra [onnx] is missing, or onnxruntime computes something else.
    """
    network = trained.build()
    content = onnx_bytes(network, packed_metadata(trained.network, trained.num_classes, trained.statistics))
    return content, f"largest difference to torch {onnx_difference(content, network):.1e}"


def onnx_bytes(network: nn.Module, metadata: dict[str, str]) -> bytes:
    """Return the network as ONNX: `images` (batch, 3, h, w) to `logits` (batch, classes), each size free.

    BatchNorm is folded into the convolutions.

    Args:
        network: In eval mode, on the CPU.
        metadata: What the file tells its reader.

    Raises:
        UserError: If the extra [onnx] is missing.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f'ONNX files need {name}: pip install "kdq-lightning[onnx]"') from error
    free = torch.export.Dim.DYNAMIC
    with silence():
        program = torch.onnx.export(
            network, (torch.zeros(2, 3, 32, 32),), dynamo=True, verbose=False, input_names=["images"],
            output_names=["logits"], dynamic_shapes=({0: free, 2: free, 3: free},),
        )  # fmt: skip
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with the paths of whoever exported
    program.model.metadata_props.update(metadata)
    content: bytes = program.model_proto.SerializeToString()
    return content


def onnx_session(content: bytes | str) -> Callable[[Tensor], Tensor]:
    """Return a function from images (batch, 3, h, w) to logits (batch, classes) that onnxruntime computes on the CPU.

    Args:
        content: An ONNX file's bytes or path; it runs on as many threads as torch does.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@torch.no_grad()
def onnx_difference(content: bytes, network: nn.Module) -> float:
    """Return the largest difference of a logit between onnxruntime and torch, on one image and on a batch.

    Raises:
        UserError: If it is more than rounding explains.
    """
    run = onnx_session(content)
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for shape in ((1, 3, 32, 32), (5, 3, 24, 24)):
        images = torch.randn(shape, generator=generator)
        expected, found = network(images), run(images)
        difference = float((found - expected).abs().max())
        if not difference <= TOLERANCE * float(expected.abs().max()):
            raise UserError(f"onnxruntime's logits differ from torch's by {difference:.1e}: nothing was written")
        worst = max(worst, difference)
    return worst


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


FORMATS = {"state_dict": to_state_dict, "onnx": to_onnx}
