"""`kdq bench project`: prints the minutes that `kdq fit` of a config will take here, from a few measured steps."""

import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from kdq_lightning.bench.measure import hardware, print_table
from kdq_lightning.bench.subjects import run_subject, subject_parser
from kdq_lightning.errors import UserError
from kdq_lightning.study.cost import CostMeter
from kdq_lightning.study.run import Run


def main(args: list[str]) -> int:
    """Project a config, print the table, write the figures where `--json` says, and return the exit code."""
    module = sys.modules[__name__]
    run_subject(module, subject_parser(module, prog="kdq bench project").parse_args(args))
    return 0


def add_arguments(parser: ArgumentParser) -> None:
    """Add the benchmark's options."""
    parser.add_argument("--config", type=Path, required=True, help="Config of the run, such as configs/dml_cpu.yaml.")
    parser.add_argument("--root", type=str | None, default=None, help="Folder of its images, if not the config's.")
    parser.add_argument(
        "--teacher_network", type=str | None, default=None, help="The teacher's network, if it isn't there yet."
    )


def run(args: Namespace) -> dict[str, Any]:
    """Print the projection, and return its figures.

    Raises:
        UserError: If the config, its images or its teacher are missing.
    """
    if not args.config.is_file():
        raise UserError(f"{args.config} does not exist: give a config such as configs/dml_cpu.yaml")
    options = ["--config", str(args.config)]
    options += [f"--data.root={args.root}"] if args.root else []
    options += [f"--model.init_args.teacher_network={args.teacher_network}"] if args.teacher_network else []
    only = Run(args.config.stem, 0, "fit", tuple(options), Path("runs"), needs=())
    meter = CostMeter([only], announce=lambda what: print("measuring", what, file=sys.stderr, flush=True))
    epochs, cost = meter.max_epochs(only), meter.measure(only)
    training, after = epochs * cost.epoch / 60, cost.after / 60
    print_table(
        f"{args.config}, projected",
        ["epochs", "s an epoch", "training, minutes", "quantization and test, minutes", "in all"],
        [[str(epochs), *(f"{x:.1f}" for x in (cost.epoch, training, after, training + after))]],
    )
    return {
        "hardware": hardware(),
        "epochs": epochs,
        "seconds_an_epoch": cost.epoch,
        "training_minutes": training,
        "after_minutes": after,
    }
