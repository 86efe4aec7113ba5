"""Labels of rows that share strategy and network: they name the settings that differ."""

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdq_lightning.commands.report import write_report
from kdq_lightning.report.figures import draw_figures
from kdq_lightning.report.findings import find
from kdq_lightning.report.labels import different_settings
from kdq_lightning.report.read_rows import read_rows
from kdq_lightning.report.rows import trained_label
from kdq_lightning.runs.config_hash import config_hash, settings_of
from tests.records import write_run

TITLE = "Vanilla KD (resnet18)"


def write_trained(root: Path, name: str, accuracy: float, max_epochs: int = 15, **settings: Any) -> None:
    """Write a run of two seeds with its config, whose hash the records have.

    Args:
        root: Folder of the runs.
        name: Of the run.
        accuracy: At 2 bits, in percent.
        max_epochs: Of the trainer.
        **settings: Of the model.
    """
    for seed in (0, 1):
        runs = root / f"seed{seed}"
        config = {
            "model": {"class_path": "VanillaKD", "init_args": {"teacher": str(runs / "teacher"), **settings}},
            "data": {"class_path": "CIFARDataModule", "init_args": {"root": f"data{seed}", "dataset": "cifar10"}},
            "trainer": {"max_epochs": max_epochs, "default_root_dir": str(runs), "devices": seed + 1},
            "quantization": {"bits": [2 + seed, 4], "calibration_images": 512},
        }
        version = runs / name / "version_0"
        accuracies = {2: accuracy, 4: accuracy + 10, 32: accuracy + 12}
        write_run(version, "vanilla", accuracies, seed=seed, run=name, config_hash=config_hash(config))
        (version / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def labels(root: Path) -> list[str]:
    (rows,) = read_rows([root])[0].values()
    return [row.label for row in rows]


def test_one_setting_differs(tmp_path: Path):
    """The same words in tables, figures, answer and CSV; teacher's folder, seed and devices are no settings."""
    write_trained(tmp_path, "vanilla", 80, temperature=4.0, learning_rate=0.1)
    write_trained(tmp_path, "another", 70, temperature=8.0, learning_rate=0.1)
    wanted = [f"{TITLE}, temperature 8", f"{TITLE}, temperature 4"]  # in order of the runs' names
    assert labels(tmp_path) == wanted
    (rows,) = read_rows([tmp_path])[0].values()
    assert [row.seeds for row in rows] == [[0, 1]] * 2
    curves = draw_figures(find(rows))["accuracy_vs_bits"].axes[0].get_legend_handles_labels()[1]
    assert curves == wanted
    text = write_report([tmp_path], tmp_path / "out").read_text()
    answer, tables = text.split("## cifar10")[:2]
    assert f"{TITLE}, temperature 4" in answer and all(f"\n| {label} |" in tables for label in wanted)
    assert not re.search(r"\b[0-9a-f]{12}\b", text)
    for name in ("cells_cifar10", "accuracy_cifar10"):
        with (tmp_path / "out" / f"{name}.csv").open() as file:
            assert {label for row in csv.reader(file) for label in row if label.startswith(TITLE)} == set(wanted), name


def test_two_settings_differ(tmp_path: Path):
    """Of each row both, in the order of the file, and of each of its methods."""
    write_trained(tmp_path, "a", 80, temperature=4.0, max_epochs=15)
    write_trained(tmp_path, "b", 70, temperature=float("inf"), max_epochs=200)
    own = [f"{TITLE}, temperature 4, max_epochs 15", f"{TITLE}, temperature inf, max_epochs 200"]
    assert labels(tmp_path) == own
    more = tmp_path / "seed0" / "a" / "version_0"
    hashes = {record["config_hash"] for record in csv.DictReader((more / "quantized.csv").open())}
    write_run(tmp_path / "gpfq", "vanilla", {2: 60}, run="a", method="gpfq", config_hash=hashes.pop())
    (rows,) = read_rows([tmp_path])[0].values()
    assert [row.label for row in rows] == [own[0], f"{TITLE}, plain GPFQ, temperature 4, max_epochs 15", own[1]]
    assert [trained_label(row) for row in rows] == [own[0], own[0], own[1]]


def test_the_panels_of_many_rows(tmp_path: Path):
    """A panel a trained network, its title in lines; places without one stay empty, and each column has numbers."""
    for temperature in range(1, 6):
        write_trained(tmp_path, f"run{temperature}", 80 - temperature, temperature=temperature)
    (rows,) = read_rows([tmp_path])[0].values()
    panels = draw_figures(find(rows))["methods"].axes
    assert [axes.get_visible() for axes in panels] == [True] * 5 + [False] * 3
    assert [axes.get_title() for axes in panels[:2]] == [f"{TITLE},\ntemperature {t}" for t in (1, 2)]
    shown = [axes.xaxis.get_tick_params()["labelbottom"] for axes in panels[:5]]
    assert shown == [False, True, True, True, True]


def test_records_without_settings(tmp_path: Path):
    """One without `config.yaml`, or settings that don't differ: the runs' names, and hashes where these are equal."""
    write_trained(tmp_path, "a", 80, temperature=4.0)
    write_trained(tmp_path, "b", 80, temperature=8.0)
    for path in tmp_path.glob("seed*/b/version_0/config.yaml"):
        path.unlink()
    assert labels(tmp_path) == [f"{TITLE} a", f"{TITLE} b"]
    for name in ("first", "second"):
        write_run(tmp_path / "same" / name, "vanilla", {2: 60}, run="c", config_hash=name)
        (tmp_path / "same" / name / "config.yaml").write_text("trainer: {max_epochs: 3}")
    assert labels(tmp_path / "same") == [f"{TITLE} c first", f"{TITLE} c second"]
    assert settings_of(tmp_path) == {}


@pytest.mark.parametrize(
    ("first", "second", "texts"),
    [
        ({"model.init_args.pretrained": True}, {}, ["pretrained true", "no pretrained"]),
        (
            {"optimizer.class_path": "torch.optim.Adam", "optimizer.init_args.lr": 0.1},
            {"optimizer.class_path": "torch.optim.SGD", "optimizer.init_args.lr": 0.2, "data.crop": 4},
            ["optimizer Adam, no crop", "optimizer SGD, crop 4"],
        ),
        (
            {"model.init_args.teacher": "runs/big/version_3/checkpoints/best.ckpt", "data.init_args.image_sizes": [16]},
            {"model.init_args.teacher": "runs/small", "data.init_args.image_sizes": [8, 16]},
            ["teacher big, image_sizes [16]", "teacher small, image_sizes [8, 16]"],
        ),
        (
            {"model.init_args.seed": 1, "data.init_args.seed": 1},
            {"model.init_args.seed": 2, "data.init_args.seed": 2},
            ["model.seed 1, data.seed 1", "model.seed 2, data.seed 2"],
        ),
        (dict.fromkeys("abcdefg", 1), dict.fromkeys("abcdefg", 2), ["a 1, b 1, c 1", "a 2, b 2, c 2"]),
    ],
)
def test_settings_in_words(first: dict[str, Any], second: dict[str, Any], texts: list[str]):
    same = {"model.class_path": "VanillaKD", "trainer.max_epochs": 3}
    assert different_settings([same | first, same | second]) == texts


def test_as_many_settings_as_tell_runs_apart():
    """Three are enough unless two runs would get the same label."""
    runs = [{"a": i > 0, "b": i > 0, "c": i > 0, "d": i} for i in range(3)]
    assert different_settings(runs)[2] == "a true, b true, c true, d 2"
    assert different_settings(runs[:2])[1] == "a true, b true, c true"
    assert different_settings([{"a": 1}, {"a": 1}]) == different_settings([{}, {"a": 1}]) == ["", ""]
