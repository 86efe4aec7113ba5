"""The `kdq` command: finds the module of the command that is asked for, and runs it."""

import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import partial
from importlib.metadata import version

from kdq_lightning.commands.help_pages import PAGES, first_page

WITHOUT_MODEL = {
    "bench project": "kdq_lightning.study.project",
    "bench": "kdq_lightning.bench.subjects",
    "export": "kdq_lightning.commands.export",
    "list": "kdq_lightning.commands.listing",
    "report": "kdq_lightning.commands.report",
    "study": "kdq_lightning.study.command",
}
"""Modules of the commands with parsers of their own, the longer name first; the rest is `commands.running`."""


COMMANDS = {
    "fit": "train a network, then quantize it at each bit width",
    "test": "accuracy of a trained network on the test images",
    "validate": "the same on the validation images",
    "predict": "the class of each image, as a CSV file",
    "quantize": "quantize weights that are trained already",
    "study": "run a list of runs, then report; goes on where it stopped",
    "report": "answer, tables and figures from records",
    "export": "a packed file as ONNX, torch.export program or state dict",
    "list": "the networks, strategies, data sets and methods there are",
    "bench": "throughput and accuracy against their limits",
}

OVERVIEW = f"""usage: kdq COMMAND [options]

Distil image classifiers, quantize them, and compare at equal bytes.

{chr(10).join(f"  {name:<10}{what}" for name, what in COMMANDS.items())}

Begin with   kdq fit --config configs/quickstart.yaml
Options of a command: kdq COMMAND --help; this version: kdq --version
"""


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; if it fails, print one sentence that says why.

    Args:
        args: The command and its options, such as ["fit", "--config", "configs/quickstart.yaml"]; those of the process
            if not given.

    Returns:
        The exit code: 0 if it succeeded, 1 if it failed, 2 if there is no such command, 130 after Ctrl-C.

    Raises:
        SystemExit: With 2 if an option is unknown or malformed, with 143 if the process was told to terminate.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help", "--version"):  # without torch, which takes seconds to import
        print(f"kdq-lightning {version('kdq-lightning')}\n" if command == "--version" else OVERVIEW, end="")
        return 0
    if not command.startswith("-") and command not in COMMANDS:
        near = "".join(f", did you mean {name}?" for name in get_close_matches(command, COMMANDS, 1))
        print(f"kdq: there is no command {command!r}{near or '.'} All commands: kdq --help", file=sys.stderr)
        return 2
    if not {"-h", "--help"}.isdisjoint(arguments[1:]) and command in PAGES:
        print(first_page(command), end="")
        return 0
    from kdq_lightning.commands.messages import exit_code_of

    find_own_files()
    for name, module in WITHOUT_MODEL.items():
        words = name.split()
        if arguments[: len(words)] == words:
            return exit_code_of(partial(importlib.import_module(module).main, arguments[len(words) :]))
    running = importlib.import_module("kdq_lightning.commands.running")
    return exit_code_of(partial(running.run_command, None if args is None else arguments))


def find_own_files() -> None:
    """Let class paths and networks, of options and configs, lead to files in the folder that the command runs in."""
    with suppress(FileNotFoundError):  # that folder has been removed
        if (folder := os.getcwd()) not in sys.path:  # as with `python -m`; the last, so that it hides no library
            sys.path.append(folder)


if __name__ == "__main__":
    sys.exit(main())
