"""`kdq bench`: one parser, one module a subject."""

import importlib
import json
from pathlib import Path

from kdq_lightning.arguments import OneLineErrors
from kdq_lightning.files import write_atomically

SUBJECTS = {
    "data": ("data", "images/s of loader and augmentation"),
    "step": ("step", "images/s of the Trainer against a bare loop, by strategy"),
    "strategies": ("step", "another name for step"),
    "quantization": ("quantization", "accuracy and seconds of GPFQ against the published code"),
    "evaluation": ("evaluation", "images/s of a network, its packed file and its exports"),
    "project": ("project", "minutes that a config takes on this machine"),
}


def main(args: list[str]) -> int:
    """Run one benchmark, print its tables, and write its figures where `--json` says."""
    parser = OneLineErrors(prog="kdq bench", description="Throughput against the limit that the same process measures.")
    subcommands = parser.add_subcommands(dest="subject")
    modules = {name: importlib.import_module(f"kdq_lightning.bench.{module}") for name, (module, _) in SUBJECTS.items()}
    for name, (_, text) in SUBJECTS.items():
        subject = OneLineErrors(description=modules[name].__doc__)
        modules[name].add_arguments(subject)
        subject.add_argument("--json", type=Path | None, default=None, help="File that gets the figures.")
        subcommands.add_subcommand(name, subject, help=text)
    options = parser.parse_args(args)
    figures = modules[options.subject].run(options[options.subject])
    if path := options[options.subject].json:
        write_atomically(path, (json.dumps(figures, indent=2) + "\n").encode())
    return 0
