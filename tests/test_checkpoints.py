"""Packed files wherever a trained network is asked for: tested, taught by, trained on, and refused with a sentence."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from kdq_lightning.cli import main
from kdq_lightning.data.datamodules import CIFARDataModule
from kdq_lightning.errors import UserError
from kdq_lightning.networks import build_network
from kdq_lightning.quantization import Quantized, quantize
from kdq_lightning.runs.checkpoints import load_trained
from kdq_lightning.runs.trained_network import Description, load_state
from tests.conftest import FEW_STEPS, config
from tests.printed import scores

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.2, 0.3)
TOLD = {"network": "resnet8", "num_classes": "10", "mean": json.dumps(MEAN), "std": json.dumps(STD)}
SMALL = "--model.init_args.network=resnet8"


@pytest.fixture(scope="module")
def quantized() -> Quantized:
    """Quantize a resnet8 to 2 bits; moment matching gives every convolution a bias."""
    torch.manual_seed(0)
    network = build_network("resnet8", 10)
    network.train()(torch.randn(64, 3, 16, 16))  # BatchNorm statistics that matter
    # Smooth, as pictures are: on noise the first layer is rounded, which gives it no bias.
    images = F.interpolate(torch.randn(16, 3, 4, 4), (16, 16), mode="bilinear") + 0.1 * torch.randn(16, 3, 16, 16)
    return quantize(network.eval(), [images], (2,), progress=lambda *_: None)[2]


@pytest.fixture
def packed(quantized: Quantized, workspace: Path) -> Path:
    """Return the packed file, where a run has it."""
    path = workspace / "runs/control_cpu/version_0/packed/resnet8-int-2bit.safetensors"
    quantized.save(path, TOLD)
    return path


def by_hand(network: torch.nn.Module, images: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the network's probabilities (images, classes) on the tiny test set, and the labels."""
    data = CIFARDataModule("cifar10", images, mean=MEAN, std=STD, val_size=0.2)
    data.setup()
    with torch.no_grad():
        return network(data.normalize(data.test_set.images)).softmax(1), data.test_set.labels


def command(name: str, images: Path, *arguments: str, strategy: str = "control") -> int:
    return main([name, "--config", config(f"{strategy}_cpu"), f"--data.root={images}", *FEW_STEPS, *arguments])


def test_a_packed_network_is_rebuilt_to_the_bit(quantized: Quantized, packed: Path):
    assert "conv1.bias" in quantized.model.state_dict(), "else this test shows nothing"
    ((name, trained),) = load_trained(packed).items()
    assert (name, trained.network, trained.num_classes) == ("resnet8", "resnet8", 10)
    assert trained.statistics == (MEAN, STD)
    images = torch.randn(5, 3, 16, 16)
    assert torch.equal(trained.build()(images), quantized.model(images))


def test_validate_test_and_predict_on_a_packed_file(
    quantized: Quantized, packed: Path, images: Path, capsys: pytest.CaptureFixture[str]
):
    """The accuracy is a count by hand; the predictions lie in the run's own folder."""
    probability, labels = by_hand(quantized.model, images)
    expected = 100 * float((probability.argmax(1) == labels).double().mean())
    for place in ("--ckpt_path", "--model.init_args.weights"):
        assert command("test", images, SMALL, f"{place}={packed}") == 0
        assert scores(capsys.readouterr().out) == [pytest.approx(expected, abs=0.005)]
    assert command("validate", images, SMALL, f"--ckpt_path={packed}") == 0
    assert command("predict", images, SMALL, f"--ckpt_path={packed}") == 0
    assert not (packed.parents[1] / "predictions.csv").exists(), "those of the float network"
    with (packed.parents[1] / f"predictions-{packed.stem}.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = [f"class{label:03d}" for label in range(10)]
    assert [row["label"] for row in rows] == [names[label] for label in labels]
    assert all(row["file"].startswith(f"test/{row['label']}/") for row in rows)
    assert [row["predicted"] for row in rows] == [names[label] for label in probability.argmax(1)]
    found = torch.tensor([float(row["probability"]) for row in rows])
    torch.testing.assert_close(found, probability.amax(1), rtol=0, atol=1e-5)


def test_predictions_of_a_file_outside_a_run(packed: Path, images: Path):
    """Two predictions, two folders: nothing is overwritten, and nothing is put beside the file."""
    shutil.copy(packed, "downloaded.safetensors")
    for _ in range(2):
        assert command("predict", images, SMALL, "--ckpt_path=downloaded.safetensors") == 0
    assert len(list(Path("runs/control_cpu-predicted").glob("version_[01]/predictions-downloaded.csv"))) == 2
    assert not Path("predictions.csv").exists()


def test_a_packed_teacher(packed: Path, images: Path):
    arguments = [SMALL, f"--model.init_args.teacher={packed}", "--trainer.max_steps=1", "--trainer.max_epochs=1"]
    arguments.append("--quantization.enabled=false")
    assert command("fit", images, *arguments, strategy="vanilla") == 0


def test_training_goes_on_from_a_packed_file(packed: Path, images: Path, capsys: pytest.CaptureFixture[str]):
    """The gained biases train, are saved, and survive a resumption without that file, and a test."""
    arguments = [SMALL, f"--model.init_args.weights={packed}", "--name=recovered", "--trainer.max_epochs=2"]
    arguments.append("--quantization.enabled=false")
    few = ["--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1"]
    stop = "--trainer.callbacks+=tests.test_cli.StopAfterFirstEpoch"
    assert command("fit", images, *arguments, *few, stop) == 1
    before = load_trained(packed)["resnet8"].state["conv1.bias"]
    packed.unlink()
    assert command("fit", images, *arguments, *few, "--ckpt_path=last") == 0, capsys.readouterr().err
    trained = load_trained("runs/recovered")["resnet8"]
    assert not torch.equal(trained.state["conv1.bias"], before)
    assert command("test", images, SMALL, "--ckpt_path=runs/recovered") == 0


def test_one_packed_peer_of_two(packed: Path, images: Path, capsys: pytest.CaptureFixture[str]):
    """A peer's packed file is tested with the config that trained it; training from it would lack the other peers."""
    arguments = ["--model.init_args.networks=[resnet14,resnet8]", f"--model.init_args.weights={packed}"]
    assert command("test", images, *arguments, strategy="dml") == 0
    printed = capsys.readouterr().out
    assert len(scores(printed)) == 1 and "mean" not in printed
    assert command("fit", images, *arguments, strategy="dml") == 1
    assert "holds resnet8; peer0, peer1 is asked for" in capsys.readouterr().err


def test_a_packed_file_without_metadata_needs_flags(quantized: Quantized, images: Path, workspace, capsys):
    quantized.save("bare.safetensors")
    statistics = [f"--model.init_args.weights_mean={list(MEAN)}", f"--model.init_args.weights_std={list(STD)}"]
    assert command("test", images, SMALL, "--ckpt_path=bare.safetensors", *statistics) == 0
    assert command("test", images, SMALL, "--ckpt_path=bare.safetensors", statistics[0]) == 1
    assert capsys.readouterr().err.endswith("too little of its network: give --model.init_args.weights_std\n")


def test_packed_files_that_are_refused(quantized: Quantized, packed: Path, images: Path, capsys):
    """Truncated, of another network, with other classes, with strange metadata: one sentence each."""
    Path("cut.safetensors").write_bytes(packed.read_bytes()[:-100])
    quantized.save("strange.safetensors", {**TOLD, "mean": "(0.4, 0.5, 0.6)"})
    quantized.save("foreign.safetensors", {**TOLD, "network": "resnet9"})
    for arguments, sentence in (
        (["--ckpt_path=cut.safetensors"], "truncated"),
        (["--ckpt_path=strange.safetensors"], "not a JSON list of numbers"),
        (["--ckpt_path=foreign.safetensors"], "unknown network 'resnet9'"),
        ([f"--ckpt_path={packed}", "--data.dataset=cifar100"], "10 classes, the data 100"),
    ):
        assert command("test", images, SMALL, *arguments) == 1
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1
    assert command("test", images, "--model.init_args.network=resnet14", f"--ckpt_path={packed}") == 1
    assert "holds resnet8; resnet14 is asked for" in capsys.readouterr().err


def test_biases_that_belong_nowhere_are_refused():
    """Only a convolution or linear layer without bias gains one, and only of its own length."""
    network = build_network("resnet8", 10)
    for key, value in (("nowhere.bias", torch.zeros(16)), ("conv1.bias", torch.zeros(5))):
        with pytest.raises(UserError, match=key):
            load_state(build_network("resnet8", 10), {**network.state_dict(), key: value}, Path("x"))


def test_a_plain_state_dict_with_gained_biases(quantized: Quantized, workspace: Path):
    save_file(quantized.model.state_dict(), "plain.safetensors")
    rebuilt = load_trained("plain.safetensors", Description("resnet8", MEAN, STD))["resnet8"].build()
    images = torch.randn(5, 3, 16, 16)
    assert torch.equal(rebuilt(images), quantized.model(images))
