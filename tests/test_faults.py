"""Kills at random moments, full disks, two runs at once, hundreds of runs in one process: nothing is lost or left."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from kdq_lightning.cli import main
from kdq_lightning.results import read_records
from tests.conftest import config

KILLS = {"at a random moment": 40, "inside a checkpoint write": 6, "inside quantization": 6}
STEPS_AN_EPOCH = 20
FIT = [
    *("fit", "--config", config("quickstart"), "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"),
    *("--model=Classifier", "--model.network=resnet8", "--model.learning_rate=0.1", "--data.batch_size=64"),
    *("--trainer.max_epochs=5", f"--trainer.limit_train_batches={STEPS_AN_EPOCH}"),
    *("--quantization.bits=[2,3,4]", "--quantization.calibration_images=64"),
]


class Server:
    """Runs `kdq` commands, each in a process of its own that may die."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fault_server"],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, arguments: list[str], fault: str = "", after: float = 0) -> int:
        """Run a command; return its exit code, or minus the signal that killed it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps({"arguments": arguments, "fault": fault, "after": after}), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())


def newest_version() -> Path:
    """Return where the run ended: one killed before its first checkpoint starts again in a new version."""
    return max(Path("runs/quickstart").iterdir(), key=lambda folder: int(folder.name.removeprefix("version_")))


def state(version: Path) -> dict[str, object]:
    """Return what a finished run leaves: weights, records but for their seconds, packed files."""
    weights = torch.load(version / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    return {
        "weights": {key: value.numpy().tobytes() for key, value in weights.items()},
        "records": [{**vars(record), "seconds": None} for record in read_records(version)],
        "packed files": {file.name: file.read_bytes() for file in (version / "packed").iterdir()},
        "hidden files": [str(path) for path in version.rglob(".*")],
    }


@pytest.mark.slow
def test_kills(workspace: Path, capsys: pytest.CaptureFixture[str]):
    """After every kill the same command goes on, and ends with the unbroken run's files, to the bit."""
    server, chance = Server(), random.Random(0)
    assert server.run(FIT) == 0, Path("output.log").read_text()
    unbroken = state(newest_version())
    left, lost, repeated, runs = Counter(KILLS), [], [], 0
    while left.total() and not lost:
        shutil.rmtree("runs")
        Path("steps.log").unlink()
        code, runs = -signal.SIGKILL, runs + 1
        while code == -signal.SIGKILL:
            fault = chance.choice([*left.elements()] or [""])
            after = {"at a random moment": 6 * chance.random() ** 2, "inside a checkpoint write": chance.randrange(4)}
            begun = Path("runs").exists() and (newest_version() / "checkpoints/last.ckpt").exists()
            code = server.run([*FIT, *["--ckpt_path=last"] * begun], fault, after.get(fault, chance.random()))
            left[fault] -= code == -signal.SIGKILL
        if code:
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
def test_full_disk(workspace: Path):
    """A checkpoint that doesn't fit ends the run with a sentence; the one before stays, and the run goes on from it."""
    server = Server()
    assert server.run(FIT) == 0, Path("output.log").read_text()
    unbroken = state(newest_version())
    shutil.rmtree("runs")
    assert server.run(FIT, "disk is full", 3) == 1
    said = Path("output.log").read_text()
    assert "best.ckpt could not be written" in said or "last.ckpt could not be written" in said
    assert "Traceback" not in said and not [*Path("runs").rglob(".*")]
    assert server.run([*FIT, "--ckpt_path=last"]) == 0
    assert state(newest_version()) == unbroken


@pytest.mark.slow
def test_two_runs_of_one_name_at_once(workspace: Path):
    """Each has a folder of its own."""
    command = [sys.executable, "-m", "kdq_lightning.cli", *FIT]
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert {path.name for path in Path("runs/quickstart").iterdir()} == {"version_0", "version_1"}
    assert state(Path("runs/quickstart/version_0")) == state(Path("runs/quickstart/version_1"))


@pytest.mark.slow
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
    assert figures[199][0] < figures[19][0] + 30
