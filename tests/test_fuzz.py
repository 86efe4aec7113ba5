"""Configurations and command lines that hypothesis has broken: a sentence, no traceback, no half-written run."""

import contextlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kdq_lightning.cli import main
from tests.conftest import config

BASE: dict[str, Any] = yaml.safe_load(Path(config("quickstart")).read_text()) | {
    "model": {
        "class_path": "Classifier",
        "init_args": {"network": "resnet8", "learning_rate": 0.1, "weight_decay": 5e-4, "warmup": 0.1},
    },
    "trainer": {
        **{"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 1, "limit_test_batches": 1},
        **{"accelerator": "cpu", "enable_progress_bar": False, "default_root_dir": "runs", "precision": "32-true"},
    },
    "quantization": {"bits": [2], "calibration_images": 8, "solver": "gpfq", "codebook": "int", "enabled": True},
    "seed_everything": 1,
}


def paths(tree: object, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Return the way to each value, inner ones too."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield (*prefix, key)
            yield from paths(value, (*prefix, key))


values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([10**9, -1.5, 0.5, 1e-9, float("nan"), float("inf")]),
    st.sampled_from(
        ["", "nonsense", "2", "runs", "resnet8", "DigitsDataModule", "../x", "é\u0000", "${x}", "[", "a" * 300]
    ),
    st.sampled_from([[], [1, 2], [9], {}, {"a": 1}, {"class_path": "nonsense"}]),
)
ENDLESS = {("trainer",), ("trainer", "max_epochs")}  # without it there are a thousand epochs, or more
places = st.sampled_from([path for path in paths(BASE) if path not in ENDLESS])


def check(arguments: list[str]) -> str:
    """Run a command: it ends well and leaves a whole run, or with a sentence and none; return what it said."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
    said = output.getvalue()
    versions = list(Path("..").rglob("version_*"))
    if code == 0:
        assert versions and all((version / "finished").exists() for version in versions), said
    else:
        assert "Traceback" not in said and ("kdq: " in said or "error: " in said), said
        assert all((version / "checkpoints").exists() for version in versions), said
    return said


@contextlib.contextmanager
def inner_folder() -> Iterator[None]:
    """Work in an empty folder in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        inner = Path(folder, "inner")
        inner.mkdir()
        with contextlib.chdir(inner):
            yield


def fit_broken_file(changes: list[tuple[tuple[str, ...], Any]], dropped: list[tuple[str, ...]]) -> str:
    """Change and drop some entries of a good file, and fit."""
    tree = yaml.safe_load(yaml.safe_dump(BASE))
    for path, value in [*changes, *[(path, ...) for path in dropped]]:
        inner = tree
        for key in path[:-1]:
            inner = inner.get(key) if isinstance(inner, dict) else None
        if isinstance(inner, dict) and value is ...:
            inner.pop(path[-1], None)
        elif isinstance(inner, dict):
            inner[path[-1]] = value
    with inner_folder():
        Path("broken.yaml").write_text(yaml.safe_dump(tree))
        return check(["fit", "--config", "broken.yaml"])


def fit_broken_line(changes: list[tuple[tuple[str, ...], Any]]) -> str:
    """Fit with a good file and some bad options."""
    with inner_folder():
        Path("whole.yaml").write_text(yaml.safe_dump(BASE))
        return check(["fit", "--config", "whole.yaml", *[f"--{'.'.join(path)}={value}" for path, value in changes]])


def test_options_without_a_value():
    """jsonargparse lets `null` through in files, whatever the type."""
    for path, sentence in (
        (("quantization", "calibration_images"), "quantization.calibration_images has no value"),
        (("model", "init_args", "learning_rate"), "model.learning_rate has no value"),
        (("trainer", "default_root_dir"), "trainer.default_root_dir has no value"),
    ):
        assert sentence in fit_broken_file([(path, None)], [])
    assert "trainer must be a group of options" in fit_broken_file([(("trainer",), [9])], [])


changes = st.lists(st.tuples(places, values), min_size=1, max_size=2)
few = settings(max_examples=8, deadline=None, derandomize=True)
many = settings(max_examples=200, deadline=None)


@few
@given(changes, st.lists(places, max_size=1))
@example([(("data", "init_args", "val_size"), float("nan"))], [])
def test_broken_files(changes, dropped):
    fit_broken_file(changes, dropped)


@few
@given(changes)
@example([(("trainer", "default_root_dir"), "é\u0000")])
@example([(("quantization",), "é\u0000")])
@example([(("model", "init_args", "weight_decay"), 10**9), (("trainer", "limit_train_batches"), 4)])
def test_broken_lines(changes):
    fit_broken_line(changes)


@pytest.mark.slow(seconds=50)
@pytest.mark.timeout(3000)
@many
@given(changes, st.lists(places, max_size=1))
def test_many_broken_files(changes, dropped):
    fit_broken_file(changes, dropped)


@pytest.mark.slow(seconds=50)
@pytest.mark.timeout(3000)
@many
@given(changes)
def test_many_broken_lines(changes):
    fit_broken_line(changes)
