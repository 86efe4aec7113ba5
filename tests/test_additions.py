"""What a user adds in a file of their own: a strategy, a data set, a network. The package is left as it is."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kdq_lightning.cli import main
from kdq_lightning.data.augmentation import View
from kdq_lightning.data.base import ImageDataModule
from kdq_lightning.data.images import ImageSet, canonical_set
from kdq_lightning.modules.classifier import Losses
from kdq_lightning.modules.distillation import Distillation
from kdq_lightning.networks import NETWORKS, Network, build_network
from kdq_lightning.runs.checkpoints import load_trained
from kdq_lightning.runs.records import read_records


class SquaredLogits(Distillation):
    """Learns the teacher's logits by their squared error."""

    def __init__(self, strategy: str = "squares", **kwargs: Any) -> None:
        super().__init__(strategy=strategy, **kwargs)

    def losses(self, view: View) -> Losses:
        """Return mean (z_S - z_T)²."""
        logits = self(view.resized)
        squares = (logits - self.cached_teacher_logits(view)).square().mean()
        return Losses(squares, {"squares": squares}, logits)


class GreyDataModule(ImageDataModule):
    """Grey images of 12 x 12 pixels, one channel, two classes: dark above, dark below."""

    def __init__(self, **options: Any) -> None:
        super().__init__(dataset="grey", num_classes=2, image_size=12, mean=(0.5,), std=(0.25,), **options)

    def read(self) -> tuple[ImageSet, ImageSet]:
        """Return the same images as training and as test set."""
        generator = np.random.default_rng(0)
        labels = np.arange(64) % 2
        pixels = generator.integers(100, 256, (64, 12, 12, 1))
        for image, label in zip(pixels, labels, strict=True):
            image[6 * label : 6 * label + 6] //= 4
        images = canonical_set(pixels.astype(np.uint8), labels, ["above", "below"])
        return images, images


class GreyNetwork(nn.Module):
    """Two convolutions of one grey channel, and a linear layer."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU())
        self.stage = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU())
        self.classify = nn.Linear(8 * 36, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits (batch, classes) of images (batch, 1, 12, 12)."""
        return self.classify(self.stage(self.stem(images)).flatten(1))


QUICK = ["--data=tests.test_additions.GreyDataModule", "--data.val_size=16", "--data.batch_size=16", "--data.crop=1"]
QUICK += [
    "--model.network=grey",
    "--model.learning_rate=0.01",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
]
QUICK += ["--trainer.max_epochs=3", "--quantization.bits=[4]", "--quantization.calibration_images=16"]


@pytest.fixture
def grey(monkeypatch: pytest.MonkeyPatch, workspace: Path) -> Path:
    """Register the network, train it as a teacher, and return its run folder."""
    monkeypatch.setitem(NETWORKS, "grey", Network(GreyNetwork, hint_layer="stage"))
    assert main(["fit", "--model=Classifier", "--model.strategy=teacher", *QUICK, "--name=teacher"]) == 0
    return workspace / "runs" / "teacher"


def test_a_strategy_a_data_set_and_a_network(grey: Path, capsys: pytest.CaptureFixture[str]):
    """Trained, quantized, recorded, tested, in the report, by the names that their classes and entries say."""
    student = ["--model=tests.test_additions.SquaredLogits", f"--model.teacher={grey}", "--name=student"]
    assert main(["fit", *student, *QUICK]) == 0
    records = read_records(Path("runs/student/version_0"))
    assert {(row.strategy, row.dataset, row.network) for row in records} == {("squares", "grey", "grey")}
    assert {(row.method, row.bits) for row in records} >= {("default", 4), ("", 32)}
    assert records[0].agreement_teacher is not None and "train/loss" in capsys.readouterr().out
    packed = next(Path("runs/student/version_0/packed").iterdir())
    assert load_trained(packed)["grey"].statistics == ((0.5,), (0.25,))
    assert main(["test", "--model=Classifier", *QUICK, f"--ckpt_path={packed}"]) == 0
    assert main(["report", "runs", "--out=report"]) == 0
    assert "squares (grey)" in Path("report/report.md").read_text()


def test_hints_from_an_added_network(grey: Path):
    """Their layer and the images' channels and size come from the entry and the data."""
    assert main(["fit", "--model=HintKD", f"--model.teacher={grey}", *QUICK, "--name=hinted"]) == 0
    assert read_records(Path("runs/hinted/version_0"))[0].strategy == "hint"


def test_a_plain_state_dict_of_an_added_network(grey: Path):
    save_file(build_network("grey", 2).state_dict(), "plain.safetensors")
    arguments = ["test", "--model=Classifier", *QUICK, "--ckpt_path=plain.safetensors"]
    arguments += ["--model.weights_mean=[0.5]", "--model.weights_std=[0.25]"]
    assert main(arguments) == 0
