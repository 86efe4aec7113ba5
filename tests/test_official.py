"""Mode `official` against the published recursion written out in float64: every neuron, column, patch by itself."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdq_lightning.bench.published_recursion import quantize_published
from kdq_lightning.networks import build_network
from kdq_lightning.quantization import quantize
from kdq_lightning.quantization.draws import draw_positions


def reference(model: nn.Module, images: Tensor, order: list[str], bits: int, seed: int) -> dict[str, np.ndarray]:
    """Codes in {-K..K} of all layers; both networks run again, whole, for each layer."""
    quantized = copy.deepcopy(model)
    codes = {}
    for index, name in enumerate(order):
        layer = model.get_submodule(name)
        groups = getattr(layer, "groups", 1)
        weight = layer.weight.detach().flatten(1).numpy()
        step = np.mean([max(abs(w) for w in row) for row in weight]) * 1.16 / 2 ** (bits - 1)
        step = float(np.float32(step))  # what a file holds
        X = patches(layer, called_with(model, name, images), index, seed)
        X_q = patches(layer, called_with(quantized, name, images), index, seed)
        codes[name] = np.zeros(weight.shape, dtype=int)
        for neuron, row in enumerate(weight):
            group = neuron // (len(weight) // groups)
            codes[name][neuron] = one_neuron(row, X[group], X_q[group], step, bits)
        new = torch.from_numpy(codes[name] * step).view_as(layer.weight)
        quantized.get_submodule(name).weight = nn.Parameter(new)
    return codes


def one_neuron(w: np.ndarray, X: np.ndarray, X_q: np.ndarray, step: float, bits: int) -> np.ndarray:
    """u += w_t x_t; q_t = Q(<x~_t, u> / |x~_t|^2); u -= q_t x~_t, with rows x_t = X[t]."""
    codes = np.zeros(len(w), dtype=int)
    u = np.zeros(X.shape[1])
    for t in range(len(w)):
        u += w[t] * X[t]
        energy = X_q[t] @ X_q[t]
        if energy > 0:  # a dead column gives zero
            value = (X_q[t] @ u) / energy
            index = math.floor(value / step + 0.5)
            codes[t] = np.sign(value) * min(abs(index), 2 ** (bits - 1))
        u -= codes[t] * step * X_q[t]
    return codes


def called_with(model: nn.Module, name: str, images: Tensor) -> Tensor:
    """The inputs of a layer's first call."""
    calls = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0].clone()))
    with torch.no_grad():
        model(images)
    hook.remove()
    return calls[0]


def patches(layer: nn.Module, inputs: Tensor, index: int, seed: int) -> list[np.ndarray]:
    """For each group (N, m): patches cut side by side, int(0.25 L + 1) an image drawn with replacement."""
    if isinstance(layer, nn.Linear):
        return [inputs.T.numpy()]
    (kh, kw), (ph, pw), (dh, dw) = layer.kernel_size, layer.padding, layer.dilation
    padded = F.pad(inputs, (pw, pw, ph, ph)).numpy()
    channels, height, width = padded.shape[1:]
    down = (height - dh * (kh - 1) - 1) // kh + 1
    across = (width - dw * (kw - 1) - 1) // kw + 1
    drawn = draw_positions(
        seed, index, torch.arange(len(padded)), int(0.25 * down * across + 1), down * across, replacement=True
    )
    per_group = channels // layer.groups
    rows: list[list[np.ndarray]] = [[] for _ in range(layer.groups)]
    for image, positions in zip(padded, drawn.tolist(), strict=True):
        for position in positions:
            top, left = position // across * kh, position % across * kw
            patch = image[:, top : top + dh * (kh - 1) + 1 : dh, left : left + dw * (kw - 1) + 1 : dw]
            for group in range(layer.groups):
                rows[group].append(patch[group * per_group : (group + 1) * per_group].flatten())
    return [np.array(group).T for group in rows]


class Branching(nn.Module):
    """Registered in another order than called, with branches, groups, strides, dilation, no padding, a dead channel."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(12, 5)
        self.join = nn.Conv2d(16, 12, 3, stride=2, padding=1, bias=False)
        self.right = nn.Conv2d(8, 8, (3, 2), padding=(2, 1), dilation=(2, 1), groups=2)
        self.left = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
        self.stem = nn.Conv2d(3, 8, 5)
        self.norm = nn.BatchNorm2d(8)
        self.shortcut = nn.Conv2d(8, 8, 1, stride=2)

    def forward(self, images):
        x = F.relu(self.norm(self.stem(images)))
        right = F.relu(self.right(x))[:, :, ::2, ::2][:, :, :4, :4]
        left = F.relu(self.left(x)) + self.shortcut(x)
        joined = F.relu(self.join(torch.cat([left, right], 1)))
        return self.head(joined.mean((2, 3)))

    order = ("stem", "right", "left", "shortcut", "join", "head")


def branching() -> nn.Module:
    network = randomised(Branching())
    network.norm.weight.data[3] = 0
    network.norm.bias.data[3] = -1  # after the ReLU, channel 3 is dead
    return network


def randomised(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.uniform_(0.2, 1)
    return network.double().eval()


def resnet8() -> tuple[nn.Module, list[str]]:
    network = randomised(build_network("resnet8", 10))
    order = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    return network, order


def compare(model: nn.Module, images: Tensor, order: list[str], bits: int, seed: int) -> dict[str, np.ndarray]:
    """Engine and column-wise baseline against the reference, weight by weight; returns the reference's codes."""
    expected = reference(model, images, order, bits, seed)
    result = quantize(model, images.split(3), bits=(bits,), mode="official", seed=seed)[bits]
    published = quantize_published(model, images, bits, seed)
    assert [report.name for report in result.layers] == order
    for name in order:
        weight = result.weights[name]
        K = 2 ** (bits - 1)
        assert weight.grid.tolist() == list(range(-K, K + 1)) and weight.scale.numel() == 1
        assert np.sum(weight.codes.flatten(1).numpy() - K != expected[name]) == 0, name
        assert torch.equal(result.model.get_submodule(name).weight.float(), weight.dequantize())
        step = float(weight.scale)
        by_column = (published.get_submodule(name).weight.detach() / step).round().flatten(1).numpy()
        assert np.sum(by_column != expected[name]) == 0, name
    return expected


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_branching_network(bits):
    torch.manual_seed(bits)
    codes = compare(branching(), torch.randn(7, 3, 12, 12).double(), list(Branching.order), bits, seed=5)
    assert (codes["right"].reshape(8, 4, 6)[:4, 3] == 0).all()  # the dead channel of the first group
    assert all(np.abs(layer).max() <= 2 ** (bits - 1) for layer in codes.values())
    assert all(len(np.unique(layer)) > 2 for layer in codes.values())


@pytest.mark.parametrize("bits", [2, 4])
def test_resnet8(bits):
    torch.manual_seed(0)
    network, order = resnet8()
    compare(network, torch.randn(4, 3, 20, 20).double(), order, bits, seed=1)


def test_patches_depend_on_the_seed():
    torch.manual_seed(0)
    network, images = branching(), torch.randn(7, 3, 12, 12).double()
    first, second = (quantize(network, [images], bits=(3,), mode="official", seed=seed)[3] for seed in (0, 1))
    assert any(not torch.equal(first.weights[name].codes, second.weights[name].codes) for name in Branching.order)
