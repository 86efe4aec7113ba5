"""Records: what is written is what is read, bit for bit; hashes tell apart what may differ, and nothing else."""

import copy
import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
import yaml

import kdq_lightning
from kdq_lightning.cli import main
from kdq_lightning.errors import UserError
from kdq_lightning.runs.checkpoints import find_packed
from kdq_lightning.runs.config_hash import config_hash
from kdq_lightning.runs.records import (
    HEADER,
    LayerRecord,
    Record,
    find_records,
    identity,
    packed_path,
    read_correct,
    read_layers,
    read_records,
    write_correct,
    write_layers,
    write_records,
)
from kdq_lightning.runs.result_folder import ResultFolder
from kdq_lightning.runs.versions import mark_finished
from tests.conftest import config

INTERFACE = (
    "run,dataset,strategy,network,peer,seed,method,solver,codebook,bits,levels,packed_bytes,val_top1,val_top5,test_top1,"
    "test_top5,agreement_float,agreement_teacher,flips,nll,ece,relative_error,seconds,epochs,partial,config_hash,version"
)

RECORD = Record(
    run="dml_cpu", dataset="cifar10", strategy="dml", network="resnet20", peer="peer0", seed=3, method="default",
    solver="least_squares", codebook="midrise", bits=2, levels=4, packed_bytes=84123, val_top1=90.02, val_top5=99.5,
    test_top1=89.57, test_top5=99.41, agreement_float=93.1, agreement_teacher=None, flips=4.2, nll=0.4567, ece=5.25,
    relative_error=0.213, seconds=1.5, epochs=15, partial=False, config_hash="0123456789ab", version="0.1.0",
)  # fmt: skip
FLOAT = replace(
    RECORD,
    bits=32,
    levels=None,
    method="",
    solver="",
    codebook="",
    relative_error=None,
    seconds=None,
    test_top1=None,
    partial=True,
)


def test_header_and_round_trip(tmp_path: Path):
    assert ",".join(HEADER) == INTERFACE
    write_records(tmp_path, [RECORD, FLOAT])
    assert read_records(tmp_path) == [RECORD, FLOAT]
    with (tmp_path / "quantized.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["test_top1"] == "89.57" and rows[0]["agreement_teacher"] == "" and rows[1]["levels"] == ""
    assert [path.name for path in tmp_path.iterdir()] == ["quantized.csv"]


@pytest.mark.parametrize("count", [1, 8, 13, 10000])
def test_correct_round_trip(tmp_path: Path, count: int):
    """The file holds one bit an image, as np.packbits lays them."""
    generator = torch.Generator().manual_seed(count)
    correct = {
        RECORD.correct_key("val"): torch.rand(count, generator=generator) < 0.9,
        RECORD.correct_key("test"): torch.rand(2 * count + 1, generator=generator) < 0.9,
        FLOAT.correct_key("test"): torch.rand(2 * count + 1, generator=generator) < 0.9,
    }
    write_correct(tmp_path, correct)
    again = read_correct(tmp_path)
    assert again.keys() == {"peer0/val/2", "peer0/test/2", "peer0/test/32"}
    for key, vector in correct.items():
        assert again[key].dtype == torch.bool and torch.equal(again[key], vector)
    with safetensors.safe_open(tmp_path / "correct.safetensors", framework="np") as file:
        vector = file.get_tensor("peer0/val/2")
    assert vector.dtype == np.uint8 and len(vector) == -(-count // 8)
    assert [bool(vector[i // 8] >> (7 - i % 8) & 1) for i in range(count)] == correct["peer0/val/2"].tolist()


def test_nothing_there_yet(tmp_path: Path):
    assert read_records(tmp_path) == [] and read_correct(tmp_path) == {} and find_records(tmp_path) == {}


def test_damaged_files(tmp_path: Path):
    write_records(tmp_path, [RECORD])
    table = tmp_path / "quantized.csv"
    whole = table.read_text()
    for broken in (
        "",
        whole.replace("config_hash", "hash"),
        whole.replace("89.57", "high"),
        whole.replace(",0.1.0", ""),
        whole.replace("False", "no"),
    ):
        table.write_text(broken)
        with pytest.raises(UserError, match=r"quantized\.csv"):
            read_records(tmp_path)
    table.write_bytes(b"\xff\xfe" + whole.encode())
    with pytest.raises(UserError, match=r"quantized\.csv"):
        read_records(tmp_path)
    write_correct(tmp_path, {"peer0/test/2": torch.ones(100, dtype=torch.bool)})
    vectors = tmp_path / "correct.safetensors"
    vectors.write_bytes(vectors.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"correct\.safetensors"):
        read_correct(tmp_path)


GPFQ = replace(RECORD, method="gpfq", codebook="paper")
MIXED = replace(RECORD, method="mixed", codebook="hard+midrise", bits=3.47, budget=100_000, packed_bytes=99_871)


def test_identity_of_a_row():
    """Rows, layers, vectors and files of one network, two bit widths and three methods are never taken for another."""
    rows = [RECORD, replace(RECORD, bits=3), GPFQ, MIXED, replace(MIXED, budget=200_000), FLOAT]
    found = [identity(row) for row in rows]
    assert found == [
        ("peer0", "default", 2),
        ("peer0", "default", 3),
        ("peer0", "gpfq", 2),
        ("peer0", "mixed", 100_000),
        ("peer0", "mixed", 200_000),
        ("peer0", "", 32),
    ]
    assert [row.correct_key("test") for row in rows] == [
        "peer0/test/2",
        "peer0/test/3",
        "peer0/test/gpfq/2",
        "peer0/test/mixed/100000",
        "peer0/test/mixed/200000",
        "peer0/test/32",
    ]
    names = [packed_path(Path("v"), row).as_posix() for row in (RECORD, GPFQ, MIXED)]
    assert names == [
        "v/packed/peer0-midrise-2bit.safetensors",
        "v/packed/peer0-gpfq-paper-2bit.safetensors",
        "v/packed/peer0-mixed-100000B.safetensors",
    ]
    layer = LayerRecord("conv1", "least_squares", "midrise", 4, 9, "layer", 0.1, 0.0, 50, 0.2, "", "peer0", "gpfq", 2)
    assert identity(layer) == identity(GPFQ) and identity(replace(RECORD, peer="")).name == "resnet20"


def test_rows_of_all_methods(tmp_path: Path):
    """They come back as they were; the budget has a column only where there is one."""
    write_records(tmp_path, [RECORD, GPFQ])
    assert (tmp_path / "quantized.csv").read_text().splitlines()[0] == INTERFACE
    write_records(tmp_path, [RECORD, GPFQ, MIXED, FLOAT])
    assert (tmp_path / "quantized.csv").read_text().splitlines()[0] == INTERFACE + ",budget"
    assert read_records(tmp_path) == [RECORD, GPFQ, MIXED, FLOAT]
    assert [type(record.bits) for record in read_records(tmp_path)] == [int, int, float, int]


def change_columns(path: Path, drop: tuple[str, ...] = (), **more: str) -> None:
    """Write a table anew, in another order, without some columns and with others."""
    with path.open(newline="") as file:
        rows = [{key: row[key] for key in reversed(row) if key not in drop} | more for row in csv.DictReader(file)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_records_of_other_releases(tmp_path: Path):
    """Columns are found by name: a missing one is None, an unknown one is kept and written again."""
    write_records(tmp_path, [RECORD, FLOAT])
    change_columns(tmp_path / "quantized.csv", ("method", "flips", "nll"), joules="12", colour="red")
    found = read_records(tmp_path)
    unknown = {"joules": "12", "colour": "red"}
    assert found == [replace(record, flips=None, nll=None, unknown=unknown) for record in (RECORD, FLOAT)]
    assert [record.method for record in found] == ["default", ""]
    write_records(tmp_path, [*found, GPFQ])
    with (tmp_path / "quantized.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["joules"] for row in rows] == ["12", "12", ""] and rows[2]["flips"] == "4.2"
    change_columns(tmp_path / "quantized.csv", ("strategy", "network"))
    with pytest.raises(UserError, match=r"quantized\.csv has no column strategy, network"):
        read_records(tmp_path)


def test_layers_of_other_releases(tmp_path: Path):
    layer = LayerRecord(
        "conv1", "least_squares", "midrise", 4, 9, "layer", 0.1, 0.0, 50, 0.2, "", "peer0", "default", 2
    )
    write_layers(tmp_path, [layer])
    change_columns(tmp_path / "layers.csv", ("method",), norm="3")
    assert read_layers(tmp_path) == [replace(layer, unknown={"norm": "3"})]


def test_methods_grow_side_by_side(tmp_path: Path):
    """A method's row neither replaces another's nor stands for it, and old rows are those of the default."""
    right = {"test": torch.ones(9, dtype=torch.bool)}
    layer = LayerRecord(
        "conv1", "least_squares", "midrise", 4, 9, "layer", 0.1, 0.0, 50, 0.2, "", "peer0", "default", 2
    )
    write_records(tmp_path, [RECORD])
    write_layers(tmp_path, [layer])
    write_correct(tmp_path, {"peer0/test/2": right["test"]})
    for record in (RECORD, GPFQ):
        path = packed_path(tmp_path, record)
        path.parent.mkdir(exist_ok=True)
        path.touch()
    for name, drop in (("quantized.csv", ("method",)), ("layers.csv", ("method",))):
        change_columns(tmp_path / name, drop)
    results = ResultFolder(tmp_path, RECORD.config_hash)
    assert results.missing("peer0", [2, 3]) == [3] and results.missing("peer0", [2, 3], "gpfq") == [2, 3]
    results.add(GPFQ, {"test": ~right["test"]}, [replace(layer, method="gpfq")])
    results.add(FLOAT, right)
    again = ResultFolder(tmp_path, RECORD.config_hash)
    assert again.records == results.records == [RECORD, GPFQ, FLOAT] and len(again.layers) == 2
    assert again.missing("peer0", [2, 32]) == again.missing("peer0", [2], "gpfq") == []
    assert again.correct["peer0/test/2"].all() and not again.correct["peer0/test/gpfq/2"].any()
    packed_path(tmp_path, GPFQ).unlink()
    assert again.missing("peer0", [2]) == [] and again.missing("peer0", [2], "gpfq") == [2]


def test_committed_records_are_of_known_methods():
    """Every record in results/ is read whole: its float rows have no method, no column is unknown."""
    found = find_records(Path(__file__).resolve().parents[1] / "results")
    assert sum(map(len, found.values())) > 100
    for folder, records in found.items():
        methods = {"default"} if "cpu_cifar10" in folder.parts else {"default", "gpfq"}
        assert {record.method for record in records if record.bits != 32} <= methods
        assert all((record.method == "") == (record.bits == 32) for record in records)
        assert not any(record.unknown for record in records)
        layers = {identity(layer) for layer in read_layers(folder)}
        assert layers <= {identity(record) for record in records}
        assert {record.correct_key("test") for record in records} <= read_correct(folder).keys()


def test_a_file_is_found_by_bits_and_method(tmp_path: Path):
    version = tmp_path / "version_0"
    for record in (GPFQ, RECORD, MIXED):
        packed_path(version, record).parent.mkdir(parents=True, exist_ok=True)
        packed_path(version, record).touch()
    write_records(version, [GPFQ, RECORD, MIXED])
    with pytest.raises(UserError, match="no finished version"):
        find_packed(tmp_path, 2)
    mark_finished(version)
    assert find_packed(tmp_path, 2) == packed_path(version, RECORD)
    assert find_packed(tmp_path, 2, "gpfq") == packed_path(version, GPFQ)
    assert find_packed(version, 100_000, "mixed") == packed_path(version, MIXED)
    with pytest.raises(UserError, match="a packed file of 3 bits made by gpfq"):
        find_packed(tmp_path, 3, "gpfq")


def test_find_records(tmp_path: Path):
    for name in ("b/version_0", "a/version_1", "a/version_0"):
        write_records(tmp_path / name, [replace(RECORD, run=name)])
    found = find_records(tmp_path, tmp_path / "a")
    assert [str(path.relative_to(tmp_path)) for path in found] == ["a/version_0", "a/version_1", "b/version_0"]
    assert found[tmp_path / "b/version_0"][0].run == "b/version_0"
    with pytest.raises(UserError, match="nowhere"):
        find_records(tmp_path / "nowhere")


def test_config_hash(workspace: Path, capsys: pytest.CaptureFixture[str]):
    """What can't change a result leaves the hash alone, whatever does changes it."""

    def parsed(*arguments: str) -> dict:
        with pytest.raises(SystemExit):
            main(["fit", "--config", config("vanilla_cpu"), *arguments, "--print_config"])
        return yaml.safe_load(capsys.readouterr().out)

    plain = config_hash(parsed())
    same = ["--seed_everything=7", "--data.root=elsewhere", "--trainer.accelerator=cpu", "--trainer.devices=2"]
    same += ["--trainer.strategy=ddp", "--trainer.enable_progress_bar=false", "--name=other", "--data.seed=4"]
    assert config_hash(parsed(*same)) == plain
    moved = parsed("--trainer.default_root_dir=/elsewhere/out", "--model.init_args.teacher=/elsewhere/out/teacher_cpu")
    assert config_hash(moved) == plain
    others = {
        option: config_hash(parsed(option))
        for option in (
            "--trainer.max_epochs=3",
            "--trainer.limit_test_batches=2",
            "--model.init_args.temperature=2",
            "--model.init_args.teacher=runs/other",
            "--data.batch_size=64",
        )
    }
    assert len({plain, *others.values()}) == 1 + len(others)
    settings = parsed()
    before = copy.deepcopy(settings)
    assert config_hash(settings, weights="a") != config_hash(settings, weights="b") != plain
    settings["quantization"] = {"bits": [2], "enabled": True, "solver": None}
    assert config_hash(settings) == config_hash(before | {"quantization": {"bits": [4]}})
    settings["quantization"]["solver"] = "gpfq"
    assert config_hash(settings) != config_hash(before | {"quantization": {"bits": [4]}})


def test_images_without_a_name_are_told_apart_by_their_folder():
    def settings(root: str) -> dict:
        images = {"class_path": "ImageFolderDataModule", "init_args": {"root": root}}
        return {"trainer": {}, "model": {"class_path": "Classifier"}, "data": images, "quantization": {}}

    assert config_hash(settings("data/birds")) != config_hash(settings("data/flowers"))
    assert config_hash(settings("data/birds")) == config_hash(settings("/elsewhere/birds"))


def test_version_is_the_package_s():
    text = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text()
    assert f'version = "{kdq_lightning.__version__}"' in text


@pytest.mark.parametrize(("old", "new"), [("lsq", "least_squares"), ("lsq+rounding", "least_squares+rounding")])
def test_old_names_of_solvers(tmp_path: Path, old: str, new: str):
    """They are read as the names of today, and written as such."""
    layer = LayerRecord("conv1", old, "midrise", 4, 9, "layer", 0.1, 0.0, 50, 0.2, "", "peer0", "default", 2)
    write_records(tmp_path, [replace(RECORD, solver=old)])
    write_layers(tmp_path, [layer])
    assert [row.solver for row in (*read_records(tmp_path), *read_layers(tmp_path))] == [new, new]
