"""Recovering a packed network: codes stay, the rest learns, and the callback packs the result as it is."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from kdq_lightning.cli import main
from kdq_lightning.data.augmentation import View
from kdq_lightning.data.normalization import Statistics, normalize
from kdq_lightning.errors import UserError
from kdq_lightning.modules.recover import Recover
from kdq_lightning.networks import build_network
from kdq_lightning.quantization import load_packed
from kdq_lightning.quantization.packing import read_metadata, read_weights, save_packed
from kdq_lightning.runs.checkpoints import find_packed
from kdq_lightning.runs.records import read_correct, read_records
from tests.conftest import config

DIGITS = ["--data=DigitsDataModule", "--data.init_args.batch_size=64", "--model.init_args.network=resnet8"]
FEW = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--quantization.calibration_images=32"]


def fit(name: str, *arguments: str) -> int:
    return main(["fit", "--config", config(name), *DIGITS, *FEW, *arguments])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a teacher for an epoch, pack it at 2 bits, and recover it by its own float answers."""
    root = tmp_path_factory.mktemp("runs")
    folder = f"--trainer.default_root_dir={root}"
    assert fit("teacher_cpu", folder, "--trainer.max_epochs=2", "--quantization.bits=[2]") == 0
    arguments = [f"--model.init_args.packed={root}/teacher_cpu", f"--model.init_args.teacher={root}/teacher_cpu"]
    assert fit("recover_cpu", folder, *arguments, "--trainer.max_epochs=2") == 0
    return root


def packed_of(run: Path) -> Path:
    (path,) = run.glob("version_0/packed/resnet8-midrise-2bit.safetensors")  # by the method default
    return path


def test_codes_stay_and_the_rest_learns(runs: Path):
    before, after = packed_of(runs / "teacher_cpu"), packed_of(runs / "recover_cpu")
    assert abs(after.stat().st_size - before.stat().st_size) <= 64  # equal bytes, but for the header's words
    old, new = read_weights(before), read_weights(after)
    assert old.keys() == new.keys()
    for name in old:
        assert torch.equal(old[name].codes, new[name].codes) and torch.equal(old[name].grid, new[name].grid)
        assert not torch.equal(old[name].scale, new[name].scale)
    states = [load_packed(path, build_network("resnet8", 10)).state_dict() for path in (before, after)]
    for key in ("bn1.weight", "bn1.bias", "linear.bias"):
        assert not torch.equal(states[0][key], states[1][key]), key
    for key in ("bn1.running_mean", "bn1.running_var"):
        assert torch.equal(states[0][key], states[1][key]), key


def test_one_record_of_what_was_packed(runs: Path):
    """At its own bit width, no float network; agreement with the teacher; the right answers of the packed file."""
    folder = runs / "recover_cpu/version_0"
    (record,) = read_records(folder)
    assert (record.strategy, record.bits, record.levels, record.network) == ("recover", 2, 4, "resnet8")
    assert record.packed_bytes == packed_of(runs / "recover_cpu").stat().st_size
    assert record.agreement_float is None and record.flips is None and record.agreement_teacher > 50
    correct = read_correct(folder)
    assert 100 * correct["resnet8/test/2"].double().mean().item() == pytest.approx(record.test_top1)
    checkpoint = torch.load(folder / "checkpoints/best.ckpt", weights_only=True)["state_dict"]
    packed = load_packed(packed_of(runs / "recover_cpu"), build_network("resnet8", 10)).state_dict()
    for key, value in packed.items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(value, checkpoint[f"network.{key}"]), key


def test_finished_is_finished(runs: Path, capsys: pytest.CaptureFixture[str]):
    """Going on with it does nothing; without its record, only packing and evaluation are done again."""
    arguments = [f"--model.init_args.packed={runs}/teacher_cpu", f"--model.init_args.teacher={runs}/teacher_cpu"]
    arguments += [f"--trainer.default_root_dir={runs}", "--trainer.max_epochs=2", "--ckpt_path=last"]
    assert fit("recover_cpu", *arguments) == 1 and "nothing is left" in capsys.readouterr().err
    table = runs / "recover_cpu/version_0/quantized.csv"
    before = table.read_text()
    table.unlink()
    packed = packed_of(runs / "recover_cpu").read_bytes()
    assert fit("recover_cpu", *arguments) == 0
    assert table.read_text() == before and packed_of(runs / "recover_cpu").read_bytes() == packed


def test_a_recovered_row_has_the_method_of_its_file(runs: Path, tmp_path: Path):
    """Whether the file is named, or the method that made it; so it is no other row than the one that it came from."""
    packed = next(runs.glob("teacher_cpu/version_0/packed/resnet8-gpfq-*-2bit.safetensors"))
    few = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", f"--model.init_args.teacher={runs}/teacher_cpu"]
    for name, given in (("file", [packed]), ("folder", [runs / "teacher_cpu", "gpfq"])):
        options = [f"--model.init_args.{key}={value}" for key, value in zip(("packed", "method"), given, strict=False)]
        assert fit("recover_cpu", f"--trainer.default_root_dir={tmp_path}", f"--name={name}", *few, *options) == 0
        (record,) = read_records(tmp_path / name / "version_0")
        assert (record.strategy, record.method, record.bits, record.levels) == ("recover", "gpfq", 2, 5)
        assert (tmp_path / name / "version_0" / "packed" / packed.name).is_file()
        assert read_correct(tmp_path / name / "version_0").keys() == {"resnet8/val/gpfq/2", "resnet8/test/gpfq/2"}


def test_the_row_of_mixed_bits_has_its_budget(runs: Path, tmp_path: Path):
    """The file says it; one that doesn't is as large as its budget."""
    path = packed_of(runs / "teacher_cpu")
    network, metadata = load_packed(path, build_network("resnet8", 10)), read_metadata(path)
    for said, budget in (({"budget": "30000"}, 30_000), ({}, None)):
        mixed = tmp_path / "mixed.safetensors"
        save_packed(mixed, network, read_weights(path), metadata | {"method": "mixed"} | said)
        assert make_module(runs, packed=str(mixed)).packed_row == ("mixed", budget or mixed.stat().st_size)


def make_module(runs: Path, **changes: object) -> Recover:
    """Return a module that is set up for training."""

    class Data:
        statistics = Statistics((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))

    class FakeTrainer:
        datamodule, ckpt_path = Data(), None

    options = {"packed": str(runs / "teacher_cpu"), "bits": 2, "teacher": str(runs / "teacher_cpu")} | changes
    module = Recover(**{"network": "resnet8", "num_classes": 10, **options})
    module._trainer = FakeTrainer()
    module._fabric = None
    module.setup("fit")
    return module.train()


def test_loss_and_gradients_are_those_of_a_loop(runs: Path):
    """τ²·KL by hand on the packed file's own outputs; a gain's gradient is Σ of weight times the weight's gradient."""
    module = make_module(runs)
    generator, labels = torch.Generator().manual_seed(0), torch.zeros(8).long()
    view = View(torch.rand(8, 3, 16, 16, generator=generator), labels, labels, size=16)
    module.losses(view).loss.backward()
    reference = load_packed(packed_of(runs / "teacher_cpu"), build_network("resnet8", 10)).eval()
    inputs = normalize(view.images, module.teacher.statistics)  # both have the statistics of the digits
    target = module.teacher.network(inputs)
    tau, student = 4.0, reference(inputs)
    teacher = F.softmax(target / tau, 1)
    loss = tau**2 * (teacher * (teacher.log() - F.log_softmax(student / tau, 1))).sum(1).mean()
    loss.backward()
    assert torch.allclose(module.losses(view).loss, loss, rtol=1e-5)
    for name, gain in zip(module._weights, module.gains, strict=True):
        weight = reference.get_parameter(f"{name}.weight")
        assert torch.allclose(gain.grad, (weight * weight.grad).flatten(1).sum(1), rtol=1e-3, atol=1e-6), name
        assert module.network.get_parameter(f"{name}.weight").grad is None
    assert not any(m.training for m in module.network.modules())


def test_codes_that_are_gone_or_others(runs: Path, tmp_path: Path):
    """Scales go on with their own codes alone, and without codes nothing is called recovered."""
    module, checkpoint = make_module(runs), {}
    other = tmp_path / "other-2bit.safetensors"
    other.write_bytes(packed_of(runs / "recover_cpu").read_bytes())
    for stored in ("packed", "data", "networks"):
        checkpoint[stored] = torch.load(runs / "recover_cpu/version_0/checkpoints/last.ckpt", weights_only=True)[stored]
    checkpoint["state_dict"] = module.state_dict()
    module.on_load_checkpoint(checkpoint)
    with pytest.raises(UserError, match="is not the one that this run began with"):
        make_module(runs, packed=str(other)).on_load_checkpoint(checkpoint)
    alone = Recover(packed="gone.safetensors", teacher="gone", network="resnet8", num_classes=10)
    with pytest.raises(UserError, match=r"gone\.safetensors is gone"):
        alone.packed_weights()


def test_wrong_files(runs: Path, tmp_path: Path):
    for changes, sentence in (
        ({"bits": None}, "say which of its packed files"),
        ({"bits": 5}, "no finished version with a packed file of 5 bits"),
        ({"network": "resnet14"}, "holds a resnet8 with 10 classes"),
        ({"num_classes": 7}, "holds a resnet8 with 10 classes"),
        ({"packed": "nothing.safetensors"}, "there is no packed file"),
        ({"temperature": 0}, "temperature"),
    ):
        with pytest.raises(UserError, match=sentence):
            make_module(runs, **changes)
    assert find_packed(packed_of(runs / "teacher_cpu"), None) == packed_of(runs / "teacher_cpu")
    assert len(load_file(packed_of(runs / "teacher_cpu"))) == 3
