"""Exact evaluation against the obvious loop and torchmetrics."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from kdq_lightning.data.normalization import Statistics
from kdq_lightning.errors import UserError
from kdq_lightning.evaluation import Evaluator, Split, evaluate
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


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Return the expected calibration error in percent as Guo et al. 2017 write it: bin by bin, a loop."""
    confidence, classes = logits.softmax(1).max(1)
    correct, error = (classes == labels).tolist(), 0.0
    for i in range(15):
        inside = [
            c for c in range(len(labels)) if i / 15 <= confidence[c] < (i + 1) / 15 or (i, confidence[c]) == (14, 1)
        ]
        error += abs(sum(correct[c] - float(confidence[c]) for c in inside)) / len(labels)
    return 100 * error


@pytest.mark.parametrize("scale", [0.1, 1, 5, 100])
def test_calibration_error(scale: float):
    """From the unsure to the certain, whose confidence is exactly 1 on most images."""
    generator = torch.Generator().manual_seed(1)
    logits = scale * torch.randn(300, 10, generator=generator, dtype=torch.float64)
    labels = torch.where(torch.rand(300, generator=generator) < 0.7, logits.argmax(1), 0)
    assert scale < 100 or (logits.softmax(1).amax(1) == 1).sum() > 100
    evaluator = Evaluator()
    evaluator.update(logits, labels, torch.arange(300))
    assert evaluator.evaluation().ece == pytest.approx(calibration_error(logits, labels), abs=1e-9)


def test_a_confidence_of_one_belongs_to_the_last_bin():
    """By hand: ten images at 0.95, all right, and one at 1, wrong: |10 · (1 - 0.95) + (0 - 1)| / 11."""
    logits = torch.tensor([[0.95, 0.05]] * 10 + [[1, 0]], dtype=torch.float64).log()
    evaluator = Evaluator()
    evaluator.update(logits, torch.tensor([0] * 10 + [1]), torch.arange(11))
    assert evaluator.evaluation().ece == pytest.approx(100 * 0.5 / 11)


def test_order_of_batches_and_empty_ones():
    """The vectors are in the order of the index, whatever order the images came in."""
    logits, labels = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 4
    whole, parts = Evaluator(), Evaluator()
    whole.update(logits, labels, torch.arange(20))
    for index in (torch.arange(1, 20, 2), torch.arange(0), torch.arange(0, 20, 2)):
        parts.update(logits[index], labels[index], index + 1000)
    first, second = whole.evaluation(), parts.evaluation()
    assert torch.equal(first.classes, logits.argmax(1)) and torch.equal(second.classes, first.classes)
    assert torch.equal(second.correct, first.correct) and (second.nll, second.ece) == (first.nll, first.ece)


def test_not_a_number_while_training():
    """A loss that isn't finite is no calibration error either."""
    evaluator = Evaluator()
    evaluator.update(torch.full((2, 3), torch.nan), torch.zeros(2, dtype=torch.int64), torch.arange(2))
    found = evaluator.evaluation()
    assert math.isnan(found.nll) and math.isnan(found.ece)


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
