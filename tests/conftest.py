"""Shared by all tests: one thread, tiny class folders in CIFAR's layout, and the real data where it lies."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch; the tests' own processes inherit it

import numpy as np
import pytest
import rich
import torch
from PIL import Image

from kdq_lightning.cli import main
from tests.slow_parts import read_part, share_out

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("KDQ_SHARED", ROOT.parent / "shared"))
CONFIGS = ROOT / "configs"

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


@pytest.fixture(scope="module", autouse=True)
def clean_root() -> Iterator[None]:
    """Fail where a test has left a file or folder in the repository, from where it would be committed."""
    before = set(ROOT.iterdir())
    yield
    left = {path.name for path in set(ROOT.iterdir()) - before if not path.name.startswith(".")}
    assert not left, f"the tests of this file, or of one run at the same time, left {', '.join(sorted(left))} in {ROOT}"


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a root with tiny cifar10 and cifar100 class folders."""
    root = tmp_path_factory.mktemp("images")
    write_images(root, "cifar10", classes=10, train=8, test=3)
    write_images(root, "cifar100", classes=100, train=2, test=1)
    return root


@pytest.fixture
def without_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lay out figures, but don't draw their pixels, a good part of a short run, except for tests marked `pictures`."""
    if request.node.get_closest_marker("pictures"):
        return
    from torch.utils.tensorboard import SummaryWriter  # which tests that run nothing do without

    from kdq_lightning.report import document

    monkeypatch.setattr(SummaryWriter, "add_figure", lambda *_, **__: None)
    monkeypatch.setattr(document, "render", lambda figure, kind: b"")


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_pictures: None) -> Path:
    """Work in an empty folder, with a console of rich's that no bar of an earlier run has left its mark on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rich, "_console", None)
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


# A worker of pytest-xdist gets whole files, in this order. torch refuses to fork a process whose autograd has threads,
# and exporting to ONNX starts them: who forks is first. The longest files follow, so that all workers end together.
FORKS = ("test_distributed.py", "test_budgets.py", "test_any_project.py", "test_mixed.py", "test_quantize.py")
FORKS += ("test_muon.py", "test_header.py", "test_post_training.py", "test_cli.py")
LONG = ("test_study.py", "test_onnx_export.py", "test_zoo.py", "test_any_network.py")
FIRST = (*FORKS, *LONG)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return how many processes share the tests: one a core, four at most, and only this one for a chosen few tests."""
    if config.option.file_or_dir or config.option.keyword:
        return 0  # a second process that imports torch costs more than it saves
    return min(len(os.sched_getaffinity(0)), 4)


def pytest_report_header() -> str | None:
    """Say which of the slow tests are run."""
    part = os.environ.get("KDQ_SLOW_PART")
    return f"slow tests: part {part}" if part else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the files in order, and leave the slow tests out that are not in the part KDQ_SLOW_PART, such as 2/6."""
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))
    if "KDQ_SLOW_PART" not in os.environ:
        return
    part, parts = read_part(os.environ["KDQ_SLOW_PART"])
    marks = {item.nodeid: mark for item in items if (mark := item.get_closest_marker("slow"))}
    seconds = {name: mark.kwargs.get("seconds", 20) for name, mark in marks.items()}
    others = seconds.keys() - set(share_out(seconds, parts)[part - 1])
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in others])
    items[:] = [item for item in items if item.nodeid not in others]
