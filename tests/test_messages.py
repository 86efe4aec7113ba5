"""Errors that a wrong option can cause: one sentence, no traceback, and what to do."""

import importlib.util
import shutil
from pathlib import Path

import pytest

from kdq_lightning.cli import main
from kdq_lightning.commands.messages import sentence_for
from tests.records import write_run
from tests.studies import TINY, write_study

FIT = ["fit", "--model=Classifier", "--model.network=resnet8", "--data=DigitsDataModule", "--data.batch_size=64"]
FIT += ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1"]
FIT += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--quantization.enabled=false"]
CALLBACK = "--trainer.callbacks+=lightning.pytorch.callbacks"
LOGGED = "which this run doesn't log: give its monitor one of val/top1, val/top5"


def failure(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line that a command prints when it fails."""
    capsys.readouterr()
    try:
        assert main(arguments) == 1
    except SystemExit as stop:
        assert stop.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("kdq: ")
    return error


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--trainer.val_check_interval=1000"], "val_check_interval 1000 is more than an epoch's batches, 1: give no"),
        (["--trainer.val_check_interval=2"], "val_check_interval 2 is more than an epoch's batches, 1: give no"),
        ([f"{CALLBACK}.EarlyStopping", "--trainer.callbacks.monitor=top1"], f"EarlyStopping watches top1, {LOGGED}"),
        ([f"{CALLBACK}.EarlyStopping", "--trainer.callbacks.monitor=a/b"], f"EarlyStopping watches a/b, {LOGGED}"),
        ([f"{CALLBACK}.ModelCheckpoint", "--trainer.callbacks.monitor=top1"], f"Checkpoint watches top1, {LOGGED}"),
        ([f"{CALLBACK}.ModelCheckpoint", "--trainer.callbacks.monitor=a/b"], f"Checkpoint watches a/b, {LOGGED}"),
        (["--trainer.precision=8"], "Precision '8' is invalid"),
        (["--trainer.precision=float8"], "Precision 'float8' is invalid"),
        (["--trainer.callbacks+=ModelCheckpoint"], "full class path to avoid ambiguity: lightning.pytorch.callbacks."),
    ],
)
def test_wrong_options(arguments: list[str], sentence: str, workspace: Path, capsys: pytest.CaptureFixture[str]):
    assert sentence in failure([*FIT, *arguments], capsys)


@pytest.mark.parametrize(("logger", "package"), [("WandbLogger", "wandb"), ("CometLogger", "comet-ml")])
def test_absent_loggers(logger: str, package: str, workspace: Path, capsys: pytest.CaptureFixture[str]):
    if importlib.util.find_spec(package.replace("-", "_")):
        pytest.skip("it is installed")
    error = failure([*FIT, f"--trainer.logger={logger}"], capsys)
    assert f"{package} is not installed: pip install -U '{package}>=" in error


def test_a_batch_of_more_images_than_there_are(workspace: Path, capsys: pytest.CaptureFixture[str]):
    """It is cut to the images that there are, and the header says so."""
    for size, is_said in ((1294, False), (1295, True), (5000, True)):
        assert main([*FIT, f"--data.batch_size={size}"]) == 0
        note = f"note       a step takes all 1,294 training images: data.batch_size is {size:,}\n"
        assert (note in capsys.readouterr().out) == is_said


@pytest.mark.parametrize("epochs", [1, 9])
def test_resuming_with_other_epochs(epochs: int, workspace: Path, capsys: pytest.CaptureFixture[str]):
    """More epochs, or fewer, than the run was begun with: the sentence says what to do instead, and that works."""
    assert main([*FIT, "--trainer.max_epochs=2", "--trainer.limit_train_batches=1"]) == 0
    error = failure([*FIT, f"--trainer.max_epochs={epochs}", "--ckpt_path=last"], capsys)
    assert (
        f"with max_epochs 2, this command says {epochs}" in error and "give the same, --trainer.max_epochs 2;" in error
    )
    option, path = error.partition("as a new run, with ")[2].split()[:2]
    assert main([*FIT, f"--trainer.max_epochs={epochs}", option, path]) == 0


def test_the_home_folder(tmp_path: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """`~` in quotes, and behind an equals sign, where a shell leaves it as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write_run(tmp_path / "records" / "a" / "version_0", "control", {2: 70, 32: 90})
    shutil.copytree(tmp_path / "records", tmp_path / "more")
    assert main(["report", "~/records", "~/more", "--out=~/written"]) == 0
    assert (tmp_path / "written" / "report.md").is_file() and not Path("~").exists()
    study = write_study(TINY)
    (tmp_path / "studies").mkdir()
    for path in (study, *Path().glob("*_cpu.yaml")):
        shutil.move(path, tmp_path / "studies" / path.name)
    assert main(["study", f"~/studies/{study.name}", "--results=~/records", "--dry_run"]) == 0
    assert capsys.readouterr().out.count("kdq fit --config ") == 2


class UnlikeError(Exception):
    """Takes two arguments, so it can't be made from its text."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(one, two)


def test_errors_of_forked_processes():
    """torch passes on the printed traceback, of which the last lines name the error."""
    from torch.multiprocessing.spawn import ProcessRaisedException

    def said(last_lines: str) -> str | None:
        frames = '\n\n-- Process 1 terminated with the following error:\nTraceback ...\n  File "a.py"\n    f()\n'
        trace = f"{frames}{last_lines}\n"
        return sentence_for(ProcessRaisedException(trace, 1, 123))

    assert said("kdq_lightning.errors.UserError: give another: bits") == "give another: bits"
    assert said("kdq_lightning.errors.UserError: give another\nnumber") == "give another\nnumber"
    assert "No such file or directory: /nowhere" in (
        said("FileNotFoundError: [Errno 2] No such file or directory: '/nowhere'") or ""
    )
    for unknown in (
        "ValueError: a bug",
        "tests.test_messages.UnlikeError: (1, 2)",
        "no.such.module.Error: x",
        "KeyError",
    ):
        assert said(unknown) is None
