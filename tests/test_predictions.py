"""`kdq predict` on a folder of images, labelled or not."""

import csv
import os
import shutil
from pathlib import Path

import pytest
import torch

from kdq_lightning.cli import main
from kdq_lightning.data.decoding import decode_file
from kdq_lightning.data.normalization import normalize
from kdq_lightning.runs.checkpoints import load_trained
from tests.conftest import FEW_STEPS, config


def predict(images: Path, teacher_run: Path, folder: Path) -> int:
    arguments = ["--config", config("teacher_cpu"), "--model.init_args.network=resnet8", *FEW_STEPS]
    arguments += [f"--data.root={images}", f"--ckpt_path={teacher_run}", f"--images={folder}"]
    return main(["predict", *arguments])


def read(run: Path) -> list[dict[str, str]]:
    with (run / "version_0" / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_folder_of_images(images: Path, teacher_run: Path, workspace: Path, capsys: pytest.CaptureFixture[str]):
    """Labels come from folders that are named after a class; a name that is no UTF-8 is escaped."""
    run = workspace / "run"
    shutil.copytree(teacher_run, run)
    sources = sorted((images / "cifar10/test").glob("*/*.png"))[:6]
    places = ["top.png", "class003/a.png", "other/b.png", "deep/class001/more/c.png", "class003/Thumbs.db"]
    for place, source in zip(places, sources, strict=False):
        (workspace / "new" / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, workspace / "new" / place)
    shutil.copy(sources[5], os.fsencode(workspace / "new") + b"/caf\xe9.png")
    assert predict(images, run, workspace / "new") == 0
    assert "1 files in" in capsys.readouterr().out
    rows = read(run)
    assert {row["file"]: row["label"] for row in rows} == {
        "top.png": "",
        "class003/a.png": "class003",
        "other/b.png": "",
        "deep/class001/more/c.png": "class001",
        "caf\\udce9.png": "",
    }
    (trained,) = load_trained(run).values()
    for row in rows:
        path = str(workspace / "new" / row["file"]).replace("\\udce9", "\udce9")
        image = torch.tensor(decode_file(path, 32)).permute(2, 0, 1)[None]
        with torch.no_grad():
            probability, top1 = trained.build()(normalize(image, trained.statistics)).softmax(1).max(1)
        assert row["predicted"] == f"class{int(top1):03d}"
        assert float(row["probability"]) == pytest.approx(float(probability), abs=1e-4)


def test_folders_that_are_refused(images: Path, teacher_run: Path, workspace: Path, capsys: pytest.CaptureFixture[str]):
    (workspace / "empty").mkdir()
    (workspace / "broken").mkdir()
    (workspace / "broken" / "a.png").write_text("no image")
    for name, sentence in (("gone", "gone is not a folder"), ("empty", "no image in"), ("broken", "not a readable")):
        assert predict(images, teacher_run, workspace / name) == 1
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1, error
