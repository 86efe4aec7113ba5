"""Two gloo processes and one: the same batches, views, gradients and metrics."""

import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies.launchers import subprocess_script
from safetensors.torch import load_file
from torch import nn

from kdq_lightning.cli import main
from kdq_lightning.data.datamodules import DigitsDataModule
from kdq_lightning.errors import UserError
from kdq_lightning.modules.classifier import Classifier
from kdq_lightning.runs.records import read_correct, read_records
from kdq_lightning.training.callbacks import NameDeadRank
from kdq_lightning.training.trainer import Trainer
from tests.conftest import FEW_STEPS, config
from tests.printed import scores

TWO = ["--trainer.strategy=ddp_fork", "--trainer.devices=2"]


class WithoutBatchNorm(Classifier):
    """A network whose gradient is the mean over images, whatever rank they lie on."""

    def _build_networks(self) -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 10)
        )

    def losses(self, view):
        """Write down what this rank sees."""
        path = Path(f"seen-{self.trainer.world_size}-{self.global_step}-{self.global_rank}.pt")
        torch.save((view.images.clone(), view.labels), path)
        return super().losses(view)


def train(devices: int) -> dict[str, torch.Tensor]:
    """Train six steps and return the weights."""
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy="ddp_fork" if devices > 1 else "auto", max_epochs=2,
        limit_train_batches=3, logger=False, enable_progress_bar=False, enable_checkpointing=False,
        precision="32-true",
    )  # fmt: skip
    module = WithoutBatchNorm("resnet8", 10, learning_rate=0.1)
    trainer.fit(module, DigitsDataModule(batch_size=64, crop=1, cutout=2))
    return {key: value.clone() for key, value in module.network.state_dict().items()}


class FailOnRankOne(Callback):
    """Finds something wrong where the other rank does not."""

    def on_train_start(self, trainer, pl_module):
        if trainer.global_rank == 1:
            raise UserError("rank 1 found a broken image: delete it")


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--trainer.callbacks+=tests.test_distributed.FailOnRankOne", "kdq: rank 1 found a broken image: delete it\n"),
        ("--model.init_args.weights=nowhere.ckpt", "kdq: nowhere.ckpt does not exist: give a run folder"),
    ],
)
def test_an_error_of_a_rank_is_a_sentence(
    option: str, sentence: str, images: Path, workspace: Path, capfd: pytest.CaptureFixture[str]
):
    """Of one rank, or of both; torch passes on its traceback alone, and no folder stays."""
    arguments = ["--config", config("control_cpu"), "--model.init_args.network=resnet8", f"--data.root={images}"]
    assert main(["fit", *arguments, *FEW_STEPS, *TWO, "--trainer.max_epochs=1", option]) == 1
    error = capfd.readouterr().err
    assert error.startswith(sentence) and error.count("\n") == 1
    assert not list(workspace.iterdir())


RANKS = pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])


@RANKS
def test_same_views_and_gradients(ranks: int, workspace: Path):
    one, several = train(1), train(ranks)
    for step in range(6):
        images, labels = torch.load(f"seen-1-{step}-0.pt")
        shares = [torch.load(f"seen-{ranks}-{step}-{rank}.pt") for rank in range(ranks)]
        assert torch.equal(images, torch.cat([share[0] for share in shares]))
        assert torch.equal(labels, torch.cat([share[1] for share in shares]))
    for key, value in one.items():
        torch.testing.assert_close(several[key], value, rtol=1e-5, atol=1e-6)


@RANKS
def test_same_metrics_of_one_checkpoint(ranks: int, workspace: Path, capfd: pytest.CaptureFixture[str]):
    """360 digits on one rank and on several, the last batch uneven: every metric to the last image."""
    quick = ["--config", config("quickstart"), "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    assert main(["fit", *quick, "--trainer.max_epochs=2", "--quantization.enabled=false"]) == 0
    tables = []
    for devices in ([], [*TWO, f"--trainer.devices={ranks}"]):
        capfd.readouterr()
        assert main(["test", *quick, "--ckpt_path=runs/quickstart", "--data.batch_size=46", *devices]) == 0
        out = capfd.readouterr().out
        tables.append({name: scores(out, name) for name in ("top-1, %", "top-5, %", "ECE, %", "loss")})
    one, two = tables
    assert sum(map(len, one.values())) == 10
    for name, value in one.items():
        assert two[name] == (value if "top" in name else pytest.approx(value, abs=0.011)), name


@RANKS
def test_same_quantized_table(ranks: int, workspace: Path):
    """Quantized on one rank and on several: every row and every vector is the same to the last image."""
    quick = ["--config", config("quickstart"), "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    quick += ["--model.networks=[resnet8,resnet8]", "--quantization.bits=[2]", "--data.val_size=99"]
    quick += ["--quantization.calibration_images=99"]
    assert main(["fit", *quick, "--trainer.max_epochs=1"]) == 0
    assert main(["quantize", *quick, "--ckpt_path=runs/quickstart", *TWO, f"--trainer.devices={ranks}"]) == 0
    one, two = Path("runs/quickstart/version_0"), Path("runs/quickstart-quantized/version_0")
    inexact = {"nll", "ece", "relative_error"}  # sums of float32 outputs, whose last digits depend on the batch
    records = [[vars(record) for record in read_records(version)] for version in (one, two)]
    assert len(records[0]) == len(records[1]) == 6
    for mine, theirs in zip(*records, strict=True):
        for name in mine.keys() - {"run", "config_hash", "seconds"}:
            expected = pytest.approx(mine[name], rel=1e-5) if name in inexact and mine[name] else mine[name]
            assert theirs[name] == expected, (mine["peer"], mine["method"], mine["bits"], name)
    vectors = read_correct(one), read_correct(two)
    assert vectors[0].keys() == vectors[1].keys() and len(vectors[0]) == 12
    assert all(torch.equal(vector, vectors[1][key]) for key, vector in vectors[0].items())


@pytest.mark.parametrize("strategy", ["control", "vanilla", "mixup", "dkd", "hint", "dml"])
def test_every_strategy_trains_on_two_ranks(strategy: str, images: Path, teacher_run: Path, workspace: Path):
    """Through both stages of hints: no parameter is left without a gradient."""
    arguments = ["fit", "--config", config(f"{strategy}_cpu"), f"--data.root={images}", *FEW_STEPS, *TWO]
    if strategy == "dml":
        arguments += ["--model.init_args.networks=[resnet8,resnet8]"]
    else:
        arguments += ["--model.init_args.network=resnet8"]
    if strategy not in ("control", "dml"):
        arguments += [f"--model.init_args.teacher={teacher_run}"]
    if strategy == "hint":
        arguments += ["--model.init_args.hint_share=0.5"]
    arguments += ["--trainer.max_epochs=2", "--trainer.limit_train_batches=3", "--quantization.methods=[default]"]
    assert main(arguments) == 0
    checkpoint = torch.load(f"runs/{strategy}_cpu/version_0/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 6


@pytest.mark.slow(seconds=8)
@pytest.mark.parametrize("strategy", ["control", "hint"])
def test_a_network_of_torchvision_on_two_ranks(strategy: str, images: Path, teacher_run: Path, workspace: Path):
    """Trained through both stages of hints between unlike networks, and quantized."""
    arguments = ["fit", "--config", config(f"{strategy}_cpu"), f"--data.root={images}", *FEW_STEPS, *TWO]
    arguments += ["--model.init_args.network=torchvision/mobilenet_v3_small", "--trainer.max_epochs=2"]
    arguments += ["--model.init_args.learning_rate=0.001", "--trainer.limit_train_batches=2"]
    arguments += ["--trainer.precision=32-true"]
    arguments += ["--quantization.solver=rounding", "--quantization.methods=[default]"]
    if strategy == "hint":
        arguments += [f"--model.init_args.teacher={teacher_run}", "--model.init_args.hint_layer=features.1"]
        arguments += ["--model.init_args.hint_share=0.5"]
    assert main(arguments) == 0
    version = Path(f"runs/{strategy}_cpu/version_0")
    assert {record.bits for record in read_records(version)} == {4, 32}
    assert torch.load(version / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 4


class KeepWeights(Callback):
    """Writes down a weight of the first half, of the head and of the regressor after each step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        network = pl_module.network
        parts = network.layer1[0].conv1.weight, network.linear.weight, pl_module.regressor.weight
        if trainer.is_global_zero:
            torch.save([part.detach() for part in parts], f"kept-{trainer.global_step}.pt")


@pytest.mark.parametrize("ranks", [[], TWO], ids=["1", "2"])
def test_a_given_optimizer_keeps_the_stages_of_hints(ranks: list[str], images: Path, teacher_run: Path, workspace):
    """In stage 1 only the first half moves, though AdamW decays whatever has a gradient, and two ranks give all one."""
    arguments = ["fit", "--config", config("hint_cpu"), f"--data.root={images}", *FEW_STEPS, *ranks]
    arguments += ["--model.init_args.network=resnet8", f"--model.init_args.teacher={teacher_run}"]
    arguments += ["--model.init_args.hint_share=0.5", "--trainer.max_epochs=2", "--trainer.limit_train_batches=3"]
    arguments += ["--optimizer=AdamW", "--optimizer.lr=0.003", "--optimizer.weight_decay=0.1"]
    arguments += ["--trainer.callbacks+=tests.test_distributed.KeepWeights", "--quantization.enabled=false"]
    assert main(arguments) == 0
    steps = [torch.load(f"kept-{step}.pt") for step in range(1, 7)]
    moves = [[not torch.equal(a, b) for a, b in pairwise(part)] for part in zip(*steps, strict=True)]
    assert moves == [[True] * 5, [False, False, True, True, True], [True, True, False, False, False]]


def test_ranks_gather_their_teachers_answers(images: Path, teacher_run: Path, workspace: Path):
    """The cache of two ranks holds every image of an epoch once, with what one rank writes."""
    arguments = [
        "fit",
        "--config",
        config("vanilla_cpu"),
        f"--data.root={images}",
        *FEW_STEPS,
        "--trainer.max_epochs=1",
    ]
    arguments += ["--model.init_args.network=resnet8", f"--model.init_args.teacher={teacher_run}"]
    answers = []
    for ranks in ([], TWO):
        cache = f"cache{len(ranks)}"
        assert (
            main([*arguments, "--quantization.enabled=false", f"--model.init_args.teacher_cache={cache}", *ranks]) == 0
        )
        (file,) = Path(cache).glob("*/epoch-0.safetensors")
        content = load_file(file)
        answers.append(dict(zip(content["index"].tolist(), content["logits"], strict=True)))
    one, two = answers
    assert len(one) == 64 and one.keys() == two.keys()
    for image, logits in one.items():
        torch.testing.assert_close(two[image], logits)


class Signal(Callback):
    """Sends a signal to the process of one rank in the middle of an epoch, and notes each step that is done.

    Lightning's observer of the processes, which ends the run a few seconds after a death, is switched off.
    """

    def __init__(self, signum: int, rank: int, step: int) -> None:
        self.signum, self.rank, self.step = signum, rank, step
        subprocess_script._launch_process_observer = lambda processes: None

    def on_train_batch_end(self, trainer, *_):
        with Path(f"steps-{trainer.global_rank}.log").open("a") as log:
            print(trainer.global_step, file=log)
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            os.kill(os.getpid(), self.signum)


def fit_on_two(*more: str) -> subprocess.CompletedProcess[str]:
    """Train three epochs of 20 steps on two ranks, which `kdq` starts."""
    command = [sys.executable, "-m", "kdq_lightning.cli", "fit", "--config", config("quickstart")]
    command += ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_epochs=3"]
    command += ["--quantization.bits=[4]", "--trainer.enable_progress_bar=false", *more]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def sends(signum: int, rank: int, step: int) -> list[str]:
    """Return the options for a `Signal`."""
    options = [
        f"--trainer.callbacks.{name}={value}"
        for name, value in zip(("signum", "rank", "step"), (signum, rank, step), strict=True)
    ]
    return ["--trainer.callbacks+=tests.test_distributed.Signal", *options]


@pytest.mark.slow
def test_a_rank_that_dies_is_named(workspace: Path):
    """By our message, without Lightning's; the run ends within a minute, and goes on from its checkpoint."""
    dead = fit_on_two(*sends(signal.SIGKILL, rank=1, step=30))
    assert dead.returncode == 1
    assert "kdq: rank 1 was killed by signal 9, so the run has ended" in dead.stderr, dead.stderr
    assert time.time() - Path("steps-1.log").stat().st_mtime < 60  # since its last step
    again = fit_on_two("--ckpt_path=last")
    assert again.returncode == 0, again.stderr
    assert [path.name for path in Path("runs/quickstart").iterdir()] == ["version_0"]


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "step"), [(0, 30), (1, 40)])
def test_ranks_stop_together(rank: int, step: int, workspace: Path):
    """SIGTERM to one of two ranks: both stop after the same step, save it, leave with 143, and no step is repeated.

    After 40 steps an epoch's validation begins, which is finished.
    """
    stopped = fit_on_two(*sends(signal.SIGTERM, rank, step))
    assert stopped.returncode == 143, stopped.stderr
    one, two = (Path(f"steps-{rank}.log").read_text().split() for rank in (0, 1))
    assert one == two and step <= len(one) < 60
    saved = torch.load("runs/quickstart/version_0/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert saved == len(one)
    again = fit_on_two("--ckpt_path=last", *sends(signal.SIGTERM, rank, step=-1))
    assert again.returncode == 0, again.stderr
    assert Path("steps-0.log").read_text().split() == [str(step) for step in range(1, 61)]


def test_killed_ranks_are_named():
    """By a note on the error; ranks that live, or end in another way, are not."""

    def notes(error: Exception, *scripts: str) -> list[str]:
        processes = [subprocess.Popen([sys.executable, "-c", script]) for script in scripts]
        trainer = SimpleNamespace(global_rank=4, strategy=SimpleNamespace(launcher=SimpleNamespace(procs=processes)))
        NameDeadRank().on_exception(trainer, None, error)
        for process in processes:
            process.kill()
            process.wait()
        return getattr(error, "__notes__", [])

    lives, ends = "import time; time.sleep(60)", "raise SystemExit(1)"
    dies = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert notes(RuntimeError("closed"), lives, dies, lives) == ["rank 6 was killed by signal 9, so the run has ended"]
    assert notes(RuntimeError("all alike"), ends, ends) == [] and notes(ValueError("mine"), dies) == []
    assert notes(RuntimeError("alone")) == []
