"""Whose classes: the same, the same in another order, others, and files that don't say."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from kdq_lightning.cli import main
from kdq_lightning.data.base import ImageDataModule
from kdq_lightning.data.datamodules import DigitsDataModule
from kdq_lightning.data.images import ImageSet
from kdq_lightning.errors import UserError
from kdq_lightning.runs.checkpoints import load_trained
from kdq_lightning.runs.class_names import class_order, decode_names, encode_names
from tests.printed import scores

NAMES = ["seven", "one, two", "näht", "a/b\n%", os.fsdecode(b"caf\xe9"), "", " "]


def test_names_survive_a_file():
    text = encode_names(NAMES)
    assert text.isascii() and "\n" not in text
    assert decode_names(text) == tuple(NAMES)


def test_order_of_classes():
    assert class_order(["a", "b"], ("a", "b"), "it", "data") is None
    assert class_order(["c", "a", "b"], ["a", "b", "c"], "it", "data") == [1, 2, 0]
    with pytest.raises(UserError, match=r"it has other classes than the data d \(it has b; the data have c\)"):
        class_order(["a", "b"], ["a", "c"], "it", "d")


WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def write_digits(root: Path, names: list[str]) -> None:
    """Write a few of scikit-learn's digits as class folders of these names."""
    digits = load_digits()
    pixels = (digits.images * 255 / 16).round().astype(np.uint8)
    for i in range(600):
        place = root / ("test" if i % 5 == 0 else "train") / names[digits.target[i]]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[i]).resize((16, 16), 0).save(place / f"{i}.png")


class Backwards(ImageDataModule):
    """The folder `figures`, its classes from 9 to 0."""

    def __init__(self, root: str, **options: Any) -> None:
        self.root = root
        super().__init__(
            dataset="backwards", num_classes=10, image_size=16, mean=(0.5,) * 3, std=(0.25,) * 3, **options
        )

    def read(self) -> tuple[ImageSet, ImageSet]:
        """Return the digits with the label 9 - digit."""
        data = DigitsDataModule()
        data.setup()
        return tuple(
            ImageSet(part.images, 9 - part.labels, part.class_names[::-1]) for part in (data.train_set, data.test_set)
        )


QUICK = ["--model.network=resnet8", "--model.learning_rate=0.1", "--trainer.accelerator=cpu"]
QUICK += ["--trainer.enable_progress_bar=false", "--quantization.bits=[4]", "--quantization.calibration_images=64"]
DIGITS = ["--data=DigitsDataModule", "--data.batch_size=64"]
FOLDER = ["--data=ImageFolderDataModule", "--data.image_size=16", "--data.batch_size=64"]
BACKWARDS = ["--data=tests.test_class_names.Backwards", "--data.root=x", "--data.batch_size=64", "--data.val_size=0.1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on digits, whose classes are 0 to 9, and return the folder of runs and images."""
    root = tmp_path_factory.mktemp("classes")
    write_digits(root / "figures", [str(digit) for digit in range(10)])
    write_digits(root / "words", WORDS)
    options = ["--model=Classifier", *QUICK, "--trainer.max_epochs=4", f"--trainer.default_root_dir={root}/runs"]
    assert main(["fit", *options, *DIGITS, "--name=figures"]) == 0
    return root


def packed_file(trained: Path) -> Path:
    (path,) = (trained / "runs/figures/version_0/packed").glob("resnet8-[!g]*-4bit.safetensors")
    return path


def test_files_keep_whose_classes_they_know(trained: Path, workspace: Path, capsys: pytest.CaptureFixture[str]):
    """The checkpoint, the packed file, and every export."""
    names = tuple(map(str, range(10)))
    best, packed = load_trained(trained / "runs/figures"), load_trained(packed_file(trained))
    for found in (*best.values(), *packed.values()):
        assert (found.dataset, found.class_names, found.image_shape) == ("digits", names, (3, 16, 16))
        assert 50 < found.val_top1 <= 100
    given = ["--network=resnet8", "--mean", "0.3", "0.3", "0.3", "--std", "0.3", "0.3", "0.3"]
    for suffix in ("safetensors", "pth"):
        assert main(["export", str(packed_file(trained)), "--to=state_dict", f"--out=plain.{suffix}"]) == 0
        assert main(["export", f"plain.{suffix}", "--to=state_dict", "--out=again.safetensors", *given]) == 0
        assert "digits, 10 classes (0, 1, 2, 3, ...)" in capsys.readouterr().out.partition("again.safetensors")[2]
    state = torch.load("plain.pth", weights_only=True)
    assert set(state) == set(best["resnet8"].state) | {key for key in state if key.endswith(".bias")}
    assert main(["export", str(packed_file(trained)), "--to=torch_export", "--out=net.pt2"]) == 0
    extra = {"metadata.json": ""}
    torch.export.load("net.pt2", extra_files=extra)
    assert '"class_names": "0,1,2,3,4,5,6,7,8,9"' in extra["metadata.json"]


def command(name: str, trained: Path, data: str, *arguments: str, model: str = "Classifier") -> int:
    own = [f"--model={model}", *QUICK, *FOLDER, f"--data.root={trained}/{data}", "--trainer.max_epochs=1"]
    return main([name, *own, *arguments])


def test_other_classes_are_refused_by_name(trained: Path, workspace: Path, capsys: pytest.CaptureFixture[str]):
    """Tested, validated, predicted, quantized, recovered, taught by, started from: one sentence each."""
    run, packed = f"{trained}/runs/figures", packed_file(trained)
    for arguments, model in (
        (["test", f"--ckpt_path={run}"], "Classifier"),
        (["test", f"--ckpt_path={packed}"], "Classifier"),
        (["validate", f"--ckpt_path={run}"], "Classifier"),
        (["quantize", f"--ckpt_path={run}"], "Classifier"),
        (["fit", f"--model.weights={run}"], "Classifier"),
        (["fit", f"--model.teacher={run}"], "VanillaKD"),
        (["fit", f"--model.teacher={run}", f"--model.packed={packed}"], "Recover"),
    ):
        assert command(arguments[0], trained, "words", *arguments[1:], model=model) == 1, arguments
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "0, 1, 2, 3, ...; the data have eight, five, four, nine, ..." in error
        assert "trained on digits" in error
        assert not list(Path().rglob("quantized.csv"))


def test_the_same_classes_of_other_data_are_taken(trained: Path, workspace: Path, capsys: pytest.CaptureFixture[str]):
    """Of a file without names, too, which is said."""
    assert command("test", trained, "figures", f"--ckpt_path={trained}/runs/figures") == 0
    assert accuracy(capsys) > 80
    checkpoint = torch.load(trained / "runs/figures/version_0/checkpoints/best.ckpt", weights_only=True)
    for key in ("class_names", "dataset", "image_shape"):
        del checkpoint["data"][key]
    torch.save(checkpoint, "old.ckpt")
    assert command("test", trained, "figures", "--ckpt_path=old.ckpt") == 0
    printed = capsys.readouterr()
    assert "old.ckpt doesn't name its classes: they are taken to be the data's" in " ".join(printed.out.split())


def accuracy(capsys: pytest.CaptureFixture[str]) -> float:
    return scores(capsys.readouterr().out)[0]


@pytest.mark.parametrize("file", ["run", "packed"])
def test_another_order_is_mapped(file: str, trained: Path, workspace: Path, capsys: pytest.CaptureFixture[str]):
    """The accuracy is that of the data's own order, and the terminal says so."""
    path = packed_file(trained) if file == "packed" else trained / "runs/figures"
    straight = ["--model=Classifier", *QUICK, *DIGITS, f"--ckpt_path={path}"]
    assert main(["test", *straight]) == 0
    expected = accuracy(capsys)
    assert main(["test", "--model=Classifier", *QUICK, *BACKWARDS, f"--ckpt_path={path}"]) == 0
    printed = capsys.readouterr().out
    assert "they are put in the data's, 9, 8, 7, 6, ..." in " ".join(printed.split())
    assert scores(printed) == [expected]


def test_a_network_of_another_order_teaches_and_recovers(trained: Path, workspace: Path):
    """A recovered network starts from the packed one's accuracy: codes and scales of the last layer move with it."""
    few = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--model.learning_rate=1e-6"]
    options = [*QUICK, *BACKWARDS, *few]
    options += [f"--model.teacher={trained}/runs/figures", f"--model.packed={packed_file(trained)}"]
    assert main(["fit", "--model=Recover", *options, "--name=recovered"]) == 0
    (after,) = load_trained("runs/recovered").values()
    before = load_trained(packed_file(trained))["resnet8"].state
    torch.testing.assert_close(after.state["linear.weight"], before["linear.weight"].flip(0), rtol=1e-3, atol=1e-3)
    assert after.class_names == tuple(map(str, range(9, -1, -1))) and after.val_top1 > 80


def test_a_run_goes_on_with_its_own_classes_alone(trained: Path, workspace: Path, capsys: pytest.CaptureFixture[str]):
    few = ["--trainer.limit_train_batches=1", "--name=run", "--quantization.enabled=false", "--trainer.max_epochs=2"]
    stop = "--trainer.callbacks+=tests.test_cli.StopAfterFirstEpoch"
    assert command("fit", trained, "figures", *few, stop) == 1
    assert command("fit", trained, "words", *few, "--ckpt_path=last") == 1
    assert "this run began with the classes 0, 1, 2, 3, ..., and the data now have eight" in capsys.readouterr().err
    assert command("fit", trained, "figures", *few, "--ckpt_path=last") == 0


def test_a_note_says_what_was_assumed(trained: Path):
    found = load_trained(trained / "runs/figures")["resnet8"]
    assert found.for_classes(found.class_names, "digits") == found
    (note,) = replace(found, class_names=()).for_classes(["a"] * 10, "digits").notes
    assert "doesn't name its classes" in note
