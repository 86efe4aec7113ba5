"""Exact evaluation against the obvious loop and torchmetrics."""

import copy

import pytest
import torch
from torch import nn
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from kdq_lightning.data.normalization import Statistics
from kdq_lightning.errors import UserError
from kdq_lightning.evaluation import Split, calibration_error, evaluate
from kdq_lightning.networks import build_network

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
STATISTICS = Statistics(MEAN, STD)


def make_split(count: int, classes: int = 10) -> Split:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return Split(images, torch.randint(0, classes, (count,), generator=generator))


@pytest.mark.parametrize("count", [1, 127, 300])
def test_each_image_once(count: int):
    """All figures are those of a loop over single images, in float64, by torchmetrics."""
    torch.manual_seed(0)
    network, split, done = build_network("resnet8", 10), make_split(count), []
    for module in network.modules():  # statistics far from those of a batch, so that train mode would show
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    before = copy.deepcopy(network.state_dict())
    found = evaluate(network.train(), split, STATISTICS, done.append)
    assert sum(done) == count
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    slow = copy.deepcopy(network).double().eval()
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
    with torch.no_grad():
        logits = torch.stack([slow(((image.double() / 255 - mean) / std)[None])[0] for image in split.images])
    probabilities = logits.softmax(1)
    assert found.classes.tolist() == probabilities.argmax(1).tolist()
    assert torch.equal(found.correct, found.classes == split.labels)
    for name, value in (
        ("top1", 100 * multiclass_accuracy(probabilities, split.labels, 10, average="micro")),
        ("top5", 100 * multiclass_accuracy(probabilities, split.labels, 10, average="micro", top_k=5)),
        ("ece", 100 * multiclass_calibration_error(probabilities, split.labels, 10, n_bins=15)),
        ("nll", -probabilities.log()[torch.arange(count), split.labels].mean()),
    ):
        assert getattr(found, name) == pytest.approx(float(value), rel=1e-4), name


def test_calibration_error_by_hand():
    """Two bins: 0.95 and 0.94 with one hit, 0.3 with a miss: (|1 - 1.89| + |0 - 0.3|) / 3."""
    error = calibration_error(torch.tensor([0.95, 0.94, 0.3], dtype=torch.float64), torch.tensor([True, False, False]))
    assert error == pytest.approx(100 * (0.89 + 0.3) / 3)


def test_few_classes():
    assert evaluate(build_network("resnet8", 3), make_split(10, classes=3), STATISTICS).top5 == 100


def test_not_finite():
    network = build_network("resnet8", 10)
    nn.init.constant_(network.linear.bias, float("nan"))
    with pytest.raises(UserError, match="not finite"):
        evaluate(network, make_split(4), STATISTICS)


def test_autocast_around_changes_nothing():
    network, split = build_network("resnet8", 10), make_split(50)
    plain = evaluate(network, split, STATISTICS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = evaluate(network, split, STATISTICS)
    assert again.nll == plain.nll and torch.equal(again.classes, plain.classes)
