"""`kdq bench step`: the Trainer's step, data and logging included, against a bare PyTorch loop on one fixed batch.

The bare loop is the limit. For a strategy with a teacher it is the student's step with the loss of vanilla
distillation, and the teacher's forward.
"""

import time
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from torch import Tensor, nn

from kdq_lightning.bench.data import NoiseDataModule
from kdq_lightning.bench.measure import hardware, print_table
from kdq_lightning.data.base import ImageDataModule
from kdq_lightning.errors import UserError
from kdq_lightning.losses import cross_entropy, kd_loss, mutual_loss
from kdq_lightning.modules.classifier import Classifier
from kdq_lightning.modules.dkd import DecoupledKD
from kdq_lightning.modules.dml import MutualLearning
from kdq_lightning.modules.mixup import MixupKD
from kdq_lightning.modules.teacher import Teacher
from kdq_lightning.modules.vanilla import VanillaKD
from kdq_lightning.networks import build_network
from kdq_lightning.training.trainer import Trainer, choose_precision

TIMED_STRATEGIES: dict[str, type[Classifier]] = {
    "control": Classifier,
    "vanilla": VanillaKD,
    "mixup": MixupKD,
    "dkd": DecoupledKD,
    "dml": MutualLearning,
}
WARMUP = 2  # batches that are not counted: memory is allocated, kernels are chosen


class _Clock(Callback):
    """Measures the seconds of the batches after the warm-up, then ends the training."""

    def __init__(self, warmup: int, batches: int) -> None:
        self.warmup, self.last = warmup, warmup + batches
        self.seen = 0
        self.started = self.seconds = 0.0

    def on_train_batch_start(
        self, trainer: LightningTrainer, module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        if self.seen == self.warmup:
            _wait(module.device)
            self.started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: LightningTrainer, module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        self.seen += 1
        if self.seen == self.last:
            _wait(module.device)
            self.seconds = time.perf_counter() - self.started
            trainer.should_stop = True


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def trainer_seconds(
    module: Classifier, data: ImageDataModule, batches: int, accumulate_grad_batches: int = 1, **options: Any
) -> float:
    """Return the seconds that the Trainer takes for so many training batches, in as many epochs as they need.

    Args:
        module: The module to train.
        data: Its images, set up.
        batches: Batches that are counted; a multiple of `accumulate_grad_batches` counts whole optimizer steps.
        accumulate_grad_batches: Batches between two steps of the optimizer, at least one of which warms up.
        **options: Further arguments of the Trainer.
    """
    clock = _Clock(round_up(WARMUP, accumulate_grad_batches), batches)
    an_epoch = min(clock.last, max(len(data.train_index) // data.batch_size, 1))
    trainer = Trainer(  # no more epochs than needed: the stages of a strategy are shares of them
        max_epochs=-(-clock.last // an_epoch), limit_train_batches=clock.last, limit_val_batches=0, devices=1,
        logger=False, enable_progress_bar=False, enable_checkpointing=False, callbacks=[clock],
        accumulate_grad_batches=accumulate_grad_batches, **options,
    )  # fmt: skip
    module.print = lambda *_, **__: None  # type: ignore[method-assign]
    trainer.fit(module, data)
    return clock.seconds


def round_up(number: int, multiple: int) -> int:
    """Return the least multiple of a whole number that is not below `number`."""
    return -(-number // multiple) * multiple


def _bare_seconds(networks: nn.ModuleList, teacher: Teacher | None, batch: tuple[Tensor, Tensor], steps: int) -> float:
    """Return the seconds of `steps` bare steps: (teacher's forward,) forwards, losses, backward, optimizer."""
    images, labels = batch
    optimizer = torch.optim.SGD(networks.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    half = torch.autocast(images.device.type, torch.bfloat16, enabled=choose_precision() == "bf16-mixed")
    started = 0.0
    for step in range(WARMUP + steps):
        if step == WARMUP:
            _wait(images.device)
            started = time.perf_counter()
        with half:
            logits = [network(images) for network in networks]
            if len(logits) > 1:
                loss = torch.stack(mutual_loss(logits, labels)).sum()
            else:
                loss = cross_entropy(logits[0], labels)
            if teacher is not None:
                with torch.no_grad():
                    answers = teacher.network(images)
                loss = 0.1 * loss + 0.9 * kd_loss(logits[0], answers, 4.0)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    _wait(images.device)
    return time.perf_counter() - started


def _module(strategy: str, network: str, teacher: Teacher) -> Classifier:
    """Return the module of a strategy, beside the teacher if it has one."""
    networks = {"networks": [network, network]} if strategy == "dml" else {"network": network}
    options = {**networks, "num_classes": 10, "learning_rate": 0.1}
    return TIMED_STRATEGIES[strategy].for_timing(options, teacher, is_cached=False)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the benchmark's options."""
    parser.add_argument("--network", type=str, default="resnet20", help="Network that is trained.")
    parser.add_argument("--teacher_network", type=str, default="resnet56", help="Teacher of the distillation.")
    parser.add_argument("--strategies", type=list[str], default=list(TIMED_STRATEGIES), help="Some of the default.")
    parser.add_argument("--batch_size", type=int, default=128, help="Images a step.")
    parser.add_argument("--steps", type=int, default=10, help="Steps of one measurement.")
    parser.add_argument("--repeats", type=int, default=5, help="Measurements of each, in turns.")
    parser.add_argument("--train_images", type=int, default=45000, help="Images an epoch, for the projected minutes.")
    parser.add_argument("--epochs", type=int, default=15, help="Epochs, for the projected minutes.")


def run(args: Namespace) -> dict[str, Any]:
    """Print images/s of the Trainer and of the bare loop for each strategy, and return the figures.

    Raises:
        UserError: If a strategy is unknown.
    """
    if unknown := set(args.strategies) - set(TIMED_STRATEGIES):
        raise UserError(f"unknown strategies {sorted(unknown)}: choose from {', '.join(TIMED_STRATEGIES)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layout = torch.channels_last
    data = NoiseDataModule(
        torch.randint(256, (args.batch_size * (WARMUP + args.steps), 3, 32, 32)).byte(), args.batch_size
    )
    teacher = Teacher(build_network(args.teacher_network, 10).to(device), data.statistics, args.teacher_network)
    batch = (
        torch.randn(args.batch_size, 3, 32, 32, device=device).contiguous(memory_format=layout),
        torch.randint(10, (args.batch_size,), device=device),
    )
    figures: dict[str, Any] = {"hardware": hardware(), "precision": choose_precision(), "batch_size": args.batch_size}
    figures["seconds"] = {name: {"limit": [], "trainer": []} for name in args.strategies}
    for _ in range(args.repeats):
        for name, seconds in figures["seconds"].items():
            module = _module(name, args.network, teacher)
            bare = nn.ModuleList(build_network(args.network, 10) for _ in module.networks())
            bare = bare.to(device).to(memory_format=layout)
            seconds["limit"].append(_bare_seconds(bare, module.find_teacher(), batch, args.steps))
            seconds["trainer"].append(trainer_seconds(module, data, args.steps))
    print_table(
        f"Training step, {args.network}, batch {args.batch_size}, {figures['precision']}, channels_last",
        ["", "limit, images/s", "Trainer, images/s", "range", "efficiency", f"{args.epochs} epochs of steps, minutes"],
        [_row(name, seconds, args, figures) for name, seconds in figures["seconds"].items()],
    )
    return figures


def _row(name: str, seconds: dict[str, list[float]], args: Namespace, figures: dict[str, Any]) -> list[str]:
    """Return a row of the table, and add the efficiency and the minutes to the figures.

    The efficiency is the median over the repeats of (seconds of the bare loop) / (seconds of the Trainer).
    """
    images = args.batch_size * args.steps
    limit, actual = torch.tensor(seconds["limit"]), torch.tensor(seconds["trainer"])
    figures[f"{name}_efficiency"] = efficiency = float((limit / actual).median())
    figures[f"{name}_minutes"] = minutes = args.epochs * args.train_images * float(actual.median()) / images / 60
    fastest, slowest = images / float(actual.min()), images / float(actual.max())
    rates = [f"{images / float(values.median()):.0f}" for values in (limit, actual)]
    return [name, *rates, f"{slowest:.0f}-{fastest:.0f}", f"{efficiency:.3f}", f"{minutes:.1f}"]
