"""Runs `kdq` commands in forked processes that die where they are told to, a JSON object a line; prints exit codes.

Everything is imported once, so that a start costs a fraction of a second.
"""

import json
import os
import resource
import signal
import sys
import threading
from pathlib import Path

import sklearn.datasets  # noqa: F401
import torch
import torch.utils.tensorboard

from kdq_lightning import files
from kdq_lightning.cli import main
from kdq_lightning.modules.classifier import Classifier
from kdq_lightning.training import interruption
from kdq_lightning.training.post_training import PostTrainingQuantization


def die() -> None:
    """Leave at once: nothing is flushed, no handler runs."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_checkpoint_write(after: int) -> None:
    """Leave half of a checkpoint beside its place, after some that are written."""
    real, left = Path.replace, after

    def replace(self: Path, target: Path) -> Path:
        nonlocal left
        if target.suffix == ".ckpt":
            left -= 1
            if left < 0:
                os.truncate(self, self.stat().st_size // 2)
                die()
        return real(self, target)

    Path.replace = replace  # type: ignore[method-assign]


def die_in_quantization(after: float) -> None:
    """Leave some seconds after quantization has begun."""
    real = PostTrainingQuantization._quantize

    def quantize(*args: object) -> None:
        threading.Timer(after, die).start()
        real(*args)

    PostTrainingQuantization._quantize = quantize  # type: ignore[method-assign]


def fill_disk(after: int) -> None:
    """Let no file grow beyond 100 kB, after some checkpoints that do."""
    real, left = Path.replace, after

    def replace(self: Path, target: Path) -> Path:
        nonlocal left
        left -= target.suffix == ".ckpt"
        if not left:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        return real(self, target)

    Path.replace = replace  # type: ignore[method-assign]


def save_all_the_time() -> None:
    """Let every step be long enough for a checkpoint."""
    interruption.ASK_SECONDS = interruption.SAVE_SECONDS = 0


def die_in_validation(at: float) -> None:
    """Leave in the validation after so many steps."""
    real = Classifier.on_validation_start

    def start(self: Classifier) -> None:
        if self.global_step == at:
            die()
        real(self)

    Classifier.on_validation_start = start  # type: ignore[method-assign]


def note_steps(signum: int = 0, at: float = -1) -> None:
    """Append the number of each training step that begins to `steps.log`; in one of them get a signal."""
    real = Classifier.training_step
    log = os.open("steps.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def step(self: Classifier, *args: object) -> torch.Tensor:
        os.write(log, f"{self.global_step}\n".encode())
        if self.global_step == at:
            os.kill(os.getpid(), signum)
        return real(self, *args)

    Classifier.training_step = step  # type: ignore[method-assign]


def run(arguments: list[str], fault: str, after: float) -> None:
    """Run one command to its end, or to its fault."""
    signals = {"terminated": signal.SIGTERM, "killed with checkpoints by time": signal.SIGKILL}
    note_steps(signals.get(fault, 0), after if fault in signals else -1)
    if fault.endswith("with checkpoints by time"):
        save_all_the_time()
        if fault.startswith("killed in validation"):
            die_in_validation(after)
    elif fault == "inside a checkpoint write":
        die_in_checkpoint_write(int(after))
    elif fault == "inside quantization":
        die_in_quantization(after)
    elif fault == "disk is full":
        fill_disk(int(after))
    elif fault == "at a random moment":
        threading.Timer(after, die).start()
    with Path("output.log").open("w") as sys.stdout:
        sys.stderr = sys.stdout
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
    os._exit(code)


if __name__ == "__main__":
    torch.set_num_threads(1)
    files.FRESH_SECONDS = 0
    for line in sys.stdin:
        if not (child := os.fork()):
            run(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
