"""`kdq study --budget_minutes`: measures a study's steps on this machine, and plans the epochs that fit.

The plan is a file beside the study's runs, which every later `kdq study` of the same file keeps to:

```yaml
budget_minutes: 600.0
projected_minutes: 571.3
hardware: ...
runs:
  control:
    options: {trainer.max_epochs: 17, data.init_args.batch_size: 128, ...}  # in place of the config's
    minutes: 61.2                                                           # of one seed
```
"""

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor, nn

from kdq_lightning.bench.measure import hardware
from kdq_lightning.bench.step import trainer_seconds
from kdq_lightning.cli import read_settings
from kdq_lightning.data.base import ImageDataModule
from kdq_lightning.errors import UserError
from kdq_lightning.files import write_atomically
from kdq_lightning.modules.classifier import Classifier
from kdq_lightning.modules.distillation import Distillation
from kdq_lightning.modules.hint import HintKD
from kdq_lightning.modules.recover import Recover
from kdq_lightning.modules.teacher import Teacher
from kdq_lightning.modules.vanilla import VanillaKD
from kdq_lightning.networks import build_network
from kdq_lightning.quantization import quantize
from kdq_lightning.study.plan import Run

STEPS = 3  # of one measurement, after two that warm up
IMAGES = 128  # that evaluation and quantization are measured on
CPU_BATCH = 128  # more doesn't fit a processor's cache
CPU_SIZES = (0.5, 0.75, 1.0)  # of an image's side, for a third of the epochs each
USED = 0.95  # of the budget: starting processes and reading images isn't measured
SHARES = 1000

BATCH_SIZE, SIZES, RATE = "data.init_args.batch_size", "data.init_args.image_sizes", "model.init_args.learning_rate"


class Cost(NamedTuple):
    """Seconds of a run: of an epoch, validation included, the mean over its image sizes; and of what comes after."""

    epoch: float
    after: float


@dataclass
class PlannedRun:
    """What a run costs, in all its seeds, and what the plan changes of its config."""

    cost: Cost
    options: dict[str, Any]
    wanted: int  # epochs, by its config
    seeds: int = 1

    def epochs(self, share: float) -> int:
        """Return the epochs at a share of those wanted; every image size has one at least."""
        return min(max(int(share * self.wanted), len(self.options.get(SIZES, [0]))), self.wanted)

    def minutes(self, share: float) -> float:
        """Return the minutes of one seed."""
        return (self.epochs(share) * self.cost.epoch + self.cost.after) / 60

    def entry(self, share: float) -> dict[str, Any]:
        """Return what the plan's file says."""
        options = {"trainer.max_epochs": self.epochs(share), **self.options} if self.wanted else {}
        return {"options": options, "minutes": round(self.minutes(share), 1)}


def make_plan(runs: Sequence[Run], minutes: float, devices: int, path: Path) -> None:
    """Measure the runs, print the projection, and write the plan.

    Every run gets the same share of the epochs in its config, and never more. On a CPU, batches are at most 128, with
    the learning rate in proportion, and networks get smaller images in two thirds of the epochs.

    Args:
        runs: All runs of the study.
        minutes: The budget.
        devices: Runs at once.
        path: File of the plan.

    Raises:
        UserError: If not even an epoch at every image size fits.
    """
    meter = Meter(runs, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    planned: dict[str, PlannedRun] = {}
    for run in runs:
        if run.name in planned:
            planned[run.name].seeds += 1
            continue
        options = meter.options(run)
        cost = meter.cost(run, options)
        wanted = meter.config(run)["trainer"]["max_epochs"] if run.command == "fit" else 0
        planned[run.name] = PlannedRun(cost, options, wanted)
        print(f"measured {run.name}: {cost.epoch:.1f} s an epoch, {cost.after:.0f} s after training", flush=True)

    def total(share: float) -> float:
        return sum(plan.seeds * plan.minutes(share) for plan in planned.values()) / devices

    fitting = (i / SHARES for i in range(SHARES, -1, -1) if total(i / SHARES) <= USED * minutes)
    share = next(fitting, None)
    if share is None:
        raise UserError(
            f"{minutes:g} minutes are too few: quantization and an epoch at every image size take about"
            f" {total(0) / USED:.0f}; give more, or leave runs or seeds away"
        )
    content = {
        "budget_minutes": float(minutes),
        "projected_minutes": round(total(share), 1),
        "hardware": hardware(),
        "runs": {name: plan.entry(share) for name, plan in planned.items()},
    }
    write_atomically(path, yaml.safe_dump(content, sort_keys=False).encode())
    for name, plan in planned.items():
        print(f"{name}: {plan.epochs(share)} epochs, {plan.minutes(share):.1f} minutes a seed")
    print(f"projected: {total(share):.1f} of {minutes:g} minutes; the plan is {path}", flush=True)


class Meter:
    """Measures runs; what has the same networks and strategy is measured once."""

    def __init__(self, runs: Sequence[Run], device: torch.device) -> None:
        """Take all runs of the study, among which teachers are looked up."""
        self.runs, self.device = runs, device
        self._configs: dict[Run, dict[str, Any]] = {}
        self._data: dict[str, ImageDataModule] = {}
        self._seconds: dict[tuple[object, ...], float] = {}

    def config(self, run: Run) -> dict[str, Any]:
        """Return a run's options."""
        if run not in self._configs:
            self._configs[run] = read_settings(run.arguments).config
        return self._configs[run]

    def data(self, run: Run) -> ImageDataModule:
        """Return a run's images; all runs of the same data share them."""
        section = self.config(run)["data"]
        if (key := str(section)) not in self._data:
            self._data[key] = _load(section["class_path"])(**section["init_args"])
            self._data[key].setup()
        return self._data[key]

    def options(self, run: Run) -> dict[str, Any]:
        """Return what suits this machine better than the run's config."""
        if self.device.type == "cuda" or run.command != "fit":
            return {}
        data, model = self.data(run), self.config(run)["model"]
        options: dict[str, Any] = {}
        if data.batch_size > CPU_BATCH:
            options[BATCH_SIZE] = CPU_BATCH
            options[RATE] = model["init_args"]["learning_rate"] * CPU_BATCH / data.batch_size
        if not data.image_sizes and not issubclass(_load(model["class_path"]), Recover):
            options[SIZES] = [round(share * data.image_size) for share in CPU_SIZES]
        return options

    def cost(self, run: Run, options: Mapping[str, Any]) -> Cost:
        """Measure a run with the plan's options in place of its own."""
        data, config = self.data(run), self.config(run)
        model, quantization = config["model"]["init_args"], config["quantization"]
        networks = model.get("networks") or [model["network"]]
        forward = sum(self.forward_seconds(name, data) for name in networks)
        after = 0.0
        if quantization["enabled"]:
            widths = len(quantization["bits"])
            evaluated = len(data.val_index) + quantization["test"] * len(data.test_set)
            after = (widths + 1) * evaluated * forward
            after += widths * sum(self.quantization_seconds(name, data) for name in networks)
        if run.command != "fit":
            return Cost(0.0, after)
        batch_size = options.get(BATCH_SIZE, data.batch_size)
        sizes = options.get(SIZES) or data.image_sizes or [data.image_size]
        step = sum(self.step_seconds(run, size, batch_size) for size in sizes) / len(sizes)
        steps = max(len(data.train_index) // batch_size, 1)
        return Cost(steps * step + len(data.val_index) * forward, after)

    def step_seconds(self, run: Run, size: int, batch_size: int) -> float:
        """Return the seconds of a Trainer step on images of a size, with an untrained teacher."""
        model, data = self.config(run)["model"], self.data(run)
        kind: type[Classifier] = _load(model["class_path"])
        if issubclass(kind, HintKD | Recover):
            kind = VanillaKD  # which costs as much or more
        teacher = self._teacher_network(run) if issubclass(kind, Distillation) else None
        if teacher and self._finds_answers(run):
            kind, teacher = Classifier, None
        given: dict[str, Any] = {key: model["init_args"].get(key) for key in ("network", "networks")}
        given = {key: value for key, value in given.items() if value} | ({"teacher": "in memory"} if teacher else {})

        def measure() -> float:
            module = kind(num_classes=data.num_classes, **given)
            if isinstance(module, Distillation):
                network = build_network(str(teacher), data.num_classes).to(self.device)
                module.teacher = Teacher(network, data.mean, data.std)
            own = data.batch_size, data.image_sizes
            data.batch_size, data.image_sizes = batch_size, [size]
            try:
                return trainer_seconds(module, data, STEPS) / STEPS
            finally:
                data.batch_size, data.image_sizes = own

        return self._once((kind, str(given), teacher, size, batch_size, id(data)), measure)

    def _teacher_network(self, run: Run) -> str:
        """Return the teacher's network, from the weights' description or from the run that trains it."""
        model = self.config(run)["model"]["init_args"]
        if model.get("teacher_network"):
            return str(model["teacher_network"])
        for other in self.runs:
            if str(other.folder) == model["teacher"]:
                return str(self.config(other)["model"]["init_args"]["network"])
        raise UserError(f"{run.name}: {model['teacher']} is no run of this study, so its network is not known")

    def _finds_answers(self, run: Run) -> bool:
        """Whether a run before it keeps the teacher's answers for it."""

        def asked(other: Run) -> tuple[object, ...]:
            model = self.config(other)["model"]["init_args"]
            return model.get("teacher_cache"), model.get("teacher"), other.seed

        return asked(run)[0] is not None and asked(run) in map(asked, self.runs[: self.runs.index(run)])

    def forward_seconds(self, name: str, data: ImageDataModule) -> float:
        """Return the seconds of a network's answer to an image, in evaluation."""
        network, images = self._network_and_images(name, data)

        @torch.no_grad()
        def measure() -> float:
            seconds = []
            for _ in range(1 + STEPS):
                start = time.perf_counter()
                float(network(images).sum())  # which waits for the device
                seconds.append(time.perf_counter() - start)
            return sorted(seconds[1:])[STEPS // 2] / len(images)

        return self._once(("forward", name, id(data)), measure)

    def quantization_seconds(self, name: str, data: ImageDataModule) -> float:
        """Return the seconds of quantizing a network at one bit width."""
        network, images = self._network_and_images(name, data)

        def measure() -> float:
            start = time.perf_counter()
            quantize(network, [images], (4,))
            return time.perf_counter() - start

        return self._once(("quantize", name, id(data)), measure)

    def _network_and_images(self, name: str, data: ImageDataModule) -> tuple[nn.Module, Tensor]:
        network = build_network(name, data.num_classes).eval().to(self.device).to(memory_format=torch.channels_last)
        return network, data.normalize(data.train_set.images[:IMAGES]).to(self.device)

    def _once(self, key: tuple[object, ...], measure: Callable[[], float]) -> float:
        if key not in self._seconds:
            self._seconds[key] = measure()
        return self._seconds[key]


def _load(class_path: str) -> Any:  # noqa: ANN401 - a class
    module, _, name = class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)
