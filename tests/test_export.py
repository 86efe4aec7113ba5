"""`kdq export`: files that other tools read, with the packed network's own outputs, and what is refused."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kdq_lightning.cli import main
from kdq_lightning.commands import export, onnx_export
from kdq_lightning.data.normalization import Statistics
from kdq_lightning.networks import build_network
from kdq_lightning.quantization import Quantized, quantize
from kdq_lightning.runs.checkpoints import load_trained
from kdq_lightning.runs.trained_network import Description, packed_metadata

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.2, 0.3)
IMAGES = torch.randn(4, 3, 20, 20, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def quantized() -> Quantized:
    """Quantize a resnet8 to 2 bits; moment matching gives its convolutions biases."""
    torch.manual_seed(0)
    network = build_network("resnet8", 10)
    network.train()(torch.randn(64, 3, 16, 16))
    return quantize(network.eval(), [torch.randn(16, 3, 16, 16)], (2,), progress=lambda *_: None)[2]


@pytest.fixture
def packed(quantized: Quantized, workspace: Path) -> str:
    quantized.save("resnet8-2bit.safetensors", packed_metadata("resnet8", 10, Statistics(MEAN, STD)))
    return "resnet8-2bit.safetensors"


def test_state_dict_as_its_docstring_reads_it(quantized: Quantized, packed: str, capsys: pytest.CaptureFixture[str]):
    """Outputs equal to the bit, by the docstring's lines and by our own reader."""
    assert main(["export", packed, "--to", "state_dict", "--out", "new/folder/plain.safetensors"]) == 0
    printed = capsys.readouterr().out
    gained = sum(isinstance(layer, nn.Conv2d) and layer.bias is not None for layer in quantized.model.modules())
    assert (
        gained > 0
        and f"{gained} biases gained by quantization" in printed
        and str(list(MEAN)) in printed
        and str(list(STD)) in printed
    )
    state = load_file("new/folder/plain.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}  # int64: BatchNorm's counters
    network = build_network("resnet8", 10).eval()
    for name, layer in network.named_modules():
        if f"{name}.bias" in state and layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros(len(layer.weight)))
    network.load_state_dict(state)
    ours = load_trained("new/folder/plain.safetensors", Description("resnet8", MEAN, STD))["resnet8"].build()
    for found in (network, ours):
        assert torch.equal(found(IMAGES), quantized.model(IMAGES))


def test_a_run_folder_exports_its_best_checkpoint(teacher_run: Path, workspace: Path, capsys):
    assert main(["export", str(teacher_run), "--to=state_dict", "--out=plain.safetensors"]) == 0
    assert "\n  float32\n" in capsys.readouterr().out
    trained = load_trained(teacher_run)["resnet8"].state
    assert all(torch.equal(value, trained[name]) for name, value in load_file("plain.safetensors").items())


@pytest.mark.parametrize("is_alone", [False, pytest.param(True, marks=pytest.mark.slow(seconds=10))])
def test_onnx_computes_what_torch_does(is_alone: bool, quantized: Quantized, packed: str, capfd, caplog, recwarn):
    """Any batch and size of image; the file tells its statistics, not where it was made; the terminal stays clean."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    command, root = ["export", packed, "--to=onnx", "--out=net.onnx"], str(Path(export.__file__).parents[2])
    if is_alone:
        program = [sys.executable, "-m", "kdq_lightning.cli", *command]
        subprocess.run(program, env={**os.environ, "PYTHONPATH": root}, check=True)
    else:
        assert main(command) == 0
    out, err = capfd.readouterr()
    assert err == "" and out.count("\n") == 7 and max(map(len, out.splitlines())) <= 80
    assert not recwarn.list and not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert float(out.split("difference to torch ")[1].split("\n")[0]) < 1e-4
    assert root.encode() not in Path("net.onnx").read_bytes()
    session = onnxruntime.InferenceSession("net.onnx", providers=["CPUExecutionProvider"])
    for images in (IMAGES, torch.randn(1, 3, 32, 32)):
        found = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
        torch.testing.assert_close(found, quantized.model(images), rtol=1e-4, atol=1e-4)
    told = session.get_modelmeta().custom_metadata_map
    assert told["network"] == "resnet8" and tuple(json.loads(told["mean"])) == MEAN


@pytest.mark.parametrize("wrong", [1e-2, float("nan")])
def test_onnx_that_computes_something_else_is_not_written(wrong, quantized, packed: str, monkeypatch, capsys):
    monkeypatch.setattr(export, "onnx_bytes", lambda *_: b"")
    monkeypatch.setattr(onnx_export, "_computed_weights", lambda *_: {})
    monkeypatch.setattr(onnx_export, "onnx_session", lambda content: lambda images: quantized.model(images) + wrong)
    assert main(["export", packed, "--to=onnx", "--out=net.onnx"]) == 1
    assert "differ from torch's by" in capsys.readouterr().err
    assert not Path("net.onnx").exists()


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_the_extra_is_named(missing: str, packed: str, monkeypatch, capsys):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None if name == missing else sys)
    assert main(["export", packed, "--to=onnx", "--out=net.onnx"]) == 1
    assert capsys.readouterr().err == f'kdq: ONNX files need {missing}: pip install "kdq-lightning[onnx]"\n'


def test_what_is_refused(packed: str, capsys: pytest.CaptureFixture[str]):
    """One line each, a code that is not 0, the source intact and nothing written."""
    content = Path(packed).read_bytes()
    Path("cut.safetensors").write_bytes(content[:3000])
    Path("damaged.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    Path("folder.pth").mkdir()
    before = sorted(Path().rglob("*"))
    for arguments, sentence in (
        (["nothing.safetensors", "--to=state_dict", "--out=x"], "nothing.safetensors does not exist"),
        (["cut.safetensors", "--to=state_dict", "--out=x"], "truncated"),
        (["damaged.safetensors", "--to=state_dict", "--out=x"], "checksum"),
        ([packed, "--to=tflite", "--out=x"], "--to must be one of state_dict, onnx, torch_export, got tflite"),
        ([packed, "--to=state_dict", "--weights=planes", "--out=x"], "--weights belongs to --to onnx"),
        ([packed, "--to=onnx", "--weights=int", "--out=x"], "--weights must be one of planes, qdq, float, got int"),
        ([packed, "--to=state_dict"], "--out must be given"),
        ([packed, "--to=state_dict", "--out=x.onnx"], "writes .safetensors or .pth, not .onnx"),
        ([packed, "--to=state_dict", f"--out=./{packed}"], "is the file that is exported"),
        ([packed, "--to=state_dict", "--out=folder.pth"], "folder.pth could not be written"),
        ([packed, "--to=state_dict", f"--out={packed}/x.pth"], "could not be written"),
    ):
        try:
            code = main(["export", *arguments])
        except SystemExit as stop:
            code = stop.code
        error = capsys.readouterr().err
        assert code in (1, 2) and sentence in error and error.count("\n") == 1, error
    assert sorted(Path().rglob("*")) == before and Path(packed).read_bytes() == content


def test_a_plain_state_dict_needs_its_name_and_statistics(packed: str, capsys: pytest.CaptureFixture[str]):
    assert main(["export", packed, "--to=state_dict", "--out=plain.safetensors"]) == 0
    again = ["export", "plain.safetensors", "--to=state_dict", "--out=again.safetensors"]
    assert main(again) == 1
    assert "give --network, --mean, --std\n" in capsys.readouterr().err
    statistics = ["--mean", *map(str, MEAN), "--std", *map(str, STD)]
    assert main([*again, "--network=resnet8", *statistics]) == 0
    assert Path("again.safetensors").read_bytes() == Path("plain.safetensors").read_bytes()
