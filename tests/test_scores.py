"""Accuracy, calibration and loss of a split, against numpy."""

import numpy as np
import pytest
import torch

from kdq_lightning.modules.scores import Scores


def reference(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Image by image; the calibration error bin by bin (Guo et al. 2017, eq. 3)."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    order = [sorted(range(len(row)), key=lambda c, row=row: -row[c]) for row in p]
    hits = np.array([ranks[0] == label for ranks, label in zip(order, labels, strict=True)])
    bins = np.ceil(p.max(1) * 15)
    ece = sum((bins == b).mean() * abs(hits[bins == b].mean() - p.max(1)[bins == b].mean()) for b in set(bins))
    top5 = np.mean([label in ranks[:5] for ranks, label in zip(order, labels, strict=True)])
    loss = -np.mean([np.log(row[label]) for row, label in zip(p, labels, strict=True)])
    return {"top1": 100 * hits.mean(), "top5": 100 * top5, "ece": 100 * ece, "loss": loss}


@pytest.mark.parametrize("names", [["resnet20"], ["peer0", "peer1"]])
def test_scores_of_uneven_batches(names: list[str]):
    """Means over images, not over batches; an empty batch counts for nothing, and nothing is left for the next time."""
    generator = np.random.default_rng(0)
    scores = Scores(names)
    for images, draw in ((37, generator.normal), (50, generator.uniform)):  # logits within [0, 1] are no shares, either
        logits = {name: draw(size=(images, 10)).astype(np.float32) for name in names}
        labels = generator.integers(10, size=images)
        for part in (slice(0, 25), slice(25, 30), slice(30, 30), slice(30, images)):
            batch = {name: torch.from_numpy(values[part]) for name, values in logits.items()}
            scores.update(batch, torch.from_numpy(labels[part]), torch.arange(images)[part])
        found = scores.compute_and_reset()
        each = {name: reference(values.astype(float), labels) for name, values in logits.items()}
        expected = {key: np.mean([of[key] for of in each.values()]) for key in ("top1", "top5", "ece", "loss")}
        if len(names) > 1:
            expected |= {f"{key}/{name}": each[name][key] for key in ("top1", "top5", "ece") for name in names}
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert float(found[key]) == pytest.approx(value, abs=1e-4), key


def test_scores_move_with_their_module():
    holder = torch.nn.Module()
    holder.scores = Scores(["resnet20"])
    holder.to("meta")
    assert holder.scores.evaluators[0].device.type == "meta" and not holder.state_dict()
