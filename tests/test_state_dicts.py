"""State dicts as people save them, by every suffix, wrapped and prefixed, and files that would run code."""

import argparse
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from kdq_lightning.cli import main
from kdq_lightning.errors import UserError
from kdq_lightning.networks import build_network
from kdq_lightning.quantization import quantize
from kdq_lightning.runs.checkpoints import load_trained, read_checkpoint
from kdq_lightning.runs.state_dicts import read_plain_file, strip_prefixes
from kdq_lightning.runs.trained_network import Description
from tests.conftest import FEW_STEPS, config

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.2, 0.3)
OWN = "tests.test_networks.TwoHeads"
GIVEN = Description("resnet8", MEAN, STD)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return build_network("resnet8", 10).eval()


def prefixed(state: dict, prefix: str) -> dict:
    return {f"{prefix}{key}": value for key, value in state.items()}


FORMS = {
    "plain.pth": lambda state: state,
    "plain.pt": lambda state: prefixed(state, "_orig_mod."),
    "imagenet.pth.tar": lambda state: {"epoch": 90, "arch": "resnet8", "state_dict": prefixed(state, "module.")},
    "torchvision.bin": lambda state: {"model": state, "args": argparse.Namespace(lr=0.1), "epoch": 3},
    "twice.pth": lambda state: {"model_state": {"state_dict": prefixed(state, "module._orig_mod.")}},
    "ema.pt": lambda state: {"ema": {**prefixed(state, "module."), "n_averaged": torch.tensor(5)}},
    "lightning.ckpt": lambda state: {"state_dict": prefixed(state, "net."), "pytorch-lightning_version": "2.6"},
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form(name: str, network: nn.Module, workspace: Path):
    torch.save(FORMS[name](network.state_dict()), name)
    (trained,) = load_trained(name, GIVEN).values()
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(trained.build()(images), network(images))
    assert (trained.num_classes, trained.statistics, trained.class_names) == (10, (MEAN, STD), ())


def test_the_first_of_several_is_taken_and_said(network: nn.Module, workspace: Path):
    state = network.state_dict()
    averaged = {key: value + 1 for key, value in state.items()}
    torch.save({"ema": averaged, "model": state}, "both.pth")
    plain = read_plain_file(Path("both.pth"))
    assert torch.equal(plain.state["conv1.weight"], state["conv1.weight"])
    assert plain.notes == ("its model is taken, not its ema",)


def test_prefixes_go_only_where_that_fits_better():
    state = {"model.a": torch.zeros(1), "model.b": torch.zeros(1)}
    assert strip_prefixes(state, ["model.a", "model.b"]) == state
    assert set(strip_prefixes(state, ["a", "c"])) == {"a", "b"}
    assert strip_prefixes(state, ["x"]) == state
    assert set(strip_prefixes(state | {"c": torch.zeros(1)}, ["a", "b", "c"])) == {"model.a", "model.b", "c"}


class Touch:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("touched"),)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
def test_files_that_are_refused(network: nn.Module, workspace: Path):
    """Each with a sentence that says how to save the weights, and without running anything."""
    torch.save(network, "module.pth")
    torch.save({"state_dict": network.state_dict(), "more": Touch()}, "trap.pth")
    torch.jit.script(nn.Linear(2, 2)).save("script.pt")
    Path("pickle.pth").write_bytes(pickle.dumps({"state_dict": Touch()}))
    torch.save({"epoch": 3, "weights": network.state_dict()}, "elsewhere.pth")
    torch.save([1, 2], "list.pth")
    torch.save({}, "empty.pth")
    Path("cut.pth").write_bytes(Path("elsewhere.pth").read_bytes()[:3000])
    for name, sentence in (
        ("module.pth", "NarrowResNet, and reading it could run code.*torch.save"),
        ("trap.pth", "and reading it could run code.*torch.save"),
        ("script.pt", "TorchScript"),
        ("pickle.pth", "run code|truncated or foreign"),
        ("elsewhere.pth", "holds no state dict.*but epoch, weights"),
        ("list.pth", "holds no state dict.*but list"),
        ("empty.pth", "holds no state dict.*but nothing"),
        ("cut.pth", "truncated or foreign"),
    ):
        with pytest.raises(UserError, match=sentence):
            load_trained(name, GIVEN)
    assert not Path("touched").exists()


def test_what_doesnt_fit_is_named(network: nn.Module, workspace: Path):
    state = network.state_dict()
    torch.save({"state_dict": {**state, "teacher.weight": torch.zeros(1)}}, "more.pth")
    torch.save({key: value for key, value in state.items() if not key.startswith("layer3")}, "less.pth")
    for name, sentence in (("more.pth", "has the unknown teacher.weight"), ("less.pth", r"lacks layer3\.0\.conv1")):
        (trained,) = load_trained(name, GIVEN).values()
        with pytest.raises(UserError, match=sentence):
            trained.build()
    with pytest.raises(UserError, match="holds no layer linear"):
        load_trained("less.pth", Description("resnet8", MEAN, STD))
        torch.save({"conv1.weight": torch.zeros(1)}, "none.pth")
        load_trained("none.pth", GIVEN)


def test_a_wrapped_teacher_with_prefixes(network: nn.Module, images: Path, workspace: Path, capsys):
    """As torch's ImageNet example saves it, from the command line."""
    torch.save(FORMS["imagenet.pth.tar"](network.state_dict()), "teacher.pth")
    arguments = ["fit", "--config", config("vanilla_cpu"), f"--data.root={images}", *FEW_STEPS]
    arguments += [
        "--model.init_args.network=resnet8",
        "--model.init_args.teacher=teacher.pth",
        "--trainer.max_epochs=1",
    ]
    arguments += ["--trainer.limit_train_batches=1", "--quantization.enabled=false"]
    assert main(arguments) == 1
    assert "too little of its network: give --model.init_args.teacher_network, " in capsys.readouterr().err
    told = [f"--model.init_args.teacher_mean={list(MEAN)}", f"--model.init_args.teacher_std={list(STD)}"]
    assert main([*arguments, "--model.init_args.teacher_network=resnet8", *told]) == 0
    assert "doesn't name its classes" in " ".join(capsys.readouterr().out.split())


# Files that name code


def checkpoint(name: str, **more: object) -> dict:
    """Return a checkpoint of ours that says that it holds a network of this name."""
    return {
        "networks": {name: {"network": name, "prefix": "network.", **more}},
        "data": {"num_classes": 10, "mean": MEAN, "std": STD},
        "state_dict": {},
    }


@pytest.mark.parametrize("name", ["os.system", "tests.test_state_dicts.checkpoint", OWN, "timm/hf-hub:a/b", "a/b"])
def test_a_checkpoint_imports_no_code(name: str, workspace: Path, monkeypatch: pytest.MonkeyPatch):
    """Nor does it build what only someone else's command line named."""
    called = []
    monkeypatch.setattr("os.system", lambda *_, **__: called.append(1))
    torch.save(checkpoint(name), "evil.ckpt")
    for described in (Description(), GIVEN):
        with pytest.raises(UserError, match=f"give --network {name} if you know and trust it"):
            load_trained("evil.ckpt", described)
    assert not called


def test_a_packed_file_imports_no_code(network: nn.Module, workspace: Path, images: Path, monkeypatch, capsys):
    """As `--ckpt_path`, as teacher, to be recovered and to be exported."""
    called = []
    monkeypatch.setattr("os.system", lambda *_, **__: called.append(1))
    result = quantize(network, [torch.randn(16, 3, 16, 16)], (4,), solver="rounding", progress=lambda *_: None)[4]
    told = {"network": "os.system", "num_classes": "10", "mean": str(list(MEAN)), "std": str(list(STD))}
    result.save("evil.safetensors", told)
    options = [f"--data.root={images}", *FEW_STEPS, "--model.init_args.network=resnet8"]
    for arguments in (
        ["export", "evil.safetensors", "--to=state_dict", "--out=out.safetensors"],
        ["test", "--config", config("control_cpu"), *options, "--ckpt_path=evil.safetensors"],
        ["fit", "--config", config("vanilla_cpu"), *options, "--model.init_args.teacher=evil.safetensors"],
    ):
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert "files import no code" in error and error.count("\n") == 1
    assert not called and not list(Path().rglob("version_*"))


def test_a_network_of_the_user_is_built_if_the_user_names_it(workspace: Path):
    """With the arguments that the user gives, and no others: those of a file could make it read another file."""
    network = build_network(OWN, 10, {"width": 6})
    content = checkpoint(OWN, network_args={"width": 6})
    content["state_dict"] = prefixed(network.state_dict(), "network.")
    torch.save(content, "own.ckpt")
    named = Description(OWN, network_args={"width": 6})
    assert torch.equal(load_trained("own.ckpt", named)[OWN].build().stem.weight, network.stem.weight)
    assert load_trained("own.ckpt", Description("resnet8", network_args={"width": 6}, others=(OWN,)))
    with pytest.raises(UserError, match="give --network_args the same"):
        load_trained("own.ckpt", Description(OWN))


def test_arguments_in_a_file_load_nothing(workspace: Path):
    for key in ("checkpoint_path", "pretrained", "weights", "pretrained_cfg"):
        torch.save(checkpoint("torchvision/squeezenet1_1", network_args={key: "evil.pth"}), "evil.ckpt")
        with pytest.raises(UserError, match="would load weights"):
            load_trained("evil.ckpt")["torchvision/squeezenet1_1"].build()


def test_a_foreign_checkpoint_is_none_of_ours(workspace: Path):
    torch.save(OrderedDict(state_dict={}), "foreign.ckpt")
    with pytest.raises(UserError, match="not a checkpoint of kdq"):
        read_checkpoint(Path("foreign.ckpt"))
