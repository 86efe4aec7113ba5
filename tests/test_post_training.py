"""The post-fit callback and `kdq quantize`: records, packed files, events, resuming, failures."""

import copy
import csv
import json
import os
import re
import shlex
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import kdq_lightning.files
import kdq_lightning.quantization.packing
import kdq_lightning.runs.records
import kdq_lightning.runs.tables
from kdq_lightning.cli import main
from kdq_lightning.data.datamodules import CIFARDataModule, DigitsDataModule
from kdq_lightning.data.normalization import normalize
from kdq_lightning.errors import UserError
from kdq_lightning.modules.classifier import Classifier
from kdq_lightning.networks import build_network
from kdq_lightning.quantization import load_packed, quantize
from kdq_lightning.quantization.packing import read_metadata
from kdq_lightning.runs.checkpoints import load_trained
from kdq_lightning.runs.config_hash import config_hash
from kdq_lightning.runs.records import Record, read_correct, read_layers, read_records
from kdq_lightning.training import post_training, trained_run
from kdq_lightning.training.callbacks import checkpoint_callbacks
from kdq_lightning.training.curves import interval
from kdq_lightning.training.dashboard import Dashboard
from kdq_lightning.training.post_training import PostTrainingQuantization
from kdq_lightning.training.trainer import Trainer
from tests.conftest import FEW_STEPS, config
from tests.processes import run_in_fork

BITS = (2, 3, 8)
QUICK = [
    *("--config", config("quickstart"), "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"),
    *("--model=Classifier", "--model.network=resnet8", "--model.learning_rate=0.1", "--trainer.max_epochs=3"),
    *("--quantization.bits=[2,3,8]", "--quantization.calibration_images=64", "--quantization.methods=[default]"),
]
BOTH = "--quantization.methods=[default,gpfq]"


class Killed(BaseException):
    """The process dies here."""


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train and quantize a resnet8 on digits; return the folder that holds `runs`."""
    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(["fit", *QUICK]) == 0
    return root


@pytest.fixture
def run(trained: Path, workspace: Path) -> Path:
    """Return a copy of the trained run's version in an empty folder."""
    shutil.copytree(trained / "runs", "runs")
    return Path("runs/quickstart/version_0")


def forget(version: Path) -> None:
    """Take away everything that quantization wrote."""
    for path in (*version.glob("*.quantized"), *version.glob("*.csv"), version / "correct.safetensors"):
        path.unlink()
    shutil.rmtree(version / "packed")


def table(version: Path) -> list[dict[str, str]]:
    """Return the rows without the one column that no two executions share."""
    with (version / "quantized.csv").open() as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def contents(version: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in version.rglob("*.safetensors")}


@pytest.fixture(scope="session")
def digits() -> DigitsDataModule:
    data = DigitsDataModule(val_size=0.1)
    data.setup()
    return data


def test_records_are_those_of_the_packed_files(run: Path, digits: DigitsDataModule):
    """Each packed file, loaded into a fresh network and run image by image, has the accuracies of its row."""
    records, correct = read_records(run), read_correct(run)
    assert [record.bits for record in records] == [*BITS, 32]
    trained = load_trained(run)["resnet8"]
    files = {path.name: path for path in (run / "packed").iterdir()}
    assert set(files) == {f"resnet8-{record.codebook}-{record.bits}bit.safetensors" for record in records[:-1]}
    hits, classes = {}, {}
    for record in records:
        if record.bits == 32:
            network = trained.build()
            save_file(network.state_dict(), "float.safetensors")
            assert record.packed_bytes == Path("float.safetensors").stat().st_size
        else:
            file = files[f"resnet8-{record.codebook}-{record.bits}bit.safetensors"]
            network = load_packed(file, build_network("resnet8", 10)).eval()
            assert record.packed_bytes == file.stat().st_size
            metadata = read_metadata(file)
            assert metadata["network"] == "resnet8" and metadata["num_classes"] == "10"
            assert tuple(json.loads(metadata["mean"])) == trained.statistics.mean == digits.statistics.mean
            assert tuple(json.loads(metadata["std"])) == trained.statistics.std
        for split, images, labels in (
            ("val", digits.train_set.images[digits.val_index], digits.train_set.labels[digits.val_index]),
            ("test", digits.test_set.images, digits.test_set.labels),
        ):
            with torch.no_grad():
                logits = torch.cat([network(digits.normalize(image[None])) for image in images])
            hit = logits.argmax(1) == labels
            assert getattr(record, f"{split}_top1") == pytest.approx(100 * hit.float().mean().item(), abs=1e-4)
            assert torch.equal(correct[f"resnet8/{split}/{record.bits}"], hit)
        hits[record.bits], classes[record.bits] = hit, logits.argmax(1)
    for record in records:
        flips = (hits[record.bits] ^ hits[32]).double().mean().item()
        agreement = (classes[record.bits] == classes[32]).double().mean().item()
        assert record.flips == pytest.approx(100 * flips, abs=1e-4)
        assert record.agreement_float == pytest.approx(100 * agreement, abs=1e-4)
    assert records[0].agreement_float < 100 and records[0].flips > 0  # else the comparison says little


def test_other_fields(run: Path):
    records, layers = read_records(run), read_layers(run)
    for record in records:
        assert (record.run, record.dataset, record.strategy) == ("quickstart", "digits", "control")
        assert (record.seed, record.epochs, record.partial, record.peer) == (0, 3, False, "")
        assert record.agreement_teacher is None and record.nll and record.ece
    assert [record.levels for record in records] == [4, 8, 256, None]
    float_record = records[-1]
    assert float_record.relative_error is None and float_record.seconds is None and float_record.flips == 0
    assert len({record.config_hash for record in records}) == 1
    assert records[0].config_hash == config_hash(yaml.safe_load((run / "config.yaml").read_text()))
    for record in records[:-1]:
        mine = [layer for layer in layers if layer.bits == record.bits]
        assert mine[0].name == "conv1" and mine[-1].name == "linear" and len(mine) == 8
        errors = [layer.relative_error for layer in mine]
        assert record.relative_error == pytest.approx(np.mean(errors), abs=1e-5)


def test_events(run: Path):
    """Exactly the listed tags and steps, each point once."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    records = read_records(run)
    floats = records.pop()
    tags = {tag for tag in events.Tags()["scalars"] if tag.startswith(("quantized", "layer"))}
    curves = ("accuracy_vs_bits", "float_accuracy", "agreement_vs_bits", "accuracy_vs_bytes")
    assert tags == {
        *(f"quantized/{name}{end}" for name in curves for end in ("", "_low", "_high")),
        *("quantized/accuracy_2bit", "quantized/accuracy_3bit", "quantized/accuracy_8bit", "quantized/float"),
    }

    def points(tag: str) -> list[tuple[int, float]]:
        return [(event.step, pytest.approx(event.value, abs=1e-4)) for event in events.Scalars(tag)]

    assert points("quantized/accuracy_vs_bits") == [(record.bits, record.test_top1) for record in records]
    assert points("quantized/float_accuracy") == [(bits, floats.test_top1) for bits in BITS]
    assert points("quantized/agreement_vs_bits") == [(record.bits, record.agreement_float) for record in records]
    assert points("quantized/accuracy_vs_bytes") == [(record.packed_bytes, record.test_top1) for record in records]
    assert points("quantized/accuracy_2bit") == [(0, records[0].test_top1)]
    assert points("quantized/float") == [(0, floats.test_top1)]
    for end, bound in (("low", 0), ("high", 1)):
        bounds = [interval(record.test_top1, 359)[bound] for record in records]
        assert points(f"quantized/accuracy_vs_bits_{end}") == list(zip(BITS, bounds, strict=True))
    assert {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]} == {
        "quantized/figure": [0],
        "quantized/layer_errors": [0],
    }
    text = events.Tensors("quantized/table/text_summary")
    markdown = text[0].tensor_proto.string_val[0].decode()
    assert len(text) == 1 and "**Flips**: images that" in markdown
    assert markdown.index("| float |") < markdown.index(f"| default | 2 | 4 | {records[0].packed_bytes / 1000:.1f} |")
    assert len(text) == 1 and f"| default | 2 | 4 | {records[0].packed_bytes / 1000:.1f} |" in markdown
    assert {"custom_scalars__config__", "_hparams_/session_start_info"} <= set(events.summary_metadata)
    assert [event.step for event in events.Scalars("train/loss")] == [20, 40, 60]  # training's own points still stand


def plugin_content(events: EventAccumulator, tag: str) -> HParamsPluginData:
    return HParamsPluginData.FromString(events.summary_metadata[f"_hparams_/{tag}"].plugin_data.content)


@pytest.mark.pictures
def test_runs_of_all_strategies_overlay(run: Path):
    """Mutual learning has the columns and the charts of the others, and all its peers in one picture."""
    few = ["--trainer.limit_train_batches=2", "--trainer.max_epochs=1", "--quantization.bits=[3]"]
    peers = ["--trainer.enable_progress_bar=false", "--quantization.calibration_images=64", "--name=peers", *few]
    assert main(["fit", "--config", config("quickstart"), *peers]) == 0
    taught = ["--model=VanillaKD", "--model.teacher=runs/quickstart", "--model.network=resnet8", "--name=taught"]
    taught += ["--quantization.calibration_images=64", "--quantization.methods=[default]"]
    assert main(["fit", *QUICK[:4], *taught, *few]) == 0
    folders = [run, Path("runs/peers/version_0"), Path("runs/taught/version_0")]
    runs = [EventAccumulator(str(folder)).Reload() for folder in folders]
    columns = [plugin_content(events, "experiment").experiment for events in runs]
    assert columns[0].hparam_infos == columns[1].hparam_infos == columns[2].hparam_infos
    assert [info.name.tag for info in columns[0].metric_infos] == [
        *("quantized/float", "quantized/accuracy_2bit"),
        *("quantized/accuracy_3bit", "quantized/accuracy_4bit", "quantized/accuracy_8bit"),
    ]
    assert columns[0].metric_infos == columns[1].metric_infos == columns[2].metric_infos
    values = [plugin_content(events, "session_start_info").session_start_info.hparams for events in runs]
    assert values[0].keys() == values[1].keys() == values[2].keys() == {info.name for info in columns[0].hparam_infos}
    assert [dict(value)["network"].string_value for value in values] == ["resnet8", "resnet8 + resnet14", "resnet8"]
    assert [dict(value)["strategy_temperature"].string_value for value in values] == ["", "", "4.0"]
    assert [dict(value)["epochs"].number_value for value in values] == [3, 1, 1]
    layouts = {events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0] for events in runs}
    assert len(layouts) == 1
    records = read_records(folders[1])
    mean = np.mean([record.test_top1 for record in records if record.method == "default" and record.bits == 3])
    assert runs[1].Scalars("quantized/accuracy_3bit")[0].value == pytest.approx(mean, abs=1e-4)
    assert set(runs[1].Tags()["images"]) == {
        *("quantized/figure", "quantized/layer_errors/peer0", "quantized/layer_errors/peer1"),
    }
    for peer in ("peer0", "peer1"):
        for method, end in (("default", ""), ("gpfq", "_gpfq")):
            points = runs[1].Scalars(f"quantized/accuracy_vs_bits{end}/{peer}")
            wanted = [(r.bits, r.test_top1) for r in records if (r.peer, r.method) == (peer, method)]
            assert [(point.step, pytest.approx(point.value, abs=1e-4)) for point in points] == wanted
    (layout,) = layouts
    charts = [chart for category in Layout.FromString(layout).category for chart in category.chart]
    drawn = {series.value for chart in charts for series in chart.margin.series}
    is_gpfq = [{"gpfq" in one.value for one in chart.margin.series if "float" not in one.value} for chart in charts]
    assert all(len(found) == 1 for found in is_gpfq)  # a run has one colour, so methods aren't mixed
    assert charts[-1].title == "accuracy vs bytes, default and mixed"  # the last is shown first
    written = {tag for events in runs for tag in events.Tags()["scalars"] if "accuracy_vs" in tag or "float_acc" in tag}
    assert {tag for tag in written if "_low" not in tag and "_high" not in tag} <= drawn
    for chart in charts:
        for series in chart.margin.series:
            bounds = (series.value.replace("/peer", "_low/peer"), series.value.replace("/peer", "_high/peer"))
            if "/peer" not in series.value:
                bounds = (f"{series.value}_low", f"{series.value}_high")
            assert (series.lower, series.upper) in (bounds, ("float_accuracy" in series.value and series.value,) * 2)


@pytest.mark.pictures
def test_resuming_keeps_the_points(run: Path):
    """After only the quantization was repeated, training's points and the new ones stand once each."""
    forget(run)
    assert main(["fit", *QUICK, "--ckpt_path=last"]) == 0
    test_events(run)
    assert main(["fit", *QUICK, "--ckpt_path=last", "--quantization.bits=[2,3,4,8]"]) == 0
    events = EventAccumulator(str(run)).Reload()
    assert [event.step for event in events.Scalars("quantized/accuracy_vs_bits")] == [2, 3, 4, 8]
    assert [event.step for event in events.Scalars("val/top1")] == [20, 40, 60]
    assert main(["fit", *QUICK, "--ckpt_path=last"]) == 1  # nothing is left


def kill_at(monkeypatch: pytest.MonkeyPatch, write: int) -> None:
    """Let the process die before its nth write; counted from 0."""
    done = 0
    real = kdq_lightning.files.write_atomically

    def counted(path: Path, content: bytes) -> None:
        nonlocal done
        if done == write:
            raise Killed
        done += 1
        real(path, content)

    for module in (kdq_lightning.runs.records, kdq_lightning.runs.tables, kdq_lightning.quantization.packing):
        monkeypatch.setattr(module, "write_atomically", counted)


WRITES = 3 + 4 * len(BITS)  # layers, vectors and row of each; a packed file of each but the float network


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[int]]]:
    """Write down which bit widths the engine is asked for."""
    asked: list[list[int]] = []
    real = post_training.quantize

    def spy(network, batches, bits, **options):
        asked.append(list(bits))
        return real(network, batches, bits, **options)

    monkeypatch.setattr(post_training, "quantize", spy)
    return asked


@pytest.mark.parametrize("write", [pytest.param(2, marks=pytest.mark.slow(seconds=3)), 6, WRITES - 1, WRITES])
def test_killed_and_resumed(write: int, run: Path, widths: list[list[int]], monkeypatch: pytest.MonkeyPatch):
    """Killed at any write, `fit --ckpt_path last` ends with the unbroken run's table and files, nothing done twice."""
    expected, files = table(run), contents(run)
    forget(run)
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, write)
        if write == WRITES:  # all is written but the dashboard
            patch.setattr(post_training, "publish_quantized", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            main(["fit", *QUICK, "--ckpt_path=last"])
    finished = {int(row["bits"]) for row in table(run)} if (run / "quantized.csv").exists() else set()
    assert len(finished) == max(0, (write + 1) // 4)
    widths.clear()
    assert main(["fit", *QUICK, "--ckpt_path=last"]) == 0
    left = [bits for bits in BITS if bits not in finished]
    assert widths == ([left] if left else [])
    assert table(run) == expected and contents(run) == files


def test_methods_side_by_side(run: Path, digits: DigitsDataModule, monkeypatch: pytest.MonkeyPatch):
    """`gpfq` is added to a finished run: the float network is evaluated once, `default` stays to the byte.

    Its rows, files and vectors are those of the published recursion, computed here directly.
    """
    rows, files, evaluated = table(run), contents(run / "packed"), []
    real = trained_run.evaluate
    monkeypatch.setattr(trained_run, "evaluate", lambda *args: evaluated.append(args[0]) or real(*args))
    assert main(["fit", *QUICK, "--ckpt_path=last", BOTH]) == 0
    assert len(evaluated) == 2 * (1 + len(BITS)) and len(set(map(id, evaluated))) == 1 + len(BITS)
    records, correct = read_records(run), read_correct(run)
    found = [(record.method, record.bits, record.levels) for record in records]
    assert found[3:6] == [("gpfq", 2, 5), ("gpfq", 3, 9), ("gpfq", 8, 257)] and found[6] == ("", 32, None)
    assert [row for row in table(run) if row["method"] != "gpfq"] == rows
    after = contents(run / "packed")
    assert all(after.pop(name) == content for name, content in files.items())
    assert set(after) == {f"resnet8-gpfq-paper-{bits}bit.safetensors" for bits in BITS}
    network, statistics = load_trained(run)["resnet8"].build(), digits.statistics
    calibration = normalize(digits.calibration_images(64)[0], statistics)
    for bits, official in quantize(network, [calibration], BITS, mode="official").items():
        path = run / "packed" / f"resnet8-gpfq-paper-{bits}bit.safetensors"
        packed = load_packed(path, build_network("resnet8", 10)).eval()
        with torch.no_grad():
            for mine, theirs in zip(packed.state_dict().values(), official.model.state_dict().values(), strict=True):
                torch.testing.assert_close(mine, theirs) if mine.is_floating_point() else None
            hits = packed(normalize(digits.test_set.images, statistics)).argmax(1) == digits.test_set.labels
        assert torch.equal(correct[f"resnet8/test/gpfq/{bits}"], hits)
        assert read_metadata(path)["method"] == "gpfq" and read_metadata(path)["bits"] == str(bits)
    events = EventAccumulator(str(run)).Reload()
    for record in records[3:6]:
        (point,) = [e for e in events.Scalars("quantized/accuracy_vs_bits_gpfq") if e.step == record.bits]
        assert point.value == pytest.approx(record.test_top1, abs=1e-4)
    assert [e.step for e in events.Scalars("quantized/accuracy_vs_bytes_gpfq")] == [
        r.packed_bytes for r in records[3:6]
    ]
    assert [e.step for e in events.Scalars("quantized/accuracy_vs_bits")] == list(BITS)
    assert [e.step for e in events.Scalars("quantized/float_accuracy")] == list(BITS)
    assert main(["fit", *QUICK, "--ckpt_path=last", BOTH]) == 1  # nothing is left


def test_killed_between_two_methods(run: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing is done twice: the engine is asked for `gpfq` alone, and only the float network is evaluated again."""
    forget(run)
    asked: list[tuple[str | None, list[int]]] = []
    real = post_training.quantize

    def quantize_or_die(network, batches, bits, **options):
        asked.append((options.get("mode"), list(bits)))
        if options.get("mode") and len(asked) == 2:
            raise Killed
        return real(network, batches, bits, **options)

    monkeypatch.setattr(post_training, "quantize", quantize_or_die)
    with pytest.raises(Killed):
        main(["fit", *QUICK, "--ckpt_path=last", BOTH])
    before = table(run), contents(run / "packed")
    assert [row["method"] for row in before[0]] == ["default"] * 3 + [""]
    assert main(["fit", *QUICK, "--ckpt_path=last", BOTH]) == 0
    assert asked == [(None, list(BITS)), ("official", list(BITS)), ("official", list(BITS))]
    assert [row for row in table(run) if row["method"] != "gpfq"] == before[0]
    assert before[1].items() <= contents(run / "packed").items()
    assert len(table(run)) == 2 * len(BITS) + 1


def test_a_user_s_choice_is_a_method_of_its_own(run: Path):
    """A codebook or solver given makes `default` to `custom`, under another hash and another name."""
    arguments = ["quantize", *QUICK, "--ckpt_path=runs/quickstart", BOTH, "--quantization.bits=[3]"]
    assert main([*arguments, "--quantization.codebook=signed", "--quantization.solver=gptq"]) == 0
    version = Path("runs/quickstart-quantized/version_0")
    records = read_records(version)
    assert [(record.method, record.solver, record.codebook) for record in records] == [
        ("custom", "gptq", "signed"),
        ("gpfq", "gpfq", "paper"),
        ("", "", ""),
    ]
    names = {"resnet8-custom-signed-3bit.safetensors", "resnet8-gpfq-paper-3bit.safetensors"}
    assert {path.name for path in (version / "packed").iterdir()} == names
    keys = {f"resnet8/{split}/{rest}" for split in ("val", "test") for rest in ("custom/3", "gpfq/3", "32")}
    assert set(read_correct(version)) == keys
    tags = set(EventAccumulator(str(version)).Reload().Tags()["scalars"])
    assert {"quantized/accuracy_vs_bits_custom", "quantized/accuracy_vs_bits_gpfq"} <= tags
    assert "quantized/accuracy_vs_bits" not in tags


@pytest.mark.parametrize(("percent", "images"), [(100, 20), (97.5, 40), (0, 7), (61.25, 10000)])
def test_the_interval_of_a_share_of_images(percent: float, images: int):
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    low, high = proportion.proportion_confint(round(percent * images / 100), images, method="wilson")
    assert interval(percent, images) == pytest.approx((100 * low, 100 * high))


@pytest.mark.parametrize("command", ["fit", "quantize"])
def test_sigkill(command: str, run: Path, widths: list[list[int]], monkeypatch: pytest.MonkeyPatch):
    """The process is gone between a packed file and its row: what is finished stays, the rest follows."""
    expected, files = [{**row, "run": "", "config_hash": ""} for row in table(run)], contents(run / "packed")
    folder, arguments = run, ["fit", *QUICK, "--ckpt_path=last"]
    if command == "fit":
        forget(run)
    else:
        folder, arguments = (
            Path("runs/quickstart-quantized/version_0"),
            ["quantize", *QUICK, "--ckpt_path=runs/quickstart"],
        )
    real = kdq_lightning.files.write_atomically

    def write_and_die(path: Path, content: bytes) -> None:
        real(path, content)
        if "3bit" in path.name:
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(kdq_lightning.quantization.packing, "write_atomically", write_and_die)
        assert run_in_fork(lambda: main(arguments)) == -signal.SIGKILL
    assert [record.bits for record in read_records(folder)] == [2, 32]
    assert main(arguments) == 0
    assert widths == [[3, 8]]
    assert [{**row, "run": "", "config_hash": ""} for row in table(folder)] == expected
    if command == "fit":
        assert contents(folder / "packed") == files


def test_terminated(run: Path, monkeypatch: pytest.MonkeyPatch):
    """SIGTERM, which Lightning only notes, ends the command with 143 before the next image or layer."""
    forget(run)
    real = kdq_lightning.files.write_atomically

    def terminate(path: Path, content: bytes) -> None:
        real(path, content)
        if path.name == "quantized.csv":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(kdq_lightning.runs.tables, "write_atomically", terminate)
    with pytest.raises(SystemExit) as stop:
        main(["fit", *QUICK, "--ckpt_path=last"])
    assert stop.value.code == 143
    assert [record.bits for record in read_records(run)] == [32]


def test_lost_packed_file_is_written_again(run: Path, widths: list[list[int]]):
    expected, files = table(run), contents(run)
    next((run / "packed").glob("*3bit*")).unlink()
    assert main(["fit", *QUICK, "--ckpt_path=last"]) == 0
    assert widths == [[3]] and table(run) == expected and contents(run) == files


FULL_DISKS = [([], "runs/quickstart/version_0"), (["--trainer.logger=false"], "runs/quickstart-quantized/version_0")]


@pytest.mark.parametrize(("options", "repeated"), FULL_DISKS, ids=["in a run folder", "without a logger"])
def test_full_disk(
    options: list[str],
    repeated: str,
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """The checkpoint stays, the exit code tells, and the command that is printed repeats only quantization."""
    with pytest.MonkeyPatch.context() as patch:

        def full(path: Path, content: bytes) -> None:
            raise UserError(f"{path} could not be written (No space left on device)")

        patch.setattr(kdq_lightning.quantization.packing, "write_atomically", full)
        options = [*options, "--quantization.bits=[2]"]
        assert main(["fit", *QUICK, "--trainer.max_epochs=1", *options]) == 1
    error = capsys.readouterr().err
    assert "No space left" in error and "Traceback" not in error and error.count("\n") == 1
    folder = Path("runs") if "--trainer.logger=false" in options else Path(repeated)
    best = (folder / "checkpoints/best.ckpt").read_bytes()
    assert [record.bits for record in read_records(folder)] == [32]
    command = shlex.split(re.search(r"kdq ((?:fit|quantize) .*)", error)[1])
    assert main(command) == 0
    assert [record.bits for record in read_records(Path(repeated))] == [2, 32]
    assert (folder / "checkpoints/best.ckpt").read_bytes() == best


def test_not_finite(run: Path, capsys: pytest.CaptureFixture[str]):
    """A network with a NaN gives one sentence, and its checkpoint is left alone."""
    forget(run)
    path = run / "checkpoints/best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["network.linear.bias"][0] = float("nan")
    torch.save(checkpoint, path)
    before = path.read_bytes()
    assert main(["fit", *QUICK, "--ckpt_path=last"]) == 1
    assert "not finite" in capsys.readouterr().err
    assert path.read_bytes() == before and not (run / "quantized.csv").exists()


def test_the_trained_module_stays_as_it_is(workspace: Path):
    """Weights, buffers and mode of the module and its mode are those of the last step, though the best was used."""
    data = DigitsDataModule(batch_size=64, val_size=0.1)
    module = Classifier("resnet8", 10, learning_rate=0.1)
    snapshots = []

    class Watch(PostTrainingQuantization):
        def on_train_end(self, trainer, pl_module):
            before = copy.deepcopy(pl_module.state_dict()), pl_module.training
            super().on_train_end(trainer, pl_module)
            snapshots.append((before, (pl_module.state_dict(), pl_module.training)))

    trainer = Trainer(
        accelerator="cpu", max_epochs=1, limit_train_batches=3, enable_progress_bar=False,
        logger=Dashboard("runs", "mine"),
        callbacks=[Watch(bits=(4,), calibration_images=32), *checkpoint_callbacks()],
    )  # fmt: skip
    trainer.fit(module, data)
    (before, mode), (after, mode_after) = snapshots[0]
    assert mode == mode_after and before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert [record.bits for record in read_records(Path("runs/mine/version_0"))] == [4, 4, 32]


def fit(*arguments: str) -> list[Record]:
    few = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--quantization.bits=[2]"]
    assert main(["fit", *QUICK, *few, *arguments]) == 0
    return read_records(Path("runs/quickstart/version_0"))


def test_limits(workspace: Path):
    """Limited to 2 and 1 batches of 64 images, and marked."""
    records = fit("--trainer.limit_test_batches=2", "--trainer.limit_val_batches=1")
    correct = read_correct(Path("runs/quickstart/version_0"))
    assert {key: len(vector) for key, vector in correct.items() if key.endswith("/2")} == {
        "resnet8/test/2": 128,
        "resnet8/val/2": 64,
    }
    assert all(record.partial for record in records)


def test_test_set_left_alone(workspace: Path, monkeypatch: pytest.MonkeyPatch):
    """Tuning runs have no test accuracy; the curve is that of validation. No test image is looked at."""

    def read(data: DigitsDataModule) -> None:
        raise AssertionError("the test images are read")

    monkeypatch.setattr(DigitsDataModule, "test_set", property(read, lambda data, images: None), raising=False)
    assert main(["fit", *QUICK, "--trainer.max_epochs=1", "--name=tested"]) == 1  # so that reading them is noticed
    records = fit("--quantization.test=false")
    assert all(record.test_top1 is None and record.test_top5 is None and record.val_top1 for record in records)
    assert not any("test" in key for key in read_correct(Path("runs/quickstart/version_0")))
    events = EventAccumulator("runs/quickstart/version_0").Reload()
    values = [event.value for event in events.Scalars("quantized/accuracy_vs_bits")]
    assert values == pytest.approx([record.val_top1 for record in records[:-1]], abs=1e-4)


def test_without_a_logger(workspace: Path):
    """The results lie in the default root, and no folder passes for a version."""
    assert fit("--trainer.logger=false") == []
    assert [record.bits for record in read_records(Path("runs"))] == [2, 32]
    assert len(list(Path("runs/packed").iterdir())) == 1
    assert not list(workspace.rglob("finished")) and not list(workspace.rglob("events*"))


@pytest.mark.parametrize("option", ["--quantization.enabled=false", "--trainer.fast_dev_run=true"])
def test_switched_off(option: str, workspace: Path):
    assert fit(option) == []
    assert not list(workspace.rglob("packed")) and not list(workspace.rglob("*.quantized"))


BAD = [
    ("--quantization.bits=[0]", "bit"),
    ("--quantization.bits=[]", "one or more"),
    ("--quantization.bits=[2,2]", "different"),
    ("--quantization.methods=[]", "methods are one or more different ones of default, gpfq"),
    ("--quantization.methods=[gpfq,gpfq]", "different ones"),
    ("--quantization.methods=[default,magic]", "unknown method 'magic': choose one or more of default, gpfq"),
    ("--quantization.methods=[gpfq] --quantization.solver=gptq", "solver change the method default, which is not"),
    ("--quantization.codebook=octal", "octal"),
    ("--quantization.solver=magic", "magic"),
    ("--quantization.calibration_images=0", "calibration_images"),
]


@pytest.mark.parametrize(("option", "sentence"), BAD)
def test_bad_options(option: str, sentence: str, workspace: Path, capsys: pytest.CaptureFixture[str]):
    """Refused before training, in one sentence, and nothing is left behind."""
    try:
        assert main(["fit", *QUICK, *option.split()]) == 1
    except SystemExit as stop:
        assert stop.code == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error
    assert not list(workspace.rglob("version_*"))


def test_number_of_calibration_images(trained: Path, workspace: Path, capsys: pytest.CaptureFixture[str]):
    """None are refused, and nothing is left behind; of more than there are all are taken, and that is said."""
    command = ["quantize", *QUICK, f"--ckpt_path={trained}/runs/quickstart"]
    assert main([*command, "--quantization.calibration_images=0"]) == 1
    assert "calibration_images" in capsys.readouterr().err
    assert not list(workspace.rglob("version_*"))
    assert main([*command, "--quantization.calibration_images=5000", "--quantization.bits=[8]"]) == 0
    said = capsys.readouterr()
    assert "training images are calibrated on: 5000 are asked for" in " ".join((said.out + said.err).split())


def test_quantize_command(run: Path, widths: list[list[int]], capsys: pytest.CaptureFixture[str]):
    """The same table in a folder of its own; once finished, for other settings or weights, there is a new version."""
    expected = [{**row, "run": "", "config_hash": ""} for row in table(run)]
    arguments = ["quantize", *QUICK, "--ckpt_path=runs/quickstart"]
    before = contents(run)
    assert main(arguments) == 0
    own = Path("runs/quickstart-quantized/version_0")
    assert widths == [[2, 3, 8]] and (own / "finished").exists()
    assert [{**row, "run": "", "config_hash": ""} for row in table(own)] == expected
    assert {row["run"] for row in table(own)} == {"quickstart-quantized"}
    assert "test top-1" in capsys.readouterr().out.replace("\n", " ")
    assert main([*arguments, "--quantization.bits=[8]"]) == 0  # finished: a new version
    assert [path.name for path in sorted(own.parent.iterdir())] == ["version_0", "version_1"]
    assert contents(run) == before and list(run.glob("*.quantized"))
    (own.parent / "version_1" / "finished").unlink()
    arguments += ["--quantization.codebook=paper", "--quantization.bits=[2,8]"]
    assert main(arguments) == 0  # unfinished, but another configuration
    paper = read_records(own.parent / "version_2")
    assert [record.levels for record in paper] == [5, 257, None] and paper[0].codebook == "paper"
    (own.parent / "version_2" / "finished").unlink()
    other = [argument for argument in arguments if "ckpt_path" not in argument]
    checkpoint = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    checkpoint["state_dict"]["network.linear.bias"] += 1e-3
    torch.save(checkpoint, "other.ckpt")
    other += ["--ckpt_path=other.ckpt", "--quantization.bits=[8]"]
    assert main(other) == 0  # other weights
    assert len(list(own.parent.iterdir())) == 4


def test_quantize_needs_weights(workspace: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["quantize", *QUICK]) == 1
    assert "needs trained weights" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_plain_state_dict_with_its_own_statistics(run: Path):
    """A first layer that expects other inputs, given their statistics: the accuracies of the network it came from."""
    network = load_trained(run)["resnet8"].build()
    digits = DigitsDataModule()
    std = tuple(value / 2 for value in digits.statistics.std)  # the inputs are twice as large
    with torch.no_grad():
        network.conv1.weight /= 2
    save_file(network.state_dict(), "weights.safetensors")
    arguments = [f"--model.weights_mean={list(digits.statistics.mean)}", f"--model.weights_std={list(std)}"]
    assert main(["quantize", *QUICK, "--ckpt_path=weights.safetensors", *arguments]) == 0
    plain = read_records(Path("runs/quickstart-quantized/version_0"))
    for mine, record in zip(plain, read_records(run), strict=True):
        assert mine.test_top1 == pytest.approx(record.test_top1, abs=0.3 if record.bits < 32 else 1e-6)
        assert mine.epochs is None
    metadata = read_metadata(next(Path("runs/quickstart-quantized/version_0/packed").iterdir()))
    assert json.loads(metadata["std"]) == pytest.approx(list(std))


def test_teacher(images: Path, teacher_run: Path, workspace: Path):
    """Agreement with the teacher, on the images that both see; `kdq quantize` does without once its file is gone."""
    shutil.copytree(teacher_run, "runs/teacher_cpu")
    arguments = ["--config", config("vanilla_cpu"), f"--data.root={images}", *FEW_STEPS]
    arguments += ["--model.init_args.network=resnet8", "--trainer.max_epochs=1"]
    assert main(["fit", *arguments]) == 0
    version = Path("runs/vanilla_cpu/version_0")
    record = read_records(version)[-1]
    assert record.bits == 32 and record.strategy == "vanilla"
    data = CIFARDataModule(root=str(images), val_size=0.2)
    data.setup()
    inputs = data.normalize(data.test_set.images)
    with torch.no_grad():
        teacher = load_trained("runs/teacher_cpu")["resnet8"].build()(inputs).argmax(1)
        student = load_trained(version)["resnet8"].build()(inputs).argmax(1)
    assert record.agreement_teacher == pytest.approx(100 * (teacher == student).float().mean().item(), abs=1e-4)
    shutil.rmtree("runs/teacher_cpu")
    assert main(["quantize", *arguments, "--ckpt_path=runs/vanilla_cpu"]) == 0
    alone = read_records(Path("runs/vanilla_cpu-quantized/version_0"))[-1]
    assert alone.agreement_teacher is None and alone.test_top1 == record.test_top1


def test_weights_that_are_trained_again_are_quantized_again(run: Path, widths: list[list[int]]):
    """What a killed `kdq quantize` has of other weights isn't gone on with, though they are of the same settings."""
    arguments = ["quantize", *QUICK, "--ckpt_path=runs/quickstart", "--quantization.bits=[2]"]
    assert main(arguments) == 0
    first = Path("runs/quickstart-quantized/version_0")
    (first / "finished").unlink()
    assert main(arguments) == 0  # goes on there
    (first / "finished").unlink()
    later = first.stat().st_mtime + 60
    os.utime(run / "checkpoints" / "best.ckpt", (later, later))
    assert main(arguments) == 0
    assert sorted(path.name for path in first.parent.iterdir()) == ["version_0", "version_1"]
    assert widths == [[2], [2]]
