"""Checks options, and prints one line about the error instead of jsonargparse's full list."""

import importlib
import inspect
from collections.abc import Collection
from types import NoneType
from typing import Any, NoReturn, get_args, get_type_hints

from jsonargparse import ArgumentParser, Namespace

from kdq_lightning.errors import UserError

_NOISE = ("Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a <class 'NoneType'>")


class OneLineErrors(ArgumentParser):
    """A parser that ends the process with code 2 and one sentence, to which `hint` may add."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the sentence and end the process with code 2."""
        sentence = one_sentence(message)
        self.exit(2, f"kdq: {sentence}{self.hint(sentence)} (options: {self.prog.replace(' [options]', '')} --help)\n")

    def hint(self, sentence: str) -> str:
        """Return what is to be added to jsonargparse's sentence, such as the names to choose from."""
        return ""


def one_sentence(message: str) -> str:
    """Return a message of jsonargparse in one line, without the lines that say nothing to a user."""
    lines = [line.strip(" -") for line in message.splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(_NOISE))


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
