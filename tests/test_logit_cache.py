"""A teacher's answers on training views are computed once, and serve every run that sees the same views."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdq_lightning.cli import main
from kdq_lightning.errors import UserError
from kdq_lightning.modules import logit_cache
from kdq_lightning.modules.teacher import Teacher
from tests.conftest import FEW_STEPS, config

CACHE = "--model.init_args.teacher_cache=cache"
IMAGES_AN_EPOCH = 64  # 80 without 16 for validation, in batches of 16
VALIDATION = 16


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of images of every batch that a teacher answers."""
    real, counts = Teacher.logits, []

    def logits(self, images):
        counts.append(len(images))
        return real(self, images)

    monkeypatch.setattr(Teacher, "logits", logits)
    return counts


def fit(strategy: str, images: Path, teacher: Path, *more: str, code: int = 0) -> dict[str, torch.Tensor]:
    """Train two epochs and return the last weights."""
    arguments = ["fit", "--config", config(f"{strategy}_cpu"), f"--data.root={images}", *FEW_STEPS]
    arguments += ["--model.init_args.network=resnet8", f"--model.init_args.teacher={teacher}", "--trainer.max_epochs=2"]
    assert main([*arguments, "--quantization.enabled=false", *more]) == code
    newest = max(Path("runs", f"{strategy}_cpu").glob("version_*"), default=Path())
    checkpoint = newest / "checkpoints" / "last.ckpt"
    return torch.load(checkpoint, weights_only=True)["state_dict"] if checkpoint.exists() else {}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_runs_share_answers(images: Path, teacher_run: Path, workspace: Path, asked: list[int]):
    """With the cache, cold or warm, every weight is the same to the bit; warm, one batch an epoch is asked for."""
    without = fit("vanilla", images, teacher_run)
    assert sum(asked) == 2 * IMAGES_AN_EPOCH + VALIDATION
    asked.clear()
    assert same(fit("vanilla", images, teacher_run, CACHE), without)
    assert sum(asked) == 2 * IMAGES_AN_EPOCH + VALIDATION
    asked.clear()
    assert same(fit("vanilla", images, teacher_run, CACHE), without)
    assert sum(asked) == 2 * 16 + VALIDATION
    assert len([*Path("cache").iterdir()]) == 1
    asked.clear()
    plain = fit("dkd", images, teacher_run)
    asked.clear()
    assert same(fit("dkd", images, teacher_run, CACHE), plain)
    assert sum(asked) == 2 * 16 + VALIDATION
    asked.clear()
    fit("hint", images, teacher_run, CACHE, "--model.init_args.hint_share=0.5")
    assert sum(asked) == 16 + VALIDATION  # the first epoch learns features


@pytest.mark.parametrize("other", ["--seed_everything=1", "--data.crop=2", "--data.batch_size=32", "--data.cutout=4"])
def test_other_views_have_a_folder_of_their_own(
    other: str, images: Path, teacher_run: Path, workspace: Path, asked: list[int]
):
    fit("vanilla", images, teacher_run, CACHE)
    asked.clear()
    assert same(fit("vanilla", images, teacher_run, CACHE, other), fit("vanilla", images, teacher_run, other))
    assert sum(asked) == 2 * (2 * IMAGES_AN_EPOCH + VALIDATION)
    assert len([*Path("cache").iterdir()]) == 2


def test_the_answers_of_fewer_batches_do_not_serve_for_all(
    images: Path, teacher_run: Path, workspace: Path, asked: list[int]
):
    fit("vanilla", images, teacher_run, CACHE, "--trainer.limit_train_batches=2")
    (folder,) = Path("cache").iterdir()
    assert {len(load_file(file)["index"]) for file in folder.iterdir()} == {32}
    asked.clear()
    fit("vanilla", images, teacher_run, CACHE)
    assert sum(asked) == 2 * IMAGES_AN_EPOCH + VALIDATION
    assert {len(load_file(file)["index"]) for file in folder.iterdir()} == {IMAGES_AN_EPOCH}


@pytest.mark.parametrize("damage", ["truncated", "of another teacher"])
def test_broken_files_are_refused(
    damage: str, images: Path, teacher_run: Path, workspace: Path, capsys: pytest.CaptureFixture[str]
):
    fit("vanilla", images, teacher_run, CACHE)
    (file,) = Path("cache").glob("*/epoch-0.safetensors")
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        content = load_file(file)
        save_file({**content, "logits": content["logits"].roll(1, 0)}, file)
    fit("vanilla", images, teacher_run, CACHE, code=1)
    sentence = capsys.readouterr().err
    assert "is broken" in sentence if damage == "truncated" else "holds other logits" in sentence, sentence


def test_a_resumed_epoch_is_not_kept(images: Path, teacher_run: Path, workspace: Path):
    """Of the second epoch, nobody has seen the beginning and the end."""
    stop = "--trainer.callbacks+=tests.test_cli.StopInTheSecondEpoch"
    fit("vanilla", images, teacher_run, CACHE, stop, code=1)
    fit("vanilla", images, teacher_run, CACHE, "--ckpt_path=last")
    assert [file.name for file in Path("cache").glob("*/*")] == ["epoch-0.safetensors"]


def test_a_folder_that_cannot_be_made_is_refused(images: Path, teacher_run: Path, workspace: Path, capsys):
    Path("cache").write_text("a file")
    fit("vanilla", images, teacher_run, CACHE, code=1)
    assert "choose another teacher_cache" in capsys.readouterr().err and not [*Path("runs").glob("*/*")]


def test_a_full_disk_costs_the_answers_alone(images: Path, teacher_run: Path, workspace: Path, monkeypatch, capsys):
    def full(path: Path, content: bytes) -> None:
        raise UserError(f"{path} could not be written (No space left on device)")

    monkeypatch.setattr(logit_cache, "write_atomically", full)
    assert fit("vanilla", images, teacher_run, CACHE)
    assert "the teacher's answers are not kept: cache" in capsys.readouterr().out


def test_mixed_images_are_no_views(images: Path, teacher_run: Path, workspace: Path, capsys):
    fit("mixup", images, teacher_run, CACHE, code=1)
    assert "mixed images are none: leave it out" in capsys.readouterr().err
