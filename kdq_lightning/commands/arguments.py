"""Parsers that print one line about an error, and help one group at a time; checks of what was parsed."""

import argparse
import importlib
import inspect
import re
import textwrap
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from kdq_lightning.commands.parse_errors import did_you_mean, plain_sentence, split_names
from kdq_lightning.errors import UserError

_MARKUP = (
    (r":\w+:`~?(?:[^`]*\.)?([^`.]+)`", r"\1"),  # :class:`~lightning.pytorch.Trainer`
    (r"``([^`]*)``", r"\1"),
    (r" ?Default: \S+\.(?= \(|$)", ""),  # follows in brackets
    (r"<class '(?:\w+\.)*(\w+)'>", r"\1"),
)
"""Markup of docstrings that the help would show as it stands: patterns and what replaces them."""


class PlainHelp(DefaultHelpFormatter):
    """Help without the markup of docstrings, and with whole words: a class's path stays in one piece."""

    def start_section(self, heading: str | None) -> None:
        """Begin a group of options, whose heading may need several lines."""
        super().start_section(heading and "\n".join(textwrap.wrap(heading, self._width - 1)))

    def _split_lines(self, text: str, width: int) -> list[str]:
        """Return the lines of an option's text."""
        text = " ".join(text.split())
        for pattern, replacement in _MARKUP:
            text = re.sub(pattern, replacement, text)
        return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


class GroupHelp(argparse._HelpAction):
    """`--help.trainer`: prints the options of a group, `--help.all` those of all, with their environment variables."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        """Print the options and end the process."""
        assert isinstance(parser, OneLineErrors) and option_string is not None
        print(parser.group_help(option_string.removeprefix("--help.")), end="")
        parser.exit()


class OneLineErrors(ArgumentParser):
    """A parser that ends the process with code 2 and one sentence, to which `hint` may add.

    An option must be spelt out: argparse would take `--trainer.max_epoch` for `max_epochs`, which a file may not say.

    Attributes:
        command: The command as one types it, if the parser's `prog` doesn't say it: jsonargparse makes parsers of
            classes without one.
    """

    command: str | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Build the parser; see jsonargparse's."""
        if "prog" not in kwargs:  # of a class, for its help
            prog = self.command or "kdq COMMAND"
            kwargs |= {"prog": prog, "usage": f"{prog} --config FILE [--option=value ...]"}
        kwargs.setdefault("formatter_class", PlainHelp)
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]  # as jsonargparse's
        """Parse, with the home folder in place of `~`, which a shell leaves as it is in quotes and in `--out=~/x`."""
        options: Namespace = super().parse_args(*args, **kwargs)
        for key, value in options.items():
            if isinstance(value, Path):
                options[key] = value.expanduser()
            elif isinstance(value, list):
                options[key] = [item.expanduser() if isinstance(item, Path) else item for item in value]
        return options

    def add_group_help(self, names: Iterable[str]) -> None:
        """Add `--help.<name>` for each of these groups, and `--help.all`."""
        for name in (*names, "all"):
            self.add_argument(f"--help.{name}", action=GroupHelp, dest=argparse.SUPPRESS, help=argparse.SUPPRESS)

    def group_help(self, name: str) -> str:
        """Return the help of a group of options, without environment variables; "all" is everything, with them.

        The parser can't be used afterwards.
        """
        if name != "all":
            self._action_groups = [self.groups[name]]  # type: ignore[index]  # they all have groups
            self.default_env = False
        self.description = None
        self.usage = f"{self._command} --config FILE [--option=value ...]"
        return self.format_help()

    @property
    def _command(self) -> str:
        """The command as one types it."""
        return self.command or self.prog.replace(" [options]", "")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the sentence and end the process with code 2; the parser of a class tells the one that asked it."""
        names, rest = split_names(plain_sentence(message, self._default_of))
        if rest == "is no option":
            rest += did_you_mean(names[0], self._option_names(), whole=self.exit_on_error)
        if rest == "must be given" and len(names) == 1 and (choices := self._choices(names[0])):
            rest += f": one of {', '.join(choices)}"
        sentence = f"{', '.join(names)} {rest}".strip()
        if not self.exit_on_error:
            raise argparse.ArgumentError(None, sentence) from ex
        spelt = " and ".join(map(self._spelt, names))
        command = f"{self._command} {self.help_option(names, message)}"
        self.exit(2, f"kdq: {f'{spelt} {rest}'.strip()}{self.hint(names, message)} (options: {command})\n")

    def _option_names(self) -> list[str]:
        """Return the options, without their dashes; of a parser with commands, those of each command."""
        parsers = [
            parser for action in self._actions if isinstance(action.choices, dict) for parser in action.choices.values()
        ]
        options = {
            option for parser in (self, *parsers) for action in parser._actions for option in action.option_strings
        }
        return sorted(option[2:] for option in options if option.startswith("--"))

    def _default_of(self, name: str) -> object:
        """Return the value of an option that isn't given; None if there is no such option."""
        return next((action.default for action in self._actions if action.dest == name), None)

    def _choices(self, name: str) -> list[str]:
        """Return the words that an option may have as its value; nothing if they are not told."""
        return [str(choice) for action in self._actions if action.dest == name for choice in action.choices or ()]

    def _spelt(self, name: str) -> str:
        """Return an option as it is written: with dashes, or in capitals if it is a word of its own."""
        name = name.removeprefix(f"{self._command.rpartition(' ')[2]}.")
        is_word = any(action.dest == name and not action.option_strings for action in self._actions)
        if is_word:
            return name.upper()
        return name if "." in name else f"--{name}"

    def help_option(self, names: Sequence[str], message: str) -> str:
        """Return the option that explains these."""
        return "--help"

    def hint(self, names: Sequence[str], message: str) -> str:
        """Return what is to be added to the sentence on these options, such as the names to choose from."""
        return ""


def read_yaml(path: Path, example: str) -> dict[str, Any]:
    """Return what a YAML file says.

    Args:
        path: The file.
        example: A file of its kind, for an error.

    Raises:
        UserError: If there is no such file, or it holds something else than names with values.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name a file such as {example}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8: name a file such as {example}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UserError(f"{path} is not valid YAML: {where}{getattr(error, 'problem', error)}") from error
    if not isinstance(content, dict):
        found = "is empty" if content is None else f"holds {type(content).__name__} {content!r:.40}"
        raise UserError(f"{path} {found} where names with values are expected, as in {example}")
    return content


def check_class_given(settings: Namespace, name: str, later: Collection[str] = ()) -> None:
    """Call `check_given` for a group that names its class in `class_path`."""
    if "init_args" in settings:
        check_given(load_class(settings.class_path), settings.init_args, name, later)


def load_class(class_path: str) -> Any:  # noqa: ANN401 - a class of any kind
    """Return the class that a configuration names."""
    module, _, name = class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def check_given(owner: type, settings: object, name: str, later: Collection[str] = ()) -> None:
    """Refuse options without a value, such as `max_epochs:` in a file, which jsonargparse lets through.

    Args:
        owner: The class whose options they are.
        settings: What was parsed for it.
        name: Of the group of options.
        later: Options that get their value later.

    Raises:
        UserError: If an option that needs a value has none, or there are no options at all.
    """
    if not isinstance(settings, Namespace):
        raise UserError(f"{name} must be a group of options such as `{name}: {{option: value}}`, got {settings!r}")
    for key, value in vars(settings).items():
        if value is None and key not in later and not _takes_none(owner, key):
            raise UserError(f"{name}.{key} has no value: give one, or leave out the line")


def _takes_none(owner: type, key: str) -> bool:
    for base in owner.__mro__:
        if key in inspect.signature(base.__init__).parameters:  # type: ignore[misc]
            hint = get_type_hints(base.__init__).get(key, Any)  # type: ignore[misc]
            return hint is Any or NoneType in (hint, *get_args(hint))
    return True
