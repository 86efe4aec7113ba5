"""Shared by all tests: one thread, tiny class folders in CIFAR's layout, and the real data where it lies."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdq_lightning.cli import main

torch.set_num_threads(1)

SHARED = Path(os.environ.get("KDQ_SHARED", Path(__file__).resolve().parents[2] / "shared"))
CONFIGS = Path(__file__).resolve().parents[1] / "configs"

FEW_STEPS = [
    "--data.val_size=0.2",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--data.batch_size=16",
    "--quantization.calibration_images=16",
    "--quantization.bits=[4]",
]


def config(name: str) -> str:
    """Return the path of a shipped config."""
    return str(CONFIGS / f"{name}.yaml")


def write_images(root: Path, dataset: str, classes: int, train: int, test: int) -> None:
    """Write class folders of random 32x32 images whose mean colour tells the class."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for label in range(classes):
            folder = root / dataset / split / f"class{label:03d}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 64, (32, 32, 3)) + np.array([label * 16 % 192, label * 5 % 192, 64])
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:04d}.png")


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a root with tiny cifar10 and cifar100 class folders."""
    root = tmp_path_factory.mktemp("images")
    write_images(root, "cifar10", classes=10, train=8, test=3)
    write_images(root, "cifar100", classes=100, train=2, test=1)
    return root


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def teacher_run(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """Train a resnet8 teacher for two steps and return its run folder."""
    root = tmp_path_factory.mktemp("teacher")
    arguments = ["fit", "--config", config("teacher_cpu"), "--model.init_args.network=resnet8", *FEW_STEPS]
    arguments += [f"--data.root={images}", "--trainer.max_epochs=1", f"--trainer.default_root_dir={root}"]
    assert main(arguments) == 0
    return root / "teacher_cpu"


@pytest.fixture(scope="session")
def real_images():
    """Return a reader of a real CIFAR split: uint8 images (images, 3, 32, 32) and labels (images,)."""
    spec = importlib.util.spec_from_file_location("unpack", SHARED / "data" / "unpack.py")
    unpack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unpack)

    def read(dataset: str, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        pixels, labels, _ = unpack.read_split(dataset, split)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)

    return read


def pytest_collection_modifyitems(items):
    """Fork first: torch refuses that in a process whose autograd has threads, and exporting to ONNX starts them."""
    items.sort(key=lambda item: item.path.name != "test_distributed.py")
