"""The memory that a walk is said to take, against what the process takes."""

import gc
from collections.abc import Callable
from multiprocessing import get_context

import pytest
import torch
from torch import nn
from torchvision import models

from kdq_lightning.bench.quantization_accuracy import peak_memory
from kdq_lightning.networks import build_network
from kdq_lightning.quantization import quantize, walks
from kdq_lightning.quantization.forwards import give_back_memory


def perceptron() -> nn.Module:
    layers = nn.Linear(3072, 1536), nn.ReLU(), nn.Linear(1536, 1536), nn.ReLU(), nn.Linear(1536, 10)
    return nn.Sequential(nn.Flatten(), *layers)


def vit() -> nn.Module:
    return models.VisionTransformer(32, 4, 3, 4, 192, 768, num_classes=10)


def convnext() -> nn.Module:
    setting = [models.convnext.CNBlockConfig(64, 128, 1), models.convnext.CNBlockConfig(128, None, 2)]
    return models.ConvNeXt(setting, num_classes=10)


def mobilenet() -> nn.Module:
    return models.mobilenet_v2(width_mult=0.5, num_classes=10)


def estimated_and_taken(
    build: Callable[..., nn.Module], arguments: tuple[object, ...], count: int, side: int, bits: tuple[int, ...]
) -> tuple[float, float]:
    """Quantize a network, and return what is said beforehand to be its memory and what it was, in bytes."""
    network, images = build(*arguments).eval(), torch.randn(count, 3, side, side)
    estimates, estimate = [], walks.walk_bytes
    walks.walk_bytes = lambda *given: estimates.append(estimate(*given)) or estimates[-1]  # in a process of its own
    quantize(network, images[:8], bits=8, solver="rounding", refine=0, match_moments=False)  # loads what is loaded once
    estimates.clear()
    gc.collect()
    give_back_memory()
    with peak_memory() as before:
        pass
    with peak_memory() as peak:
        quantize(network, images, bits=bits)
    return max(estimates), (peak() - before()) * 2**30


@pytest.mark.slow(seconds=45)
@pytest.mark.parametrize(
    ("build", "arguments", "count", "side", "bits"),
    [
        (build_network, ("resnet20", 10), 512, 32, (2, 4)),
        (build_network, ("resnet8", 10), 1024, 32, (3,)),
        (perceptron, (), 512, 32, (2, 4)),
        (vit, (), 256, 32, (4,)),
        (mobilenet, (), 128, 64, (4,)),
        (convnext, (), 256, 48, (2, 4)),
    ],
)
def test_the_estimate_is_an_upper_bound_and_at_most_twice_the_memory_taken(
    build: Callable[..., nn.Module], arguments: tuple[object, ...], count: int, side: int, bits: tuple[int, ...]
):
    """In a new process: what earlier tests have freed would be taken again, and not be seen."""
    with get_context("spawn").Pool(1) as process:
        estimated, taken = process.apply(estimated_and_taken, (build, arguments, count, side, bits))
    print(f"estimated {estimated / 1e9:.2f} GB, taken {taken / 1e9:.2f} GB")
    assert taken < estimated < 2 * taken
