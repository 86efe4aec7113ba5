"""Parsers that say in one line what is wrong with an option, where jsonargparse prints every option there is."""

from typing import NoReturn

from jsonargparse import ArgumentParser

_NOISE = ("Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a <class 'NoneType'>")


class OneLineErrors(ArgumentParser):
    """Leaves with 2 and a sentence; `hint` may add to it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the sentence and leave."""
        lines = [line.strip(" -") for line in message.splitlines()]
        sentence = " ".join(line for line in lines if line and not line.startswith(_NOISE))
        self.exit(2, f"kdq: {sentence}{self.hint(sentence)} (options: {self.prog.replace(' [options]', '')} --help)\n")

    def hint(self, sentence: str) -> str:
        """Return what is known beyond jsonargparse's sentence."""
        return ""
