"""`kdq bench`: one module a subject; all print tables, and write their figures where `--json` says."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from kdq_lightning.commands.arguments import OneLineErrors
from kdq_lightning.files import write_atomically

SUBJECTS = {
    "data": ("kdq_lightning.bench.data", "images/s of loader and augmentation"),
    "step": ("kdq_lightning.bench.step", "images/s of the Trainer against a bare loop, by strategy"),
    "strategies": ("kdq_lightning.bench.step", "another name for step"),
    "quantization": ("kdq_lightning.bench.quantization", "accuracy and seconds of GPFQ against the published code"),
    "mixed": ("kdq_lightning.bench.mixed", "accuracy of bits chosen layer by layer, against others of equal bytes"),
    "evaluation": ("kdq_lightning.bench.inference", "images/s of a network, its packed file and its exports"),
}
"""Module and help of each subject. A module has `add_arguments(parser)` and `run(options) -> figures`."""


def main(args: list[str]) -> int:
    """Run one benchmark, print its tables, write its figures where `--json` says, and return the exit code."""
    parser = OneLineErrors(
        prog="kdq bench",
        description="Throughput against the limit that the same process measures.",
        epilog="kdq bench project: minutes that a config takes on this machine; it has a --help of its own.",
    )
    subcommands = parser.add_subcommands(dest="subject")
    modules = {name: importlib.import_module(module) for name, (module, _) in SUBJECTS.items()}
    for name, (_, text) in SUBJECTS.items():
        subcommands.add_subcommand(name, subject_parser(modules[name]), help=text)
    options = parser.parse_args(args)
    run_subject(modules[options.subject], options[options.subject])
    return 0


def subject_parser(subject: ModuleType, **settings: Any) -> ArgumentParser:
    """Return the parser of a subject's options and of `--json`.

    Args:
        subject: One of the modules of `SUBJECTS`, or another with the same two functions.
        **settings: Arguments of the parser.
    """
    parser = OneLineErrors(description=subject.__doc__, **settings)
    subject.add_arguments(parser)
    parser.add_argument("--json", type=Path | None, default=None, help="File that gets the figures.")
    return parser


def run_subject(subject: ModuleType, options: Namespace) -> None:
    """Run a subject, and write its figures as JSON if `--json` names a file."""
    figures = subject.run(options)
    if options.json:
        write_atomically(options.json, (json.dumps(figures, indent=2) + "\n").encode())
