"""CIFAR ResNets: wide ones with torchvision's keys (ResNet-18, 34, 50), and the narrow family of He et al. 2015."""

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet


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


def wide_resnet(block: type[BasicBlock | Bottleneck], layers: list[int], num_classes: int) -> ResNet:
    """Torchvision's ResNet with a CIFAR stem; the last BatchNorm of each block starts at zero."""
    network = ResNet(block, layers, num_classes=num_classes, zero_init_residual=True)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    return network
