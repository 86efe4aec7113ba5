"""The Trainer's own parts: precision, and checkpoints that are written whole or not at all."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from lightning.pytorch import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kdq_lightning.cli import main
from kdq_lightning.errors import UserError
from kdq_lightning.training.callbacks import LogSteps
from kdq_lightning.training.trainer import AtomicCheckpointIO, choose_precision
from tests.conftest import config


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


def test_one_batch_is_not_all():
    """After an import of rich, too, which meets the type `float | int` before Lightning meets `int | float`."""
    options = [f"limit_{stage}_batches" for stage in ("train", "val", "test")]
    program = f"""
import rich.console
from kdq_lightning.cli import main
main(["fit", "--config", "configs/quickstart.yaml", *(f"--trainer.{{name}}=1" for name in {options}), "--print_config"])
"""
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    printed = subprocess.run(
        [sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    assert all(f"{option}: 1\n" in printed.stdout for option in options)


class Losses(Callback):
    """Writes down the loss of each batch, as Lightning hands it out, and the learning rate."""

    seen: ClassVar[list[tuple[int, float, float]]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append((trainer.global_step, float(outputs["loss"]), trainer.optimizers[0].param_groups[0]["lr"]))


@pytest.mark.parametrize(("every", "accumulated", "steps"), [(3, 1, [3, 6, 9]), (2, 2, [2, 4, 6]), (0, 1, [])])
def test_losses_of_steps(every: int, accumulated: int, steps: list[int], workspace: Path):
    """Every so many steps of the optimizer, a point each; by default none."""
    Losses.seen.clear()
    quick = ["fit", "--config", config("quickstart"), "--model=Classifier", "--model.network=resnet8"]
    quick += ["--trainer.max_epochs=2", "--trainer.limit_train_batches=5", "--trainer.enable_progress_bar=false"]
    quick += ["--quantization.enabled=false", "--trainer.callbacks+=tests.test_trainer.Losses"]
    own = [f"--trainer.log_every_n_steps={every}"] if every else []
    assert main([*quick, *own, f"--trainer.accumulate_grad_batches={accumulated}"]) == 0
    events = EventAccumulator("runs/quickstart/version_0").Reload()
    assert ("train/loss_step" in events.Tags()["scalars"]) == ("lr_step" in events.Tags()["scalars"]) == bool(every)
    if not every:
        return
    last = {step: (loss * accumulated, rate) for step, loss, rate in reversed(Losses.seen)}  # the first of each step
    losses, rates = ([(e.step, e.value) for e in events.Scalars(tag)] for tag in ("train/loss_step", "lr_step"))
    assert losses == [(step, pytest.approx(last[step][0], rel=1e-5)) for step in steps]
    assert rates == [(step, pytest.approx(last[step][1], rel=1e-5)) for step in steps]
    assert [event.step for event in events.Scalars("train/loss")] == [max(last) // 2, max(last)]


def test_no_look_at_the_device_between():
    """The loss is not even asked for, where a tensor's value would make the host wait."""

    class Untouched(dict):
        def __getitem__(self, key):
            raise AssertionError("the loss is looked at")

    log = LogSteps(every=4)
    log.on_train_start(SimpleNamespace(global_step=4), None)
    for step in (4, 5, 6, 7):
        log.on_train_batch_end(SimpleNamespace(global_step=step), None, Untouched(), None, 0)
    with pytest.raises(AssertionError, match="looked at"):
        log.on_train_batch_end(SimpleNamespace(global_step=8), None, Untouched(), None, 0)


MISTAKES = [
    ("--trainer.logger=WandbLogger", "wandb is not installed: pip install -U 'wandb"),
    (
        "--trainer.callbacks=EarlyStopping --trainer.callbacks.monitor=val/nothing",
        "EarlyStopping watches val/nothing, which this run doesn't log: give its monitor one of val/top1",
    ),
    ("--trainer.log_every_n_steps=-1", "log_every_n_steps must be above 0, got -1"),
]


@pytest.mark.parametrize(("options", "sentence"), MISTAKES)
def test_what_lightning_refuses_is_a_sentence(options: str, sentence: str, workspace: Path, capsys):
    if "Wandb" in options and importlib.util.find_spec("wandb"):
        pytest.skip("the package is there")
    quick = ["fit", "--config", config("quickstart"), "--model=Classifier", "--model.network=resnet8"]
    quick += ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.enable_progress_bar=false"]
    assert main([*quick, "--quantization.enabled=false", *options.split()]) == 1
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1, error
