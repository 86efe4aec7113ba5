"""What a user adds in a file of their own: a strategy, a data set, a network. The package is left as it is."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from kdq_lightning.cli import main
from kdq_lightning.data.augmentation import View
from kdq_lightning.data.base import ImageDataModule
from kdq_lightning.data.images import ImageSet, canonical_set
from kdq_lightning.errors import UserError
from kdq_lightning.modules.classifier import Losses
from kdq_lightning.modules.distillation import Distillation
from kdq_lightning.networks import NETWORKS, Network, build_network
from kdq_lightning.quantization.codebooks import QuantizedWeight
from kdq_lightning.quantization.packing import read_weights
from kdq_lightning.runs.checkpoints import load_trained
from kdq_lightning.runs.records import (
    MEASURES,
    Measure,
    compute_added,
    identity,
    packed_path,
    read_layers,
    read_records,
)
from tests.records import write_run


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
    assert records[0].agreement_teacher is not None and "epoch 3/3  train " in capsys.readouterr().out
    packed = next(Path("runs/student/version_0/packed").iterdir())
    assert load_trained(packed)["grey"].statistics == ((0.5,), (0.25,))
    assert main(["test", "--model=Classifier", *QUICK, f"--ckpt_path={packed}"]) == 0
    assert main(["report", "runs", "--out=report"]) == 0
    assert "squares (grey)" in Path("report/report.md").read_text()


def zeros(weights: Iterable[QuantizedWeight]) -> float:
    """Return how many of the weights are zero, in percent."""
    levels = torch.cat([weight.grid[weight.codes.long()].flatten() for weight in weights])
    return 100 * (levels == 0).double().mean().item()


ZEROS = Measure(
    "Weights that are zero, percent",
    decimals=1,
    best=max,
    axis="zeros, %",
    compute=lambda network, quantized: zeros(quantized.weights.values()) if quantized else None,
    compute_layer=lambda quantized, layer: zeros([quantized.weights[layer]]) if layer in quantized.weights else None,
)


def test_a_column_of_the_records(grey: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """One entry is enough for records, layers, report, figures and TensorBoard; without it the column is kept aside."""
    monkeypatch.setitem(MEASURES, "zero_weights", ZEROS)
    assert main(["fit", "--model=Classifier", *QUICK, "--quantization.codebook=int", "--name=counted"]) == 0
    version = Path("runs/counted/version_0")
    records, layers = read_records(version), read_layers(version)
    for record in records:
        if record.bits == 32:
            assert record.number("zero_weights") is None
            continue
        weights = read_weights(packed_path(version, record))
        assert (
            record.number("zero_weights") == pytest.approx(zeros(weights.values()), abs=1e-5)
            and record.method != "default"
        )
        own = {
            layer.name: float(layer.unknown["zero_weights"]) for layer in layers if identity(layer) == identity(record)
        }
        assert own == pytest.approx({name: zeros([weight]) for name, weight in weights.items()}, abs=1e-5)
    assert len({record.number("zero_weights") for record in records}) == 3, (
        "of two methods, and none of the float network"
    )
    events = EventAccumulator(str(next(version.glob("*.quantized")))).Reload()
    (point,) = events.Scalars("quantized/zero_weights_vs_bits_custom")
    (custom,) = (record.number("zero_weights") for record in records if record.method == "custom")
    assert point.step == 4 and point.value == pytest.approx(custom)
    table = events.Tensors("quantized/table/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| recipe | zero_weights |" in table and f" {custom:.1f} |" in table
    assert main(["report", "runs/counted", "--out=report"]) == 0
    shown = Path("report/zero_weights_custom_grey.csv").read_text()
    assert f"{custom:.1f}" in shown and Path("report/zero_weights_grey.svg").exists()
    assert "zero_weights,zero_weights_deviation" in Path("report/cells_grey.csv").read_text()
    assert "doesn't know" not in Path("report/report.md").read_text()
    monkeypatch.delitem(MEASURES, "zero_weights")
    assert read_records(version) == records, "kept as text"
    assert main(["report", "runs/counted", "--out=other"]) == 0
    assert "doesn't know are left out: zero_weights" in Path("other/report.md").read_text()
    assert not Path("other/zero_weights_grey.svg").exists()


def test_an_added_column_has_a_name_of_its_own(monkeypatch: pytest.MonkeyPatch):
    """`zeros` is a column of the layers already."""
    monkeypatch.setitem(MEASURES, "zeros", ZEROS)
    with pytest.raises(UserError, match="have a column zeros already"):
        compute_added(nn.Identity(), None)


def test_an_added_column_that_is_no_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(MEASURES, "zero_weights", ZEROS)
    (record, *_) = write_run(tmp_path / "run" / "version_0", "control", {2: 70.0}, unknown={"zero_weights": "many"})
    with pytest.raises(UserError, match="a record of control has 'many' as zero_weights, which is not a number"):
        record.number("zero_weights")
    assert main(["report", str(tmp_path), f"--out={tmp_path}/report"]) == 1


def test_hints_from_an_added_network(grey: Path):
    """Their layer and the images' channels and size come from the entry and the data."""
    assert main(["fit", "--model=HintKD", f"--model.teacher={grey}", *QUICK, "--name=hinted"]) == 0
    assert read_records(Path("runs/hinted/version_0"))[0].strategy == "hint"


def test_a_plain_state_dict_of_an_added_network(grey: Path):
    save_file(build_network("grey", 2).state_dict(), "plain.safetensors")
    arguments = ["test", "--model=Classifier", *QUICK, "--ckpt_path=plain.safetensors"]
    arguments += ["--model.weights_mean=[0.5]", "--model.weights_std=[0.25]"]
    assert main(arguments) == 0
