"""Networks: sizes, keys, and the accuracies of the three public weights."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kdq_lightning.data.normalization import Statistics, normalize
from kdq_lightning.errors import UserError
from kdq_lightning.networks import NETWORKS, Network, build_network, count_classes, hint_features, hint_modules
from tests.conftest import SHARED

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR100 = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


@pytest.mark.parametrize(
    ("name", "parameters"), [("resnet18", 11_220_132), ("resnet50", 23_705_252), ("resnet20", 275_572)]
)
def test_parameter_counts(name: str, parameters: int):
    assert sum(p.numel() for p in build_network(name, 100).parameters()) == parameters


@pytest.mark.parametrize("name", NETWORKS)
def test_shapes_and_hint_layer(name: str):
    """The hint layer's features are what the whole network hands on there; the head has a row for each class."""
    network, handed_on = build_network(name, 7).eval(), []
    network.layer2.register_forward_hook(lambda *call: handed_on.append(call[2]))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert network(images).shape == (2, 7)
        features = hint_features(hint_modules(name, network), images)
    assert features.shape[2:] == (16, 16)
    torch.testing.assert_close(features, handed_on[0])
    assert count_classes(name, network.state_dict()) == 7


def test_entries_that_say_too_little(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(NETWORKS, "bare", Network(lambda num_classes: nn.Sequential(nn.Linear(3, num_classes))))
    network = build_network("bare", 5)
    with pytest.raises(UserError, match="name its last layer, `head`"):
        count_classes("bare", network.state_dict())
    with pytest.raises(UserError, match="name it, `hint_layer`"):
        hint_modules("bare", network)
    with pytest.raises(UserError, match="holds no layer linear"):
        count_classes("resnet8", network.state_dict())


def test_narrow_block_by_hand():
    """Option A: every second pixel, a quarter of the new width in zeros before and after."""
    block = build_network("resnet8", 10).layer2[0].eval()
    torch.nn.init.zeros_(block.conv2.weight)
    images = torch.rand(1, 16, 8, 8)
    out = block(images)
    assert torch.equal(out[:, 8:24], images[:, :, ::2, ::2])
    assert not out[:, :8].any() and not out[:, 24:].any()


def test_unknown_names():
    with pytest.raises(UserError, match="resnet20"):
        build_network("resnet21", 10)
    with pytest.raises(UserError, match="2 classes"):
        build_network("resnet20", 1)


@pytest.mark.slow(seconds=70)
@pytest.mark.skipif(not SHARED.exists(), reason="needs the real data")
@pytest.mark.parametrize(
    ("file", "name", "dataset", "statistics", "hits"),
    [
        ("resnet20-cifar10", "resnet20", "cifar10", IMAGENET, {9173}),
        ("resnet56-cifar10", "resnet56", "cifar10", IMAGENET, {9339}),
        ("resnet18-cifar100", "resnet18", "cifar100", CIFAR100, {6950, 6951, 6952}),
    ],
)
def test_public_weights(file: str, name: str, dataset: str, statistics: tuple, hits: set[int], real_images):
    images, labels = real_images(dataset, "test")
    network = build_network(name, int(labels.max()) + 1).eval()
    network.load_state_dict(load_file(SHARED / "models" / f"{file}.safetensors"), strict=False)
    with torch.inference_mode():
        found = sum(
            int(
                (
                    network(normalize(images[i : i + 500], Statistics(*statistics))).argmax(1) == labels[i : i + 500]
                ).sum()
            )
            for i in range(0, len(images), 500)
        )
    assert found in hits
