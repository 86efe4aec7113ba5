"""Sums of a training epoch."""

import time

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from kdq_lightning.modules.training_epoch import TrainingEpoch

STRATEGY = SingleDeviceStrategy("cpu")


def test_means_are_of_images_and_the_clock_of_training(monkeypatch: pytest.MonkeyPatch):
    """Batches count by their images, a part by those that had it, and a validation takes no time."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    epoch = TrainingEpoch(torch.device("cpu"))
    assert epoch.means(STRATEGY) == {}
    epoch.add({"loss": torch.tensor(1.0), "hint": torch.tensor(4.0)}, images=30, step=7)
    now[0] += 3
    epoch.stop_clock()
    now[0] += 50
    epoch.resume_clock()
    epoch.add({"loss": torch.tensor(3.0)}, images=10, step=8)
    now[0] += 5
    assert epoch.means(STRATEGY) == {"loss": 1.5, "hint": 4.0, "images_per_second": 40 / 8}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_first_bad_step_is_kept(bad: float):
    epoch = TrainingEpoch(torch.device("cpu"))
    for step, loss in enumerate([1.0, bad, 2.0, bad], start=40):
        assert epoch.bad_step(STRATEGY) == (-1 if step < 42 else 41)
        epoch.add({"loss": torch.tensor(loss)}, images=2, step=step)
    assert epoch.bad_step(STRATEGY) == 41


def test_the_first_bad_step_of_all_ranks():
    """The others follow a step later, through the gradients that they share."""
    strategies = []
    for other in (3.0, 41.0, float("inf")):
        strategy = SingleDeviceStrategy("cpu")
        strategy.reduce = lambda mine, reduce_op, other=other: {"min": min, "max": max}[reduce_op](float(mine), other)
        strategies.append(strategy)
    epoch = TrainingEpoch(torch.device("cpu"))
    assert [epoch.bad_step(strategy) for strategy in strategies] == [3, 41, -1]
    epoch.add({"loss": torch.tensor(float("nan"))}, images=2, step=40)
    assert [epoch.bad_step(strategy) for strategy in strategies] == [3, 40, 40]
