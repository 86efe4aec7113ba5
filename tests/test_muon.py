"""Muon: its update against float64 loops, which parameters it takes, resuming, two ranks, bad input."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from kdq_lightning.cli import main
from kdq_lightning.data.datamodules import DigitsDataModule
from kdq_lightning.errors import UserError
from kdq_lightning.modules.classifier import Classifier
from kdq_lightning.modules.muon import Muon, kernels, orthogonalize
from kdq_lightning.networks import build_network
from kdq_lightning.training.trainer import Trainer
from tests.conftest import FEW_STEPS, config

MUON = ["--model.init_args.network=resnet8", "--model.init_args.optimizer=muon", "--data.flip=alternate"]


def reference_orthogonal(update: np.ndarray) -> np.ndarray:
    """Apply p(σ) = aσ + bσ³ + cσ⁵ three times to the singular values: what the matrix steps amount to."""
    matrix = update.reshape(len(update), -1)
    left, singular, right = np.linalg.svd(matrix / np.linalg.norm(matrix), full_matrices=False)
    for _ in range(3):
        singular = 3.4445 * singular - 4.7750 * singular**3 + 2.0315 * singular**5
    return ((left * singular) @ right).reshape(update.shape)


@pytest.mark.parametrize("shape", [(8, 3, 3, 3), (4, 16, 3, 3), (32, 4, 1, 1), (6, 1, 3, 3)], ids=str)
def test_steps_equal_a_float64_reference(shape: tuple[int, ...]):
    """Five steps of a kernel and of a bias with weight decay, at a rate that changes."""
    generator = torch.Generator().manual_seed(0)
    start, bias = (torch.randn(size, generator=generator, dtype=torch.float64) for size in (shape, (5, 2)))
    gradients = [
        [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in (start, bias)] for _ in "five!"
    ]
    parameters = [nn.Parameter(start.clone()), nn.Parameter(bias.clone())]
    optimizer = Muon(
        [
            {"params": parameters[:1], "lr": 0.2, "momentum": 0.6, "orthogonal": True},
            {"params": parameters[1:], "weight_decay": 0.03},
        ],
        lr=0.1,
    )
    W, V = start.numpy().copy(), bias.numpy().copy()
    m, n = np.zeros_like(W), np.zeros_like(V)
    for step, (g, h) in enumerate(gradients):
        share = 1 - step / 5
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = 0.2 * share, 0.1 * share
        for parameter, gradient in zip(parameters, (g, h), strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        m = 0.6 * m + g.numpy()
        W = W * np.sqrt(len(W)) / np.sqrt((W**2).sum()) - 0.2 * share * reference_orthogonal(g.numpy() + 0.6 * m)
        decayed = h.numpy() + 0.03 * V
        n = 0.9 * n + decayed
        V = V - 0.1 * share * (decayed + 0.9 * n)
        np.testing.assert_allclose(parameters[0].detach(), W, rtol=0, atol=1e-12)
        np.testing.assert_allclose(parameters[1].detach(), V, rtol=0, atol=1e-12)


def test_everything_else_is_torchs_sgd():
    """The groups that are not orthogonal move as torch.optim.SGD moves them, to the bit of float32."""
    networks = [build_network("resnet8", 10) for _ in "ab"]
    networks[1].load_state_dict(networks[0].state_dict())
    muon = Muon([{"params": networks[0].parameters(), "weight_decay": 5e-4}], lr=0.1)
    sgd = torch.optim.SGD(networks[1].parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for seed in range(3):
        for network, optimizer in zip(networks, (muon, sgd), strict=True):
            generator = torch.Generator().manual_seed(seed)
            for parameter in network.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
    for mine, theirs in zip(*(network.parameters() for network in networks), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-7)


def test_a_float32_update_is_nearly_orthogonal():
    """Three steps bring the singular values of a random kernel near 1, in whatever type the processor multiplies."""
    update = orthogonalize(torch.randn(16, 32, 3, 3, generator=torch.Generator().manual_seed(0)))
    singular = torch.linalg.svdvals(update.flatten(1))
    assert update.dtype == torch.float32 and singular.min() > 0.5 and singular.max() < 1.5
    assert orthogonalize(torch.zeros(4, 4, 1, 1)).abs().max() == 0, "a kernel without gradient stays where it is"


def test_kernels_are_all_but_the_stems():
    """Peers have a stem each; a linear layer is no kernel."""
    networks = [build_network("resnet8", 10), build_network("resnet18", 10)]
    chosen = {id(kernel) for kernel in kernels(networks)}
    expected = {
        id(parameter)
        for network in networks
        for name, parameter in network.named_parameters()
        if parameter.ndim == 4 and name != "conv1.weight"
    }
    assert chosen == expected


def train(root: Path, images: Path, *options: str, strategy: str = "control") -> dict[str, torch.Tensor]:
    """Train two epochs of four steps, each of two batches, and return the weights."""
    arguments = ["fit", "--config", config(f"{strategy}_cpu"), f"--data.root={images}", *FEW_STEPS, *MUON, *options]
    arguments += ["--trainer.max_epochs=2", "--trainer.accumulate_grad_batches=2", "--data.batch_size=8"]
    arguments += [f"--trainer.default_root_dir={root}", "--quantization.enabled=false"]
    assert main(arguments) == 0
    path = root / f"{strategy}_cpu" / "version_0" / "checkpoints" / "last.ckpt"
    return torch.load(path, weights_only=True)["state_dict"]


class StopAfterASecondEpochsStep(Callback):
    """Saves the last checkpoint after the first of an epoch's steps, and breaks the run off."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 1:
            trainer.save_checkpoint(Path(trainer.log_dir, "checkpoints", "last.ckpt"))
            raise UserError("pulled the plug")


@pytest.mark.parametrize("stop", ["test_cli.StopAfterFirstEpoch", "test_muon.StopAfterASecondEpochsStep"])
def test_resumes_to_the_bit(stop: str, images: Path, workspace: Path):
    """Momentum and both schedules are in the checkpoint."""
    whole = train(Path("whole"), images)
    with pytest.raises(AssertionError):
        train(Path("cut"), images, f"--trainer.callbacks+=tests.{stop}")
    resumed = train(Path("cut"), images, "--ckpt_path=last")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_hints_train_with_muon(images: Path, teacher_run: Path, workspace: Path):
    """Two cycles of both rates; the regressor, whose scale counts, is left to SGD."""
    teacher = f"--model.init_args.teacher={teacher_run}"
    assert train(Path("runs"), images, teacher, "--model.init_args.hint_share=0.5", strategy="hint")


class WithoutBatchNorm(Classifier):
    """A network whose gradient is the mean over images, whatever rank they lie on."""

    def _build_networks(self) -> None:
        torch.manual_seed(0)
        convolutions = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=2), nn.ReLU(), nn.Conv2d(16, 4, 1)
        self.network = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 10))


def test_two_ranks_equal_one(workspace: Path):
    """The ranks' mean gradient is orthogonalised: the same update everywhere."""
    weights = []
    for devices in (1, 2):
        trainer = Trainer(
            accelerator="cpu", devices=devices, strategy="ddp_fork" if devices > 1 else "auto", max_epochs=2,
            limit_train_batches=4, accumulate_grad_batches=2, logger=False, enable_progress_bar=False,
            enable_checkpointing=False, precision="32-true",
        )  # fmt: skip
        module = WithoutBatchNorm("resnet8", 10, learning_rate=0.1, optimizer="muon")
        trainer.fit(module, DigitsDataModule(batch_size=64))
        weights.append({key: value.clone() for key, value in module.network.state_dict().items()})
    start = WithoutBatchNorm("resnet8", 10).network.state_dict()
    for key, value in weights[0].items():
        moved = (value - start[key]).abs().max()
        assert moved > 0.001 and (weights[1][key] - value).abs().max() < 0.03 * moved, key  # bfloat16 has 8 bits


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--trainer.precision=bf16-true"], "muon keeps its weights in float32"),
        (["--model.init_args.kernel_learning_rate=0"], "kernel_learning_rate must be above 0"),
    ],
    ids=["precision", "rate"],
)
def test_bad_input_is_a_sentence(options: list[str], said: str, images: Path, workspace: Path, capsys):
    with pytest.raises(AssertionError):
        train(Path("runs"), images, *options)
    assert said in capsys.readouterr().err


def test_an_unknown_optimizer_is_refused_by_the_parser(workspace: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["fit", "--config", config("control_cpu"), "--model.init_args.optimizer=moun"])
    assert "optimizer" in (err := capsys.readouterr().err) and "muon" in err


def test_networks_without_convolutions_are_refused():
    with pytest.raises(ValueError, match="kernels of convolutions beyond the first, and Sequential has none"):
        kernels([nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2))])


def test_an_sgd_run_does_not_go_on_with_muon(images: Path, workspace: Path, capsys: pytest.CaptureFixture[str]):
    """Nor one from before the choice existed."""
    sgd = ["fit", "--config", config("control_cpu"), f"--data.root={images}", *FEW_STEPS]
    sgd += ["--model.init_args.network=resnet8", "--trainer.max_epochs=2", "--quantization.enabled=false"]
    with pytest.raises(AssertionError):
        assert main([*sgd, "--trainer.callbacks+=tests.test_cli.StopAfterFirstEpoch"]) == 0
    last = Path("runs/control_cpu/version_0/checkpoints/last.ckpt")
    checkpoint = torch.load(last, weights_only=True)
    del checkpoint["plan"]["optimizer"]
    torch.save(checkpoint, last)
    shutil.copytree("runs", "kept")
    assert main([*sgd, "--ckpt_path=last", "--model.init_args.optimizer=muon"]) == 1
    assert "was trained with optimizer sgd, this command says muon" in capsys.readouterr().err
    assert main([*sgd, "--ckpt_path=last"]) == 0
