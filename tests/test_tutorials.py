"""The page of tutorials is typed from top to bottom as it stands there, on a few images and for a few steps."""

import csv
import re
import shlex
from pathlib import Path

import pytest
import torch

from kdq_lightning.cli import main
from kdq_lightning.runs.records import FLOAT_BITS, read_records
from tests.jpegs import PATTERNS, write_jpegs

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "tutorials.md").read_text()
QUICK = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
QUICK += ["--data.val_size=8", "--quantization.calibration_images=16", "--quantization.bits=[4]"]
TWO_STEPS = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]


def follow(page: str) -> None:
    """Write the files that a page names in their first line, run its other Python, and type its commands."""
    for language, code in re.findall(r"^```(\w+)\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        named = re.match(r"# (\S+\.\w+)\n", code)
        if named:
            Path(named[1]).write_text(code)
        elif language == "python":
            exec(compile(code, "docs/tutorials.md", "exec"), {})
        else:
            assert language == "sh"
            for line in code.replace("\\\n", " ").splitlines():
                kdq, command, *rest = shlex.split(line)
                assert kdq == "kdq"
                more = {"fit": [*QUICK, *TWO_STEPS], "quantize": QUICK, "predict": QUICK}.get(command, [])
                assert main([command, *rest, *more]) == 0, line


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tutorials(workspace: Path):
    write_jpegs(Path("photos"), train=10, test=4)
    follow(PAGE)
    for run in ("teacher", "student", "small", "mine-quantized"):
        records = read_records(Path(f"runs/{run}/version_0"))
        assert [record.bits for record in records if record.method in ("", "default")] == [4, FLOAT_BITS]
    assert "resnet8" in Path("report/report.md").read_text()
    with Path("runs/student/version_0/predictions.csv").open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 14 * len(PATTERNS)
    assert torch.export.load("small.pt2").module()(torch.zeros(3, 3, 32, 32)).shape == (3, len(PATTERNS))


def test_each_tutorial_is_short():
    """About ten lines of code each, as the page says."""
    for section in PAGE.split("\n## ")[1:]:
        code = re.findall(r"^```\w+\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
        lines = [line for line in "".join(code).splitlines() if line.strip()]
        assert 1 <= len(lines) <= 15, section.partition("\n")[0]
