"""Known errors of public code, put into ours one at a time: each must break a test."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "kdq_lightning"
BREAKABLE = ["tests/test_losses.py", "tests/test_modules.py"]  # the tests that must notice

LOSSES = "losses.py"
MUTATIONS = {
    "none": (LOSSES, "", ""),
    "BatchNorm in train mode while evaluating": (
        "modules/evaluated.py",
        "{name: network(images).float()",
        "{name: network.train()(images).float()",
    ),
    "KD without τ²": (LOSSES, "return temperature**2 * F.kl_div", "return F.kl_div"),
    "KD averaged over classes": (LOSSES, '"batchmean"', '"mean"'),
    "KD reversed": (LOSSES, "F.kl_div(log_student, log_teacher", "F.kl_div(log_teacher, log_student"),
    "half precision kept": (
        LOSSES,
        "return logits if logits.dtype == torch.float64 else logits.float()",
        "return logits",
    ),
    "DKD without τ²": (LOSSES, "return temperature**2 * (alpha", "return 1 * (alpha"),
    "DKD not renormalised": (LOSSES, "others.log_softmax(1)", "others - logits.logsumexp(1, keepdim=True)"),
    "DKD averaged over classes": (LOSSES, "(others_t - others_s)).sum(1)", "(others_t - others_s)).mean(1)"),
    "DKD without CE": ("modules/dkd.py", "loss = ce + self.ramp()", "loss = self.ramp()"),
    "DKD counts epochs from 0": ("modules/dkd.py", "(self.current_epoch + 1)", "self.current_epoch"),
    "mutual learning without stop-gradient": (LOSSES, "kd_loss(own, other.detach(), ", "kd_loss(own, other, "),
    "mutual learning by squared error": (
        LOSSES,
        "kd_loss(own, other.detach(), temperature=1.0)",
        "F.mse_loss(own.softmax(1), other.detach().softmax(1))",
    ),
    "mutual learning reversed": (LOSSES, "kd_loss(own, other.detach(), ", "kd_loss(other.detach(), own, "),
    "mixup's teacher sees unmixed images": (
        "modules/mixup.py",
        "self.teacher_logits(mixed.images)",
        "self.teacher_logits(view.images)",
    ),
    "mixup's λ the other way round": (
        LOSSES,
        "torch.lerp(partner(images), images",
        "torch.lerp(images, partner(images)",
    ),
    "label weight the other way round": (
        "modules/vanilla.py",
        "self.label_weight * ce + (1 - self.label_weight) * kd",
        "(1 - self.label_weight) * ce + self.label_weight * kd",
    ),
    "hint loss not halved": (LOSSES, "_exact(teacher_features)) / 2", "_exact(teacher_features))"),
    "teacher in train mode": ("modules/teacher.py", "network.eval()", "network.train()"),
    "teacher fed the student's statistics": (
        "modules/teacher.py",
        "normalize(images, self.statistics)",
        "normalize(images, type(self.statistics)((0.5,) * 3, (0.2,) * 3))",
    ),
    "schedule stepped by epoch": ("modules/optimization.py", '"interval": "step"', '"interval": "epoch"'),
    "weight decay on BatchNorm": ("modules/optimization.py", "if decayed else 0.0", "if True else 0.0"),
}


@pytest.mark.parametrize("name", [name for name in MUTATIONS if name != "none"])
def test_every_error_still_finds_its_place(name: str):
    """The text that an error replaces stands once in its file, so that moved code can't disarm the error unseen."""
    file, right, wrong = MUTATIONS[name]
    path = ROOT / PACKAGE / file
    assert path.is_file(), f"{file} has moved: mend the mutation {name!r}"
    assert path.read_text().count(right) == 1 and right != wrong, f"{file} has changed: mend the mutation {name!r}"


@pytest.mark.slow(seconds=10)
@pytest.mark.parametrize("name", MUTATIONS)
def test_error_breaks_a_test(name: str, tmp_path: Path):
    """Without an error the tests pass; with one of them a test fails, and not because a file can't be imported."""
    file, right, wrong = MUTATIONS[name]
    copy = tmp_path / "copy"
    unneeded = shutil.ignore_patterns("__pycache__", "fixtures")
    for folder in (PACKAGE, "tests", "configs"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=unneeded)
    shutil.copy(ROOT / "pyproject.toml", copy)
    target = copy / PACKAGE / file
    code = target.read_text()
    target.write_text(code.replace(right, wrong) if right else code)
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *BREAKABLE],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == (0 if name == "none" else 1), found.stdout[-2000:]
    assert ("FAILED tests/" in found.stdout) == (name != "none"), found.stdout[-2000:]
