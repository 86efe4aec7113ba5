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
from kdq_lightning.commands.arguments import load_class
from kdq_lightning.commands.command_line import read_settings
from kdq_lightning.data.base import ImageDataModule
from kdq_lightning.errors import UserError, check_range
from kdq_lightning.files import write_atomically
from kdq_lightning.modules.classifier import Classifier
from kdq_lightning.modules.distillation import Distillation
from kdq_lightning.modules.hint import HintKD
from kdq_lightning.modules.recover import Recover
from kdq_lightning.modules.teacher import Teacher
from kdq_lightning.modules.vanilla import VanillaKD
from kdq_lightning.networks import build_network
from kdq_lightning.quantization import quantize
from kdq_lightning.runs.checkpoints import load_trained
from kdq_lightning.study.run import Run

STEPS = 3  # of one measurement, after two that warm up
IMAGES = 128  # that evaluation is measured on
CPU_BATCH = 128  # more doesn't fit a processor's cache
CPU_SIZES = (0.5, 0.75, 1.0)  # of an image's side, for a third of the epochs each
USED = 0.95  # of the budget: starting processes and reading images isn't measured
SHARES = 1000

BATCH_SIZE, SIZES, RATE = "data.init_args.batch_size", "data.init_args.image_sizes", "model.init_args.learning_rate"


class RunCost(NamedTuple):
    """Seconds of a run: of an epoch, validation included, the mean over its image sizes; and of what comes after."""

    epoch: float
    after: float


@dataclass
class PlannedRun:
    """What a run costs, and what the plan changes of its config."""

    run: Run
    cost: RunCost
    options: dict[str, Any]
    wanted: int  # epochs, by its config; 0 of one that isn't trained
    sizes: int  # of images

    def epochs(self, share: float) -> int:
        """Return the epochs at a share of those wanted; every image size has one at least."""
        return min(max(int(share * self.wanted), self.sizes), self.wanted)

    def minutes(self, share: float) -> float:
        """Return what it takes."""
        return (self.epochs(share) * self.cost.epoch + self.cost.after) / 60

    def entry(self, share: float) -> dict[str, Any]:
        """Return what the plan's file says."""
        options = {"trainer.max_epochs": self.epochs(share), **self.options} if self.wanted else {}
        return {"options": options, "minutes": round(self.minutes(share), 1)}


def total_minutes(planned: Sequence[PlannedRun], share: float, at_once: int) -> float:
    """Return what the runs take, so many at once: their sum, or the longest chain of runs that need each other."""
    ends: dict[tuple[str, int], float] = {}
    for plan in planned:  # each after those that it needs
        run = plan.run
        start = max((ends.get((name, run.seed), 0.0) for name in run.needs), default=0.0)
        ends[run.name, run.seed] = start + plan.minutes(share)
    return max(sum(plan.minutes(share) for plan in planned) / at_once, *ends.values())


def make_plan(runs: Sequence[Run], chosen: Sequence[Run], minutes: float, devices: int, path: Path) -> None:
    """Measure the runs, print the projection, and write the plan.

    Every run gets the same share of the epochs in its config, and never more. On a CPU, batches are at most 128, with
    the learning rate in proportion, and networks get smaller images in two thirds of the epochs.

    Args:
        runs: All runs of the study, which the plan is made for.
        chosen: Those among them that have to fit.
        minutes: The budget.
        devices: Runs at once; on a CPU, which they share, that makes none shorter.
        path: File of the plan.

    Raises:
        UserError: If not even an epoch at every image size fits, or a run can't be measured.
    """
    check_range("--budget_minutes", minutes, low=0)
    meter = Meter(runs, at_once=devices)
    planned = []
    for run in runs:
        planned.append(meter.plan(run))
        cost = planned[-1].cost
        print(f"measured {run.label}: {cost.epoch:.1f} s an epoch, {cost.after:.0f} s after training", flush=True)
    counted = [plan for plan in planned if plan.run in chosen]
    at_once = min(devices, max(torch.cuda.device_count(), 1))
    shares = (i / SHARES for i in range(SHARES, -1, -1))
    share = next((share for share in shares if total_minutes(counted, share, at_once) <= USED * minutes), None)
    if share is None:
        raise UserError(
            f"{minutes:g} minutes are too few: quantization and an epoch at every image size take about"
            f" {total_minutes(counted, 0, at_once) / USED:.0f}; give more, or drop runs or seeds"
        )
    projected = total_minutes(counted, share, at_once)
    content = {
        "budget_minutes": float(minutes),
        "projected_minutes": round(projected, 1),
        "hardware": hardware(),
        "runs": {plan.run.name: plan.entry(share) for plan in reversed(planned)},  # minutes of the first seed
    }
    write_atomically(path, yaml.safe_dump(content, sort_keys=False).encode())
    for plan in counted:
        print(f"{plan.run.label}: {plan.epochs(share)} epochs, {plan.minutes(share):.1f} minutes")
    print(f"projected: {projected:.1f} of {minutes:g} minutes; the plan is {path}", flush=True)


class Meter:
    """Measures runs; what has the same networks and strategy is measured once."""

    def __init__(self, runs: Sequence[Run], at_once: int = 1) -> None:
        """Take all runs of the study, among which teachers are looked up, and how many of them run at once."""
        self.runs, self.at_once = runs, at_once
        self.configs = {run: read_settings(run.settings_arguments).config for run in runs}
        on_cpu = any(config["trainer"]["accelerator"] == "cpu" for config in self.configs.values())
        self.device = torch.device("cpu" if on_cpu or not torch.cuda.is_available() else "cuda")
        self._data: dict[str, ImageDataModule] = {}
        self._seconds: dict[tuple[object, ...], float] = {}

    def data(self, run: Run) -> ImageDataModule:
        """Return a run's images; all runs of the same data share them."""
        section = self.configs[run]["data"]
        if (key := str(section)) not in self._data:
            self._data[key] = load_class(section["class_path"])(**section["init_args"])
            self._data[key].setup()
        return self._data[key]

    def options(self, run: Run) -> dict[str, Any]:
        """Return what suits this machine better than the run's config."""
        if self.device.type == "cuda" or run.command != "fit":
            return {}
        data, model = self.data(run), self.configs[run]["model"]
        options: dict[str, Any] = {}
        batch_size = min(data.batch_size, len(data.train_index))
        if batch_size > CPU_BATCH:
            options[BATCH_SIZE] = CPU_BATCH
            options[RATE] = model["init_args"]["learning_rate"] * CPU_BATCH / batch_size
        if not data.image_sizes and not issubclass(load_class(model["class_path"]), Recover):
            options[SIZES] = [round(share * data.image_size) for share in CPU_SIZES]
        return options

    def plan(self, run: Run, as_it_is: bool = False) -> PlannedRun:
        """Measure a run.

        Args:
            run: One of the study.
            as_it_is: Change nothing of its config to suit this machine.

        Raises:
            UserError: If it isn't trained by epochs, or its teacher isn't known.
        """
        options, data = {} if as_it_is else self.options(run), self.data(run)
        sizes = options.get(SIZES) or data.image_sizes or [data.image_size]
        epochs = self.configs[run]["trainer"]["max_epochs"] if run.command == "fit" else 0
        if epochs is None or epochs < 0:
            raise UserError(f"{run.name} says no number of epochs: give trainer.max_epochs")
        return PlannedRun(run, self._cost(run, sizes, options), options, epochs, len(sizes))

    def _cost(self, run: Run, sizes: Sequence[int], options: Mapping[str, Any]) -> RunCost:
        data, config = self.data(run), self.configs[run]
        model, quantization = config["model"], config["quantization"]
        networks = model["init_args"].get("networks") or [model["init_args"]["network"]]
        forward = sum(self.forward_seconds(name, data) for name in networks)
        after = 0.0
        kind: type[Classifier] = load_class(model["class_path"])
        if quantization["enabled"]:
            widths = 0 if kind.is_quantized else len(quantization["bits"])
            evaluated = len(data.val_index) + quantization["test"] * len(data.test_set)
            after = (widths + 1) * evaluated * forward
            if run.command == "fit" and issubclass(kind, Distillation):
                after += evaluated * self.forward_seconds(self._teacher_network(run), data)
            images = quantization["calibration_images"]
            after += widths * sum(self.quantization_seconds(name, data, images) for name in networks)
        if run.command != "fit":
            return RunCost(0.0, after)
        batch_size = options.get(BATCH_SIZE, data.batch_size)
        step = sum(self.step_seconds(run, size, batch_size) for size in sizes) / len(sizes)
        steps = max(len(data.train_index) // batch_size, 1)
        limit = config["trainer"]["limit_train_batches"]
        steps = min(steps, limit) if isinstance(limit, int) else int(steps * (1.0 if limit is None else limit))
        return RunCost(steps * step + len(data.val_index) * forward, after)

    def step_seconds(self, run: Run, size: int, batch_size: int) -> float:
        """Return the seconds of a Trainer step on images of a size, with an untrained teacher."""
        model, data = self.configs[run]["model"], self.data(run)
        kind: type[Classifier] = load_class(model["class_path"])
        teacher = self._teacher_network(run) if issubclass(kind, Distillation) else None
        if teacher and self._finds_answers(run) and not issubclass(kind, HintKD):  # which needs features, too
            kind, teacher = Classifier, None
        if issubclass(kind, HintKD | Recover):
            kind = VanillaKD  # which costs as much or more
        given: dict[str, Any] = {key: model["init_args"].get(key) for key in ("network", "networks")}
        given = {key: value for key, value in given.items() if value} | ({"teacher": "in memory"} if teacher else {})
        precision = self.configs[run]["trainer"]["precision"]

        def measure() -> float:
            module = kind(num_classes=data.num_classes, **given)
            if isinstance(module, Distillation):
                network = build_network(str(teacher), data.num_classes).to(self.device)
                module.teacher = Teacher(network, data.statistics)
            own = data.batch_size, data.image_sizes
            data.batch_size, data.image_sizes = batch_size, [size]
            try:
                return trainer_seconds(module, data, STEPS, precision=precision, accelerator=self.device.type) / STEPS
            finally:
                data.batch_size, data.image_sizes = own

        return self._once((kind, str(given), teacher, size, batch_size, precision, id(data)), measure)

    def _teacher_network(self, run: Run) -> str:
        """Return the teacher's network, from the weights' description or from the run that trains it."""
        model = self.configs[run]["model"]["init_args"]
        if model.get("teacher_network"):
            return str(model["teacher_network"])
        for other in self.runs:
            if str(other.folder) == model["teacher"]:
                taught_by = self.configs[other]["model"]["init_args"]
                return str(taught_by.get("network") or taught_by["networks"][0])
        return next(iter(load_trained(model["teacher"]).values())).network

    def _finds_answers(self, run: Run) -> bool:
        """Whether a run before it, not beside it, keeps the teacher's answers for it."""

        def asked(other: Run) -> tuple[object, ...]:
            model = self.configs[other]["model"]["init_args"]
            return model.get("teacher_cache"), model.get("teacher"), other.seed, str(self.configs[other]["data"])

        before = map(asked, self.runs[: self.runs.index(run)])
        return self.at_once == 1 and asked(run)[0] is not None and asked(run) in before

    def forward_seconds(self, name: str, data: ImageDataModule) -> float:
        """Return the seconds of a network's answer to an image, in evaluation."""
        network, images = self._network_and_images(name, data, IMAGES)

        @torch.no_grad()
        def measure() -> float:
            seconds = []
            for _ in range(1 + STEPS):
                start = time.perf_counter()
                float(network(images).sum())  # which waits for the device
                seconds.append(time.perf_counter() - start)
            return sorted(seconds[1:])[STEPS // 2] / len(images)

        return self._once(("forward", name, id(data)), measure)

    def quantization_seconds(self, name: str, data: ImageDataModule, count: int) -> float:
        """Return the seconds of quantizing a network at one bit width on so many images."""
        network, images = self._network_and_images(name, data, count)

        def measure() -> float:
            start = time.perf_counter()
            quantize(network, [images], (4,))
            return time.perf_counter() - start

        return self._once(("quantize", name, count, id(data)), measure)

    def _network_and_images(self, name: str, data: ImageDataModule, count: int) -> tuple[nn.Module, Tensor]:
        network = build_network(name, data.num_classes).eval().to(self.device).to(memory_format=torch.channels_last)
        return network, data.normalize(data.train_set.images[:count]).to(self.device)

    def _once(self, key: tuple[object, ...], measure: Callable[[], float]) -> float:
        if key not in self._seconds:
            self._seconds[key] = measure()
        return self._seconds[key]
