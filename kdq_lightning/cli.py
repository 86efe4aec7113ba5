"""The `kdq` command: finds the module of the command that is asked for, and runs it."""

import importlib
import sys
from collections.abc import Sequence
from functools import partial

from kdq_lightning.commands.messages import exit_code_of

WITHOUT_MODEL = {
    "bench project": "kdq_lightning.study.project",
    "bench": "kdq_lightning.bench.subjects",
    "export": "kdq_lightning.commands.export",
    "list": "kdq_lightning.commands.listing",
    "report": "kdq_lightning.commands.report",
    "study": "kdq_lightning.study.command",
}
"""Modules of the commands with parsers of their own, the longer name first; the rest is `commands.command_line`."""


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; if it fails, print one sentence that says why.

    Args:
        args: The command and its options, such as ["fit", "--config", "configs/quickstart.yaml"]; those of the process
            if not given.

    Returns:
        The exit code: 0 if it succeeded, 1 if it failed.

    Raises:
        SystemExit: With 2 if an option is unknown or malformed, with 143 if the process was told to terminate.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    for name, module in WITHOUT_MODEL.items():
        words = name.split()
        if arguments[: len(words)] == words:
            return exit_code_of(partial(importlib.import_module(module).main, arguments[len(words) :]))
    command_line = importlib.import_module("kdq_lightning.commands.command_line")
    return exit_code_of(partial(command_line.run_command, None if args is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
