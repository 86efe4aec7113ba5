"""Benchmarks: calls take turns, the warm-up isn't counted, and the figures are each other's."""

import json
import time
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser, Namespace

from kdq_lightning.bench import data, step
from kdq_lightning.bench.measure import Timing, hardware, interleaved
from kdq_lightning.cli import main
from kdq_lightning.data.datamodules import DigitsDataModule
from kdq_lightning.errors import UserError
from kdq_lightning.modules.classifier import Classifier
from kdq_lightning.study import budget
from tests.conftest import CONFIGS


def test_functions_take_turns_after_a_warm_up():
    calls = []

    def slow_at_first():
        time.sleep(0.3 if "slow" not in calls else 0.01)
        calls.append("slow")

    timings = interleaved({"slow": slow_at_first, "quick": lambda: calls.append("quick")}, repeats=3)
    assert calls == ["slow", "quick"] * 4
    slow, quick = timings["slow"], timings["quick"]
    assert 0.01 <= slow.fastest <= slow.median <= slow.slowest < 0.3
    assert slow.processor < slow.median  # sleeping is no work
    assert quick.median < 0.01


def test_hardware_is_one_line_with_versions():
    assert torch.__version__ in hardware() and "lightning" in hardware() and "\n" not in hardware()


def test_data_benchmark(capsys):
    parser = ArgumentParser()
    data.add_arguments(parser)
    figures = data.run(parser.parse_args(["--batch_size=16", "--images=64", "--repeats=1"]))
    assert "1 used" in figures["hardware"]
    pil, ours = figures["pipelines"]["PIL: crop, flip"], figures["pipelines"]["ours: crop, flip"]
    assert pil["ratio"] == 1
    assert ours["ratio"] == pytest.approx(ours["images_per_second"] / pil["images_per_second"])
    assert ours["slowest"] == ours["fastest"] == ours["images_per_second"]  # one repeat
    printed = capsys.readouterr().out
    assert "ours: crop, flip, cutout" in printed and f"{ours['ratio']:.1f}" in printed


def test_benchmark_counts_the_images_that_were_read(monkeypatch):
    timing = Timing(median=2.0, fastest=1.0, slowest=4.0, processor=2.0)
    monkeypatch.setattr(data, "interleaved", lambda functions, repeats: dict.fromkeys(functions, timing))
    figures = data.run(Namespace(batch_size=16, images=64, repeats=1))["pipelines"]
    assert figures["PIL: crop, flip"] == {"images_per_second": 8, "slowest": 4, "fastest": 16, "ratio": 1}
    assert figures["ours: crop, flip"]["ratio"] == 4


def test_step_benchmark_computes_from_what_it_measures(capsys, monkeypatch: pytest.MonkeyPatch):
    """Efficiency is the median over turns of limit / Trainer time; minutes follow from the Trainer's."""
    limits, actuals = iter([0.1, 0.4, 0.3]), iter([0.2, 0.5, 0.3])
    monkeypatch.setattr(step, "_bare_seconds", lambda *_: next(limits))
    monkeypatch.setattr(step, "trainer_seconds", lambda *_: next(actuals))
    parser = ArgumentParser()
    step.add_arguments(parser)
    chosen = ['--strategies=["dml"]', "--steps=10", "--batch_size=6", "--repeats=3"]
    figures = step.run(parser.parse_args([*chosen, "--train_images=12000", "--epochs=5"]))
    assert figures["dml_efficiency"] == pytest.approx(0.8)  # the median of 1/2, 4/5 and 1
    assert figures["dml_minutes"] == pytest.approx(5 * 12000 / (60 / 0.3) / 60)
    assert ["dml", "200", "200", "120-300", "0.800", "5.0"] in [
        [cell.strip() for cell in line.strip("│ ").split("│")] for line in capsys.readouterr().out.splitlines()
    ]


def test_an_epoch_of_one_step(workspace):
    """Fewer steps an epoch than are left out at the start."""
    small = step.NoiseDataModule(torch.zeros(8, 3, 32, 32).byte(), 8)
    module = Classifier("resnet8", 10)
    assert 0 < step.trainer_seconds(module, small, steps=2, accelerator="cpu") < 60


def test_step_benchmark(capsys):
    """Every strategy is measured."""
    parser = ArgumentParser()
    step.add_arguments(parser)
    small = ["--network=resnet8", "--teacher_network=resnet8", "--batch_size=8", "--steps=2", "--repeats=3"]
    figures = step.run(parser.parse_args([*small, "--train_images=1600", "--epochs=6"]))
    assert list(figures["seconds"]) == ["control", "vanilla", "mixup", "dkd", "dml"]
    printed = capsys.readouterr().out
    for name, seconds in figures["seconds"].items():
        assert len(seconds["limit"]) == len(seconds["trainer"]) == 3
        assert min(seconds["limit"]) > 0 < figures[f"{name}_efficiency"]
        assert f"{figures[f'{name}_efficiency']:.3f}" in printed
    with pytest.raises(UserError, match=r"unknown strategies.*'nonsense'.*choose from control"):
        step.run(parser.parse_args(['--strategies=["nonsense"]']))


def test_a_config_is_projected(workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Known seconds of the quickstart: 2 s a step for two peers; the config stays as it is."""
    monkeypatch.setattr(budget.Meter, "forward_seconds", lambda *_: 0.01)
    monkeypatch.setattr(budget.Meter, "quantization_seconds", lambda *_: 3.0)
    monkeypatch.setattr(budget, "trainer_seconds", lambda module, _, steps, **__: steps * len(module.networks()))
    assert main(["bench", "project", f"--config={CONFIGS / 'quickstart.yaml'}", "--json=new/folder/minutes.json"]) == 0
    settings = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    data = DigitsDataModule(**settings["data"]["init_args"])
    data.setup()
    figures = json.loads(Path("new/folder/minutes.json").read_text())
    epoch = 2 * (len(data.train_index) // data.batch_size) + 2 * 0.01 * len(data.val_index)
    widths, evaluated = len(settings["quantization"]["bits"]), len(data.val_index) + len(data.test_set)
    assert figures["epochs"] == settings["trainer"]["max_epochs"]
    assert figures["seconds_an_epoch"] == pytest.approx(epoch)
    assert figures["training_minutes"] == pytest.approx(figures["epochs"] * epoch / 60)
    assert figures["after_minutes"] == pytest.approx(2 * (3 * widths + (widths + 1) * evaluated * 0.01) / 60)
    assert f"{figures['training_minutes']:.1f}" in capsys.readouterr().out
    assert main(["bench", "project", "--config=none.yaml"]) == 1
    assert "none.yaml does not exist: give a config" in capsys.readouterr().err
