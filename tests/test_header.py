"""The first lines of a command, those of its epochs, and the last ones; and `kdq list`."""

import os
import pty
import re
import shlex
import struct
import sys
import termios
from contextlib import suppress
from fcntl import ioctl
from pathlib import Path

import pytest

from kdq_lightning.cli import main
from kdq_lightning.modules.training_epoch import epoch_line
from kdq_lightning.runs.checkpoints import load_trained
from tests.processes import start_in_fork, wait_for

QUICK = ["--data=DigitsDataModule", "--data.batch_size=64", "--trainer.accelerator=cpu", "--trainer.max_epochs=1"]
QUICK += ["--trainer.enable_progress_bar=false", "--trainer.limit_train_batches=1", "--trainer.precision=32-true"]
QUICK += ["--quantization.bits=[4]", "--quantization.calibration_images=64", "--quantization.methods=[default]"]


def header(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the lines before anything else is printed."""
    lines = capsys.readouterr().out.splitlines()
    labels = ("network", "data", "classes", "device", "folder", "weights", "teacher", "note", "trained by", " " * 11)
    return [
        line
        for i, line in enumerate(lines)
        if all(other.strip() and other.startswith(labels) for other in lines[: i + 1])
    ]


def test_the_first_lines(workspace: Path, capsys: pytest.CaptureFixture[str]):
    """Of each command, exactly: what it works on, and where its weights and its teacher come from."""
    control = ["--model=Classifier", "--model.network=resnet8", *QUICK]
    assert main(["fit", *control, "--name=teacher"]) == 0
    about = ["network    resnet8, 75,290 parameters"]
    classes = ["classes    10: 0, 1, 2, 3, 4, 5, 6, 7, ...", "device     cpu, 32-true"]
    train = ["data       digits, images of 3 x 16 x 16: 1,294 to train, 144 to validate"]
    assert header(capsys)[:5] == [*about, *train, *classes, "folder     runs/teacher/version_0"]

    (trained,) = load_trained("runs/teacher").values()
    validated = [f"           resnet8, trained on digits, {trained.val_top1:.2f} % in validation"]
    teacher = "runs/teacher/version_0/checkpoints/best.ckpt"
    student = ["--model=VanillaKD", "--model.network=resnet8", "--model.teacher=runs/teacher", *QUICK]
    assert main(["fit", *student, "--name=student", "--quantization.enabled=false"]) == 0
    folder = ["folder     runs/student/version_0"]
    assert header(capsys) == [*about, *train, *classes, *folder, f"teacher    {teacher}", *validated]
    weights = [f"weights    {teacher}", *validated]
    assert main(["validate", *control, "--ckpt_path=runs/teacher"]) == 0
    assert header(capsys) == [*about, *train, *classes, *weights]
    assert main(["test", *control, "--ckpt_path=runs/teacher"]) == 0
    assert header(capsys) == [*about, "data       digits, images of 3 x 16 x 16: 359 to test", *classes, *weights]
    assert main(["quantize", *control, "--ckpt_path=runs/teacher", "--name=again"]) == 0
    folder = ["folder     runs/again-quantized/version_0"]
    assert header(capsys)[:8] == [*about, *train, *classes, *folder, *weights]


def test_long_lines_are_wrapped(workspace: Path, capsys: pytest.CaptureFixture[str]):
    """Of peers, each has its size; no line is wider than a terminal."""
    networks = "--model.networks=[torchvision/mobilenet_v3_small,torchvision/shufflenet_v2_x0_5,resnet8]"
    options = ["--model=MutualLearning", networks, *QUICK, "--quantization.enabled=false", "--data.batch_size=8"]
    assert main(["fit", *options, "--trainer.limit_val_batches=1"]) == 0
    lines = header(capsys)
    assert lines[:2] == [
        "network    torchvision/mobilenet_v3_small + torchvision/shufflenet_v2_x0_5 +",
        "           resnet8, 1,528,106 + 352,042 + 75,290 parameters",
    ]
    assert max(map(len, lines)) <= 80


METRICS = {
    **{"train/loss": 0.4288, "train/top1": 97.66, "val/loss": 0.1226, "val/top1": 98.61},
    **{"val/agreement": 88.127, "train/images_per_second": 1337.3},
}


def test_the_line_of_an_epoch():
    """At most 80 columns: the last numbers go first; mixup has no accuracy in training, a run may have no end."""
    train = "epoch 3/16  train 97.7 %, loss 0.429  val 98.6 %"
    assert epoch_line(3, 16, METRICS) == f"{train}, 88.1 % as teacher, loss 0.123"
    alone = {name: value for name, value in METRICS.items() if name != "val/agreement"}
    assert epoch_line(3, 16, alone) == f"{train}, loss 0.123  1,337 images/s"
    assert epoch_line(3, -1, {"train/loss": 123456.0}) == "epoch 3  train loss 1.23e+05"
    huge = {**METRICS, "train/loss": 1.2345e30}
    assert max(len(epoch_line(10**n, 10**n, huge)) for n in range(12)) <= 80


def test_the_last_lines(workspace: Path, capsys: pytest.CaptureFixture[str]):
    """In a pipe: a line an epoch, no escape codes, at most 80 columns; the last line is a command that works."""
    fit = ["fit", "--model=Classifier", "--model.network=resnet8", *QUICK, "--trainer.max_epochs=2", "--name=a b"]
    fit.remove("--trainer.enable_progress_bar=false")
    assert main([*fit, "--quantization.enabled=false"]) == 0
    said = capsys.readouterr().out
    assert re.findall(r"^(epoch \S+)  train .* %, loss ", said, re.MULTILINE) == ["epoch 1/2", "epoch 2/2"]
    command = said.splitlines()[-1].removeprefix("next       kdq ")
    assert "Epoch" not in said and "\x1b" not in said and command.startswith("quantize --config 'runs/a b/version_0'")
    assert main(shlex.split(command)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and not any("\x1b" in line for line in lines)
    folder = "'runs/a b-quantized'"
    assert "kB: of the packed file; agreement: images with the float network's class" in [
        line.strip() for line in lines
    ]
    assert lines[-3:] == [
        f"results    {folder[1:-1]}/version_0",
        "curves     tensorboard --logdir runs",
        f"next       kdq report {folder}",
    ]
    assert main(shlex.split(lines[-1])[2:]) == 0


def test_a_terminal(workspace: Path, monkeypatch: pytest.MonkeyPatch):
    """The bar counts epochs as their lines do, has no version number, and is gone in the end; nothing is wrapped."""
    screen, terminal = pty.openpty()
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 80, 0, 0))
    fit = ["--model=Classifier", "--model.network=resnet8", *QUICK, "--trainer.max_epochs=2"]
    fit.remove("--trainer.enable_progress_bar=false")
    monkeypatch.setenv("TERM", "xterm")

    def run() -> int:
        os.dup2(terminal, 1)
        os.dup2(terminal, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        return main(["fit", *fit, "--trainer.limit_train_batches=20"])

    process = start_in_fork(run)
    os.close(terminal)
    shown = b""
    with suppress(OSError):  # the end of a terminal
        while chunk := os.read(screen, 1 << 16):
            shown += chunk
    assert wait_for(process) == 0
    texts = re.split(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]+", shown.decode())
    assert {"epoch 1/2", "epoch 2/2"} <= {text.strip() for text in texts}
    assert not any("v_num" in text or "Epoch" in text for text in texts)
    assert max(len(text) for text in texts) <= 80
    assert b"\x1b[2K" in shown[shown.rindex(b"epoch 2/2") :]  # the bar's line was cleared


def test_lists(capsys: pytest.CaptureFixture[str]):
    """One name a line, first."""
    for kind, names in (
        ("networks", ["resnet18", "torchvision/mobilenet_v3_small"]),
        ("strategies", ["Classifier", "VanillaKD", "HintKD", "MutualLearning", "Recover"]),
        ("data", ["CIFARDataModule", "ImageFolderDataModule", "DigitsDataModule"]),
        ("methods", ["default", "gpfq", "mixed", "custom"]),
    ):
        assert main(["list", kind]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert set(names) <= {line.split()[0] for line in lines}
        assert all(len(line.split()) == 1 for line in lines) == (kind == "networks")
    with pytest.raises(SystemExit) as stop:
        main(["list", "colours"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "networks" in error
