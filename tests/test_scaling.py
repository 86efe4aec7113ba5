"""The numbers of docs/scaling.md follow from records and from what they say they follow from."""

import json
import re
from pathlib import Path

import torch
import yaml
from torch import nn
from torchvision.models import resnet50

from kdq_lightning.data.datamodules import DigitsDataModule
from kdq_lightning.modules.logit_cache import LogitCache

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "scaling.md").read_text()
WORDS = " ".join(PAGE.split())


def projection() -> dict[str, list[str]]:
    """Return the cells of the projected table by the name of their row."""
    rows = [line.strip("| ").split(" | ") for line in PAGE.split("a projection\n")[1].splitlines() if "|" in line]
    return {name: cells for name, *cells in rows if len(cells) == 2}


def test_seconds_of_a_layer():
    """The table is that of the records, wider layers in order."""
    rows = []
    for path in sorted((ROOT / "results" / "scaling").glob("layer-*.json"), key=lambda path: int(path.stem[6:])):
        steps = {step["name"]: step["seconds"] for step in json.loads(path.read_text())["layer"]}
        rows.append(f"| {int(path.stem[6:]):,} | {steps['collect']:.2f} | {steps['solve']:.2f} |")
    assert len(rows) >= 3 and "\n".join(rows) in PAGE


def test_hours_of_the_published_study():
    plan = yaml.safe_load((ROOT / "results" / "published_cifar10" / "plan.yaml").read_text())["runs"]
    assert all(plan[run]["options"]["trainer.max_epochs"] == 16 for run in ("teacher", "control"))
    hours = [plan[run]["minutes"] / 60 for run in ("teacher", "control")]
    assert "{:.1f} hours for ResNet-50, {:.1f} for ResNet-18".format(*hours) in WORDS


def test_bytes_of_images_and_answers(tmp_path: Path):
    """A byte a channel and pixel; an index and float32 logits."""
    data = DigitsDataModule()
    data.setup()
    assert data.train_set.images.nbytes == len(data.train_set) * 3 * 16 * 16
    assert f"{3 * 32 * 32:,} of CIFAR, {3 * 224 * 224:,} at 224 x 224" in WORDS
    cache = LogitCache(tmp_path, {})
    sizes = []
    for images in (1000, 2000):
        cache.write(0, torch.arange(images), torch.zeros(images, 10))
        sizes.append(cache.path(0).stat().st_size)
    assert (sizes[1] - sizes[0]) / 1000 == 4 + 4 * 10
    assert "44 of CIFAR-10, 404 of CIFAR-100" in WORDS


def test_projection_of_imagenet():
    with torch.device("meta"):
        network = resnet50()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    layers = [layer.weight for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    gram = sum(8 * weight[0].numel() * (weight[0].numel() + len(weight)) for weight in layers) / 1e9
    images, epochs, rate = 1_281_167, 90, 16_621 / 8
    assert all(f"{number:,}" in WORDS for number in (images, parameters, round(8 * rate)))
    assert f"{epochs} epochs, 256 images a GPU and step" in WORDS
    found = projection()
    expected: dict[str, list[str]] = {name: [] for name in found}
    for gpus in (8, 64):
        batch, sent = 256 * gpus, 2 * (gpus - 1) / gpus * 4 * parameters
        column = [
            f"{batch:,}",
            f"{images // batch}",
            f"{images * epochs / (gpus * rate) / 3600:.2f}",
            f"{sent / 1e6:.0f}",
            f"{sent / (256 / rate) / 1e9:.2f}",
            f"{8 * images * 3 * 224 * 224 / 1e9:,.0f}",
            f"{gram:.1f}",
        ]
        for cells, cell in zip(expected.values(), column, strict=True):
            cells.append(cell)
    assert found == expected
    one, small = images * 3 * 224**2 / 1e9, images * 3 * 64**2 / 1e9
    assert f"{one:.0f} GB each" in WORDS and f"{small:.1f} GB each and {8 * small:.0f} GB a node" in WORDS
    assert re.search(r"Nothing in this table was run", WORDS)
