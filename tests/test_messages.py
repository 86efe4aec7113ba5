"""Errors that a wrong option can cause: one sentence, no traceback, and what to do."""

import importlib.util
import shutil
from pathlib import Path

import pytest
from lightning.pytorch import Callback

from kdq_lightning.cli import main
from kdq_lightning.commands.messages import sentence_for
from kdq_lightning.data.datamodules import DigitsDataModule
from kdq_lightning.modules.classifier import Classifier
from kdq_lightning.modules.dml import MutualLearning
from kdq_lightning.modules.teacher import Teacher
from kdq_lightning.modules.vanilla import VanillaKD
from kdq_lightning.networks import build_network
from kdq_lightning.training.trainer import Trainer
from tests.records import write_run
from tests.studies import TINY, write_study

FIT = ["fit", "--model=Classifier", "--model.network=resnet8", "--data=DigitsDataModule", "--data.batch_size=64"]
FIT += ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1"]
FIT += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--quantization.enabled=false"]
CALLBACK = "--trainer.callbacks+=lightning.pytorch.callbacks"
NAMES = "val/top1, val/top5, val/ece, val/loss, train/loss, train/top1, lr"
LOGGED = f"which this run doesn't log: give its monitor one of {NAMES}"
MEANT = f"which this run doesn't log: did you mean val/top1? It logs {NAMES}"
PLATEAU = ["--optimizer=SGD", "--optimizer.lr=0.1", "--lr_scheduler=ReduceLROnPlateau"]


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
        ([f"{CALLBACK}.EarlyStopping", "--trainer.callbacks.monitor=top1"], f"EarlyStopping watches top1, {MEANT}"),
        ([f"{CALLBACK}.EarlyStopping", "--trainer.callbacks.monitor=a/b"], f"EarlyStopping watches a/b, {LOGGED}"),
        ([f"{CALLBACK}.ModelCheckpoint", "--trainer.callbacks.monitor=top1"], f"Checkpoint watches top1, {MEANT}"),
        ([f"{CALLBACK}.ModelCheckpoint", "--trainer.callbacks.monitor=a/b"], f"Checkpoint watches a/b, {LOGGED}"),
        ([*PLATEAU, "--lr_scheduler.monitor=val/acc"], f"ReduceLROnPlateau watches val/acc, {MEANT}"),
        (
            [f"{CALLBACK}.EarlyStopping", "--trainer.callbacks.monitor=val/top1", "--trainer.limit_val_batches=0"],
            "watches val/top1, which this run doesn't log: give its monitor one of train/loss, train/top1, lr\n",
        ),
        (
            [f"{CALLBACK}.EarlyStopping", "--trainer.callbacks.monitor=val/top1"],
            "EarlyStopping watches val/top1 with mode min, but more of it is better: give it mode max\n",
        ),
        (
            [f"{CALLBACK}.ModelCheckpoint", "--trainer.callbacks.monitor=val/loss", "--trainer.callbacks.mode=max"],
            "ModelCheckpoint watches val/loss with mode max, but less of it is better: give it mode min\n",
        ),
        (
            [*PLATEAU, "--lr_scheduler.monitor=val/top5"],
            "ReduceLROnPlateau watches val/top5 with mode min, but more of it is better: give it mode max\n",
        ),
        (
            [f"{CALLBACK}.EarlyStopping", "--trainer.callbacks.monitor=train/los"],
            "watches train/los, which this run doesn't log: did you mean train/loss? It logs val/top1, val/top5,",
        ),
        (["--trainer.max_epochs=0"], "trainer.max_epochs 0 trains nothing: give more"),
        (["--trainer.limit_train_batches=0"], "trainer.limit_train_batches 0 trains nothing: give more"),
        (["--trainer.devices=many"], "the trainer refuses its options: `devices` selected with `CPUAccelerator`"),
        (["--trainer.precision=8"], "Precision '8' is invalid"),
        (["--trainer.precision=float8"], "Precision 'float8' is invalid"),
        (["--trainer.callbacks+=ModelCheckpoint"], "full class path to avoid ambiguity: lightning.pytorch.callbacks."),
    ],
)
def test_wrong_options(arguments: list[str], sentence: str, workspace: Path, capsys: pytest.CaptureFixture[str]):
    """Before an epoch is trained: nothing is printed for one, and nothing is left behind."""
    assert sentence in failure([*FIT, *arguments], capsys)
    assert not list(workspace.iterdir())


OWN_MONITOR = [f"{CALLBACK}.EarlyStopping", "--trainer.callbacks.monitor=own"]


class LogOwn(Callback):
    """Logs a name of its own."""

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("own", 1.0)


def test_what_a_callback_of_the_user_logs_can_be_watched(workspace: Path, capsys: pytest.CaptureFixture[str]):
    assert "EarlyStopping watches own" in failure([*FIT, *OWN_MONITOR], capsys)
    assert main([*FIT, "--trainer.callbacks+=tests.test_messages.LogOwn", *OWN_MONITOR]) == 0


@pytest.mark.parametrize("kind", [Classifier, VanillaKD, MutualLearning])
def test_all_that_is_logged_is_known(kind: type[Classifier], workspace: Path):
    """A module says beforehand all names that it logs in an epoch; the parts of its loss once it has been taken."""
    data = DigitsDataModule(batch_size=64)
    data.setup()
    teacher = Teacher(build_network("resnet8", 10), data.statistics, "resnet8") if kind is VanillaKD else None
    options = {"networks": ["resnet8", "resnet8"]} if kind is MutualLearning else {"network": "resnet8"}
    options |= {"num_classes": 10, **({"teacher": "unused"} if teacher else {})}
    module = kind.for_timing(options, teacher, False)
    few = {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 1, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **few)
    trainer.fit(module, data)
    logged = set(trainer.callback_metrics) - {"step"}
    assert set(module.logged_names()) == logged
    parts = logged - set(kind.for_timing(options, teacher, False).logged_names())
    assert all(name.startswith("train/") for name in parts) and "train/images_per_second" in parts


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
