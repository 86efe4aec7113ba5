"""Families of torchvision's networks on narrow inputs: each walks, and every matrix is accounted for."""

import copy
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from kdq_lightning.quantization import LayerReport, Quantized, load_packed, quantize

ROUNDING = {"solver": "rounding", "refine": 0, "match_moments": False}
CALIBRATION, HELD_OUT = 32, 48

CLASSES = 16


def vgg() -> nn.Module:
    network = models.VGG(models.vgg.make_layers([8, "M", 16, "M", 32], batch_norm=True), CLASSES)
    network.classifier = nn.Sequential(nn.Linear(32 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    return network


def regnet() -> nn.Module:
    params = models.regnet.BlockParams.from_init_params(depth=6, w_0=16, w_a=8.0, w_m=2.2, group_width=8, se_ratio=0.25)
    return models.RegNet(params, num_classes=CLASSES, stem_width=16)


def convnext() -> nn.Module:
    setting = [models.convnext.CNBlockConfig(16, 32, 1), models.convnext.CNBlockConfig(32, None, 2)]
    return models.ConvNeXt(setting, num_classes=CLASSES)


def efficientnet() -> nn.Module:
    setting = [
        models.efficientnet.FusedMBConvConfig(2, 3, 2, 16, 16, 1),
        models.efficientnet.MBConvConfig(4, 3, 2, 16, 32, 2, 1.0, 1.0),
    ]
    return models.EfficientNet(setting, dropout=0.0, num_classes=CLASSES, last_channel=64)


def swin(version: int) -> nn.Module:
    more = {
        "block": models.swin_transformer.SwinTransformerBlockV2,
        "downsample_layer": models.swin_transformer.PatchMergingV2,
    }
    return models.SwinTransformer(
        [4, 4],
        16,
        [1, 2],
        [2, 2],
        [4, 4],
        num_classes=CLASSES,
        stochastic_depth_prob=0.0,
        **(more if version == 2 else {}),
    )


def vit() -> nn.Module:
    network = models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=CLASSES)
    nn.init.normal_(network.heads.head.weight, std=0.05)  # zeros otherwise: all errors would be 0 of 0
    return network


def maxvit() -> nn.Module:
    return models.MaxVit((32, 32), 16, 2, [16, 32], [1, 1], 8, 0.0, num_classes=CLASSES)


ZOO: dict[str, Callable[[], nn.Module]] = {
    "VGG": vgg,
    "ResNet": lambda: models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], CLASSES, groups=8, width_per_group=4),
    "DenseNet": lambda: models.DenseNet(8, (2, 2, 2), 16, num_classes=CLASSES),
    "SqueezeNet": lambda: models.squeezenet1_1(num_classes=CLASSES, dropout=0.0),
    "GoogLeNet": lambda: models.googlenet(num_classes=CLASSES, init_weights=True, dropout=0.0, dropout_aux=0.0),
    "MobileNetV2": lambda: models.mobilenet_v2(width_mult=0.35, num_classes=CLASSES, dropout=0.0),
    "MobileNetV3": lambda: models.mobilenet_v3_small(width_mult=0.5, num_classes=CLASSES, dropout=0.0),
    "ShuffleNetV2": lambda: models.ShuffleNetV2([2, 2, 2], [16, 32, 48, 64, 128], CLASSES),
    "MNASNet": lambda: models.MNASNet(0.25, CLASSES, dropout=0.0),
    "EfficientNet": efficientnet,
    "RegNet": regnet,
    "ConvNeXt": convnext,
    "ViT": vit,
    "Swin": lambda: swin(1),
    "Swin V2": lambda: swin(2),
    "MaxViT": maxvit,
}
FAST = ["ShuffleNetV2", "EfficientNet", "ConvNeXt", "Swin V2"]
LARGER = {"GoogLeNet": 64, "SqueezeNet": 48}


def smooth_images(count: int, size: int, seed: int) -> Tensor:
    """Return noise at three scales, (count, 3, size, size), each image with a brightness of its own."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 1, 1, generator=generator) * torch.ones(1, 1, size, size)
    for cells in (3, 8, size):
        noise = torch.randn(count, 3, cells, cells, generator=generator)
        images = images + nn.functional.interpolate(noise, (size, size), mode="bilinear")
    return images / 2


def build(name: str) -> tuple[nn.Module, int]:
    """Return a network of random weights whose BatchNorm has real statistics, and the size of its images."""
    torch.manual_seed(0)
    network, size = ZOO[name](), LARGER.get(name, 32)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches
    network.train()
    with torch.no_grad():
        for seed in range(4):
            network(smooth_images(32, size, 100 + seed))
    return network.eval(), size


@dataclass
class Found:
    """What quantizing one network gave; errors are of the outputs on images held out, over their deviation."""

    share: float
    errors: dict[int, float]
    rounding: float
    seconds: float
    left: list[LayerReport]


def examine(name: str, path: Path) -> Found:
    """Quantize a network, and assert what must hold of every one."""
    network, size = build(name)
    before = copy.deepcopy(network.state_dict())
    images, held_out = smooth_images(CALIBRATION, size, 0), smooth_images(HELD_OUT, size, 1)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = quantize(network, images, bits=(2, 4, 8))
        seconds = time.perf_counter() - start
        plain = quantize(network, images, bits=8, **ROUNDING)[8]
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert_accounted_for(network, results[4])
    with torch.inference_mode():
        outputs = network(held_out)

        def error(result: Quantized) -> float:
            return float((result.model(held_out) - outputs).norm() / (outputs - outputs.mean(0)).norm())

        results[4].save(path)
        assert torch.equal(load_packed(path, build(name)[0])(held_out), results[4].model(held_out))
        left = [layer for layer in results[4].layers if not layer.levels]
        errors = {bits: error(result) for bits, result in results.items()}
        return Found(results[4].share, errors, error(plain), seconds, left)


def assert_accounted_for(network: nn.Module, result: Quantized) -> None:
    """Every parameter of two or more dimensions stands in the report once, quantized or with a reason."""
    matrices = {name for name, parameter in network.named_parameters() if parameter.dim() > 1}
    named = [layer.name if layer.name in matrices else f"{layer.name}.weight" for layer in result.layers]
    assert sorted(named) == sorted(matrices)
    assert all(layer.levels or layer.note.endswith("left in float") for layer in result.layers)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in ZOO])
def test_a_family(name: str, tmp_path: Path):
    found = examine(name, tmp_path / "packed.safetensors")
    assert found.errors[4] <= 1.05 * found.errors[2] and found.errors[8] <= 1.05 * found.errors[4]
    assert found.errors[8] <= 1.2 * found.rounding


def main() -> None:
    """Print the table of docs/any_module.md: python -m tests.test_zoo."""
    torch.set_num_threads(1)
    print("| network | quantized | rounding, 8 bits | 8 bits | 4 bits | seconds |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in ZOO:
        with tempfile.TemporaryDirectory() as folder:
            found = examine(name, Path(folder) / "packed.safetensors")
        numbers = f"{found.rounding:.4f} | {found.errors[8]:.4f} | {found.errors[4]:.3f} | {found.seconds:.0f}"
        print(f"| {name} | {found.share:.1%} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
