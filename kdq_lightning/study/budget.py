"""`kdq study --budget_minutes`: plans the epochs that fit, by what the study's runs cost on this machine.

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

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from kdq_lightning.bench.measure import hardware
from kdq_lightning.commands.arguments import load_class
from kdq_lightning.data.base import ImageDataModule
from kdq_lightning.errors import UserError, check_range
from kdq_lightning.files import write_atomically
from kdq_lightning.study.cost import CostMeter, RunCost
from kdq_lightning.study.run import Run

CPU_BATCH = 128  # images; more don't fit a processor's cache
CPU_SIZES = (0.5, 0.75, 1.0)  # image sizes as shares of the stored side, each for an equal share of the epochs
MUON_SIZES = (0.5, 0.5, 0.75, 1.0)
MUON_LEARNING_RATE = 0.1  # of the parameters that SGD trains beside Muon
USED = 0.95  # of the budget: starting processes and reading images isn't measured
SHARES = 1000  # steps in which the share of the epochs is searched

BATCH_SIZE, SIZES, FLIP = "data.init_args.batch_size", "data.init_args.image_sizes", "data.init_args.flip"
RATE, OPTIMIZER = "model.init_args.learning_rate", "model.init_args.optimizer"
ACCUMULATE = "trainer.accumulate_grad_batches"


@dataclass(frozen=True)
class PlannedRun:
    """A run, what it costs, and what the plan changes of its config.

    Attributes:
        run: The run.
        cost: Its cost with these options.
        options: Options in place of the config's.
        max_epochs: Epochs in its config, 0 if nothing is trained.
        min_epochs: One epoch for each of its image sizes.
    """

    run: Run
    cost: RunCost
    options: Mapping[str, Any]
    max_epochs: int
    min_epochs: int

    def epochs(self, share: float) -> int:
        """Return the number of epochs at a share of `max_epochs`."""
        return min(max(int(share * self.max_epochs), self.min_epochs), self.max_epochs)

    def minutes(self, share: float) -> float:
        """Return the minutes that the run takes at a share of `max_epochs`."""
        return (self.epochs(share) * self.cost.epoch + self.cost.after) / 60

    def entry(self, share: float) -> dict[str, Any]:
        """Return what the plan's file says of the run."""
        options = {"trainer.max_epochs": self.epochs(share), **self.options} if self.max_epochs else {}
        return {"options": options, "minutes": round(self.minutes(share), 1)}


def total_minutes(planned: Sequence[PlannedRun], share: float, at_once: int) -> float:
    """Return the minutes of all runs, `at_once` at a time: their sum, or the longest chain of runs that wait."""
    ends: dict[tuple[str, int], float] = {}
    for plan in planned:  # each after those that it needs
        run = plan.run
        start = max((ends.get((name, run.seed), 0.0) for name in run.needs), default=0.0)
        ends[run.name, run.seed] = start + plan.minutes(share)
    return max(sum(plan.minutes(share) for plan in planned) / at_once, *ends.values())


def choose_cpu_options(config: Mapping[str, Any], data: ImageDataModule) -> dict[str, Any]:
    """Return the options that make a training short on a CPU, in place of its config's.

    A batch of more than 128 images is cut into batches of 128, and Muon, whose step still takes the gradient of the
    whole batch, trains in fewer epochs than SGD. A quantized network has no kernels to train: it keeps SGD, with the
    learning rate in proportion to the batch. All runs alternate the flip, so that they can share a teacher's logits.
    The trained network gets smaller images in the first epochs, unless the config says which.

    Args:
        config: Settings of `kdq fit`.
        data: Its images, set up.
    """
    options: dict[str, Any] = {}
    shares: tuple[float, ...] = CPU_SIZES
    model, is_quantized = config["model"]["init_args"], load_class(config["model"]["class_path"]).is_quantized
    batch_size = min(data.batch_size, len(data.train_index))
    if batch_size > CPU_BATCH:
        options[BATCH_SIZE] = CPU_BATCH
        if data.flip is True:  # digits are not mirrored
            options[FLIP] = "alternate"
        if is_quantized:
            options[RATE] = model["learning_rate"] * CPU_BATCH / batch_size
        else:
            options[ACCUMULATE] = config["trainer"]["accumulate_grad_batches"] * (batch_size // CPU_BATCH)
            options |= {OPTIMIZER: "muon", RATE: MUON_LEARNING_RATE}
            shares = MUON_SIZES
    if not data.image_sizes and not is_quantized:
        options[SIZES] = [round(share * data.image_size) for share in shares]
    return options


def plan_runs(meter: CostMeter) -> list[PlannedRun]:
    """Choose what suits this machine, and measure every run with it."""
    options: dict[Run, dict[str, Any]] = {run: {} for run in meter.runs}
    for run in meter.runs:
        if meter.device.type == "cpu" and run.command == "fit":
            options[run] = choose_cpu_options(meter.configs[run], meter.data(run))
        for key, value in options[run].items():
            meter.change(run, key, value)
    planned = []
    for number, run in enumerate(meter.runs, start=1):
        place = f"[{number:{len(str(len(meter.runs)))}}/{len(meter.runs)}] {run.label}"
        meter.announce = partial(_tell, f"{place}: measuring")
        cost = meter.measure(run)
        _tell(f"{place}: {cost.epoch:.1f} s an epoch, {cost.after:.0f} s after training")
        planned.append(PlannedRun(run, cost, options[run], meter.max_epochs(run), len(meter.image_sizes(run))))
    return planned


def _tell(*words: str) -> None:
    """Print how far it is, at once and beside what the command is asked for."""
    print(*words, file=sys.stderr, flush=True)


def make_plan(runs: Sequence[Run], chosen: Sequence[Run], minutes: float, devices: int, path: Path) -> None:
    """Measure the runs, print the projection, and write the plan.

    Every run gets the same share of the epochs in its config, and never more. On a CPU it gets `choose_cpu_options`.

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
    planned = plan_runs(CostMeter(runs, at_once=devices))
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
