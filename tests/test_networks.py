"""Networks: sizes, keys, other people's networks and weights, and the accuracies of the three public weights."""

import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import models

from kdq_lightning.data.normalization import Statistics, normalize
from kdq_lightning.errors import UserError
from kdq_lightning.networks import (
    NETWORKS,
    Network,
    build_network,
    catalogue,
    check_hint_layer,
    check_images,
    count_classes,
    features_at,
    is_listed,
    network_names,
    parameters_before,
    pretrained_state,
    reorder_classes,
)
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
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert network(images).shape == (2, 7)
        features = features_at(network, check_hint_layer(name, network, None, "hint_layer"), images)
        network.layer2.register_forward_hook(lambda *call: handed_on.append(call[2]))
        network(images)
    assert features.shape[2:] == (16, 16)
    assert torch.equal(features, handed_on[0])
    assert count_classes(name, network.state_dict()) == 7


def test_states_that_dont_say_how_many_classes(monkeypatch: pytest.MonkeyPatch):
    """A network whose last layer has no rows of its own, and a state dict of another network."""
    monkeypatch.setitem(NETWORKS, "fixed", Network(lambda num_classes: nn.Sequential(nn.Linear(3, 5))))
    with pytest.raises(UserError, match="a state dict of fixed doesn't say how many classes"):
        count_classes("fixed", build_network("fixed", 5).state_dict())
    with pytest.raises(UserError, match="holds no layer linear"):
        count_classes("resnet8", build_network("fixed", 5).state_dict())


def test_narrow_block_by_hand():
    """Option A: every second pixel, a quarter of the new width in zeros before and after."""
    block = build_network("resnet8", 10).layer2[0].eval()
    torch.nn.init.zeros_(block.conv2.weight)
    images = torch.rand(1, 16, 8, 8)
    out = block(images)
    assert torch.equal(out[:, 8:24], images[:, :, ::2, ::2])
    assert not out[:, :8].any() and not out[:, 24:].any()


# Networks of others


class TwoHeads(nn.Module):
    """A network of a user, whose output while it trains is not a tensor."""

    def __init__(self, num_classes: int, width: int = 4, heads: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2)
        self.deep = nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 3))
        self.head = nn.Linear(width, num_classes)
        self.heads = heads

    def forward(self, images: torch.Tensor):
        logits = self.head(self.deep(self.stem(images)).mean((2, 3)))
        return (logits, logits) if self.heads and self.training else logits


def two(num_classes: int) -> int:
    return num_classes


OWN = "tests.test_networks.TwoHeads"


@pytest.mark.parametrize("name", ["torchvision/squeezenet1_1", "timm/test_resnet.r160_in1k", OWN])
def test_networks_of_others(name: str):
    """Built for the classes asked for, which are counted again from the state dict, wherever its last layer is."""
    if name.startswith("timm"):
        pytest.importorskip("timm")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    network = build_network(name, 7)
    torch.set_rng_state(before)
    assert count_classes(name, network.state_dict()) == 7
    assert torch.equal(before, torch.get_rng_state()), "counting draws no random number"
    check_images(name, network, (3, 64, 64), 7)


def test_arguments_of_a_network():
    assert len(build_network(OWN, 5, {"width": 6}).stem.weight) == 6
    assert count_classes(OWN, build_network(OWN, 5, {"width": 6}).state_dict(), {"width": 6}) == 5


def test_the_inceptions_have_one_head():
    """With auxiliary heads they return more than logits while they train."""
    assert build_network("torchvision/googlenet", 4).aux1 is None


@pytest.mark.parametrize("name", ["torchvision/squeezenet1_1", OWN])
def test_classes_in_another_order(name: str):
    """The logits come out permuted, and nothing else changes."""
    torch.manual_seed(0)
    network, order = build_network(name, 4).eval(), torch.tensor([2, 0, 3, 1])
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        expected = network(images)[:, order]
        network.load_state_dict(reorder_classes(name, network.state_dict(), order))
        torch.testing.assert_close(network(images), expected)


def test_a_bias_that_the_last_layer_gained_is_reordered_too():
    state = {"stem.weight": torch.zeros(1), "head.weight": torch.arange(3.0)[:, None], "head.bias": torch.arange(3.0)}
    found = reorder_classes(OWN, state, torch.tensor([2, 0, 1]))
    assert found["head.bias"].tolist() == found["head.weight"].flatten().tolist() == [2, 0, 1]


@pytest.mark.parametrize("layer", ["stem", "deep.0", "deep"])
def test_features_of_any_layer(layer: str):
    """Computed by hand; what comes after the layer has neither part in them nor is it run."""
    torch.manual_seed(0)
    network, images = TwoHeads(5), torch.randn(2, 3, 9, 9)
    parts = {"stem": [network.stem], "deep.0": [network.stem, network.deep[0]], "deep": [network.stem, network.deep]}
    expected = images
    for part in parts[layer]:
        expected = part(expected)
    ran = []
    network.head.register_forward_hook(lambda *_: ran.append("head"))
    assert torch.equal(features_at(network, layer, images), expected) and not ran
    wanted = {"stem.weight", "stem.bias"} | ({"deep.1.weight", "deep.1.bias"} if layer == "deep" else set())
    assert parameters_before(network, layer, images) == wanted
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not network.stem._forward_hooks and not network.deep._forward_hooks


def test_hint_layers_that_are_refused():
    network = TwoHeads(5)
    for layer, sentence in ((None, "nothing says which layer"), ("layer2", "has no layer 'layer2'"), ("", "nothing")):
        with pytest.raises(UserError, match=f"{sentence}.*--model.init_args.hint_layer one of stem, deep, deep.0"):
            check_hint_layer(OWN, network, layer, "hint_layer")
    with pytest.raises(UserError, match="layer head gives a tensor of 2 dimensions"):
        features_at(network, "head", torch.zeros(1, 3, 9, 9))
    network.spare = nn.Conv2d(3, 3, 1)
    with pytest.raises(UserError, match="never calls its layer spare"):
        features_at(network, "spare", torch.zeros(1, 3, 9, 9))


REFUSED = [
    ("resnet21", {}, "resnet20"),
    ("torchvision/mobilenet_v3_smal", {}, "but mobilenet_v3_small"),
    ("torchvision/fasterrcnn_resnet50_fpn", {}, "lists no such classifier"),
    ("torchvision.models.mobilenet_v3_smal", {}, "can't be imported"),
    ("no_such_package.nets.build", {}, "can't be imported"),
    ("tests.test_networks.OWN", {}, "is a str, which can't be called"),
    ("tests.test_networks.two", {}, "gives a int, not a torch.nn.Module"),
    ("os.system", {}, "can't be built with num_classes=10"),
    (OWN, {"depth": 3}, "unexpected keyword argument 'depth'"),
    (OWN, {"num_classes": 3}, "counted from the data"),
    ("torchvision/resnet18", {"weights": "DEFAULT"}, "would load weights"),
    ("torchvision/resnet18", {"pretrained": True}, "would load weights"),
]


@pytest.mark.parametrize(("name", "options", "sentence"), REFUSED)
def test_networks_that_are_refused(name: str, options: dict, sentence: str):
    with pytest.raises(UserError, match=sentence):
        build_network(name, 10, options)


def test_networks_of_timm_that_are_refused():
    """Names that would be fetched from a hub, and arguments that would read files."""
    pytest.importorskip("timm")
    for name in ("timm/hf-hub:timm/resnet18", "timm/local-dir:/tmp", "timm/resnet18.no_such_tag"):
        assert not is_listed(name)
        with pytest.raises(UserError, match="lists no such classifier"):
            build_network(name, 10)
    for key in ("checkpoint_path", "pretrained_cfg_overlay", "cache_dir"):
        with pytest.raises(UserError, match="would load weights"):
            build_network("timm/resnet18", 10, {key: "x"})


def test_without_timm(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    catalogue._timm_names.cache_clear()
    with pytest.raises(UserError, match=r"pip install \"kdq-lightning\[timm\]\""):
        build_network("timm/resnet18", 10)


def test_images_that_a_network_refuses():
    network = build_network("torchvision/alexnet", 10)
    with pytest.raises(UserError, match=r"torchvision/alexnet can't take images of 3 x 32 x 32.*--data.image_size"):
        check_images("torchvision/alexnet", network, (3, 32, 32), 10)
    with pytest.raises(UserError, match=r"logits of shape \(2, 10\), and gives tuple"):
        check_images("x", TwoHeads(10, heads=True), (3, 32, 32), 10)
    with pytest.raises(UserError, match=r"gives \(2, 5\)"):
        check_images("x", TwoHeads(5), (3, 32, 32), 10)


def test_names_that_are_listed():
    names = list(network_names())
    assert {"resnet20", "torchvision/mobilenet_v3_small"} <= set(names) and all(map(is_listed, names))
    assert not any(map(is_listed, ("os.system", "resnet21", "torchvision/../x", "torchvision.models.resnet18", OWN)))


def test_too_few_classes():
    with pytest.raises(UserError, match="2 classes"):
        build_network("resnet20", 1)


# Published weights


def test_published_weights_of_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From torch's cache, as there is no download in a test: all but the last layer, and ImageNet's statistics."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name, weights = "torchvision/squeezenet1_1", models.SqueezeNet1_1_Weights.DEFAULT
    torch.manual_seed(0)
    published = models.squeezenet1_1().state_dict()
    place = tmp_path / "hub" / "checkpoints" / weights.url.rpartition("/")[2]
    place.parent.mkdir(parents=True)
    torch.save(published, place)
    network = build_network(name, 7)
    state, mean, std = pretrained_state(name, network, 7)
    assert (mean, std) == IMAGENET
    for key, value in network.state_dict().items():
        assert torch.equal(state[key], value if key.startswith("classifier.1") else published[key])
    assert torch.equal(
        pretrained_state(name, build_network(name, 1000), 1000).state["classifier.1.weight"],
        published["classifier.1.weight"],
    )


def test_published_weights_of_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    timm = pytest.importorskip("timm")
    hub = pytest.importorskip("huggingface_hub")
    name = "timm/test_resnet.r160_in1k"
    torch.manual_seed(0)
    published = timm.create_model("test_resnet.r160_in1k").state_dict()
    folder = tmp_path / "models--timm--test_resnet.r160_in1k"
    (folder / "snapshots" / "0").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0")
    save_file(published, folder / "snapshots" / "0" / "model.safetensors")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    network = build_network(name, 7)
    state, mean, std = pretrained_state(name, network, 7)
    config = network.pretrained_cfg
    assert (mean, std) == (tuple(config["mean"]), tuple(config["std"])) and len(state["fc.weight"]) == 7
    assert all(torch.equal(value, state[key]) for key, value in published.items() if not key.startswith("fc."))


def test_published_weights_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=OSError("no connection")))
    name = "torchvision/squeezenet1_1"
    with pytest.raises(UserError, match=r"can't be fetched.*put https://"):
        pretrained_state(name, build_network(name, 7), 7)
    with pytest.raises(UserError, match="nobody publishes weights of resnet20"):
        pretrained_state("resnet20", build_network("resnet20", 7), 7)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the real data")
@pytest.mark.parametrize(
    ("file", "name", "dataset", "statistics", "hits"),
    [
        pytest.param("resnet20-cifar10", "resnet20", "cifar10", IMAGENET, {9173}, marks=pytest.mark.slow),
        pytest.param("resnet56-cifar10", "resnet56", "cifar10", IMAGENET, {9339}, marks=pytest.mark.slow(seconds=60)),
        pytest.param(
            *("resnet18-cifar100", "resnet18", "cifar100", CIFAR100, {6950, 6951, 6952}),
            marks=pytest.mark.slow(seconds=200),
        ),
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
