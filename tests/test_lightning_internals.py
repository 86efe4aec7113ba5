"""What this project relies on in Lightning without a promise, a test each: who raises the version reads what broke."""

import ast
import inspect
import io
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch.utils.tensorboard import SummaryWriter

from kdq_lightning.training.callbacks import checkpoint_callbacks
from kdq_lightning.training.lightning_internals import (
    EpochBar,
    ModelCheckpoint,
    StageTrainer,
    WithoutRunning,
    completed_epochs,
    pass_on_signal,
    started_processes,
    write_hyperparameters,
    write_margin_charts,
)
from tests.printed import DrawnMeanwhile

PACKAGE = Path(__file__).resolve().parents[1] / "kdq_lightning"
QUIET: dict[str, Any] = {
    **{"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False},
    **{"enable_model_summary": False, "max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 1},
}


class Steps(BoringModel):
    """Counts its training and validation steps."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[str] = []

    def training_step(self, batch, batch_idx):
        self.done.append("train")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.done.append("val")


def test_the_bar_counts_epochs_from_one(monkeypatch: pytest.MonkeyPatch):
    """`_get_train_description` is what stands before the bar, and `progress.tasks` are all of its bars."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    bar, seen = EpochBar(refresh_rate=20, console_kwargs={"file": io.StringIO()}), []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append([task.description for task in bar.progress.tasks if task.visible])

    trainer = LightningTrainer(
        **QUIET | {"enable_progress_bar": True, "enable_checkpointing": False}, callbacks=[bar, Look()]
    )
    trainer.fit(BoringModel())
    assert seen == [["epoch 1/2"]] * 3 + [["epoch 2/2"]] * 3
    assert bar.progress.tasks and not any(task.visible for task in bar.progress.tasks)


def test_bars_are_not_drawn_while_a_line_is_printed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    bar = EpochBar(refresh_rate=20, console_kwargs={"file": io.StringIO()})
    meanwhile = DrawnMeanwhile(lambda: bar.progress.refresh())

    class Printing(Callback):
        def on_train_start(self, trainer, pl_module):
            bar.progress.console.push_render_hook(meanwhile)
            bar.print("a line")
            bar.progress.console.pop_render_hook()

    trainer = LightningTrainer(
        **QUIET | {"enable_progress_bar": True, "enable_checkpointing": False}, callbacks=[bar, Printing()]
    )
    trainer.fit(BoringModel())
    assert meanwhile.finished and not any(meanwhile.finished)


def test_a_stage_can_be_replaced():
    """`_run_stage` is called once a command, with the module set up, and what it does is all that happens."""
    seen: list[tuple[str | None, bool]] = []

    class Replaced(StageTrainer):
        def run_stage(self) -> list[Any]:
            seen.append((self.state.fn, self.lightning_module is not None and self.strategy.model is not None))
            return []

    module, trainer = Steps(), Replaced(enable_checkpointing=False, **QUIET)
    trainer.validate(module)
    trainer.fit(module)
    broken = "Lightning doesn't call Trainer._run_stage once it is set up: `kdq quantize` would validate instead"
    assert seen == [("validate", True), ("fit", True)], broken
    assert module.done == [], broken


def test_the_stage_is_lightnings_unless_replaced(tmp_path: Path):
    module = Steps()
    StageTrainer(enable_checkpointing=False, num_sanity_val_steps=0, **QUIET).fit(module)
    assert module.done == [*["train"] * 3, "val"] * 2


@pytest.mark.parametrize(("stop_at", "done"), [(2, ["train"] * 2), (4, ["train"] * 3 + ["val"])])
def test_the_loops_ask_whether_to_terminate(stop_at: int, done: list[str]):
    """After each batch but an epoch's last, they read `received_sigterm`; after a last one, when it is validated."""
    module = Steps()

    class Stopping(StageTrainer):
        def should_terminate(self) -> bool:
            return len(module.done) >= stop_at

    with pytest.raises(SIGTERMException):
        Stopping(enable_checkpointing=False, num_sanity_val_steps=0, **QUIET).fit(module)
    assert module.done == done, "Lightning reads Trainer.received_sigterm elsewhere: interruption.py stops too late"


def test_sigterm_is_noted():
    """One process alone: Lightning's own handler sets what `should_terminate` returns."""
    asked: list[bool] = []

    class Signalled(Steps):
        def training_step(self, batch, batch_idx):
            asked.append(self.trainer.should_terminate())
            signal.raise_signal(signal.SIGTERM)
            asked.append(self.trainer.should_terminate())
            return super().training_step(batch, batch_idx)

    with pytest.raises(SIGTERMException):
        StageTrainer(enable_checkpointing=False, num_sanity_val_steps=0, **QUIET).fit(Signalled())
    assert asked == [False, True], "Lightning doesn't note SIGTERM any more: a single process would not stop"


def test_a_command_is_parsed_only():
    """The constructor ends with `_run_subcommand`, the one place where a command is run."""

    class Reader(WithoutRunning, LightningCLI):
        pass

    cli = Reader(BoringModel, trainer_class=StageTrainer, args=["fit", "--trainer.max_epochs=3"])
    assert cli.config[cli.subcommand].trainer.max_epochs == 3
    assert not hasattr(cli, "trainer"), "LightningCLI instantiates elsewhere: reading settings would load networks"


def test_the_state_of_a_model_checkpoint(tmp_path: Path):
    """A moved folder's checkpoints are found by their names, whatever path the state remembers."""
    keeper = ModelCheckpoint(dirpath=tmp_path / "new")
    there = str(tmp_path / "old" / "best.ckpt")
    written = keeper.state_dict()
    keys = {"best_model_path", "kth_best_model_path", "last_model_path", "best_k_models", "dirpath", "best_model_score"}
    assert keys <= written.keys(), "ModelCheckpoint.state_dict has other keys: a moved run would forget its best epoch"
    state = {
        **written,
        **{"dirpath": str(tmp_path / "old"), "best_model_path": there, "kth_best_model_path": there},
        **{"best_k_models": {there: torch.tensor(7.0)}, "best_model_score": torch.tensor(7.0)},
    }
    keeper.load_state_dict(state)
    here = str(tmp_path / "new" / "best.ckpt")
    assert (keeper.best_model_path, keeper.kth_best_model_path, keeper.last_model_path) == (here, here, "")
    assert keeper.best_k_models == {here: 7.0} and keeper.best_model_score == 7.0
    assert keeper.dirpath == str(tmp_path / "new")


def test_the_key_of_a_model_checkpoint_s_state():
    """As files have it that are there already; under another key, their best epoch would be forgotten in silence."""
    keys = [keeper.state_key.partition(", 'every_n_train_steps'")[0] for keeper in checkpoint_callbacks()]
    assert keys == [
        "ModelCheckpoint{'monitor': 'val/top1', 'mode': 'max'",
        "ModelCheckpoint{'monitor': None, 'mode': 'min'",
    ]


def test_the_epochs_of_a_checkpoint(tmp_path: Path):
    """Complete ones count: saved at an epoch's end, and in the middle of the next."""
    found: dict[str, int] = {}

    class Saving(Steps):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            found[f"step {self.global_step}"] = self.save()

        def on_train_epoch_end(self):
            found[f"end {self.current_epoch}"] = self.save()

        def save(self) -> int:
            self.trainer.save_checkpoint(tmp_path / "now.ckpt")
            return completed_epochs(torch.load(tmp_path / "now.ckpt", weights_only=True))

    StageTrainer(enable_checkpointing=False, num_sanity_val_steps=0, **QUIET).fit(Saving())
    expected = {**{f"step {step}": step > 3 for step in range(1, 7)}, "end 0": 1, "end 1": 2}
    assert found == expected, "the `loops` of a checkpoint count otherwise: a finished run would be trained on"


def test_processes_that_a_launcher_has_started():
    """`procs` of the launcher that ddp configures, empty before the launch; a signal reaches each of them."""
    trainer = StageTrainer(**{**QUIET, "devices": 2}, strategy="ddp", enable_checkpointing=False)
    assert started_processes(trainer) == []
    launcher = trainer.strategy.launcher
    assert launcher is not None and launcher.procs == [], "the launcher has no `procs`: no dead rank would be named"
    launcher.procs = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2)]
    assert started_processes(trainer) == launcher.procs
    pass_on_signal(trainer, signal.SIGTERM)
    broken = "the launcher's `kill` sends no signal: ranks would not learn of a SIGTERM"
    assert [process.wait(10) for process in launcher.procs] == [-signal.SIGTERM] * 2, broken


def test_no_process_was_started():
    alone = StageTrainer(enable_checkpointing=False, **QUIET)
    assert started_processes(alone) == []
    pass_on_signal(alone, signal.SIGTERM)  # reaches nobody, this process neither
    forked = SimpleNamespace(strategy=SimpleNamespace(launcher=SimpleNamespace(procs=[object()])))
    assert started_processes(forked) == []  # type: ignore[arg-type]


def test_hyperparameters_go_into_the_runs_own_events(tmp_path: Path):
    with SummaryWriter(str(tmp_path)) as writer:
        write_hyperparameters(writer, {"network": "resnet8", "seed": 3}, ["quantized/float"])
    events = EventAccumulator(str(tmp_path)).Reload()
    broken = "torch writes hyper-parameters in another way: TensorBoard's HParams tab would be empty"
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(events.summary_metadata), broken
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"resnet8" in content and b"seed" in content, broken
    assert b"quantized/float" in events.summary_metadata["_hparams_/experiment"].plugin_data.content, broken
    assert len(list(tmp_path.iterdir())) == 1, broken  # no run beside it


def test_margin_charts_are_laid_out(tmp_path: Path):
    """As many series a chart as are given, where `SummaryWriter.add_custom_scalars` takes one."""
    series = [("a", "a_low", "a_high"), ("b", "b_low", "b_high")]
    with SummaryWriter(str(tmp_path)) as writer:
        write_margin_charts(writer, "quantized", {"accuracy": series})
    events = EventAccumulator(str(tmp_path)).Reload()
    broken = "torch writes summaries in another way: TensorBoard's custom scalars would be empty"
    assert "custom_scalars__config__" in events.summary_metadata, broken
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    (group,) = layout.category
    (chart,) = group.chart
    assert (group.title, chart.title) == ("quantized", "accuracy")
    assert [(one.value, one.lower, one.upper) for one in chart.margin.series] == series


NAMED_TUPLE = ("_asdict", "_replace")  # public, for all their names
LIGHTNING = (LightningTrainer, LightningModule, LightningDataModule, LightningCLI, Callback, TensorBoardLogger)


def names_of_lightning() -> set[str]:
    """Return the private names that its classes define, and those of their instances' attributes."""
    kinds = {base for kind in LIGHTNING for base in kind.__mro__ if "lightning" in base.__module__}
    attributes = {name for kind in kinds for name in re.findall(r"self\.(_[a-z]\w*)", inspect.getsource(kind))}
    return attributes | {name for kind in kinds for name in vars(kind) if re.match("_[a-z]", name)}


def private_uses(path: Path, lightning: set[str]) -> Iterator[str]:
    """Yield the private names that a file takes from an object of another file, or shares with Lightning."""
    text = path.read_text(encoding="utf-8")
    own = set(re.findall(r"self\.(_[a-z]\w*)|def (_[a-z]\w*)", text))
    own = {name for names in own for name in names}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr) and node.attr not in NAMED_TUPLE:
            of = ast.unparse(node.value)
            if node.attr in lightning or not (of == "super()" or of.startswith("torch.") or node.attr in own):
                yield f"{path.name}: {of}.{node.attr}"
        if isinstance(node, ast.ClassDef):
            methods = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
            yield from (f"{path.name}: {node.name}.{name}" for name in sorted(methods & lightning))


def test_everything_private_stands_here():
    """No other module uses a private name of Lightning."""
    lightning = names_of_lightning()
    assert {"_run_stage", "_trainer", "_run_subcommand", "_version"} <= lightning
    internals = PACKAGE / "training" / "lightning_internals.py"
    files = set(PACKAGE.rglob("*.py")) - set((PACKAGE / "quantization").iterdir()) - {internals}
    assert [use for path in sorted(files) for use in private_uses(path, lightning)] == []
    assert list(private_uses(internals, lightning))  # else nothing would be found
