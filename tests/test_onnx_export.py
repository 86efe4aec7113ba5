"""ONNX files with small weights: every codebook to the bit in onnxruntime, their bytes, and what is refused."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kdq_lightning.cli import main
from kdq_lightning.commands import onnx_weights
from kdq_lightning.commands.onnx_export import check_onnx, onnx_bytes, onnx_session
from kdq_lightning.commands.onnx_weights import bit_planes
from kdq_lightning.data.normalization import Statistics
from kdq_lightning.errors import UserError
from kdq_lightning.networks import NETWORKS, Network, build_network
from kdq_lightning.quantization import quantize
from kdq_lightning.quantization.codebooks import CODEBOOKS, QuantizedWeight, grid
from kdq_lightning.runs.trained_network import packed_metadata

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SHAPE = (3, 32, 32)
PAIRS = [pair for pair in product(CODEBOOKS, (1, 2, 3, 4, 5, 8)) if pair != ("narrow", 1)]


def random_weight(shape: torch.Size, codebook: str, bits: int, seed: int) -> QuantizedWeight:
    """Return random codes, with a scale a layer for every third seed, else one a channel; of `signed` some negative."""
    generator = torch.Generator().manual_seed(seed)
    levels = grid(codebook, bits)
    codes = torch.randint(len(levels), shape, generator=generator).short()
    scale = (0.2 + torch.rand(1 if seed % 3 == 0 else shape[0], generator=generator)) / levels.abs().max()
    if codebook == "signed":
        scale = scale * (torch.randint(2, scale.shape, generator=generator) * 2 - 1)
    return QuantizedWeight(codes, levels, scale, codebook, bits)


class ManyLayers(nn.Module):
    """A layer for each pair of codebook and bit width: convolutions, grouped, depthwise, and linear ones."""

    def __init__(self, pairs: list[tuple[str, int]]) -> None:
        super().__init__()
        kinds = (
            lambda: nn.Conv2d(6, 6, 3, padding=1, bias=False),
            lambda: nn.Conv2d(6, 6, 1, groups=3),
            lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6),
            lambda: nn.Linear(6, 6),
        )
        self.stem = nn.Conv2d(3, 6, 3, bias=False)
        self.layers = nn.ModuleList(kinds[i % 4]() for i in range(len(pairs)))
        self.norm = nn.BatchNorm2d(6)

    def forward(self, images):
        features = self.norm(self.stem(images))
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                features = features + 0.1 * layer(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            else:
                features = features + 0.1 * layer(features)
        return features.mean((2, 3))


def network_of(pairs: list[tuple[str, int]]) -> tuple[nn.Module, dict[str, QuantizedWeight]]:
    torch.manual_seed(0)
    network = ManyLayers(pairs).eval()
    weights = {}
    for i, (codebook, bits) in enumerate(pairs):
        weight = network.layers[i].weight
        weights[f"layers.{i}"] = random_weight(weight.shape, codebook, bits, seed=i)
        weight.data.copy_(weights[f"layers.{i}"].dequantize())
    return network, weights


def computed(content: bytes, weights: dict[str, QuantizedWeight]) -> dict[str, np.ndarray]:
    """Return what the reference implementation of ONNX, which is slow and obvious, computes as weights."""
    from onnx.reference import ReferenceEvaluator

    model = onnx.load_from_string(content)
    names = [f"{name}.weight" for name in weights]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    images = np.zeros((1, 3, 8, 8), np.float32)
    return dict(zip(weights, ReferenceEvaluator(model).run(None, {"images": images}), strict=True))


def test_planes_of_every_codebook_are_exact():
    """In onnxruntime and in the reference implementation; the unpacking needs no more than opset 13."""
    network, weights = network_of(PAIRS)
    content = onnx_bytes(network, weights, {}, SHAPE, "planes")
    assert check_onnx(content, network, weights, SHAPE) < 1e-4
    for name, found in computed(content, weights).items():
        assert np.array_equal(found, weights[name].dequantize().numpy()), name
    kinds = {node.op_type for node in onnx.load_from_string(content).graph.node}
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.since_version <= 13}
    assert kinds <= known and "BitShift" not in kinds


def test_integers_of_every_codebook_that_fits():
    """What doesn't fit a byte, or isn't evenly spaced, is refused, and the way out named."""
    fitting = [pair for pair in PAIRS if pair[0] != "hard" and pair not in (("paper", 8), ("soft", 8))]
    network, weights = network_of(fitting)
    content = onnx_bytes(network, weights, {}, SHAPE, "qdq")
    assert check_onnx(content, network, weights, SHAPE, weight_tolerance=1e-6) < 1e-4
    stored = {
        tensor.data_type
        for tensor in onnx.load_from_string(content).graph.initializer
        if tensor.data_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.INT64)
    }
    assert stored == {onnx.TensorProto.INT2, onnx.TensorProto.INT4, onnx.TensorProto.INT8}
    for pair, said in ((("hard", 2), "no integers"), (("paper", 8), "257 levels"), (("soft", 8), "257 levels")):
        network, weights = network_of([pair])
        with pytest.raises(UserError, match=f"{said}.*--weights planes"):
            onnx_bytes(network, weights, {}, SHAPE, "qdq")


def test_planes_equal_a_loop():
    codes = torch.randint(0, 9, (3, 7), generator=torch.Generator().manual_seed(0)).short()
    packed = bit_planes(codes, 4)
    assert packed.shape == (4, 3)
    for plane, place in product(range(4), range(21)):
        assert packed[plane, place // 8] >> (place % 8) & 1 == int(codes.flatten()[place]) >> plane & 1


@pytest.mark.parametrize("kind", ["planes", "qdq"])
def test_a_wrong_weight_is_not_written(kind: str):
    """One code in a thousand is enough."""
    network, weights = network_of([("int", 4), ("midrise", 3)])
    content = onnx_bytes(network, weights, {}, SHAPE, kind)
    weights["layers.1"].codes.view(-1)[5] ^= 1
    with pytest.raises(UserError, match=r"other weights of layer layers\.1"):
        check_onnx(content, network, weights, SHAPE, weight_tolerance=1e-6)


SMALL = [(2, "qdq"), (3, "planes"), *(pytest.param(b, "planes", marks=pytest.mark.slow(seconds=4)) for b in (2, 4, 8))]


@pytest.mark.parametrize(("bits", "kind"), SMALL)
def test_a_packed_file_stays_small(bits: int, kind: str, workspace: Path, capsys: pytest.CaptureFixture[str]):
    """With 2^b levels at most 3 % and 1 kB a layer above the packed file; moment matching has added biases.

    No two tensors of BatchNorm are equal, as in a trained network: an exporter stores equal ones once.
    """
    torch.manual_seed(0)
    network = build_network("resnet8", 10)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.weight, layer.bias):
                nn.init.uniform_(tensor, 0.9, 1.1)
    network.train()(torch.randn(64, 3, 16, 16))
    result = quantize(network.eval(), [torch.randn(16, 3, 16, 16)], (bits,), progress=lambda *_: None)[bits]
    result.save("packed.safetensors", packed_metadata("resnet8", 10, Statistics((0.4, 0.5, 0.6), (0.2, 0.2, 0.3))))
    assert main(["export", "packed.safetensors", "--to=onnx", f"--weights={kind}", "--out=net.onnx"]) == 0
    printed = capsys.readouterr().out
    packed, written = (Path(name).stat().st_size for name in ("packed.safetensors", "net.onnx"))
    assert written <= 1.03 * packed + 8 * 1000
    assert f"the packed file has {packed / 1e6:.3f} MB" in printed and ("disable_quant_qdq" in printed) == (
        kind == "qdq"
    )
    images = torch.randn(7, 3, 20, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(onnx_session("net.onnx")(images), result.model(images), rtol=1e-4, atol=1e-4)
    graph = onnx.load("net.onnx").graph
    assert input_shape(graph) == ["batch", 3, "height", "width"]
    given = {name for node in graph.node for name in node.output}
    assert given >= {f"{name}.weight" for name in result.weights}, "a reader finds each layer by its weight"
    stored = {tensor.raw_data for tensor in graph.initializer}
    for name, layer in network.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert {getattr(layer, key).detach().numpy().tobytes() for key in ("weight", "running_var")} <= stored, name


def input_shape(graph) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim]


@pytest.mark.parametrize(
    ("codebook", "planes"), [("paper", 3), pytest.param("midrise", 2, marks=pytest.mark.slow(seconds=4))]
)
def test_planes_and_packed_bits_are_printed(codebook: str, planes: int, workspace: Path, capsys):
    """Five levels take three planes, and 2.33 bits of a packed file: three codes go into a word of seven bits."""
    network = build_network("resnet8", 10).eval()
    images = [torch.randn(2, 3, 32, 32)]
    result = quantize(network, images, (2,), solver="rounding", codebook=codebook, progress=lambda *_: None)[2]
    result.save("packed.safetensors", packed_metadata("resnet8", 10, Statistics((0.4,) * 3, (0.2,) * 3)))
    assert main(["export", "packed.safetensors", "--to=onnx", "--out=net.onnx"]) == 0
    packed = "2.33" if codebook == "paper" else "2.00"
    assert f"\n  {planes}.00 planes a weight where packing takes {packed} bits" in capsys.readouterr().out
    files = (Path("packed.safetensors"), Path("net.onnx"))
    expected = sum(weight.codes.numel() for weight in result.weights.values()) * (planes - float(packed)) / 8
    assert 0 < files[1].stat().st_size - files[0].stat().st_size - expected < 10_000


class OneSize(nn.Module):
    """Takes images of one channel and 12 x 12 pixels, and no others."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.classify = nn.Linear(4 * 36, num_classes)

    def forward(self, images):
        return self.classify(self.stem(images).relu().flatten(1))


def test_size_and_channels_of_the_file(workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """The packed file says them; one that doesn't needs the option where the network takes one size alone."""
    monkeypatch.setitem(NETWORKS, "one_size", Network(OneSize))
    torch.manual_seed(0)
    network = build_network("one_size", 3).eval()
    result = quantize(network, [torch.randn(8, 1, 12, 12)], (4,), solver="rounding", progress=lambda *_: None)[4]
    grey = Statistics((0.5,), (0.25,))
    result.save("sized.safetensors", packed_metadata("one_size", 3, grey, image_shape=(1, 12, 12)))
    result.save("unsized.safetensors", packed_metadata("one_size", 3, grey))
    images = torch.randn(5, 1, 12, 12)
    for arguments in (["sized.safetensors"], ["unsized.safetensors", "--image_size=12"]):
        assert main(["export", *arguments, "--to=onnx", "--out=net.onnx"]) == 0
        assert "inputs: images of 1 channels in" in capsys.readouterr().out
        assert input_shape(onnx.load("net.onnx").graph)[:2] == ["batch", 1]
        torch.testing.assert_close(onnx_session("net.onnx")(images), result.model(images), rtol=1e-4, atol=1e-5)
        assert main(["export", *arguments, "--to=torch_export", "--out=net.pt2"]) == 0
        assert "images of 1 x 12 x 12" in capsys.readouterr().out
        program = torch.export.load("net.pt2").module()
        torch.testing.assert_close(program(images), result.model(images), rtol=1e-4, atol=1e-5)
    for target in ("onnx", "torch_export"):
        assert main(["export", "unsized.safetensors", f"--to={target}", "--out=other"]) == 1
        error = capsys.readouterr().err
        assert "1 x 32 x 32" in error and "--image_size" in error and error.count("\n") == 1
    assert main(["export", "sized.safetensors", "--to=onnx", "--image_size=0", "--out=other"]) == 1
    assert "image_size must be at least 1" in capsys.readouterr().err and not Path("other").exists()


def test_float_weights_and_float_networks(teacher_run: Path, workspace: Path, capsys: pytest.CaptureFixture[str]):
    """A run folder has no codes: float32 by default, and nothing else."""
    assert main(["export", str(teacher_run), "--to=onnx", "--out=net.onnx"]) == 0
    assert "weights as float32" in capsys.readouterr().out
    assert main(["export", str(teacher_run), "--to=onnx", "--weights=planes", "--out=other.onnx"]) == 1
    assert "has no quantized weights" in capsys.readouterr().err and not Path("other.onnx").exists()


def test_torch_export_loads_without_the_package(teacher_run: Path, workspace: Path):
    """In a process that can't import it, at any batch size."""
    import subprocess
    import sys

    assert main(["export", str(teacher_run), "--to=torch_export", "--out=net.pt2"]) == 0
    assert main(["export", str(teacher_run), "--to=state_dict", "--out=net.safetensors"]) == 0
    code = (
        "import sys, torch; sys.modules['kdq_lightning'] = None;"
        "module = torch.export.load('net.pt2').module();"
        "torch.save([module(torch.ones(n, 3, 32, 32)) for n in (1, 3, 9)], 'logits.pt')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    network = build_network("resnet8", 10).eval()
    network.load_state_dict(load_file("net.safetensors"), strict=False)
    for batch, found in zip((1, 3, 9), torch.load("logits.pt"), strict=True):
        torch.testing.assert_close(found, network(torch.ones(batch, 3, 32, 32)), rtol=1e-4, atol=1e-5)


class Branching(nn.Module):
    """Runs one of two layers, as the images say."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, images):
        return self.layer(images.mean((2, 3))) if images.sum() > 0 else images.mean((2, 3))[:, :2]


def test_what_torch_cannot_export_is_a_sentence():
    with pytest.raises(UserError, match="can't export Branching to ONNX") as error:
        onnx_bytes(Branching().eval(), {}, {}, SHAPE, "float")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("versions", "said"),
    [
        ({"onnx": "1.15.0", "onnxruntime": "1.24.0"}, "int4 weights need onnx 1.16, and 1.15.0 is here"),
        ({"onnx": "1.20.0", "onnxruntime": "1.19.2"}, "int4 weights need onnxruntime 1.20, and 1.19.2 is here"),
    ],
    ids=["onnx", "onnxruntime"],
)
def test_old_versions_are_named(versions: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch):
    """Integers of a byte always fit; those of four bits name the version that is needed."""
    monkeypatch.setattr(onnx_weights, "_versions", lambda: versions)
    network, weights = network_of([("int", 8)])
    assert onnx_bytes(network, weights, {}, SHAPE, "qdq")
    network, weights = network_of([("int", 3)])
    with pytest.raises(UserError, match=f"{said}.*--weights planes"):
        onnx_bytes(network, weights, {}, SHAPE, "qdq")
