"""The benchmark of evaluation: each engine computes the network, figures are each other's, what is missing is named."""

import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from kdq_lightning.bench import inference
from kdq_lightning.bench.measure import Timing
from kdq_lightning.cli import main
from kdq_lightning.networks import build_network
from kdq_lightning.quantization import quantize

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
COMMAND = ["bench", "evaluation", "--network=resnet8"]


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing but torch be there, and let no process load files."""
    for name in ("onnx", "onnxscript", "onnxruntime", "torchao", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(inference, "measure_loading", lambda engine, network: inference.Loading(0.5, 12.0))


def test_onnxruntime_computes_the_network_in_float32_and_in_int8(caplog, capfd: pytest.CaptureFixture[str]):
    """int8 rounds visibly, and by little; what the quantizer warns of stays off the terminal."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 32, 3, stride=2), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2), nn.ReLU()
    convolutions += nn.Conv2d(64, 64, 3), nn.ReLU()
    network = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()
    expected = network(IMAGES).detach()
    low_bit = quantize(network, [IMAGES], (2,), solver="rounding", progress=lambda *_: None)
    exact, planes, qdq, int8 = inference._onnx_engines(network, low_bit)
    for engine in (planes, qdq):
        torch.testing.assert_close(engine.evaluate(IMAGES), low_bit[2].model(IMAGES).detach(), rtol=1e-4, atol=1e-4)
        assert engine.file_bytes < 0.15 * exact.file_bytes
    loading = inference.measure_loading(qdq, "")
    assert 0 < loading.seconds < 60 and (loading.resident_mb is None or 0 < loading.resident_mb < 500)
    torch.testing.assert_close(exact.evaluate(IMAGES), expected, rtol=1e-4, atol=1e-4)
    error = float((int8.evaluate(IMAGES) - expected).norm() / expected.norm())
    assert 1e-3 < error < 0.3
    assert 0.2 < int8.file_bytes / exact.file_bytes < 0.5
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not warnings and capfd.readouterr() == ("", "")


def test_a_process_loads_what_torch_packed():
    """Its packed file, by the time and memory that it takes."""
    torch.manual_seed(0)
    network = build_network("resnet8", 10).eval()
    low_bit = quantize(network, [IMAGES], (2,), solver="rounding", progress=lambda *_: None)
    packed = inference._packed_engine(low_bit[2], "resnet8", 2)
    loading = inference.measure_loading(packed, "resnet8")
    assert 0 < loading.seconds < 60 and (loading.resident_mb is None or 0 < loading.resident_mb < 500)


@pytest.mark.parametrize("engine", [0, 1])
def test_the_program_that_loads(engine: int, nothing_installed: None, tmp_path: Path):
    """Gives the network of the file, float or packed."""
    torch.manual_seed(0)
    engines, _ = inference.gather_engines("resnet8", [2])
    program: dict = {}
    exec(inference.LOADERS["torch"], program)
    path = tmp_path / "network.safetensors"
    path.write_bytes(engines[engine].content)
    with torch.no_grad():
        torch.testing.assert_close(program["load"](str(path), "resnet8")(IMAGES), engines[engine].evaluate(IMAGES))


def test_torch_computes_the_network_and_its_rounded_copy(nothing_installed: None):
    torch.manual_seed(0)
    engines, absent = inference.gather_engines("resnet8", [8])
    floating, packed = engines
    difference = (packed.evaluate(IMAGES) - floating.evaluate(IMAGES)).norm() / floating.evaluate(IMAGES).norm()
    assert 1e-4 < float(difference) < 0.1  # 8 bits: nearly, not quite
    assert 0.2 < packed.file_bytes / floating.file_bytes < 0.3
    assert len(absent) == 2


def test_command_names_what_is_missing(nothing_installed: None, workspace: Path, capsys: pytest.CaptureFixture[str]):
    assert main([*COMMAND, "--batch_sizes=[1,2]", "--images=2", "--repeats=1", "--json=figures.json"]) == 0
    printed = capsys.readouterr().out
    assert 'pip install "kdq-lightning[onnx]"' in printed and "pip install torchao" in printed
    assert "saves storage, not arithmetic" in printed and "onnxruntime float32" not in printed
    figures = json.loads(Path("figures.json").read_text())
    assert figures["files"].keys() == figures["loading"].keys() == {"torch float32", "torch, 2-bit file"}
    assert [(rate["engine"], rate["batch_size"]) for rate in figures["rates"]] == [
        (engine, batch_size) for batch_size in (1, 2) for engine in ("torch float32", "torch, 2-bit file")
    ]


def test_rates_count_the_images_that_were_evaluated(nothing_installed: None, workspace: Path, monkeypatch):
    seconds = {"torch float32": Timing(2.0, 1.0, 4.0, 2.0), "torch, 2-bit file": Timing(4.0, 4.0, 4.0, 4.0)}
    evaluated = []

    def timings(functions, repeats):
        for function in functions.values():
            evaluated.append(len(function.args[1]) * function.args[2])
        return seconds

    monkeypatch.setattr(inference, "interleaved", timings)
    assert main([*COMMAND, "--batch_sizes=[3]", "--images=7", "--json=figures.json"]) == 0
    assert evaluated == [9, 9]  # whole batches
    floating, packed = json.loads(Path("figures.json").read_text())["rates"]
    assert [floating[key] for key in ("images_per_second", "slowest", "fastest", "ratio")] == [4.5, 2.25, 9, 1]
    assert packed["images_per_second"] == 2.25 and packed["ratio"] == 0.5


def test_every_call_is_made():
    seen = []
    inference._repeat(seen.append, IMAGES, 4)
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--batch_sizes=[4,0]"], "batch_sizes must be at least 1"),
        (["--repeats=0"], "repeats must be at least 1"),
        (["--network=resnet9"], "unknown network"),
        (["--bits=[9]"], "bits"),
    ],
)
def test_bad_options(arguments: list[str], sentence: str, nothing_installed: None, capsys: pytest.CaptureFixture[str]):
    assert main([*COMMAND, *arguments]) == 1
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
