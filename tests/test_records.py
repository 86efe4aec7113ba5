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
from kdq_lightning.runs.config_hash import config_hash
from kdq_lightning.runs.records import (
    HEADER,
    Record,
    find_records,
    read_correct,
    read_records,
    write_correct,
    write_records,
)
from tests.conftest import config

INTERFACE = (
    "run,dataset,strategy,network,peer,seed,solver,codebook,bits,levels,packed_bytes,val_top1,val_top5,test_top1,"
    "test_top5,agreement_float,agreement_teacher,flips,nll,ece,relative_error,seconds,epochs,partial,config_hash,version"
)

RECORD = Record(
    run="dml_cpu", dataset="cifar10", strategy="dml", network="resnet20", peer="peer0", seed=3, solver="lsq",
    codebook="midrise", bits=2, levels=4, packed_bytes=84123, val_top1=90.02, val_top5=99.5, test_top1=89.57,
    test_top5=99.41, agreement_float=93.1, agreement_teacher=None, flips=4.2, nll=0.4567, ece=5.25,
    relative_error=0.213, seconds=1.5, epochs=15, partial=False, config_hash="0123456789ab", version="0.1.0",
)  # fmt: skip
FLOAT = replace(
    RECORD,
    bits=32,
    levels=None,
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
        whole.replace("val_top1", "accuracy"),
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
