"""What each layer's quantization costs, against gradients of the weights, image by image."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdq_lightning.quantization import sensitivity
from kdq_lightning.quantization.copies import copy_for_walk
from kdq_lightning.quantization.probe import probe
from kdq_lightning.quantization.quantize import place_among_all
from kdq_lightning.quantization.recipes import best_recipe
from kdq_lightning.quantization.torch_state import isolated
from kdq_lightning.random_draws import random_uniform

RECIPES = [best_recipe(bits) for bits in (1, 3)]


class Network(nn.Module):
    """A layer that is called twice, operations in place, groups, and a frozen layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stem.requires_grad_(False)
        self.twice = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).relu_()
        x = self.twice(self.twice(x).relu_()).relu_()
        return 3 * self.head(x.mean((2, 3)))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(80, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def errors_of(network: nn.Module, images: Tensor) -> tuple[dict, dict]:
    """Return the errors, and the changes that they are those of."""
    copied = copy_for_walk(network.eval())
    calibration = place_among_all(images, seed=3)
    with isolated():
        plan = probe(copied, network, images)
        changes = sensitivity.solve_on_float(copied, plan, calibration, RECIPES, lambda name: None)
        return sensitivity.own_errors(copied, plan, calibration, RECIPES), changes


def test_the_fisher_information_along_the_change(images):
    """½ E[(∇w · Δw)²], with the gradients of weights and biases of one image at a time."""
    network = Network()
    errors, changes = errors_of(network, images)
    network.requires_grad_(True)
    network.twice.bias = nn.Parameter(torch.zeros(8))
    expected = {name: torch.zeros(len(RECIPES)) for name in changes}
    temperature = sensitivity.TEMPERATURE
    for i, image in enumerate(images):
        logits = network(image[None]) / temperature
        share = logits.detach().double().softmax(1).cumsum(1)[0]
        for draw in range(sensitivity.LABEL_DRAWS):
            label = int((share < random_uniform(3, torch.tensor([i]), draw) * share[-1]).sum())
            network.zero_grad()
            (temperature * F.cross_entropy(logits, torch.tensor([label]))).backward(retain_graph=True)
            for name, options in changes.items():
                layer = network.get_submodule(name)
                for j, change in enumerate(options):
                    along = (layer.weight.grad * change.weight).sum() + (layer.bias.grad * change.bias).sum()
                    expected[name][j] += along.square() / (2 * len(images) * sensitivity.LABEL_DRAWS)
    assert list(errors) == ["stem", "twice", "head"]
    for name, values in errors.items():
        torch.testing.assert_close(torch.tensor(values), expected[name], rtol=1e-3, atol=1e-9)


def test_the_divergence_of_a_small_change(images):
    """One layer changed a little moves the softmax as far as its error says, but for the draws of labels."""
    network = Network()
    images = images[:1].repeat(2000, 1, 1, 1) + 0.5 * torch.randn(2000, 3, 6, 6)
    errors, changes = errors_of(network, images)
    float_logits = network(images).log_softmax(1) if sensitivity.TEMPERATURE == 1 else network(images)
    change = changes["head"][1]
    with torch.no_grad():
        network.head.weight += change.weight
        network.head.bias += change.bias
        t = sensitivity.TEMPERATURE
        before, after = (x.double().div(t).log_softmax(1) for x in (float_logits, network(images)))
    divergence = float(t**2 * (before.exp() * (before - after)).sum(1).mean())
    assert errors["head"][1] == pytest.approx(divergence, rel=0.15)


class WithoutGraph(Network):
    """A network that computes without gradients."""

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)


class InInference(Network):
    """A network in inference mode."""

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)


@pytest.mark.parametrize("kind", [WithoutGraph, InInference])
def test_without_gradients(kind, images):
    """½ E[Σ d²], and a warning."""
    with pytest.warns(UserWarning, match="no gradients"):
        errors, changes = errors_of(kind(), images)
    network = Network()
    stem = network.stem(images)
    with torch.no_grad():
        moved = F.conv2d(images, changes["stem"][0].weight, changes["stem"][0].bias, padding=1)
    assert errors["stem"][0] == pytest.approx(float(moved.square().sum() / (2 * len(images))), rel=1e-4)
    assert stem.shape == moved.shape
