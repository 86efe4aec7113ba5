"""Kills at random moments, full disks, two runs at once, hundreds of runs in one process: nothing is lost or left."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kdq_lightning.cli import main
from kdq_lightning.runs.records import read_records
from tests.conftest import config

KILLS = {"at a random moment": 40, "inside a checkpoint write": 6, "inside quantization": 6}
RUNS_AT_MOST = 30  # for all of them: each run is killed again and again until it is done, so some ten are enough
STEPS_AN_EPOCH = 20
FIT = [
    *("fit", "--config", config("quickstart"), "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"),
    *("--model=Classifier", "--model.network=resnet8", "--model.learning_rate=0.1", "--data.batch_size=64"),
    *("--trainer.max_epochs=5", f"--trainer.limit_train_batches={STEPS_AN_EPOCH}", "--data.image_sizes=[8,12,16]"),
    *("--quantization.bits=[2,3,4]", "--quantization.calibration_images=64"),
]


Server = Callable[..., int]


@pytest.fixture
def server(workspace: Path) -> Iterator[Server]:
    """Return a function that runs a command in a process of its own, and returns its exit code, or minus its signal."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    command = [sys.executable, "-m", "tests.fault_server"]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def run(arguments: list[str], fault: str = "", after: float = 0) -> int:
            assert process.stdin and process.stdout
            print(json.dumps({"arguments": arguments, "fault": fault, "after": after}), file=process.stdin, flush=True)
            return int(process.stdout.readline())

        yield run


def newest_version() -> Path:
    """Return where the run ended: one killed before its first checkpoint starts again in a new version."""
    return max(
        Path("runs/quickstart").glob("version_*"),
        key=lambda folder: int(folder.name.removeprefix("version_")),
        default=Path("runs/quickstart/version_0"),
    )


def state(version: Path) -> dict[str, object]:
    """Return what a finished run leaves: weights, records but for their seconds, packed files."""
    weights = torch.load(version / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    return {
        "weights": {key: value.numpy().tobytes() for key, value in weights.items()},
        "records": [{**vars(record), "seconds": None} for record in read_records(version)],
        "packed files": {file.name: file.read_bytes() for file in (version / "packed").iterdir()},
        "hidden files": [str(path) for path in version.rglob(".*")],
    }


class Terminate(Callback):
    """Sends SIGTERM to this process after a batch of the second epoch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == self.batch:
            signal.raise_signal(signal.SIGTERM)


def test_terminated_while_gradients_are_accumulated(workspace: Path):
    """Stopped after the optimizer's step, as gradients are in no checkpoint: resumed, the unbroken run's weights.

    An epoch has 7 batches, so 3 steps of 3, 3 and 1; SIGTERM in its last one cuts off the validation, and with it the
    epoch.
    """
    few = ["--trainer.max_epochs=2", "--trainer.limit_train_batches=7", "--trainer.accumulate_grad_batches=3"]
    fit, last = [*FIT, *few, "--quantization.enabled=false"], "checkpoints/last.ckpt"
    assert main([*fit, "--name=unbroken"]) == 0
    unbroken = torch.load(Path("runs/unbroken/version_0", last), weights_only=True)
    for batch, steps in ((2, 4), (3, 5), (6, 3)):
        name = f"--name=stopped{batch}"
        terminate = f"{{class_path: tests.test_faults.Terminate, init_args: {{batch: {batch}}}}}"
        with pytest.raises(SystemExit) as stop:
            main([*fit, name, f"--trainer.callbacks={terminate}"])
        assert stop.value.code == 143
        stopped = torch.load(Path(f"runs/stopped{batch}/version_0", last), weights_only=True)
        assert stopped["global_step"] == steps
        assert main([*fit, name, "--ckpt_path=last"]) == 0
        resumed = torch.load(Path(f"runs/stopped{batch}/version_0", last), weights_only=True)
        assert resumed["global_step"] == unbroken["global_step"] == 6
        assert all(torch.equal(value, resumed["state_dict"][key]) for key, value in unbroken["state_dict"].items())


class PressCtrlC(Callback):
    """Presses Ctrl-C after a batch of the second epoch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 2:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c(workspace: Path, capsys: pytest.CaptureFixture[str]):
    """The run stops after its step, saved, with 130, and says how to go on, which gives the unbroken run's weights."""
    few = ["--trainer.max_epochs=2", "--trainer.limit_train_batches=7", "--quantization.enabled=false"]
    fit, last, before = [*FIT, *few], "checkpoints/last.ckpt", signal.getsignal(signal.SIGINT)
    assert main([*fit, "--name=unbroken"]) == 0
    unbroken = torch.load(Path("runs/unbroken/version_0", last), weights_only=True)
    with pytest.raises(SystemExit) as stop:
        main([*fit, "--name=broken", "--trainer.callbacks=tests.test_faults.PressCtrlC"])
    assert stop.value.code == 130 and signal.getsignal(signal.SIGINT) is before
    said = capsys.readouterr().err
    assert "stopping after this step" in said
    command = re.search(r"kdq: stopped in epoch 2, saved; go on with: kdq (fit --config (\S+) --ckpt_path \S+)\n", said)
    assert command[2] == "runs/broken/version_0/config.yaml"
    assert torch.load(Path("runs/broken/version_0", last), weights_only=True)["global_step"] == 10
    assert main([*command[1].split(), "--trainer.callbacks=[]"]) == 0
    resumed = torch.load(Path("runs/broken/version_0", last), weights_only=True)
    assert resumed["global_step"] == unbroken["global_step"] == 14
    assert all(torch.equal(value, resumed["state_dict"][key]) for key, value in unbroken["state_dict"].items())


class PressCtrlCAtTheEnd(Callback):
    """Presses Ctrl-C when training is finished, before it is quantized."""

    def on_train_end(self, trainer, pl_module):
        os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_after_training(workspace: Path, capsys: pytest.CaptureFixture[str]):
    """No epoch is named that the run doesn't have, and the command quantizes."""
    few = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--quantization.bits=[4]"]
    few += ["--quantization.calibration_images=16", "--quantization.methods=[default]"]
    with pytest.raises(SystemExit) as stop:
        main([*FIT, *few, "--name=run", "--trainer.callbacks=tests.test_faults.PressCtrlCAtTheEnd"])
    assert stop.value.code == 130
    command = capsys.readouterr().err.partition("kdq: stopped after training, saved; go on with: kdq ")[2]
    assert main([*command.split(), "--trainer.callbacks=[]"]) == 0
    assert Path("runs/run/version_0/quantized.csv").is_file()


def test_ctrl_c_before_training(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("kdq_lightning.commands.report.main", interrupted)
    assert main(["report", "runs"]) == 130
    assert capsys.readouterr().err == "kdq: stopped\n"


@pytest.mark.slow(seconds=160)
def test_kills(server: Server, capsys: pytest.CaptureFixture[str]):
    """After every kill the same command goes on, and ends with the unbroken run's files, to the bit."""
    chance = random.Random(0)
    assert server(FIT) == 0, Path("output.log").read_text()
    unbroken = state(newest_version())
    left, lost, repeated, runs = Counter(KILLS), [], [], 0
    while left.total() and not lost:
        assert runs < RUNS_AT_MOST, f"these kills haven't come, so what they are in isn't called: {+left}"
        shutil.rmtree("runs")
        Path("steps.log").unlink()
        code, runs = -signal.SIGKILL, runs + 1
        while code == -signal.SIGKILL:
            fault = chance.choice([*left.elements()] or [""])
            after = {"at a random moment": 6 * chance.random() ** 2, "inside a checkpoint write": chance.randrange(4)}
            begun = (newest_version() / "checkpoints/last.ckpt").exists()
            code = server([*FIT, *["--ckpt_path=last"] * begun], fault, after.get(fault, chance.random()))
            left[fault] -= code == -signal.SIGKILL
        if code and "is finished: nothing is left" not in Path("output.log").read_text():
            lost.append(f"{fault}: exit code {code}: {Path('output.log').read_text()[-2000:]}")
        else:
            lost += [f"run {runs}: {key}" for key, value in state(newest_version()).items() if value != unbroken[key]]
        steps = [int(line) for line in Path("steps.log").read_text().split()]
        repeated += [before - after + 1 for before, after in pairwise(steps) if after <= before]
    with capsys.disabled():
        print(f"\nkills in {runs} runs: {KILLS}; lost: {len(lost)}; steps repeated: {sum(repeated)} in all,")
        print(f"at most {max(repeated)} after a kill, where an epoch, the checkpoint interval, has {STEPS_AN_EPOCH}")
    assert not lost, "\n".join(lost)
    assert max(repeated) <= STEPS_AN_EPOCH


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 33, 39, 40, 99])  # of 100, with 20 an epoch
def test_terminated_while_training(step: int, server: Server):
    """SIGTERM ends the run with 143 after the step; no step is repeated unless it cuts off the epoch's validation."""
    assert server(FIT) == 0, Path("output.log").read_text()
    unbroken = state(newest_version())
    shutil.rmtree("runs")
    Path("steps.log").unlink()
    assert server(FIT, "terminated", step) == 143, Path("output.log").read_text()
    assert server([*FIT, "--ckpt_path=last"]) == 0, Path("output.log").read_text()
    steps = [int(line) for line in Path("steps.log").read_text().split()]
    goes_on = step + 1 if (step + 1) % STEPS_AN_EPOCH else step + 1 - STEPS_AN_EPOCH  # the validation was cut off
    assert steps == [*range(step + 1), *range(goes_on, 100)]
    assert state(newest_version()) == unbroken


@pytest.mark.slow
def test_checkpoints_by_time(server: Server):
    """Epochs longer than the interval, here of 0 s, are saved in between: after a kill no more is done again."""
    assert server(FIT) == 0, Path("output.log").read_text()
    unbroken = state(newest_version())
    shutil.rmtree("runs")
    Path("steps.log").unlink()
    for step in (1, 33, 39, 40, 77):
        goes_on = ["--ckpt_path=last"] * (step > 1)
        assert server([*FIT, *goes_on], "killed with checkpoints by time", step) == -signal.SIGKILL
    for step in (80, 100):
        fault = "killed in validation with checkpoints by time"
        assert server([*FIT, "--ckpt_path=last"], fault, step) == -signal.SIGKILL
    assert server([*FIT, "--ckpt_path=last"]) == 0, Path("output.log").read_text()
    steps = [int(line) for line in Path("steps.log").read_text().split()]
    repeated = [before - after + 1 for before, after in pairwise(steps) if after <= before]
    assert len(repeated) == 7 and max(repeated) <= 1
    assert state(newest_version()) == unbroken


@pytest.mark.slow
def test_truncated_events(server: Server):
    """A power cut in the middle of a line of events: the run goes on, and TensorBoard shows the points after it."""
    assert server(FIT, "terminated", 33) == 143, Path("output.log").read_text()
    (events,) = newest_version().glob("events.*")
    os.truncate(events, events.stat().st_size - 7)
    assert server([*FIT, "--ckpt_path=last"]) == 0, Path("output.log").read_text()
    shown = EventAccumulator(str(newest_version()))
    shown.Reload()
    steps = [event.step for event in shown.Scalars("train/loss")]
    assert steps[-4:] == [40, 60, 80, 100] and len(set(steps)) == len(steps)
    assert len(shown.Scalars("quantized/accuracy_vs_bits")) == 3


@pytest.mark.slow
def test_full_disk(server: Server):
    """A checkpoint that doesn't fit ends the run with a sentence; the one before stays, and the run goes on from it."""
    assert server(FIT) == 0, Path("output.log").read_text()
    unbroken = state(newest_version())
    shutil.rmtree("runs")
    assert server(FIT, "disk is full", 3) == 1
    said = Path("output.log").read_text()
    assert "best.ckpt could not be written" in said or "last.ckpt could not be written" in said
    assert "Traceback" not in said and not [*Path("runs").rglob(".*")]
    assert server([*FIT, "--ckpt_path=last"]) == 0
    assert state(newest_version()) == unbroken


@pytest.mark.slow
def test_two_runs_of_one_name_at_once(workspace: Path):
    """Each has a folder of its own."""
    command = [sys.executable, "-m", "kdq_lightning.cli", *FIT]
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert {path.name for path in Path("runs/quickstart").iterdir()} == {"version_0", "version_1"}
    assert state(Path("runs/quickstart/version_0")) == state(Path("runs/quickstart/version_1"))


@pytest.mark.slow(seconds=350)
@pytest.mark.timeout(1800)
def test_two_hundred_fits_in_one_process(workspace: Path, capsys: pytest.CaptureFixture[str]):
    """Memory stays flat, no file stays open."""
    short = [*FIT, "--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--quantization.bits=[2]"]
    figures = []
    for run in range(200):
        assert main([*short, f"--name=run{run}"]) == 0
        memory = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
        figures.append((memory, len(os.listdir("/proc/self/fd")), threading.active_count()))
        shutil.rmtree("runs")
    with capsys.disabled():
        print("\nMB, open files and threads after 20, 110 and 200 fits:", figures[19], figures[109], figures[199])
    assert figures[199][1:] == figures[19][1:]
    assert figures[199][0] < figures[19][0] + 100  # a run whose images and networks stay alive is 2 MB
