"""LightningModules: what each strategy minimises, the teacher's rest, schedules, and clipping a peer at a time."""

import copy
import gc
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdq_lightning.data.augmentation import View, shrink
from kdq_lightning.data.datamodules import CIFARDataModule, DigitsDataModule
from kdq_lightning.data.normalization import Statistics, normalize
from kdq_lightning.errors import UserError
from kdq_lightning.losses import cross_entropy, dkd_parts, hint_loss, kd_loss, mixup, mutual_loss, partner
from kdq_lightning.modules.classifier import Classifier
from kdq_lightning.modules.distillation import Distillation
from kdq_lightning.modules.dkd import DecoupledKD
from kdq_lightning.modules.dml import MutualLearning
from kdq_lightning.modules.hint import HintKD
from kdq_lightning.modules.mixup import MixupKD
from kdq_lightning.modules.schedule import one_cycle
from kdq_lightning.modules.teacher import Teacher
from kdq_lightning.modules.vanilla import VanillaKD
from kdq_lightning.networks import build_network
from kdq_lightning.runs.checkpoints import load_trained
from kdq_lightning.training.trainer import Trainer

SMALL = {"network": "resnet8", "num_classes": 10}
STATISTICS = Statistics((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
LABELS = torch.tensor([0, 1, 2, 3, 4, 5])
VIEW = View(torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)), LABELS, torch.arange(6), size=16)
SMALL_VIEW = replace(VIEW, size=8)
INPUTS = normalize(VIEW.images, STATISTICS)


def stage2_features(network: nn.Module, images: Tensor) -> Tensor:
    """Return the features after the second stage, where hints are taken from, stage by stage."""
    features = network.relu(network.bn1(network.conv1(images)))
    return network.layer2(network.layer1(features))


class RecordingTeacher(Teacher):
    """Keeps what it is shown."""

    def logits(self, images: Tensor) -> Tensor:
        self.seen = images
        return super().logits(images)


def student(kind: type[Distillation], epoch: int = 0, step: int = 0, **arguments) -> Distillation:
    """Return a student beside a teacher, at some epoch and step of a run of 24 epochs."""
    torch.manual_seed(0)
    module = kind(teacher="unused", **SMALL, **arguments)
    module.statistics = STATISTICS
    module.teacher = RecordingTeacher(build_network("resnet14", 10), STATISTICS, "resnet14")
    data = SimpleNamespace(seed=3, image_shape=(3, 16, 16))
    loops = {"fit_loop": None, "world_size": 1, "max_epochs": 24, "current_epoch": epoch, "global_step": step}
    module._trainer = SimpleNamespace(datamodule=data, **loops)
    return module


def answers(module: Distillation) -> tuple[Tensor, Tensor]:
    """Return the student's and the teacher's logits, computed apart."""
    with torch.no_grad():
        return copy.deepcopy(module.network)(INPUTS), module.teacher.network(INPUTS)


@pytest.mark.parametrize(("weight", "temperature"), [(0.1, 4.0), (0.7, 1.0), (0.0, math.inf)])
def test_vanilla(weight: float, temperature: float):
    module = student(VanillaKD, label_weight=weight, temperature=temperature)
    z_s, z_t = answers(module)
    expected = weight * cross_entropy(z_s, LABELS) + (1 - weight) * kd_loss(z_s, z_t, temperature)
    torch.testing.assert_close(module.losses(VIEW).loss, expected)


@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_mixup_shows_both_networks_the_same_images(weight: float):
    module = student(MixupKD, epoch=2, step=7, label_weight=weight, temperature=2.0)
    shown = []
    module.register_forward_pre_hook(lambda _, inputs: shown.append(inputs[0]))
    found = module.losses(VIEW)
    assert shown[0] is module.teacher.seen
    lam = float(np.random.default_rng([3, 2, 7]).beta(1.0, 1.0))
    assert torch.equal(shown[0], mixup(VIEW.images, lam)) and 0.01 < lam < 0.99
    z_s, z_t = found.logits.detach(), module.teacher.network(mixup(INPUTS, lam))
    ce = lam * cross_entropy(z_s, LABELS) + (1 - lam) * cross_entropy(z_s, partner(LABELS))
    torch.testing.assert_close(found.loss.detach(), weight * ce + (1 - weight) * kd_loss(z_s, z_t, 2.0))


def test_mixup_without_mixing_is_vanilla():
    """λ = 1 gives plain distillation."""
    mixed, plain = student(MixupKD, label_weight=0.1, temperature=4.0), student(VanillaKD)
    mixed.draw_lambda = lambda: 1.0
    torch.testing.assert_close(mixed.losses(VIEW).loss, plain.losses(VIEW).loss)


def test_mixup_draws_anew_each_step():
    draws = {student(MixupKD, epoch=epoch, step=step).draw_lambda() for epoch in range(4) for step in range(4)}
    assert len(draws) == 16


@pytest.mark.parametrize(("epoch", "ramp"), [(0, 0.5), (1, 1.0), (20, 1.0)])
def test_dkd(epoch: int, ramp: float):
    """The ramp counts epochs from 1 and ends after a twelfth of them."""
    module = student(DecoupledKD, epoch=epoch, alpha=1.5, beta=6.0)
    z_s, z_t = answers(module)
    tckd, nckd = dkd_parts(z_s, z_t, LABELS, 4.0)
    expected = cross_entropy(z_s, LABELS) + ramp * 16 * (1.5 * tckd + 6.0 * nckd).mean()
    torch.testing.assert_close(module.losses(VIEW).loss, expected)


def hinted(step: int) -> HintKD:
    module = student(HintKD, step=step)
    module.regressor = nn.Conv2d(32, 32, 1)
    module.cycles(100, warmup=0.25)
    return module


def test_hint_stages():
    """Stage 1 takes the first fifth of the steps and trains the first half; stage 2 is vanilla distillation."""
    module = hinted(step=19)
    expected = hint_loss(
        module.regressor(stage2_features(copy.deepcopy(module.network), INPUTS)),
        stage2_features(module.teacher.network, INPUTS),
    )
    found = module.losses(VIEW)
    torch.testing.assert_close(found.loss, expected)
    found.loss.backward()
    trained = {name.split(".")[0] for name, value in module.network.named_parameters() if value.grad is not None}
    assert trained == {"conv1", "bn1", "layer1", "layer2"}
    assert module.regressor.weight.grad is not None
    assert not any("regressor" in name for name in module.networks()["resnet8"].state_dict())
    second = hinted(step=20).losses(VIEW)
    assert set(second.parts) == {"ce", "kd"}


@pytest.mark.parametrize("kind", [VanillaKD, DecoupledKD, MixupKD, HintKD])
def test_a_teacher_sees_whole_what_its_student_sees_shrunk(kind: type[Distillation]):
    """One view, one mixture: the student gets the smaller size of the epoch, the teacher the size that it knows."""
    module = hinted(step=50) if kind is HintKD else student(kind)
    seen = []
    module.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    module.losses(SMALL_VIEW)
    assert module.teacher.seen.shape[-1] == 16
    torch.testing.assert_close(seen[0], shrink(normalize(module.teacher.seen, STATISTICS), 8))


def test_hints_of_shrunk_images_are_averaged():
    module = hinted(step=3)
    mine = stage2_features(copy.deepcopy(module.network), shrink(INPUTS, 8))
    theirs = stage2_features(module.teacher.network, INPUTS)
    assert theirs.shape[-1] == 2 * mine.shape[-1]
    pooled = theirs.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5))
    torch.testing.assert_close(module.losses(SMALL_VIEW).loss, hint_loss(module.regressor(mine), pooled))


def test_hint_learning_rates():
    """Before the second stage the rest stands still; each stage has its own warm-up and ends at 0."""
    module = hinted(step=0)
    (_, half), ([rest_parameters], rest), (_, regressor) = module.cycles(100, warmup=0.25)
    assert [rest(step) for step in (0, 10, 19)] == [0, 0, 0]
    assert half(4) == pytest.approx(5 / 6) and half(19) == pytest.approx(1 / 15)
    assert half(20) == rest(20) == pytest.approx(1 / 21) and half(39) == rest(39) == pytest.approx(20 / 21)
    assert regressor(20) == 0 and half(100) == 0
    wanted = {*module.network.layer3.parameters(), *module.network.linear.parameters()}
    assert set(rest_parameters.parameters()) == wanted


def test_one_cycle_is_linear():
    share = one_cycle(100, 0.25)
    values = [share(step) for step in range(101)]
    assert values.index(max(values)) in (24, 25) and values[0] == pytest.approx(1 / 26) and values[100] == 0
    assert np.allclose(np.diff(values[:24], n=2), 0) and np.allclose(np.diff(values[26:], n=2), 0)


def test_mutual_learning_sums_its_peers():
    module = MutualLearning(networks=["resnet8", "resnet14", "resnet8"], num_classes=10)
    module.statistics = STATISTICS
    found = module.losses(VIEW)
    expected = mutual_loss(list(found.logits.detach()), LABELS)
    torch.testing.assert_close(found.loss.detach(), torch.stack(expected).sum())
    assert list(module.networks()) == ["peer0", "peer1", "peer2"]
    with pytest.raises(UserError, match="2 networks"):
        MutualLearning(networks=["resnet8"], num_classes=10)


def test_mutual_learning_clips_a_peer_at_a_time():
    module = MutualLearning(networks=["resnet8", "resnet8"], num_classes=10)
    for peer, size in zip(module.peers, (100.0, 1e-3), strict=True):
        for parameter in peer.parameters():
            parameter.grad = torch.full_like(parameter, size)
    module.configure_gradient_clipping(None, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
    norms = [math.sqrt(sum(float(p.grad.square().sum()) for p in peer.parameters())) for peer in module.peers]
    assert norms[0] == pytest.approx(1.0, rel=1e-3)
    assert norms[1] == pytest.approx(1e-3 * math.sqrt(sum(p.numel() for p in module.peers[1].parameters())), rel=1e-3)


def test_weight_decay_spares_batchnorm_and_biases():
    module = Classifier(**SMALL)
    module._trainer = SimpleNamespace(estimated_stepping_batches=10)
    groups = module.configure_optimizers()["optimizer"].param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in module.network.named_parameters():
        assert (id(parameter) in decayed) == (name.endswith("weight") and "bn" not in name)


@pytest.mark.parametrize("kind", [VanillaKD, MixupKD, DecoupledKD, HintKD])
def test_teacher_rests(kind: type[Distillation], teacher_run: Path, images: Path, workspace: Path):
    """After a fit the teacher is in eval mode, not one of its tensors has changed, and no key of it was saved."""
    module = kind(teacher=str(teacher_run), **SMALL)
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, limit_train_batches=3, logger=False, enable_progress_bar=False,
        enable_checkpointing=False,
    )  # fmt: skip
    before = next(iter(load_trained(teacher_run).values())).state
    trainer.fit(module, CIFARDataModule(root=images, val_size=0.2, batch_size=16))
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0, "the schedule moves per step, and ends at 0"
    network = module.teacher.network
    assert not any(part.training for part in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    trainer.save_checkpoint("student.ckpt")
    checkpoint = torch.load("student.ckpt", weights_only=True)
    assert len([key for key in checkpoint["state_dict"] if key.startswith("network.")]) == len(before)
    assert all(key.startswith(("network.", "regressor.")) for key in checkpoint["state_dict"])
    restored = kind.load_from_checkpoint("student.ckpt", teacher="gone", weights_only=True)
    assert restored.strategy == module.strategy and restored.statistics == module.statistics
    trained = module.network.state_dict()
    assert all(torch.equal(trained[key], value) for key, value in restored.network.state_dict().items())


def test_teacher_sees_its_own_statistics():
    """Whatever the student's are."""
    module = student(VanillaKD)
    own = Statistics((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    module.teacher = Teacher(build_network("resnet8", 10), own, "resnet8")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in own)
    inputs = (VIEW.images - mean) / std
    with torch.no_grad():
        expected = module.teacher.network(inputs)
    torch.testing.assert_close(module.cached_teacher_logits(VIEW), expected, rtol=1e-4, atol=1e-4)
    features = module.teacher.features(VIEW.images, "layer2")
    torch.testing.assert_close(features, stage2_features(module.teacher.network, inputs), rtol=1e-4, atol=1e-4)


def test_validation_is_exact_and_changes_nothing(workspace: Path):
    """Top-1 equals a count by hand in eval mode, image by image, and no buffer moves."""
    torch.manual_seed(0)
    module, data = Classifier(**SMALL), DigitsDataModule(batch_size=50)
    with torch.no_grad():
        for _ in range(20):  # statistics that train mode would visibly change
            module.network(3 * torch.randn(16, 3, 16, 16) + 1)
    before = copy.deepcopy(module.network.state_dict())
    found = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).test(module, data, verbose=False)[0]
    assert all(torch.equal(before[key], value) for key, value in module.network.state_dict().items())
    module.network.eval()
    with torch.no_grad():
        logits = torch.cat([module.network(data.normalize(image[None])) for image in data.test_set.images])
    hits = (logits.argmax(1) == data.test_set.labels).double().mean()
    top5 = (logits.topk(5).indices == data.test_set.labels[:, None]).any(1).double().mean()
    assert found["test/top1"] == pytest.approx(100 * float(hits), abs=1e-4)
    assert found["test/top5"] == pytest.approx(100 * float(top5), abs=1e-4)
    assert found["test/loss"] == pytest.approx(float(cross_entropy(logits, data.test_set.labels)), rel=1e-4)


def test_a_loaded_module_answers_on_its_own(teacher_run: Path):
    """A checkpoint loads with Lightning's own means, and maps images to logits without a Trainer."""
    module = Classifier.load_from_checkpoint(teacher_run / "version_0/checkpoints/best.ckpt", weights_only=True).eval()
    inputs = normalize(VIEW.images, CIFARDataModule("cifar10").statistics)
    torch.testing.assert_close(module(VIEW.images), module.network(inputs), rtol=1e-4, atol=1e-4)


class WithoutLosses(Distillation):
    """Says nothing of what it minimises."""


class OwnNameWithoutLosses(Classifier):
    """Would be called something else than the control, and train as it."""

    def __init__(self, strategy: str = "lossless", **kwargs):
        super().__init__(strategy=strategy, **kwargs)


@pytest.mark.parametrize(
    ("kind", "arguments"), [(WithoutLosses, {"teacher": "unused"}), (OwnNameWithoutLosses, {})], ids=str
)
def test_a_strategy_without_losses_is_refused(kind: type[Classifier], arguments: dict):
    with pytest.raises(UserError, match=rf"^{kind.__name__} has no method losses\(view\)"):
        kind(**SMALL, **arguments)


def test_a_strategy_s_name_is_free_but_claimed_once():
    """By a class's own default; what one calls a single run is one's own affair."""

    class First(VanillaKD):
        def __init__(self, strategy: str = "mine", **kwargs):
            super().__init__(strategy=strategy, **kwargs)

    assert First(teacher="unused", **SMALL).strategy == "mine"
    assert VanillaKD(teacher="unused", strategy="mine", **SMALL).strategy == "mine"

    class Second(DecoupledKD):
        def __init__(self, strategy: str = "mine", **kwargs):
            super().__init__(strategy=strategy, **kwargs)

    for kind in (First, Second):
        with pytest.raises(UserError, match="both claim the strategy name 'mine'"):
            kind(teacher="unused", **SMALL)
    del First, Second, kind
    gc.collect()  # other tests' classes may claim it again
