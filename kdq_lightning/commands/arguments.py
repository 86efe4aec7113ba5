"""Checks options, prints one line about an error instead of jsonargparse's full list, and help one group at a time."""

import argparse
import importlib
import inspect
import re
import textwrap
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, get_args, get_type_hints

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from kdq_lightning.errors import UserError

_MARKUP = (
    (r":\w+:`~?(?:[^`]*\.)?([^`.]+)`", r"\1"),  # :class:`~lightning.pytorch.Trainer`
    (r"``([^`]*)``", r"\1"),
    (r" ?Default: \S+\.(?= \(|$)", ""),  # follows in brackets
    (r"<class '(?:\w+\.)*(\w+)'>", r"\1"),
)
"""Markup of docstrings that the help would show as it stands: patterns and what replaces them."""

_NO_CONFIG = r"Expected a path but \S+ either not accessible or invalid (?=\S)"
"""What jsonargparse says first of a class path, as a file may stand in its place; what is wrong with it follows."""

_NOISE = ("Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a <class 'NoneType'>")


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
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Build the parser; see jsonargparse's."""
        if "prog" not in kwargs:  # of a class, for its help
            kwargs |= {"prog": "kdq COMMAND", "usage": "kdq COMMAND --config FILE [--option=value ...]"}
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
        return self.prog.replace(" [options]", "")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the sentence and end the process with code 2."""
        sentence = one_sentence(message)
        hints = f"{self.hint(sentence)}{self._near(sentence)}{_list_hint(sentence)}"
        self.exit(2, f"kdq: {sentence}{hints} (options: {self._command} --help)\n")

    def _near(self, sentence: str) -> str:
        """Return the option that an unknown one may be meant for."""
        found = re.search(r"Option '([^']+)' is not accepted|unrecognized arguments: --([^ =]+)", sentence)
        if found is None:
            return ""
        known = {option[2:]: option for action in self._actions for option in action.option_strings}
        known |= {option.rpartition(".")[2]: option for option in known.values()}
        near = get_close_matches(found[1] or found[2], known, 1, cutoff=0.75)
        return f", did you mean {near[0] if found[1] else known[near[0]]}?" if near else ""

    def hint(self, sentence: str) -> str:
        """Return what is to be added to jsonargparse's sentence, such as the names to choose from."""
        return ""


def _list_hint(sentence: str) -> str:
    """Return how to write a list of one, where a single value was given for a list."""
    found = re.search(r"Expected a <class '(?:tuple|list)'>\. Got value: (\S+)", sentence)
    return f": write [{found[1]}]" if found else ""


def one_sentence(message: str) -> str:
    """Return a message of jsonargparse in one line, without the lines that say nothing to a user."""
    lines = [line.strip(" -") for line in message.splitlines()]
    sentence = " ".join(dict.fromkeys(line for line in lines if line and not line.startswith(_NOISE)))
    return re.sub(_NO_CONFIG, "", sentence)


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
