"""Two gloo processes and one: the same batches, views, gradients and metrics."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from kdq_lightning.cli import main
from kdq_lightning.data.datamodules import DigitsDataModule
from kdq_lightning.modules.classifier import Classifier
from kdq_lightning.results import read_correct, read_records
from kdq_lightning.trainer import Trainer
from tests.conftest import FEW_STEPS, config

TWO = ["--trainer.strategy=ddp_fork", "--trainer.devices=2"]


class WithoutBatchNorm(Classifier):
    """A network whose gradient is the mean over images, whatever rank they lie on."""

    def _build_networks(self) -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 10)
        )

    def losses(self, images, labels):
        """Write down what this rank sees."""
        path = Path(f"seen-{self.trainer.world_size}-{self.global_step}-{self.global_rank}.pt")
        torch.save((images.detach().clone(), labels), path)
        return super().losses(images, labels)


def train(devices: int) -> dict[str, torch.Tensor]:
    """Train six steps and return the weights."""
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy="ddp_fork" if devices > 1 else "auto", max_epochs=2,
        limit_train_batches=3, logger=False, enable_progress_bar=False, enable_checkpointing=False,
    )  # fmt: skip
    module = WithoutBatchNorm("resnet8", 10, learning_rate=0.1)
    trainer.fit(module, DigitsDataModule(batch_size=64, crop=1, cutout=2))
    return {key: value.clone() for key, value in module.network.state_dict().items()}


def test_same_views_and_gradients(workspace: Path):
    one, two = train(1), train(2)
    for step in range(6):
        images, labels = torch.load(f"seen-1-{step}-0.pt")
        halves = [torch.load(f"seen-2-{step}-{rank}.pt") for rank in (0, 1)]
        assert torch.equal(images, torch.cat([half[0] for half in halves]))
        assert torch.equal(labels, torch.cat([half[1] for half in halves]))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-5, atol=1e-6)


def test_same_metrics_of_one_checkpoint(workspace: Path, capfd: pytest.CaptureFixture[str]):
    """360 digits on one rank and on two, the last batch uneven: every metric to the last image."""
    quick = ["--config", config("quickstart"), "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    assert main(["fit", *quick, "--trainer.max_epochs=2"]) == 0
    tables = []
    for devices in ([], TWO):
        capfd.readouterr()
        assert main(["test", *quick, "--ckpt_path=runs/quickstart", "--data.batch_size=46", *devices]) == 0
        out = capfd.readouterr().out
        tables.append({name: float(value) for name, value in re.findall(r"│\s+(test/\S+)\s+│\s+([\d.]+)", out)})
    one, two = tables
    assert len(one) == 10
    for name, value in one.items():
        assert two[name] == (value if "top" in name else pytest.approx(value, rel=1e-4)), name


def test_same_quantized_table(workspace: Path):
    """Quantized on one rank and on two: every row and every vector is the same to the last image."""
    quick = ["--config", config("quickstart"), "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    quick += ["--model.networks=[resnet8,resnet8]", "--quantization.bits=[2,4]", "--data.val_size=99"]
    quick += ["--quantization.calibration_images=99"]
    assert main(["fit", *quick, "--trainer.max_epochs=2"]) == 0
    assert main(["quantize", *quick, "--ckpt_path=runs/quickstart", *TWO]) == 0
    one, two = Path("runs/quickstart/version_0"), Path("runs/quickstart-quantized/version_0")
    inexact = {"nll", "ece", "relative_error"}  # sums of float32 outputs, whose last digits depend on the batch
    records = [[vars(record) for record in read_records(version)] for version in (one, two)]
    assert len(records[0]) == len(records[1]) == 6
    for mine, theirs in zip(*records, strict=True):
        for name in mine.keys() - {"run", "config_hash", "seconds"}:
            expected = pytest.approx(mine[name], rel=1e-5) if name in inexact and mine[name] else mine[name]
            assert theirs[name] == expected, (mine["peer"], mine["bits"], name)
    vectors = read_correct(one), read_correct(two)
    assert vectors[0].keys() == vectors[1].keys() and len(vectors[0]) == 12
    assert all(torch.equal(vector, vectors[1][key]) for key, vector in vectors[0].items())


@pytest.mark.parametrize("strategy", ["control", "vanilla", "mixup", "dkd", "hint", "dml"])
def test_every_strategy_trains_on_two_ranks(strategy: str, images: Path, teacher_run: Path, workspace: Path):
    """Through both stages of hints: no parameter is left without a gradient."""
    arguments = ["fit", "--config", config(f"{strategy}_cpu"), f"--data.root={images}", *FEW_STEPS, *TWO]
    if strategy == "dml":
        arguments += ["--model.init_args.networks=[resnet8,resnet8]"]
    else:
        arguments += ["--model.init_args.network=resnet8"]
    if strategy not in ("control", "dml"):
        arguments += [f"--model.init_args.teacher={teacher_run}"]
    if strategy == "hint":
        arguments += ["--model.init_args.hint_share=0.5"]
    assert main([*arguments, "--trainer.max_epochs=2", "--trainer.limit_train_batches=3"]) == 0
    checkpoint = torch.load(f"runs/{strategy}_cpu/version_0/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 6
