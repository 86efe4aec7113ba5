"""Runs a command that has a model, or says what it would run with."""

import io
import signal
import sys
from contextlib import redirect_stderr
from typing import Any, NamedTuple

from lightning.pytorch.cli import ArgsType
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from kdq_lightning.commands.command_line import CommandLine
from kdq_lightning.commands.messages import quieten
from kdq_lightning.commands.model_parser import parser_of
from kdq_lightning.data.base import ImageDataModule
from kdq_lightning.errors import UserError
from kdq_lightning.modules.classifier import Classifier
from kdq_lightning.training.callbacks import SaveConfig
from kdq_lightning.training.interruption import StoppedByUser
from kdq_lightning.training.lightning_internals import WithoutRunning
from kdq_lightning.training.trainer import Trainer


class ConfigReader(WithoutRunning, CommandLine):
    """Parses a command and goes no further."""


class Settings(NamedTuple):
    """What a command would run with.

    Attributes:
        config: All options.
        config_hash: Of its records.
    """

    config: dict[str, Any]
    config_hash: str


def read_settings(args: list[str]) -> Settings:
    """Return what `kdq fit` or `kdq quantize` would run with, without running it.

    Args:
        args: Such as ["fit", "--config", "configs/quickstart.yaml"].

    Raises:
        UserError: If an option is unknown or malformed, or the command needs weights and there are none.
    """
    quieten()
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            command_line = build_command_line(ConfigReader, args)
    except SystemExit as stop:  # as a parser ends a command
        raise UserError(said.getvalue().strip().removeprefix("kdq: ")) from stop
    print(said.getvalue(), end="", file=sys.stderr)
    return Settings(command_line.config[command_line.subcommand].as_dict(), command_line.hash_config())


def build_command_line(kind: type[CommandLine], args: ArgsType) -> CommandLine:
    """Parse a command and run it, if the kind does.

    Only the options of that command are collected, as each command's take a tenth of a second.
    """
    command, commands = next(iter(sys.argv[1:] if args is None else args), None), kind.subcommands()
    if command in commands:
        kind = type(kind.__name__, (kind,), {"subcommands": staticmethod(lambda: {command: commands[command]})})
    return kind(
        Classifier,
        ImageDataModule,
        trainer_class=Trainer,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        parser_class=parser_of(f"kdq {command}" if command in commands else "kdq"),
        parser_kwargs={
            "prog": "kdq",
            "description": "Distil image classifiers, quantize them, and compare at equal bytes.",
            "epilog": "Without a model: kdq bench, kdq export, kdq list, kdq report, kdq study; each has --help.",
            "default_env": True,
            "env_prefix": "KDQ",
        },
        args=args,
    )


def run_command(args: ArgsType = None) -> int:
    """Run `kdq fit`, `validate`, `test`, `predict` or `quantize`, and return the exit code.

    Args:
        args: The command and its options; those of the process if not given.

    Raises:
        SystemExit: With 2 if an option is unknown or malformed, with 130 after Ctrl-C, with 143 if the process was told
            to terminate.
    """
    quieten()
    try:
        build_command_line(CommandLine, args)
    except StoppedByUser as stop:
        rank_zero_only(print)(f"kdq: {stop}", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from stop
    except SIGTERMException as stop:  # Lightning's own leave with 0
        raise SystemExit(128 + signal.SIGTERM) from stop
    return 0
