"""The hash in the records of runs that were trained: neither new options nor retired ones may change it.

Records and `kdq study` find each other by it, so a changed hash trains everything again. A new option therefore has the
default None, which doesn't count, and a retired one is still accepted at its old default, which still does.
"""

from pathlib import Path

import pytest
import yaml

from kdq_lightning.commands.running import read_settings
from kdq_lightning.quantization.methods import METHODS
from kdq_lightning.runs.config_hash import config_hash
from kdq_lightning.runs.records import read_records
from tests.conftest import CONFIGS

RESULTS = Path(__file__).resolve().parents[1] / "results"
SHIPPED = sorted(path for path in CONFIGS.glob("*.yaml") if not path.stem.startswith("study_"))
FOLDERS = sorted(path.parent for path in RESULTS.rglob("config.yaml"))
TEACHER = RESULTS / "cpu_cifar10" / "seed0" / "teacher"  # was quantized only
DIGEST = "d92e3145e64cd7541fa0eaa3138f65ed"  # of its weights, data/resnet56-cifar10.safetensors
TRAINED = [folder for folder in FOLDERS if folder != TEACHER]
OF_ONE_SEED = [folder for folder in TRAINED if folder.parent.name == "seed0"]


def recorded_hash(folder: Path) -> str:
    """Return the hash that all records of a run have."""
    (found,) = {record.config_hash for record in read_records(folder)}
    return found


def names(folder: Path) -> str:
    return folder.relative_to(RESULTS).as_posix()


def test_the_runs_are_here():
    assert len(TRAINED) == 15 + 24 + 1 and len(OF_ONE_SEED) == 9 + 8 + 1 and TEACHER in FOLDERS


@pytest.mark.parametrize("folder", FOLDERS, ids=names)
def test_the_config_of_a_run_gives_its_recorded_hash(folder: Path, workspace: Path):
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config_hash(config, weights=DIGEST if folder == TEACHER else None) == recorded_hash(folder)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_names_its_methods(path: Path, workspace: Path):
    """Both of them, which are the defaults and without effect on the hash; what is quantized already has none."""
    config = yaml.safe_load(path.read_text())
    methods = config["quantization"].pop("methods", None)
    assert methods == (None if config["model"]["class_path"] == "Recover" else list(METHODS))
    Path("without.yaml").write_text(yaml.safe_dump(config))
    hashes = {read_settings(["fit", f"--config={file}", "--name=a"]).config_hash for file in (path, "without.yaml")}
    assert len(hashes) == 1


@pytest.mark.parametrize("folder", OF_ONE_SEED, ids=names)
def test_the_options_of_today_give_a_run_its_recorded_hash(folder: Path, workspace: Path):
    """The command that reads the run's config adds the options that are new since then, at their defaults."""
    assert read_settings(["fit", "--config", str(folder / "config.yaml")]).config_hash == recorded_hash(folder)
