"""Gives the rows of a data set different labels: rows of one strategy and network say in which setting they differ."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kdq_lightning.quantization.methods import DEFAULT_METHOD
from kdq_lightning.report.rows import Row, method_title
from kdq_lightning.runs.config_hash import settings_of

NAMED = 3  # settings in a label, unless they are too few to tell the rows apart


def with_different_labels(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with labels that differ: first the method is added, then what tells trained networks apart.

    These are the settings that differ by their `config.yaml`, such as "temperature 4"; where a row has no such file,
    or the files don't differ, the run's name; and where the names are equal, the hash of the settings.
    """
    details: dict[tuple[str, str, str, tuple[int, ...]], str] = {}
    for label in dict.fromkeys(row.label for row in rows):
        alike = list(dict.fromkeys(_trained(row) for row in rows if row.label == label))
        first = {_trained(row): row for row in reversed(rows) if row.label == label}
        details |= dict(zip(alike, _details([first[trained] for trained in alike]), strict=True))
    labelled = []
    for row in rows:
        method = "" if row.method == DEFAULT_METHOD else f", {method_title(row.method)}"
        partial = ", partial" if row.is_partial else ""
        labelled.append(replace(row, label=f"{row.label}{method}{details[_trained(row)]}{partial}"))
    return labelled


def _trained(row: Row) -> tuple[str, str, str, tuple[int, ...]]:
    """Return what tells the trained network of a row from others; rows that differ in the method alone share it."""
    return row.label, row.first_record.run, row.first_record.config_hash, tuple(row.seeds)


def _details(rows: Sequence[Row]) -> list[str]:
    """Return what follows the label of each of these rows of different networks; nothing if there is one alone."""
    if len(rows) == 1:
        return [""]
    settings = different_settings([settings_of(row.first_measurement.folder) for row in rows])
    if len(set(settings)) == len(rows):
        return [f", {text}" for text in settings]
    texts = [f" {row.first_record.run}" for row in rows]
    return [
        f"{text} {row.first_record.config_hash}" if texts.count(text) > 1 else text
        for text, row in zip(texts, rows, strict=True)
    ]


def different_settings(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return in words in which settings several runs differ, such as "temperature 4, learning_rate 0.05" of each.

    Args:
        configs: The settings of each run, as `settings_of` returns them.

    Returns:
        A text a run, all with the same settings in the same order; empty texts if a run has no settings.
    """
    places = dict.fromkeys(place for config in configs for place in config)
    differing = [place for place in places if len({str(config.get(place)) for config in configs}) > 1]
    classes = tuple(place.removesuffix("class_path") + "init_args." for place in differing if "class_path" in place)
    differing = [place for place in differing if not place.startswith(classes)]  # other classes, other arguments
    if not all(configs) or not differing:
        return [""] * len(configs)
    names = _names(differing)
    texts = [[_in_words(names[place], config.get(place)) for place in differing] for config in configs]
    short = [", ".join(own[:NAMED]) for own in texts]
    return short if len(set(short)) == len(short) else [", ".join(own) for own in texts]


def _names(places: Sequence[str]) -> dict[str, str]:
    """Return the name of each setting: the last word of its place, the last two where the last ones are equal."""
    words = {place: re.sub(r"\.(?:init_args|class_path)(?=\.|$)", "", place).split(".") for place in places}
    last = [parts[-1] for parts in words.values()]
    return {place: ".".join(parts[-2:]) if last.count(parts[-1]) > 1 else parts[-1] for place, parts in words.items()}


def _in_words(name: str, value: object) -> str:
    """Return a setting as a label has it: of a file of a run the run's name, of a class its name."""
    if value is None:
        return f"no {name}"
    if isinstance(value, bool):
        return f"{name} {str(value).lower()}"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    if "/" in text:
        text = re.sub(r"/version_\d+(?:/.*)?$", "", text.rstrip("/")).rpartition("/")[2]
    elif re.fullmatch(r"(?:\w+\.)+[A-Za-z]\w*", text):
        text = text.rpartition(".")[2]
    return f"{name} {text}"
