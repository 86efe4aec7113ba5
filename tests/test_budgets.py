"""Files of mixed bits from the command line: rows, files, curves, report, and going on after a kill."""

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kdq_lightning.cli import main
from kdq_lightning.errors import UserError
from kdq_lightning.files import format_bytes, parse_bytes
from kdq_lightning.networks import build_network
from kdq_lightning.quantization.mixed import check_least
from kdq_lightning.quantization.packing import mean_bits, read_metadata, read_weights
from kdq_lightning.runs.checkpoints import load_trained
from kdq_lightning.runs.config_hash import config_hash, version_hash
from kdq_lightning.runs.records import read_correct, read_layers, read_records
from kdq_lightning.training.post_training import PostTrainingQuantization
from kdq_lightning.training.quantized_run import QuantizedRun
from tests.conftest import config
from tests.processes import run_in_fork

QUICK = [
    *("--config", config("quickstart"), "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"),
    *("--model=Classifier", "--model.network=resnet8", "--model.learning_rate=0.1", "--trainer.max_epochs=1"),
    *("--quantization.bits=[2,4]", "--quantization.calibration_images=64", "--quantization.methods=[default]"),
]
BUDGETS = "--quantization.budgets=[30kB,18000]"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a resnet8 on digits and quantize it within two budgets; return the folder that holds `runs`."""
    root = tmp_path_factory.mktemp("budgets")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(["fit", *QUICK, BUDGETS]) == 0
    return root


@pytest.fixture
def run(trained: Path, workspace: Path) -> Path:
    """Return a copy of the trained run's version in an empty folder."""
    shutil.copytree(trained / "runs", "runs")
    return Path("runs/quickstart/version_0")


def test_rows_and_files(run: Path):
    """A row a budget, with the mean bits of its file, which is within the budget and can be evaluated again."""
    records = {(record.method, record.budget or record.bits): record for record in read_records(run)}
    assert list(records) == [("default", 2), ("default", 4), ("mixed", 18_000), ("mixed", 30_000), ("", 32)]
    layers = read_layers(run)
    correct = read_correct(run)
    for budget in (18_000, 30_000):
        record = records["mixed", budget]
        path = run / "packed" / f"resnet8-mixed-{budget}B.safetensors"
        assert budget - 250 < path.stat().st_size == record.packed_bytes <= budget
        weights = read_weights(path)
        assert record.bits == round(mean_bits(weights.values()), 2)
        assert record.levels == max(weight.grid.numel() for weight in weights.values())
        assert record.codebook == "+".join(sorted({weight.codebook for weight in weights.values()}))
        assert read_metadata(path)["method"] == "mixed"
        own = [layer for layer in layers if layer.budget == budget]
        assert [layer.name for layer in own] == list(weights)
        assert [layer.levels for layer in own] == [weight.grid.numel() for weight in weights.values()]
        vector = correct[f"resnet8/val/mixed/{budget}"]
        assert record.val_top1 == pytest.approx(100 * vector.double().mean().item(), abs=1e-4)
        assert load_trained(path)["resnet8"].network == "resnet8"
    assert records["default", 2].packed_bytes < 30_000


def test_the_curve(run: Path):
    """Accuracy against bytes alone: a mean of bits is no bit width."""
    events = EventAccumulator(str(run)).Reload()
    scalars = events.Tags()["scalars"]
    points = events.Scalars("quantized/accuracy_vs_bytes_mixed")
    records = {record.packed_bytes: record for record in read_records(run) if record.method == "mixed"}
    assert {point.step: pytest.approx(point.value, abs=1e-4) for point in points} == {
        size: record.top1 for size, record in records.items()
    }
    assert not [tag for tag in scalars if "vs_bits_mixed" in tag]


@pytest.mark.pictures
def test_the_report_ships_a_mixed_file(run: Path, capsys: pytest.CaptureFixture[str]):
    """Where it is the best on validation: here it is the only one that fits."""
    assert main(["report", "runs", "--max_bytes", "20kB", "--out", "report"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"ship Control \(resnet8\), mixed bits, within 18 kB, seed 0", said), said
    text = Path("report/report.md").read_text()
    assert "| within 18 kB | within 30 kB |" in text and "mixed bits" in text
    assert "18000 bits" not in text and "30000 bits" not in text
    figure = Path("report/accuracy_vs_bytes_digits.svg").read_text()
    assert ", mixed" in figure
    assert ", mixed" not in Path("report/accuracy_vs_bits_digits.svg").read_text()
    assert main(["report", "runs", "--max_bytes", "50 kilos", "--out", "report"]) == 1
    assert "--max_bytes is a size such as 50000, 100kB or 1.5MB, got '50 kilos'" in capsys.readouterr().err


@pytest.mark.slow(seconds=5)
def test_a_further_budget_repeats_nothing(run: Path):
    """A budget is a record of its own, as a bit width is: it doesn't change the hash of the settings."""
    before = {path: path.stat().st_mtime_ns for path in (run / "packed").iterdir()}
    assert main(["fit", *QUICK, "--quantization.budgets=[22kB,30kB]", "--ckpt_path=last"]) == 0
    budgets = [record.budget for record in read_records(run) if record.method == "mixed"]
    assert budgets == [18_000, 22_000, 30_000]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


@pytest.mark.slow(seconds=10)
def test_kill_minus_9_between_two_budgets(trained: Path, run: Path, monkeypatch: pytest.MonkeyPatch):
    """The same command does the other budget alone, and ends with the unbroken run's files.

    `test_any_project` has it of a smaller network.
    """
    add_row = QuantizedRun.add_row

    def add_and_die(self, row, *rest, **more):
        add_row(self, row, *rest, **more)
        if row.method == "mixed":
            os.kill(os.getpid(), signal.SIGKILL)

    command = ["quantize", *QUICK, BUDGETS, "--ckpt_path", str(trained / "runs/quickstart")]
    with monkeypatch.context() as patch:
        patch.setattr(QuantizedRun, "add_row", add_and_die)
        assert run_in_fork(lambda: main(command)) == -signal.SIGKILL
    folder = Path("runs/quickstart-quantized/version_0")
    assert [record.budget for record in read_records(folder) if record.method == "mixed"] == [18_000]
    times = {path: path.stat().st_mtime_ns for path in (folder / "packed").iterdir()}
    assert len(times) == 3
    assert main(command) == 0
    assert [path.name for path in folder.parent.iterdir()] == ["version_0"]
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    for name in ("resnet8-mixed-18000B", "resnet8-mixed-30000B"):
        mine, theirs = (read_weights(root / "packed" / f"{name}.safetensors") for root in (folder, run))
        assert all((mine[key].codes == theirs[key].codes).all() for key in theirs)


@pytest.mark.parametrize(
    ("text", "size"), [("100kB", 100_000), ("1.5MB", 1_500_000), ("50000", 50_000), ("2 GB", 2 * 10**9), (7, 7)]
)
def test_sizes(text, size):
    assert parse_bytes(text) == size
    assert parse_bytes(format_bytes(size)) == size


@pytest.mark.parametrize("text", ["50 kilos", "-1", "", "kB", "0", "0.9", "nan", "1e400", "100kB/s"])
def test_not_a_size(text):
    with pytest.raises(UserError, match="a budget is a size such as 50000, 100kB"):
        PostTrainingQuantization(budgets=(text,))


def test_the_command_refuses_what_is_no_size(workspace: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["fit", *QUICK, "--quantization.budgets=['50 kilos']"]) != 0
    assert "a budget is a size such as 50000, 100kB or 1.5MB, got '50 kilos'" in capsys.readouterr().err
    assert not Path("runs").exists() or not list(Path("runs").rglob("*.ckpt"))


def test_what_no_choice_of_bits_fits_is_refused_before_training(workspace: Path, capsys: pytest.CaptureFixture[str]):
    """With the size of the smallest file, which fits."""
    assert main(["fit", *QUICK, "--quantization.budgets=[3kB, 30kB]"]) == 1
    error = capsys.readouterr().err
    assert "a budget of 3,000 bytes is too small for this network" in error and not Path("runs").exists()
    least = int(re.search(r"its file takes ([\d,]+) bytes", error)[1].replace(",", ""))
    network = build_network("resnet8", 10)
    check_least(network, [least])
    with pytest.raises(UserError, match=f"takes {least:,} bytes"):
        check_least(network, [least - 1])


def test_the_hash_of_the_settings(run: Path):
    """Runs from before there were budgets keep theirs."""
    settings = {"trainer": {}, "quantization": {"calibration_images": 64}}
    assert config_hash(settings) == config_hash(
        {**settings, "quantization": {"calibration_images": 64, "budgets": ["1kB"]}}
    )
    assert version_hash(run) == read_records(run)[0].config_hash
