"""The command line: every shipped config, run folders, resuming, and bad input."""

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kdq_lightning.cli import main
from kdq_lightning.commands.help_pages import PAGES
from kdq_lightning.errors import UserError
from kdq_lightning.networks import build_network
from tests.conftest import CONFIGS, FEW_STEPS, config
from tests.printed import scores
from tests.processes import run_in_fork

STRATEGIES = ["teacher", "control", "vanilla", "mixup", "dkd", "hint", "dml"]


class StopAfterFirstEpoch(Callback):
    """Breaks a run off when its second epoch begins."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            raise UserError("pulled the plug")


class StopInTheSecondEpoch(Callback):
    """Saves the last checkpoint after the first of an epoch's two steps, and breaks the run off."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 0:
            trainer.save_checkpoint(Path(trainer.log_dir, "checkpoints", "last.ckpt"))
            raise UserError("pulled the plug")


class PoisonSecondEpoch(Callback):
    """Makes a weight NaN when the second epoch begins."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            pl_module.network.conv1.weight.data[0] = float("nan")


FLOAT = "--quantization.enabled=false"  # where weights alone matter


def fit(name: str, images: Path, *arguments: str) -> int:
    few = [*FEW_STEPS, "--trainer.max_epochs=2", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
    return main(["fit", "--config", config(name), f"--data.root={images}", *few, *arguments])


LONG = [pytest.mark.slow(seconds=330), pytest.mark.timeout(1800)]


@pytest.mark.parametrize("suffix", ["cpu", pytest.param("cifar10", marks=LONG), pytest.param("cifar100", marks=LONG)])
def test_every_config_trains(suffix: str, images: Path, workspace: Path, capsys: pytest.CaptureFixture[str]):
    """Teacher first; each student finds it under runs/, ends with a finished run folder and its tags.

    The slow ones quantize a teacher and a student, too, minutes each. `test_distributed` quantizes every strategy.
    """
    for strategy in STRATEGIES:
        quantized = suffix != "cpu" and strategy in ("teacher", "control")
        assert fit(f"{strategy}_{suffix}", images, f"--quantization.enabled={quantized}") == 0, strategy
        version = workspace / "runs" / f"{strategy}_{suffix}" / "version_0"
        files = {str(path.relative_to(version)) for path in version.rglob("*")}
        assert {"finished", "config.yaml", "checkpoints/best.ckpt", "checkpoints/last.ckpt"} <= files
        events = EventAccumulator(str(version)).Reload()
        tags = set(events.Tags()["scalars"])
        assert {"train/loss", "train/top1", "lr", "val/top1", "val/top5", "val/loss", "val/ece"} <= tags, strategy
        assert ("val/agreement" in tags) == (strategy in ("vanilla", "mixup", "dkd", "hint"))
        assert ("val/top1/peer1" in tags) == (strategy == "dml")
        assert "epoch" not in tags and "hp_metric" not in tags
        assert [event.step for event in events.Scalars("val/top1")] == [2, 4]
        assert [event.step for event in events.Scalars("train/loss")] == [2, 4]
        checkpoint = torch.load(version / "checkpoints" / "best.ckpt", weights_only=True)
        assert not any("teacher" in key for key in checkpoint["state_dict"])
    assert "Warning" not in capsys.readouterr().err


def test_the_command_of_the_readme(images: Path, workspace: Path):
    """Mutual learning of two ResNet-18 on CIFAR-100, one step."""
    one = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--quantization.enabled=false"]
    assert fit("dml_cifar100", images, *one) == 0


def test_every_config_is_there():
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    wanted = {f"{strategy}_{suffix}" for strategy in STRATEGIES for suffix in ("cpu", "cifar10", "cifar100")}
    assert wanted | {"quickstart"} <= names


def test_quickstart_then_test_and_predict(workspace: Path, capsys: pytest.CaptureFixture[str]):
    """Digits without a download; the best checkpoint beats chance by far after two epochs, and predicts every image."""
    quick = ["--config", config("quickstart"), "--trainer.enable_progress_bar=false", "--quantization.bits=[4]"]
    quick += ["--quantization.methods=[default]"]
    assert main(["fit", *quick, "--trainer.max_epochs=3"]) == 0
    assert main(["test", *quick, "--ckpt_path", "runs/quickstart"]) == 0
    printed = capsys.readouterr().out
    table = printed[printed.rindex("digits: test images") :]
    mean, *peers = scores(table)
    assert mean > 60 and mean == pytest.approx(sum(peers) / 2, abs=0.011)
    assert [len(scores(table, name)) for name in ("top-5, %", "ECE, %", "loss")] == [3, 3, 1]
    assert "peer0 resnet8" in table and "peer1 resnet14" in table and max(map(len, table.splitlines())) <= 80
    assert all(len(number.partition(".")[2]) in (2, 4) for number in re.findall(r"\d+\.\d+", table))
    assert main(["predict", *quick, "--ckpt_path", "runs/quickstart"]) == 0
    with (workspace / "runs/quickstart/version_0/predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [f"test/{i}" for i in range(len(rows))] and len(rows) > 300
    assert all(row["predicted"] in "0123456789" and 0 < float(row["probability"]) <= 1 for row in rows)
    assert sum(row["predicted"] == row["label"] for row in rows) > 0.6 * len(rows)
    assert [path.name for path in (workspace / "runs").iterdir()] == ["quickstart"]
    assert len(list((workspace / "runs/quickstart").iterdir())) == 1


def test_student_outlives_its_teacher(images: Path, teacher_run: Path, workspace: Path):
    """A student tests, and goes on from its weights, when the teacher's file is gone."""
    shutil.copytree(teacher_run, "runs/teacher_cpu")
    for strategy in ("vanilla", "hint"):
        assert fit(f"{strategy}_cpu", images, "--model.init_args.network=resnet8", FLOAT) == 0
    shutil.rmtree("runs/teacher_cpu")
    for strategy in ("vanilla", "hint"):
        arguments = [
            "--config",
            config(f"{strategy}_cpu"),
            "--model.init_args.network=resnet8",
            f"--data.root={images}",
        ]
        assert main(["test", *arguments, *FEW_STEPS, "--ckpt_path", f"runs/{strategy}_cpu"]) == 0
    best = "runs/vanilla_cpu/version_0/checkpoints/best.ckpt"
    arguments = ["--model.init_args.network=resnet8", f"--model.init_args.weights={best}", "--name=again", FLOAT]
    assert fit("control_cpu", images, *arguments) == 0


@pytest.mark.parametrize("strategy", ["control", "vanilla"])
def test_resume_goes_on_in_its_folder(
    strategy: str, images: Path, teacher_run: Path, workspace: Path, capsys: pytest.CaptureFixture[str]
):
    """Stopped between epochs or within one, and resumed: the unbroken run's weights to the bit, in the same folder.

    The second epoch has larger images, and the teacher's answers are those that the unbroken run has kept.
    """
    name, version = f"{strategy}_cpu", Path("runs", f"{strategy}_cpu", "version_0")
    options = ["--model.init_args.network=resnet8", "--data.image_sizes=[16,32]", FLOAT]
    if strategy == "vanilla":
        options += [f"--model.init_args.teacher={teacher_run}", "--model.init_args.teacher_cache=answers"]
    assert fit(name, images, *options) == 0
    whole = torch.load(version / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    for stop in ("StopAfterFirstEpoch", "StopInTheSecondEpoch"):
        shutil.rmtree("runs")
        assert fit(name, images, *options, f"--trainer.callbacks+=tests.test_cli.{stop}") == 1
        assert not (version / "finished").exists()
        assert fit(name, images, *options, "--ckpt_path=last") == 0
        assert [path.name for path in version.parent.iterdir()] == ["version_0"]
        resumed = torch.load(version / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        assert all(torch.equal(whole[key], resumed[key]) for key in whole), stop
        events = EventAccumulator(str(version)).Reload()
        # Two files of one second are read in the order of their names: the tenth of a process is before the ninth.
        assert sorted(event.step for event in events.Scalars("train/loss")) == [2, 4]
        assert fit(name, images, *options, "--ckpt_path=last") == 1
        assert "finished" in capsys.readouterr().err


def test_a_run_that_was_moved_keeps_its_best(images: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch):
    """Gone on with in another place, its later epochs don't replace a better one."""
    small, checkpoints = "--model.init_args.network=resnet8", Path("runs/control_cpu/version_0/checkpoints")
    assert fit("control_cpu", images, small, FLOAT, "--trainer.callbacks+=tests.test_cli.StopAfterFirstEpoch") == 1
    content = torch.load(checkpoints / "last.ckpt", weights_only=True)
    (key,) = [key for key, state in content["callbacks"].items() if state.get("monitor") == "val/top1"]
    unbeatable = torch.tensor(101.0)
    state = content["callbacks"][key]
    state |= {
        "best_model_score": unbeatable,
        "kth_value": unbeatable,
        "best_k_models": {state["best_model_path"]: unbeatable},
    }
    torch.save(content, checkpoints / "last.ckpt")
    best = (checkpoints / "best.ckpt").read_bytes()
    Path("elsewhere").mkdir()
    shutil.move("runs", "elsewhere/runs")
    monkeypatch.chdir("elsewhere")
    assert fit("control_cpu", images, small, FLOAT, "--ckpt_path=last") == 0
    assert (checkpoints / "best.ckpt").read_bytes() == best
    state = torch.load(checkpoints / "last.ckpt", weights_only=True)["callbacks"][key]
    assert state["best_model_path"] == str(checkpoints.resolve() / "best.ckpt")


def test_resume_after_the_last_step(images: Path, workspace: Path):
    """Cut off between its last checkpoint and the word that it is finished, a run has quantization left."""
    small, version = "--model.init_args.network=resnet8", Path("runs/control_cpu/version_0")
    assert fit("control_cpu", images, small) == 0
    before = (version / "quantized.csv").read_text().splitlines()
    for path in (*version.glob("finished"), *version.glob("*.csv"), *version.glob("events*.quantized")):
        path.unlink()
    assert fit("control_cpu", images, small, "--ckpt_path=last") == 0
    assert (version / "finished").exists()
    assert len((version / "quantized.csv").read_text().splitlines()) == len(before) == 4


def test_resume_refuses_another_teacher(images: Path, teacher_run: Path, workspace: Path, capsys):
    """A teacher that changes on disk would silently train something else; the same weights in another file do not."""
    shutil.copytree(teacher_run, "runs/teacher_cpu")
    best = next(Path("runs/teacher_cpu").glob("version_*/checkpoints/best.ckpt"))
    teacher = torch.load(best, weights_only=True)
    small = "--model.init_args.network=resnet8"
    assert fit("vanilla_cpu", images, small, "--trainer.callbacks+=tests.test_cli.StopAfterFirstEpoch") == 1
    teacher["state_dict"]["network.linear.bias"] += 1e-3
    torch.save(teacher, best)
    capsys.readouterr()
    assert fit("vanilla_cpu", images, small, "--ckpt_path=last") == 1
    assert "has other weights than the one that this run began with" in capsys.readouterr().err
    teacher["state_dict"]["network.linear.bias"] = torch.load(
        next(teacher_run.glob("version_*/checkpoints/best.ckpt")), weights_only=True
    )["state_dict"]["network.linear.bias"]
    torch.save(teacher, best)
    assert fit("vanilla_cpu", images, small, "--ckpt_path=last") == 0


def test_resume_refuses_another_run(images: Path, workspace: Path, capsys: pytest.CaptureFixture[str]):
    """Another seed, length or network would silently train something else; a broken checkpoint is named."""
    small = "--model.init_args.network=resnet8"
    assert fit("control_cpu", images, small, "--trainer.callbacks+=tests.test_cli.StopAfterFirstEpoch") == 1
    last = Path("runs/control_cpu/version_0/checkpoints/last.ckpt")
    Path("elsewhere.ckpt").write_bytes(last.read_bytes())
    for arguments, sentence in (
        ([small, "--ckpt_path=last", "--seed_everything=3"], "seed_everything 0, this command says 3"),
        ([small, "--ckpt_path=runs/control_cpu", "--trainer.max_epochs=9"], "max_epochs 2, this command says 9"),
        (["--model.init_args.network=resnet14", f"--ckpt_path={last}"], "resnet14"),
        ([small, "--model.init_args.strategy=teacher", "--ckpt_path=last"], "strategy control"),
        ([small, "--ckpt_path=elsewhere.ckpt"], "lies in no run folder"),
    ):
        capsys.readouterr()
        assert fit("control_cpu", images, *arguments) == 1, sentence
        assert sentence in capsys.readouterr().err
    last.write_bytes(last.read_bytes()[:5000])
    assert fit("control_cpu", images, small, "--ckpt_path=last") == 1
    assert "last.ckpt cannot be read" in capsys.readouterr().err


def test_print_config_round_trip(workspace: Path, capsys: pytest.CaptureFixture[str]):
    for path in set(CONFIGS.glob("*_c*.yaml")) - set(CONFIGS.glob("study_*.yaml")):
        with pytest.raises(SystemExit) as stop:
            main(["fit", "--config", str(path), "--print_config"])
        assert stop.value.code == 0
        printed, shipped = yaml.safe_load(capsys.readouterr().out), yaml.safe_load(path.read_text())
        for key, value in shipped["model"]["init_args"].items():
            assert printed["model"]["init_args"][key] == value


BAD = [
    (["--data.root=nowhere", "--data.download=false"], "quickstart"),
    (["--model.init_args.network=resnet21"], "resnet20"),
    (["--model.init_args.learning_rate=-1"], "learning_rate"),
    (["--data.dataset=cifar11"], "cifar100"),
    (["--trainer.max_epochs=-1"], "max_epochs"),
    (["--ckpt_path=last"], "leave out --ckpt_path"),
    (["--model.init_args.weights=nothing.ckpt"], "nothing.ckpt"),
    (["--data.mean=[125,122,113]"], "images scaled to [0, 1]"),
    (["--trainer.precision=fp8"], "fp8"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD, ids=[sentence for _, sentence in BAD])
def test_bad_input(
    arguments: list[str], sentence: str, images: Path, workspace: Path, capsys: pytest.CaptureFixture[str]
):
    """One sentence, a code that is not 0, nothing left behind."""
    assert failure(["fit", "--config", config("control_cpu"), f"--data.root={images}", *FEW_STEPS, *arguments]) != 0
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error
    assert not list(workspace.rglob("version_*"))


BAD_TEACHERS = [
    ([], "configs/teacher_cpu.yaml"),
    (["--model.init_args.teacher=weights.safetensors"], "give --model.init_args.teacher_network, --model.init_args.t"),
    (["--model.init_args.teacher=broken.safetensors"], "truncated or foreign"),
    (["--model.init_args.teacher=broken.ckpt"], "truncated or foreign"),
    (["--model.init_args.teacher={teacher}", "--model.init_args.teacher_network=resnet20"], "is a resnet8"),
    (["--model.init_args.teacher={teacher}", "--data.dataset=cifar100"], "10 classes"),
    (["--model.init_args.teacher={teacher}", "--model.init_args.temperature=0"], "temperature"),
    (["--model.init_args.teacher={teacher}", "--model.init_args.label_weight=1.5"], "label_weight"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD_TEACHERS, ids=[sentence for _, sentence in BAD_TEACHERS])
def test_bad_teacher(
    arguments: list[str],
    sentence: str,
    images: Path,
    teacher_run: Path,
    workspace: Path,
    capsys: pytest.CaptureFixture[str],
):
    Path("broken.ckpt").write_bytes((teacher_run / "version_0/checkpoints/best.ckpt").read_bytes()[:5000])
    save_file(build_network("resnet8", 10).state_dict(), "weights.safetensors")
    Path("broken.safetensors").write_bytes(Path("weights.safetensors").read_bytes()[:5000])
    arguments = [argument.format(teacher=teacher_run) for argument in arguments]
    assert failure(["fit", "--config", config("vanilla_cpu"), f"--data.root={images}", *FEW_STEPS, *arguments]) == 1
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error and error.count("\n") == 1
    assert not list(workspace.rglob("version_*"))


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_no_random_weights(command: str, images: Path, workspace: Path, capsys: pytest.CaptureFixture[str]):
    assert failure([command, "--config", config("control_cpu"), f"--data.root={images}"]) == 1
    assert "needs trained weights" in capsys.readouterr().err


def test_unknown_strategy(workspace: Path, capsys: pytest.CaptureFixture[str]):
    assert failure(["fit", "--model", "Distiller", "--data", "DigitsDataModule"]) != 0
    error = capsys.readouterr().err
    assert "VanillaKD" in error and "Traceback" not in error


def test_nan_names_step_and_checkpoint(images: Path, workspace: Path, capsys: pytest.CaptureFixture[str]):
    """A loss that explodes in the second epoch stops the run; the first epoch's checkpoint stays the last good one."""
    arguments = ["--model.init_args.network=resnet8", "--trainer.callbacks+=tests.test_cli.PoisonSecondEpoch"]
    assert fit("control_cpu", images, *arguments) == 1
    error = capsys.readouterr().err
    assert "not been finite since step 2" in error and "version_0/checkpoints/last.ckpt" in error
    state = torch.load("runs/control_cpu/version_0/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_folder_without_permission(images: Path, workspace: Path, capsys: pytest.CaptureFixture[str]):
    Path("runs").mkdir(mode=0o500)
    assert fit("control_cpu", images, "--model.init_args.network=resnet8") == 1
    assert "runs" in capsys.readouterr().err


def test_plain_state_dict(images: Path, workspace: Path, capsys: pytest.CaptureFixture[str]):
    """A state dict must say its network and statistics, by flags; then `--ckpt_path` may name it."""
    save_file(build_network("resnet8", 10).state_dict(), "weights.safetensors")
    arguments = ["test", "--config", config("control_cpu"), f"--data.root={images}", *FEW_STEPS]
    arguments += ["--model.init_args.network=resnet8", "--ckpt_path=weights.safetensors"]
    for command in ("test", "predict"):
        assert main([command, *arguments[1:]]) == 1
        error = capsys.readouterr().err
        assert all(name in error for name in ("network", "weights_mean", "weights_std"))
    assert not Path("runs").exists()
    statistics = ["--model.init_args.weights_mean=[0.4,0.5,0.6]", "--model.init_args.weights_std=[0.2,0.2,0.3]"]
    assert main([*arguments, *statistics]) == 0


def failure(arguments: list[str]) -> int:
    """Return the exit code of a command, whether it returns or exits."""
    try:
        return main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)


def test_the_overview_needs_no_torch():
    """`kdq --help` and `kdq --version` answer at once."""
    for option, words in (("--help", "kdq fit --config configs/quickstart.yaml"), ("--version", "kdq-lightning 0.")):
        program = (
            f"import sys; from kdq_lightning.cli import main; main([{option!r}]); assert 'torch' not in sys.modules"
        )
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
        shown = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        assert words in shown.stdout and max(map(len, shown.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fti"], "there is no command 'fti', did you mean fit?"),
        (
            ["--quantization.bits=4"],
            "quantization.bits must be a list such as [4], got 4 (options: kdq fit --help.quant",
        ),
        (["--trainer.max_epoch=4"], "did you mean --trainer.max_epochs?"),
        (["--max_epochs=4"], "did you mean --trainer.max_epochs?"),
        (["--model.learning_rte=4"], "did you mean learning_rate?"),
        (["--unheard_of=4"], "kdq: --unheard_of is no option (options: kdq fit --help)"),
        (
            ["--model=no_file.MyKD"],
            "kdq: --model must be a class that can be imported, and no_file.MyKD can't: No module named 'no_file': run",
        ),
        (["--model=Nothing"], "kdq: --model must be the name of a class, got Nothing; known: Classifier"),
    ],
)
def test_what_may_be_meant(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]):
    if arguments[0].startswith("--"):
        with pytest.raises(SystemExit) as stop:
            main(["fit", "--config", config("quickstart"), *arguments])
        assert stop.value.code == 2
    else:
        assert main(arguments) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


@pytest.mark.parametrize("command", PAGES)
def test_the_first_page_of_help(command: str, workspace: Path, capsys: pytest.CaptureFixture[str]):
    """Short, whole lines; it needs no torch, and each option on it exists."""
    program = "import sys; from kdq_lightning.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    shown = subprocess.run(
        [sys.executable, "-c", program, command, "--help"], env=environment, capture_output=True, text=True, check=True
    )
    lines = shown.stdout.splitlines()
    assert len(lines) < 100 and max(map(len, lines)) <= 80
    listed = [line.split()[0] for line in lines if line.startswith("  --")]
    assert {"--config", "--ckpt_path", "--model", "--help.trainer"} <= set(listed)
    assert ("--quantization.bits" in listed) == (command in ("fit", "quantize"))
    known = help_of([command, "--help.all"], capsys)
    for name in ("--model.help=VanillaKD", "--data.help=CIFARDataModule"):
        known += help_of([command, name], capsys)
    for option in listed:
        if option.startswith("--help."):
            assert help_of([command, option], capsys)
        else:
            assert f" {option} " in known, option


def test_help_of_a_group(capsys: pytest.CaptureFixture[str]):
    """One group alone, without environment variables and without the markup of docstrings; `all` has both groups."""
    trainer, quantization, everything = (
        help_of(["fit", f"--help.{name}"], capsys) for name in ("trainer", "quantization", "all")
    )
    assert "--trainer.max_epochs" in trainer and "--quantization.bits" not in trainer and "KDQ_FIT" not in trainer
    assert "``" not in trainer and ":class:" not in trainer and "kdq_lightning.PostTrainingQuantization" in trainer
    assert "--quantization.bits" in quantization and "--trainer.max_epochs" not in quantization
    assert "KDQ_FIT__TRAINER__MAX_EPOCHS" in everything and "KDQ_FIT__QUANTIZATION__BITS" in everything
    strategy = help_of(["fit", "--model.help=VanillaKD"], capsys)
    assert strategy.startswith("usage: kdq fit --config FILE") and "--model.temperature" in strategy
    assert failure(["fit", "--help.nothing"]) == 2


def help_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return what a command prints before it ends with 0."""
    assert failure(arguments) == 0
    return capsys.readouterr().out


OWN_FILE = """
from lightning.pytorch import Callback
from torch import optim

from kdq_lightning.data.datamodules import DigitsDataModule
from kdq_lightning.modules.vanilla import VanillaKD
from kdq_lightning.networks import build_network


class MyKD(VanillaKD):
    def __init__(self, strategy: str = "mine", **kwargs):
        super().__init__(strategy=strategy, **kwargs)


class MyData(DigitsDataModule):
    pass


class MyOptimizer(optim.SGD):
    def __init__(self, params, lr: float):
        super().__init__(params, lr)


class MyCallback(Callback):
    def on_train_start(self, trainer, pl_module):
        print("called back")


def build(num_classes):
    return build_network("resnet8", num_classes)
"""


def test_classes_of_the_users_own_file(workspace: Path):
    """Strategy, data, optimizer, callback and network, typed or in a config, by the command as it is installed.

    The working folder is not on `sys.path`, as it is with `python -m`; a fork leaves no module behind.
    """
    assert not {"", str(workspace)} & set(sys.path)

    def kdq(*arguments: str) -> None:
        def run() -> int:
            with Path("printed").open("w") as sys.stdout:
                return main(list(arguments))

        assert run_in_fork(run) == 0, Path("printed").read_text()

    Path("my_file.py").write_text(OWN_FILE)
    few = [*("--data=my_file.MyData", "--data.batch_size=64", "--trainer.accelerator=cpu", "--trainer.max_epochs=1")]
    few += ["--trainer.enable_progress_bar=false", "--trainer.limit_train_batches=1", "--quantization.enabled=false"]
    kdq("fit", "--model=Classifier", "--model.network=my_file.build", *few, "--name=teacher")
    own = ["--model=my_file.MyKD", "--model.network=resnet8", "--model.teacher=runs/teacher"]
    own += ["--model.teacher_network=my_file.build", "--optimizer=my_file.MyOptimizer", "--optimizer.lr=0.01"]
    own += ["--trainer.callbacks=my_file.MyCallback", *few, "--name=own"]
    kdq("fit", *own)
    kdq("fit", "--config", "runs/own/version_0/config.yaml")
    printed = Path("printed").read_text()
    assert "called back" in printed and "my_file.MyOptimizer(lr=0.01)" in printed
    config = yaml.safe_load(Path("runs/own/version_1/config.yaml").read_text())
    assert (config["model"]["class_path"], config["data"]["class_path"]) == ("my_file.MyKD", "my_file.MyData")
