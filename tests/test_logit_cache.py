"""A teacher's logits on training views are computed once, and serve every run that sees the same views."""

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdq_lightning.cli import main
from kdq_lightning.data.augmentation import View
from kdq_lightning.data.base import ImageDataModule
from kdq_lightning.data.datamodules import DigitsDataModule
from kdq_lightning.data.normalization import Statistics
from kdq_lightning.errors import UserError
from kdq_lightning.modules import logit_cache
from kdq_lightning.modules.distillation import Distillation
from kdq_lightning.modules.dkd import DecoupledKD
from kdq_lightning.modules.hint import HintKD
from kdq_lightning.modules.logit_cache import LogitCache
from kdq_lightning.modules.mixup import MixupKD
from kdq_lightning.modules.recover import Recover
from kdq_lightning.modules.teacher import Teacher
from kdq_lightning.modules.vanilla import VanillaKD
from kdq_lightning.networks import build_network
from tests.conftest import FEW_STEPS, config

CPU = torch.device("cpu")
INDEX = torch.tensor([5, 0, 9, 3])  # the images of an epoch, in its order
LOGITS = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))


def unasked() -> Tensor:
    raise AssertionError("the teacher was asked")


def open_cache(epoch: int = 0, images: int = 4) -> tuple[LogitCache, bool]:
    """Return the cache at the start of an epoch, and whether it knows the epoch."""
    cache = LogitCache("cache", {"teacher": "one"})
    return cache, cache.start(epoch, images, CPU)


@pytest.fixture
def written(workspace: Path) -> Path:
    """Return the file that holds the logits of epoch 0."""
    open_cache()[0].write(0, INDEX, LOGITS)
    (file,) = Path("cache").glob("*/epoch-0.safetensors")
    return file


# The cache alone


def test_unknown_views_are_shown_to_the_teacher(workspace: Path):
    """Training gets the very tensor that the teacher answers with, so a first run is the run without a cache."""
    cache, known = open_cache()
    answers = LOGITS[:2].clone().requires_grad_()
    assert not known and cache.logits(INDEX[:2], lambda: answers) is answers
    ((index, logits),) = cache.pending
    assert torch.equal(index, INDEX[:2]) and torch.equal(logits, LOGITS[:2]) and not logits.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_known_views_are_looked_up(dtype: torch.dtype, workspace: Path):
    """In any order, to the bit and in their precision; the teacher is asked for one batch an epoch, to compare."""
    open_cache()[0].write(0, INDEX, LOGITS.to(dtype))
    cache, known = open_cache()
    assert known and not open_cache(epoch=1)[1]
    for _ in range(2):  # epochs
        assert cache.start(0, 4, CPU)
        asked = []
        first = cache.logits(INDEX[[3, 1]], lambda asked=asked: asked.append(1) or LOGITS[[3, 1]] + 1e-3)
        assert asked and torch.equal(first, LOGITS[[3, 1]].to(dtype)) and first.dtype == dtype
        assert torch.equal(cache.logits(INDEX[[2, 0]], unasked), LOGITS[[2, 0]].to(dtype))
        assert not cache.pending


def test_an_epoch_of_another_length_is_not_known(written: Path):
    """With `limit_train_batches`, an epoch has other images; its file gives way to the whole epoch's."""
    for images in (3, 5):
        cache, known = open_cache(images=images)
        answer = torch.zeros(2, 10)
        assert not known and cache.logits(INDEX[:2], lambda answer=answer: answer) is answer
    cache.write(0, torch.arange(5), torch.zeros(5, 10))
    assert open_cache(images=5)[1] and not open_cache(images=4)[1]


def test_all_processes_ask_if_one_of_them_must(written: Path):
    cache, known = open_cache()
    assert known
    cache.disable()
    answer = torch.zeros(2, 10)
    assert cache.logits(INDEX[:2], lambda: answer) is answer and len(cache.pending) == 1


def test_broken_files_are_refused(written: Path):
    whole = written.read_bytes()
    content = {"index": INDEX, "logits": LOGITS}
    written.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"epoch-0.safetensors is broken .* delete it, and it is made again"):
        open_cache()
    save_file({"logits": content["logits"]}, written)
    with pytest.raises(UserError, match="is broken"):
        open_cache()
    save_file({**content, "logits": content["logits"].roll(1, 0)}, written)
    cache, known = open_cache()
    with pytest.raises(UserError, match="holds other logits than the teacher gives: delete that folder"):
        cache.logits(INDEX, lambda: LOGITS)
    assert known


def test_each_key_has_a_folder(workspace: Path):
    LogitCache("cache", {"a": 1, "b": 2}).write(0, INDEX, LOGITS)
    assert LogitCache("cache", {"b": 2, "a": 1}).start(0, 4, CPU)
    assert not LogitCache("cache", {"a": 1, "b": 3}).start(0, 4, CPU)


# Beside a student


def beside_a_teacher(kind: type[Distillation] = VanillaKD, **changed: Any) -> Distillation:
    """Return a student at the start of a run of epochs of 3 batches.

    Args:
        kind: Its strategy.
        changed: Options of the data, and `precision` and the teacher's `mean`.
    """
    torch.manual_seed(0)
    mean = changed.pop("mean", (0.5, 0.5, 0.5))
    trainer = SimpleNamespace(
        **{"precision": changed.pop("precision", "32-true"), "num_training_batches": 3, "max_epochs": 2},
        **{"current_epoch": 0, "is_global_zero": True, "training": False, "progress_bar_callback": None},
        strategy=SingleDeviceStrategy(CPU),
        datamodule=DigitsDataModule(**{"batch_size": 2, "seed": 0, **changed}),
    )
    trainer.datamodule.setup("fit")
    more = {"packed": "unread"} if kind is Recover else {}
    module = kind(teacher="unread", teacher_cache="cache", network="resnet8", num_classes=10, **more)
    module.teacher = Teacher(build_network("resnet8", 10), Statistics(mean, (0.2, 0.2, 0.2)), "resnet8")
    module._trainer = trainer
    module.on_fit_start()
    return module


def view(*index: int) -> View:
    """Return a training batch of these images."""
    return View(torch.rand(len(index), 3, 16, 16), torch.zeros(len(index)), torch.tensor(index), 16)


def folder(module: Distillation) -> str:
    return module._cache.folder.name


@pytest.mark.parametrize("kind", [DecoupledKD, HintKD, Recover])
def test_strategies_share_a_folder(kind: type[Distillation], workspace: Path):
    assert folder(beside_a_teacher(kind)) == folder(beside_a_teacher(VanillaKD))


VIEWS = {"seed": 1, "batch_size": 4, "crop": 2, "flip": True, "cutout": 4, "val_size": 99, "split_seed": 1}


def test_other_views_have_a_folder_of_their_own(workspace: Path):
    """Whatever changes the images, their order or the answers; not what changes the student's images alone."""
    changes = [{name: value} for name, value in VIEWS.items()]
    changes += [{"precision": "bf16-mixed"}, {"mean": (0.1, 0.5, 0.5)}, {"flip": "alternate"}]
    plain = beside_a_teacher()
    folders = [folder(beside_a_teacher(**change)) for change in changes]
    module = beside_a_teacher()
    module.teacher = Teacher(build_network("resnet8", 10), module.teacher.statistics, "resnet8")  # other weights
    module.on_fit_start()
    assert len({folder(plain), *folders, folder(module)}) == 2 + len(changes)
    assert folder(beside_a_teacher(image_sizes=[8, 16])) == folder(plain)


def test_every_option_of_the_data_is_accounted_for():
    """A new option either changes the views, so it belongs into `view_key`, or it stands here."""
    source = {
        "dataset",
        "num_classes",
        "image_size",
        "mean",
        "std",
        "train_size",
    }  # hash of pixels and indices, statistics
    options = set(inspect.signature(ImageDataModule.__init__).parameters) - {"self"}
    assert options == VIEWS.keys() | source | {"image_sizes", "trivial_augment"}


def test_a_whole_epoch_is_kept_and_a_part_is_not(workspace: Path):
    """Nobody has seen the beginning of the epoch that a run is resumed in."""
    module = beside_a_teacher()
    for batches, files in ((2, 0), (3, 1)):
        module.on_train_epoch_start()
        for batch in range(batches):
            module.cached_teacher_logits(view(batch, batch + 7))
        module.on_train_epoch_end()
        assert len([*Path("cache").glob("*/*")]) == files
    content = load_file(module._cache.path(0))
    assert content["index"].tolist() == [0, 7, 1, 8, 2, 9] and content["logits"].shape == (6, 10)
    before = module._cache.path(0).read_bytes()
    module.on_train_epoch_start()
    module.on_train_epoch_end()  # an epoch of which no image was asked for
    assert module._cache.path(0).read_bytes() == before


def test_a_full_disk_costs_the_answers_alone(workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    def full(path: Path, content: bytes) -> None:
        raise UserError(f"{path} could not be written (No space left on device)")

    monkeypatch.setattr(logit_cache, "write_atomically", full)
    module = beside_a_teacher()
    module.on_train_epoch_start()
    for _ in range(3):
        module.cached_teacher_logits(view(1, 2))
    module.on_train_epoch_end()
    assert "the teacher's answers are not kept: cache" in capsys.readouterr().out


def test_mixed_images_are_no_views():
    with pytest.raises(UserError, match="mixed images are none: leave it out"):
        MixupKD(teacher="unread", teacher_cache="cache", network="resnet8", num_classes=10)


# Whole runs


def fit(images: Path, teacher: Path) -> int:
    """Train two epochs of 64 images, with 16 for validation, in batches of 16."""
    arguments = ["fit", "--config", config("vanilla_cpu"), f"--data.root={images}", *FEW_STEPS]
    arguments += ["--model.init_args.network=resnet8", f"--model.init_args.teacher={teacher}", "--trainer.max_epochs=2"]
    return main([*arguments, "--quantization.enabled=false", "--model.init_args.teacher_cache=cache"])


def test_a_second_run_finds_the_answers(images: Path, teacher_run: Path, workspace: Path, monkeypatch):
    """Every weight is the same to the bit, and one batch an epoch is asked for."""
    answer, counts = Teacher.logits, []

    def logits(self, images):
        counts.append(len(images))
        return answer(self, images)

    monkeypatch.setattr(Teacher, "logits", logits)
    weights = []
    for version, asked in enumerate(([16] * 4, [16])):
        assert fit(images, teacher_run) == 0
        assert counts == [*asked, 16, *asked]  # an epoch, the validation images once, an epoch
        counts.clear()
        last = Path(f"runs/vanilla_cpu/version_{version}/checkpoints/last.ckpt")
        weights.append(torch.load(last, weights_only=True)["state_dict"])
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_folder_that_cannot_be_made_is_refused(images: Path, teacher_run: Path, workspace: Path, capsys):
    Path("cache").write_text("a file")
    assert fit(images, teacher_run) == 1
    assert "choose another teacher_cache" in capsys.readouterr().err and not [*Path("runs").glob("*/*")]
