"""`kdq bench step`: figures follow from what was measured, and a measurement leaves its warm-up out."""

import time

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from kdq_lightning.bench import step
from kdq_lightning.errors import UserError
from kdq_lightning.modules.classifier import Classifier


class Sleeper(Classifier):
    """Batches of 20 ms, the first four of 300 ms, and steps of the optimizer of 200 ms."""

    def __init__(self, network: str, num_classes: int):
        super().__init__(network, num_classes)
        self.batches = self.steps = 0

    def training_step(self, batch: object, batch_idx: int) -> Tensor:
        time.sleep(0.3 if self.batches < 4 else 0.02)
        self.batches += 1
        return next(self.network.parameters()).sum()

    def optimizer_step(self, *args: object, **kwargs: object) -> None:
        super().optimizer_step(*args, **kwargs)
        time.sleep(0.2)
        self.steps += 1


@pytest.mark.parametrize(("images", "epochs"), [(256, 1), (32, 3)])
def test_accumulated_batches_are_measured_in_whole_steps(images: int, epochs: int, workspace):
    """Four batches of two warm up; eight are counted, with their two steps, in one epoch or in more."""
    small = step.NoiseDataModule(torch.zeros(images, 3, 32, 32).byte(), 8)
    module = Sleeper("resnet8", 10)
    seconds = step.trainer_seconds(module, small, 8, accumulate_grad_batches=4, accelerator="cpu")
    assert (module.batches, module.steps, module.trainer.current_epoch) == (12, 3, epochs)
    assert 8 * 0.02 + 2 * 0.2 <= seconds < 8 * 0.02 + 2 * 0.2 + 0.25


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
    assert 0 < step.trainer_seconds(module, small, batches=2, accelerator="cpu") < 60


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
