"""`--optimizer` and `--lr_scheduler`, precisions, seeds and paths: options beside the module's own."""

import os
from itertools import product
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import nn

from kdq_lightning.cli import main
from kdq_lightning.commands.running import read_settings
from kdq_lightning.data.datamodules import DigitsDataModule
from kdq_lightning.modules.classifier import Classifier
from kdq_lightning.modules.optimization import GivenOptimizer
from kdq_lightning.report.read_rows import read_rows
from kdq_lightning.runs.checkpoints import load_trained
from kdq_lightning.runs.records import read_records
from tests.printed import scores

DIGITS = ["--model.network=resnet8", "--data=DigitsDataModule", "--data.batch_size=64", "--trainer.accelerator=cpu"]
DIGITS += ["--trainer.enable_progress_bar=false", "--trainer.max_epochs=2", "--trainer.limit_train_batches=3"]
DIGITS += ["--trainer.precision=32-true"]
CONTROL = ["--model=Classifier", *DIGITS]
NO_BITS = "--quantization.enabled=false"
ADAM = ["--optimizer=AdamW", "--optimizer.lr=0.003", "--optimizer.weight_decay=0.1"]
STEP = ["--lr_scheduler=StepLR", "--lr_scheduler.step_size=1", "--lr_scheduler.gamma=0.5"]


def weights(run: str) -> dict[str, torch.Tensor]:
    return torch.load(f"runs/{run}/version_0/checkpoints/last.ckpt", weights_only=True)["state_dict"]


def test_they_train_as_torch_does(workspace: Path, capsys: pytest.CaptureFixture[str]):
    """A run by hand with torch's own optimizer and scheduler gives the same weights; the first lines name them."""
    assert main(["fit", *CONTROL, *ADAM, *STEP, NO_BITS, "--name=adam"]) == 0
    printed = capsys.readouterr().out
    assert "trained by torch.optim.AdamW(" in printed and "torch.optim.lr_scheduler.StepLR(gamma=0.5" in printed
    saved = torch.load("runs/adam/version_0/checkpoints/last.ckpt", weights_only=True)
    assert saved["lr_schedulers"][0]["_last_lr"] == [0.00075]
    seed_everything(0, workers=True)
    module, data = Classifier("resnet8", 10), DigitsDataModule(batch_size=64)
    data.setup()
    module.statistics = data.statistics
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.003, weight_decay=0.1)
    module.train()
    for epoch, share in enumerate((1.0, 0.5)):
        optimizer.param_groups[0]["lr"] = share * 0.003
        data.trainer = None
        sampler = data.train_dataloader().sampler
        sampler.set_epoch(epoch)
        for step, index in enumerate(sampler):
            if step == 3:
                break
            view = data.training_view(data.train_set[index], epoch, 2)
            optimizer.zero_grad()
            module.losses(view).loss.backward()
            optimizer.step()
    found = weights("adam")
    for key, value in module.network.state_dict().items():
        torch.testing.assert_close(found[f"network.{key}"], value, rtol=1e-3, atol=1e-4)


def test_hashes_change_only_where_they_are_given(workspace: Path):
    plain = read_settings(["fit", *CONTROL]).config_hash
    adam = read_settings(["fit", *CONTROL, *ADAM]).config_hash
    assert adam != plain
    assert read_settings(["fit", *CONTROL, *ADAM, *STEP]).config_hash not in (plain, adam)


def test_resume_knows_them(workspace: Path, capsys: pytest.CaptureFixture[str]):
    """The unbroken run's weights to the bit, by the command and by the config that it wrote; others are refused."""
    assert main(["fit", *CONTROL, *ADAM, *STEP, NO_BITS, "--name=whole"]) == 0
    stop = "--trainer.callbacks+=tests.test_cli.StopAfterFirstEpoch"
    assert main(["fit", *CONTROL, *ADAM, *STEP, NO_BITS, "--name=broken", stop]) == 1
    capsys.readouterr()
    for options, sentence in (
        ([], "with optimizer torch.optim.AdamW("),
        (["--optimizer=SGD", "--optimizer.lr=0.1", *STEP], "this command says torch.optim.SGD("),
        (ADAM, "with lr_scheduler torch.optim.lr_scheduler.StepLR("),
    ):
        assert main(["fit", *CONTROL, *options, NO_BITS, "--name=broken", "--ckpt_path=last"]) == 1
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1
    assert main(["fit", *CONTROL, *ADAM, *STEP, NO_BITS, "--name=broken", "--ckpt_path=last"]) == 0
    whole, resumed = weights("whole"), weights("broken")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    again = ["--config=runs/broken/version_0/config.yaml", "--ckpt_path=last"]
    assert main(["fit", *again]) == 1
    assert "is finished" in capsys.readouterr().err


def test_a_plateau_watches_a_tag(workspace: Path):
    plateau = ["--lr_scheduler=lightning.pytorch.cli.ReduceLROnPlateau", "--lr_scheduler.monitor=val/loss"]
    assert main(["fit", *CONTROL, *ADAM, *plateau, NO_BITS, "--name=run"]) == 0


def test_what_is_refused(workspace: Path, capsys: pytest.CaptureFixture[str]):
    """One sentence each."""
    for options, sentence in (
        (STEP, "give --optimizer, too"),
        ([*ADAM, "--model.optimizer=muon"], "are both given"),
        (["--optimizer=Adam", "--optimizer.lr=-1"], "Invalid learning rate"),
        (["--trainer.callbacks=LearningRateFinder"], "LearningRateFinder would train with other numbers"),
        (["--trainer.callbacks=BatchSizeFinder"], "BatchSizeFinder would train with other numbers"),
    ):
        assert main(["fit", *CONTROL, *options, NO_BITS]) == 1, options
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1
    assert not list(Path().rglob("version_*"))


def test_parameters_without_gradient_are_left_out():
    frozen, free = nn.Parameter(torch.zeros(1), requires_grad=False), nn.Parameter(torch.zeros(1))
    given = GivenOptimizer({"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}, None)
    assert given.configure([frozen, free]).param_groups[0]["params"] == [free]


# Precision, seed, home folder


MODELS, PRECISIONS = ("Classifier", "HintKD", "MutualLearning"), ("bf16-true", "16-true", "64-true")
FAST = {("Classifier", "64-true"), *((model, "bf16-true") for model in MODELS)}


@pytest.mark.parametrize(
    ("model", "precision"),
    [
        pytest.param(*both, marks=[] if both in FAST else pytest.mark.slow(seconds=5))
        for both in product(MODELS, PRECISIONS)
    ],
)
def test_precisions_without_a_float32_copy(model: str, precision: str, workspace: Path, capsys):
    """Trained, validated, quantized in float32, tested with the config that was written."""
    if model == "HintKD":
        assert main(["fit", *CONTROL, "--model.strategy=teacher", NO_BITS, "--name=teacher"]) == 0
    networks = ["--model.networks=[resnet8,resnet8]"] if model == "MutualLearning" else ["--model.network=resnet8"]
    options = [f"--model={model}", *networks, *DIGITS[1:], f"--trainer.precision={precision}", "--name=run"]
    options += ["--model.teacher=runs/teacher"] if model == "HintKD" else []
    options += ["--quantization.bits=[4]", "--quantization.calibration_images=64", "--model.learning_rate=0.05"]
    options += ["--quantization.methods=[default]"]
    assert main(["fit", *options]) == 0, capsys.readouterr().err
    first = next(iter(load_trained("runs/run").values()))
    wanted = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}[precision]
    assert first.state["conv1.weight"].dtype == wanted
    capsys.readouterr()
    assert main(["test", "--config=runs/run/version_0/config.yaml", "--ckpt_path=runs/run"]) == 0
    printed = capsys.readouterr().out
    floats = [row.test_top1 for row in read_records(Path("runs/run/version_0")) if row.bits == 32]
    assert scores(printed)[0] == pytest.approx(sum(floats) / len(floats), abs=0.006)


def test_a_run_without_a_seed(workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Is recorded as one without, also after a seeded one in the same process, and goes on as one without."""
    quick = [*CONTROL, "--quantization.bits=[4]", "--quantization.calibration_images=64"]
    quick += ["--quantization.methods=[default]"]
    assert main(["fit", *quick, "--seed_everything=3", "--name=seeded"]) == 0
    for name in ("unseeded", "again"):
        assert main(["fit", *quick, "--seed_everything=false", f"--name={name}"]) == 0
        assert "PL_GLOBAL_SEED" not in os.environ
        assert {row.seed for row in read_records(Path(f"runs/{name}/version_0"))} == {None}
    rows, notes = read_rows([Path("runs")])
    assert {seed for row in rows["digits"] for seed in row.seeds} == {3, -1, -2}
    assert sum("was trained without a seed" in note for note in notes) == 2
    capsys.readouterr()
    assert main(["fit", *quick, "--seed_everything=false", "--name=seeded", "--ckpt_path=last"]) == 1
    assert "with seed_everything 3, this command says None" in capsys.readouterr().err


def test_the_home_folder(workspace: Path, monkeypatch: pytest.MonkeyPatch):
    """`~` in a config or after `=`, which no shell expands; the same settings have the same hash."""
    monkeypatch.setenv("HOME", str(workspace))
    at_home = ["--trainer.default_root_dir=~/runs", "--model.strategy=teacher", NO_BITS, "--name=teacher"]
    assert main(["fit", *CONTROL, *at_home]) == 0
    assert Path("runs/teacher/version_0/finished").exists() and not Path("~").exists()
    student = ["--model=VanillaKD", *DIGITS, "--model.teacher_cache=~/answers", NO_BITS]
    home = [*student, "--model.teacher=~/runs/teacher", "--trainer.default_root_dir=~/runs"]
    assert main(["fit", *home, "--name=student"]) == 0
    assert Path("answers").is_dir()
    whole = [*student, f"--model.teacher={workspace}/runs/teacher", f"--trainer.default_root_dir={workspace}/runs"]
    assert read_settings(["fit", *home]).config_hash == read_settings(["fit", *whole]).config_hash
    assert main(["test", *CONTROL, "--ckpt_path=~/runs/student"]) == 0
    assert main(["export", "~/runs/student", "--to=state_dict", "--out=~/plain.pth"]) == 0
    assert Path("plain.pth").exists() and not Path("~").exists()
