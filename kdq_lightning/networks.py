"""CIFAR ResNets by name: wide ones with torchvision's keys (ResNet-18, 34, 50), the narrow family of He et al. 2015."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from kdq_lightning.errors import UserError


class NarrowBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (He et al. 2015, section 4.2, option A)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        """Build a block that maps (batch, in_channels, h, w) to (batch, channels, h / stride, w / stride)."""
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - in_channels

    def forward(self, images: Tensor) -> Tensor:
        """Add the block's output to its input, which is subsampled and padded with zero channels where it has to be."""
        out = F.relu(self.bn1(self.conv1(images)))
        out = self.bn2(self.conv2(out))
        shortcut = images[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            before = self.new_channels // 2
            shortcut = F.pad(shortcut, (0, 0, 0, 0, before, self.new_channels - before))
        return F.relu(out + shortcut)


class NarrowResNet(nn.Module):
    """The CIFAR ResNet-(6n + 2) of He et al. 2015, section 4.2: three stages of n blocks with 16, 32, 64 channels."""

    def __init__(self, depth: int, num_classes: int) -> None:
        """Build a network of `depth` weighted layers; depth - 2 is a multiple of 6."""
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(16, 16, blocks, stride=1)
        self.layer2 = self._stage(16, 32, blocks, stride=2)
        self.layer3 = self._stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = NarrowBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(NarrowBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (batch, 3, h, w) to logits (batch, classes)."""
        features = self.relu(self.bn1(self.conv1(images)))
        features = self.layer3(self.layer2(self.layer1(features)))
        logits: Tensor = self.linear(features.mean(dim=(2, 3)))
        return logits


def _wide_resnet(block: type[BasicBlock | Bottleneck], layers: list[int], num_classes: int) -> ResNet:
    """Torchvision's ResNet with a CIFAR stem; the last BatchNorm of each block starts at zero."""
    network = ResNet(block, layers, num_classes=num_classes, zero_init_residual=True)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    return network


class Network(NamedTuple):
    """What the project must know of a network; a further one is one entry of `NETWORKS`.

    Attributes:
        build: Builds it, freshly initialised, for a number of classes, its keyword argument `num_classes`.
        hint_layer: Child module whose output hints are taken from, and before it only modules in a row; None if there
            is no such module.
        head: Name of the last linear layer, which has a row for each class. None if there is no such layer: then a
            plain state dict of the network can't be read, as it doesn't say how many classes there are.
    """

    build: Callable[..., nn.Module]
    hint_layer: str | None = None
    head: str | None = None


NETWORKS = {
    "resnet18": Network(partial(_wide_resnet, BasicBlock, [2, 2, 2, 2]), hint_layer="layer2", head="fc"),
    "resnet34": Network(partial(_wide_resnet, BasicBlock, [3, 4, 6, 3]), hint_layer="layer2", head="fc"),
    "resnet50": Network(partial(_wide_resnet, Bottleneck, [3, 4, 6, 3]), hint_layer="layer2", head="fc"),
    **{
        f"resnet{depth}": Network(partial(NarrowResNet, depth), hint_layer="layer2", head="linear")
        for depth in (8, 14, 20, 32, 44, 56, 110)
    },
}


def find_network(name: str) -> Network:
    """Return the entry of a network.

    Raises:
        UserError: If the name is unknown.
    """
    if name not in NETWORKS:
        raise UserError(f"unknown network {name!r}: choose one of {', '.join(NETWORKS)}")
    return NETWORKS[name]


def build_network(name: str, num_classes: int) -> nn.Module:
    """Build a freshly initialised network that maps normalised images (batch, 3, h, w) to logits (batch, classes).

    Args:
        name: One of `NETWORKS`.
        num_classes: Width of the last layer.

    Raises:
        UserError: If the name is unknown or num_classes is below 2.
    """
    entry = find_network(name)
    if num_classes < 2:
        raise UserError(f"a classifier needs at least 2 classes, got {num_classes}")
    return entry.build(num_classes=num_classes)


def count_classes(name: str, state: Mapping[str, Tensor]) -> int:
    """Return the number of classes of a network's state dict.

    Args:
        name: One of `NETWORKS`.
        state: The state dict.

    Raises:
        UserError: If the name is unknown, its entry names no head, or the state dict has no such layer.
    """
    head = find_network(name).head
    if head is None:
        raise UserError(
            f"a state dict of {name} doesn't say how many classes there are: name its last layer, `head`, in NETWORKS"
        )
    weight = state.get(f"{head}.weight")
    if weight is None:
        raise UserError(f"the state dict holds no layer {head}, which a {name} ends with: is it another network's?")
    return len(weight)


def hint_modules(name: str, network: nn.Module) -> list[nn.Module]:
    """Return the child modules of a network that run in a row up to its hint layer, this one included.

    Args:
        name: One of `NETWORKS`.
        network: That network.

    Raises:
        UserError: If the name is unknown, its entry names no hint layer, or the network has no such child.
    """
    layer = find_network(name).hint_layer
    children = dict(network.named_children())
    if layer not in children:
        raise UserError(f"{name} has no layer that hints are taken from: name it, `hint_layer`, in NETWORKS")
    return list(children.values())[: list(children).index(layer) + 1]


def hint_features(modules: Iterable[nn.Module], images: Tensor) -> Tensor:
    """Return the features (batch, channels, h', w') that `hint_modules` make of normalised images, one by one."""
    for module in modules:
        images = module(images)
    return images
