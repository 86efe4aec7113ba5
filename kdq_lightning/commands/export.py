"""`kdq export`: write a trained or packed network as a file that other tools read."""

import io
import json
from pathlib import Path

import torch

from kdq_lightning.commands.arguments import OneLineErrors
from kdq_lightning.commands.onnx_export import KINDS, check_onnx, onnx_bytes, silence
from kdq_lightning.commands.onnx_weights import bits_of_a_weight
from kdq_lightning.errors import UserError, check_range
from kdq_lightning.files import write_atomically
from kdq_lightning.networks import build_network
from kdq_lightning.quantization.packing import is_packed, read_weights
from kdq_lightning.runs.checkpoints import add_network_arguments, load_network
from kdq_lightning.runs.class_names import shorten_names
from kdq_lightning.runs.state_dicts import METADATA_KEY
from kdq_lightning.runs.trained_network import TrainedNetwork, state_dict_bytes

DEFAULT_SIDE = 32
"""Side in pixels of the images that a network is exported with where neither its file nor the user says it."""


def main(args: list[str]) -> int:
    """Run `kdq export`."""
    parser = OneLineErrors(prog="kdq export", description=__doc__)
    parser.add_argument(
        "packed", metavar="PACKED", type=Path, help="Packed file; a run folder, checkpoint or state dict will do, too."
    )
    parser.add_argument("--to", choices=list(TARGETS), required=True, help="What to write.")
    parser.add_argument(
        "--weights",
        choices=list(KINDS),
        default=None,
        help="How an ONNX file stores quantized weights: bit planes (default), integers, or float32.",
    )
    parser.add_argument("--out", type=Path, required=True, help="The file; missing folders are made.")
    parser.add_argument(
        "--image_size",
        type=int | None,
        default=None,
        help="Side in pixels of the images that the network is exported with; default: of those that it was trained"
        f" on, where the file says it, else {DEFAULT_SIDE}.",
    )
    add_network_arguments(parser)
    options = parser.parse_args(args)
    options.out = options.out.expanduser()
    trained = load_network(options.packed, options)
    if options.out.resolve() == trained.path.resolve():
        raise UserError(f"--out {options.out} is the file that is exported: choose another name")
    if options.weights is not None and options.to != "onnx":
        raise UserError(f"--weights belongs to --to onnx, and --to {options.to} writes float32: leave it out")
    if options.to == "state_dict":
        content, remark = to_state_dict(trained, options.out.suffix)
    elif options.to == "onnx":
        content, remark = to_onnx(trained, options.weights, image_shape(trained, options.image_size))
    else:
        content, remark = to_torch_export(trained, image_shape(trained, options.image_size))
    write_atomically(options.out, content)
    mean, std = map(list, trained.statistics)
    kind = "RGB images" if len(mean) == 3 else f"images of {len(mean)} channels"
    lines = [f"{options.out}: {_describe(trained)}, {len(content) / 1e6:.2f} MB", *remark.split("; ")]
    lines += [f"inputs: {kind} in [0, 1],", f"minus {mean}, divided by {std}"]
    print("\n  ".join(lines))  # lines that a terminal of 80 columns needn't wrap
    return 0


def _describe(trained: TrainedNetwork) -> str:
    """Return what is exported: network, parameters, data and classes."""
    parameters = sum(value.numel() for value in trained.state.values() if value.is_floating_point())
    names = f" ({shorten_names(trained.class_names)})" if trained.class_names else ""
    data = f"{trained.dataset}, " if trained.dataset else ""
    return f"{trained.network}, {parameters:,} numbers, {data}{trained.num_classes} classes{names}"


def image_shape(trained: TrainedNetwork, side: int | None) -> tuple[int, int, int]:
    """Return channels, height and width of the images that a network is exported with.

    Args:
        trained: The network; it expects as many channels as its mean has values.
        side: Height and width in pixels; of None those of the images that it was trained on, where its file says
            them, else `DEFAULT_SIDE`.

    Raises:
        UserError: If the side is not at least 1, or the network doesn't take such images.
    """
    known = trained.image_shape or (len(trained.statistics.mean), DEFAULT_SIDE, DEFAULT_SIDE)
    shape = known if side is None else (known[0], side, side)
    check_range("image_size", min(shape[1:]), low=1, including_low=True)
    try:
        with torch.no_grad():
            trained.build()(torch.zeros(1, *shape))
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise UserError(
            f"{trained.network} doesn't take images of {' x '.join(map(str, shape))} ({reason}): give their side in"
            " pixels as --image_size"
        ) from error
    return shape


def to_state_dict(trained: TrainedNetwork, suffix: str) -> tuple[bytes, str]:
    """Return a plain float32 state dict, and a remark for the user.

    Layers that gained a bias by moment matching hold it under the plain key, such as `conv1.bias`. `load_trained` makes
    room for them; elsewhere, where the network's layers are built without:

        state = safetensors.torch.load_file(path)
        for name, layer in network.named_modules():
            if f"{name}.bias" in state and layer.bias is None:
                layer.bias = nn.Parameter(torch.zeros(len(layer.weight)))
        network.load_state_dict(state)

    What the network was trained on, its classes among it, lies beside the tensors: as metadata of a `.safetensors`
    file, as an attribute of a `.pth` file's dictionary.

    Args:
        trained: The network.
        suffix: Of the file, `.safetensors` or `.pth`.

    Raises:
        UserError: If the suffix is another one.
    """
    if suffix not in (".safetensors", ".pth"):
        raise UserError(f"--to state_dict writes .safetensors or .pth, not {suffix or 'a file without suffix'}")
    network = trained.build()
    own = build_network(trained.network, trained.num_classes, trained.network_args).state_dict()
    gained = [name for name in network.state_dict() if name not in own]
    remark = f"{len(gained)} biases gained by quantization, such as {gained[0]}" if gained else "float32"
    if suffix == ".safetensors":
        return state_dict_bytes(network, trained.metadata()), remark
    content, state = io.BytesIO(), network.state_dict()
    setattr(state, METADATA_KEY, json.dumps(trained.metadata()))  # an ordered dictionary, which keeps it
    torch.save(state, content)
    return content.getvalue(), remark


def to_onnx(trained: TrainedNetwork, kind: str | None, shape: tuple[int, int, int]) -> tuple[bytes, str]:
    """Return an ONNX file that onnxruntime has read with torch's outputs, and a remark for the user.

    Args:
        trained: The network.
        kind: How the file stores quantized weights, a key of `onnx_export.KINDS`; bit planes if not given, and float32
            of a network that has none.
        shape: Channels, height and width of the images that it is exported with.

    Raises:
        UserError: If the extra [onnx] is missing, the kind doesn't fit, or onnxruntime computes something else.
    """
    weights = read_weights(trained.path) if is_packed(trained.path) else {}
    kind = kind or ("planes" if weights else "float")
    if kind != "float" and not weights:
        raise UserError(f"{trained.path} has no quantized weights: give a packed file, or --weights float")
    network = trained.build()
    content = onnx_bytes(network, weights, trained.metadata(), shape, kind)
    tolerance = 1e-6 if kind == "qdq" else 0.0
    difference = check_onnx(content, network, weights, shape, weight_tolerance=tolerance)
    remark = f"weights as {KINDS[kind]}; largest difference to torch {difference:.1e}"
    if weights:
        remark += f"; the packed file has {trained.path.stat().st_size / 1e6:.3f} MB"
    if kind == "planes":
        remark += "; {:.2f} planes a weight where packing takes {:.2f} bits".format(*bits_of_a_weight(weights))
    if kind == "qdq":
        remark += "; onnxruntime repeats DequantizeLinear in every run unless session.disable_quant_qdq is 1"
    return content, remark


@torch.no_grad()
def to_torch_export(trained: TrainedNetwork, shape: tuple[int, int, int]) -> tuple[bytes, str]:
    """Return a `torch.export` program of the dequantized network, which loads without this package; and a remark.

    `torch.export.load(path).module()` maps images (batch, channels, h, w) to logits; what the network was trained on is
    the file's `metadata.json` (`torch.export.load(path, extra_files={...})`).

    Args:
        trained: The network.
        shape: Channels, height and width of the images: the program takes no others.

    Raises:
        UserError: If torch can't export the network.
    """
    network = trained.build()
    example = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    try:
        with silence():
            program = torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    except Exception as error:  # whatever torch met in the network's forward
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"torch.export can't take {trained.network} ({reason[:200]}): use --to state_dict") from error
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={"metadata.json": json.dumps(trained.metadata())})
    content.seek(0)
    loaded = torch.export.load(content).module()
    for batch in (1, 2, 5):
        images = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))
        if not torch.allclose(loaded(images), network(images), rtol=1e-4, atol=1e-5):
            raise UserError("the exported program computes other logits than the network: nothing was written")
    takes = " x ".join(map(str, shape))
    return content.getvalue(), f"float32, images of {takes}; read it with torch.export.load(path).module()"


TARGETS = ("state_dict", "onnx", "torch_export")
