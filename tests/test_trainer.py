"""The Trainer's own parts: precision, and checkpoints that are written whole or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdq_lightning.errors import UserError
from kdq_lightning.training.trainer import AtomicCheckpointIO, choose_precision


def test_precision_follows_the_hardware(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for avx512, amx, expected in ((False, False, "32-true"), (True, False, "bf16-mixed"), (False, True, "bf16-mixed")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda found=avx512: found)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda found=amx: found)
        assert choose_precision() == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert choose_precision() == "32-true"


def test_a_broken_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space"):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("option", ["limit_train_batches", "limit_val_batches", "limit_test_batches"])
def test_one_batch_is_not_all(option: str):
    """After an import of rich, too, which meets the type `float | int` before Lightning meets `int | float`."""
    program = f"""
import rich.console
from kdq_lightning.cli import main
main(["fit", "--config", "configs/quickstart.yaml", "--trainer.{option}=1", "--print_config"])
"""
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    printed = subprocess.run(
        [sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    assert f"{option}: 1\n" in printed.stdout
