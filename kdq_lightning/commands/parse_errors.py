"""What jsonargparse says of a wrong option, in words: which option it is, what it takes, and what it got."""

import re
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches

_NOISE = ("Does not validate", "Subtypes:", "Errors:", "Given value type", "Expected a <class 'NoneType'>")
_NO_CONFIG = r"Expected a path but \S+ either not accessible or invalid (?=\S)"
"""What jsonargparse says first of a class path, as a file may stand in its place; what is wrong with it follows."""

_KINDS = {
    "a list": ("list", "tuple", "Iterable", "Sequence", "set"),
    "a whole number": ("int",),
    "a number": ("float",),
    "true or false": ("bool",),
    "a group of names with values": ("dict", "Mapping"),
    "a text": ("str",),
    "a path": ("Path",),
}
"""What an option takes, and the types that jsonargparse names."""

_NAMES = r"((?:[\w.-]+, )*[\w.-]+) ((?:must be|has no value|is no option).*)"


def split_names(sentence: str) -> tuple[list[str], str]:
    """Return the options that a sentence of `plain_sentence` is about, and what it says of them."""
    found = re.fullmatch(_NAMES, sentence)
    return (found[1].split(", "), found[2]) if found else ([], sentence)


def plain_sentence(message: str, example: Callable[[str], object] = lambda key: None) -> str:
    """Return a message of jsonargparse or argparse as a sentence that begins with the name of an option.

    Args:
        message: In several lines, some of which say nothing to a user.
        example: Returns a value of an option that takes a list, by the option's name; None if none is known.
    """
    lines = [line.strip(" -") for line in message.splitlines()]
    given = [line.partition(": ")[2] for line in lines if line.startswith("Given value: ")]
    kept = dict.fromkeys(line for line in lines if line and not line.startswith((*_NOISE, "Given value: ")))
    text = re.sub(_NO_CONFIG, "", " ".join(kept))
    if "Literal[" in text and "Expected a <class 'NoneType'>" in message:
        text += " Expected a typing.Literal['null']"  # an option of words that may be left out: null is one of them
    text = re.sub(r"^([\w.]+\.help): (?=Expected)", r'Parser key "\1": ', text)
    if found := re.fullmatch(r'Parser key "([^"]+)"(?: element \d+)?: (.*)', text):
        if of_class := [line for line in lines[1:] if re.fullmatch(_NAMES, line)]:  # said by the parser of a class
            names, rest = split_names(of_class[0])
            return f"{', '.join(f'{found[1]}.{name}' for name in names)} {rest}"
        return _of_a_key(found[1], found[2], given[0] if given else None, example)
    return _of_the_command(text)


def _of_a_key(key: str, text: str, given: str | None, example: Callable[[str], object]) -> str:
    """Return the sentence for an option with a wrong value.

    Args:
        key: The option.
        text: What is wrong with it.
        given: Its value, where the text doesn't say it.
        example: See `plain_sentence`.
    """
    text, _, got = text.partition(". Got value:")
    got = (got or given or "").strip()
    if found := re.search(r"(?:File does not exist|Path is not a file|Path does not exist): '?([^']+)'?", text):
        return f"{key} must be a file that can be read: there is none at {found[1]}"
    if problem := re.search(r"Problem with given class_path '([^']+)': (.*)", text):
        reason = re.sub(r"module '([^']+)' has no attribute '([^']+)'", r"there is no \2 in \1", problem[2])
        if not reason.startswith(("No module", "there is no")):
            return f"{key} must be a class with its options in init_args: {reason}"
        return f"{key} must be a class that can be imported, and {problem[1]} can't: {reason}"
    if found := re.search(r"does not correspond to a subclass of (\w+)", text):
        return f"{key} must be a class derived from {found[1]}" + (f", got {got}" if got else "")
    if found := re.search(r"Not a valid subclass of \w+", text):
        return f"{key} must be the name of a class, or class_path and init_args" + (f", got {got}" if got else "")
    if found := re.match(r"Unable to load config '?([^']*)'?", text):
        return f"{key} must be a YAML file with options, got {found[1]}"
    kinds = _kinds(text)
    if missing := re.search(r"Expected a dot import path string: (.*?)(?= Expected an? |$)", text):
        got = missing[1]
        kinds = kinds if "a number" in kinds else ["the name of a class", *kinds]
    words = _words(text)
    if not kinds and not words:
        return f"{key}: {text}" + (f" (got {got})" if got else "")
    sentence = f"{key} must be {' or '.join([*kinds, *words])}"
    if kinds == ["a list"] and (shown := _example(example(key), got)):
        sentence += f" such as {shown}"
    return f"{sentence}, got {got or 'nothing'}{_nearest(got, words)}"


def _kinds(text: str) -> list[str]:
    """Return what an option takes, in words, by the types that jsonargparse expected."""
    types = {name.rpartition(".")[2] for name in re.findall(r"Expected an? <class '([\w.]+)'>", text)}
    kinds = [words for words, names in _KINDS.items() if not types.isdisjoint(names)]
    return [words for words in kinds if words != "a whole number" or "float" not in types]


def _words(text: str) -> list[str]:
    """Return the words that an option takes, and null, by the literals that jsonargparse expected."""
    literals = re.findall(r"typing\.Literal\[(.*?)\]", text)
    return re.findall(r"[\w.-]+", " ".join(literals))


def _example(known: object, got: str) -> str:
    """Return a list to write: of the value given if it is of the right kind, else of what is known."""
    values = list(known)[:2] if isinstance(known, list | tuple) else []
    is_number = re.fullmatch(r"-?[\d.]+(e-?\d+)?", got) is not None
    if got and (not values or is_number == isinstance(values[0], int | float)):
        return f"[{got}]"
    return f"[{', '.join(map(str, values))}]" if values else ""


def _of_the_command(text: str) -> str:
    """Return the sentence for an option that is unknown or has no value, or for an unknown word."""
    if found := re.search(r"^Option '([^']+)' is not accepted|does not accept option '([^']+)'", text):
        return f"{found[1] or found[2]} is no option"
    if found := re.fullmatch(r"unrecognized arguments: --?([^ =]+).*", text):
        return f"{found[1]} is no option"
    if found := re.fullmatch(r"unrecognized arguments: (.*)", text):
        return f"{found[1]} is one word too many: options are written --name=value"
    if found := re.fullmatch(r"the following arguments are required: (.*)", text):
        return f"{found[1]} must be given"
    if found := re.fullmatch(r"argument (?:\S+/)?--(\S+): expected (?:one|at least one) argument", text):
        return f"{found[1]} has no value: write it behind the option"
    if found := re.fullmatch(r"argument (\S+): ignored explicit argument (.*)", text):
        return f"{found[1]} takes no value: leave out {found[2]}"
    if found := re.fullmatch(r"argument (?:--)?(\S+): invalid choice: '?([^']*)'? \(choose from (.*)\)", text):
        return _choice(found[1], found[2], re.findall(r"[\w-]+", found[3]))
    if found := re.fullmatch(r'expected "(\w+)" to be one of .* but it was not provided.*', text):
        return f"{found[1]} must be given"
    if found := re.fullmatch(r"Unexpected config: ?(.*)", text):
        return f"config must be a YAML file with options, got {found[1] or 'nothing'}"
    return text


def _choice(name: str, given: str, choices: Sequence[str]) -> str:
    return f"{name} must be one of {', '.join(choices)}, got {given}{_nearest(given, choices)}"


def _nearest(given: str, choices: Sequence[str]) -> str:
    """Return a question that ends a sentence about a word which is none of the choices; nothing if none is alike."""
    near = get_close_matches(given, choices, 1)
    return f": did you mean {near[0]}?" if near else ""


def did_you_mean(name: str, known: Iterable[str], whole: bool = True) -> str:
    """Return a question that ends a sentence about an unknown name; nothing if no known one is alike.

    Args:
        name: The unknown name.
        known: Names with their groups, such as `trainer.max_epochs`, of which the last part may be what is alike.
        whole: Whether the known ones are options as they are typed, with dashes.
    """
    names = {full.rpartition(".")[2]: full for full in known} | {full: full for full in known}
    near = get_close_matches(name, names, 1, cutoff=0.8)
    group, dot, _ = name.partition(".")
    groups = {full.partition(".")[0] for full in names.values()}
    if dot and not near and group not in groups:
        return did_you_mean(group, groups, whole)
    return f", did you mean {'--' * whole}{names[near[0]]}?" if near else ""
