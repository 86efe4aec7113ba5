"""Where the seconds of one wide layer go: gathering its rows, and each step of its solver."""

import cProfile
import pstats
import time
from dataclasses import dataclass

import torch
from torch import nn

from kdq_lightning.bench.quantization_speed import one_thread
from kdq_lightning.quantization.gram import Patches, Rows, columns
from kdq_lightning.quantization.recipes import best_recipe
from kdq_lightning.quantization.solution import solve

ROWS_PER_COLUMN = 4
PART = 64  # images of one forward


@dataclass
class Step:
    """One step of a layer.

    Attributes:
        name: "collect" for the Gram matrices, "solve" for the whole solver, else what of the engine `solve` calls;
            "rest" is what it does itself.
        seconds: Processor time of one thread.
    """

    name: str
    seconds: float


def profile_layer(size: int, neurons: int, bits: int = 4) -> list[Step]:
    """Return the seconds of each step for a linear layer that is given one row an image.

    Args:
        size: Columns of the layer, which has four times as many rows.
        neurons: Its neurons.
        bits: Width to solve it at, by the default recipe.
    """
    generator = torch.Generator().manual_seed(0)
    layer, count = nn.Linear(size, neurons), ROWS_PER_COLUMN * size
    mixing = torch.randn(64, size, generator=generator) / 8
    inputs = torch.randn(count, 64, generator=generator) @ mixing
    inputs += torch.randn(count, size, generator=generator) / 2
    noisy = inputs + torch.randn(count, size, generator=generator) / 10
    parts = [[x, y] for x, y in zip(torch.split(inputs.relu_(), PART), torch.split(noisy.relu_(), PART), strict=True)]
    positions = torch.zeros(count, 1, dtype=torch.int64)
    with one_thread():
        start = time.process_time()
        (gram,) = Rows(Patches(layer), parts, positions, 0, together=count).collect([False])
        steps = [Step("collect", time.process_time() - start)]
        profile = cProfile.Profile(time.process_time)
        profile.runcall(solve, gram, columns(layer.weight.detach(), 1), best_recipe(bits))
    return steps + _steps_of_solve(profile)


def _steps_of_solve(profile: cProfile.Profile) -> list[Step]:
    """Return the seconds of `solve` and of what it calls, the dearest first."""
    found = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    (whole,) = [key for key in found if key[2] == "solve" and key[0].endswith("solution.py")]
    called = {
        key[2]: callers[whole][3]
        for key, (*_, callers) in found.items()
        if whole in callers and "kdq_lightning" in key[0]
    }
    seconds = found[whole][3]
    called["rest"] = seconds - sum(called.values())
    ranked = sorted(called.items(), key=lambda step: -step[1])
    return [Step("solve", seconds), *(Step(name, spent) for name, spent in ranked)]
