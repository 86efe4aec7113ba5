"""The first lines of a command, and `kdq list`."""

from pathlib import Path

import pytest

from kdq_lightning.cli import main
from kdq_lightning.runs.checkpoints import load_trained

QUICK = ["--data=DigitsDataModule", "--data.batch_size=64", "--trainer.accelerator=cpu", "--trainer.max_epochs=1"]
QUICK += ["--trainer.enable_progress_bar=false", "--trainer.limit_train_batches=1", "--trainer.precision=32-true"]
QUICK += ["--quantization.bits=[4]", "--quantization.calibration_images=64", "--quantization.methods=[default]"]


def header(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the lines before anything else is printed."""
    lines = capsys.readouterr().out.splitlines()
    labels = ("network", "data", "classes", "device", "folder", "weights", "teacher", "note", "trained by", " ")
    return [line for i, line in enumerate(lines) if all(other.startswith(labels) for other in lines[: i + 1])]


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
