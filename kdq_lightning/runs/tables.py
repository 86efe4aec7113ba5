"""CSV files of dataclass objects, read by the names of their columns, so that files of other releases can be read."""

import csv
import io
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

from kdq_lightning.errors import UserError
from kdq_lightning.files import write_atomically


class Absent(NamedTuple):
    """Annotates a field: what its value is in files that lack the column.

    Attributes:
        value: Takes the other values of a row by their names, and returns this one.
    """

    value: Callable[[dict[str, Any]], object]


class Renamed(NamedTuple):
    """Annotates a field of words, several of which are joined by "+": what other releases called them.

    Attributes:
        words: The word of today by the word of old.
    """

    words: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """A row of a table.

    A field with a default is a column that is written only where a row has another value.

    Attributes:
        unknown: Text of the columns that this release doesn't know, by name. They are kept, and written again.
    """

    unknown: dict[str, str] = field(default_factory=dict, hash=False)


Row = TypeVar("Row", bound=TableRow)
Note = TypeVar("Note")


def columns(kind: type[TableRow]) -> list[Field[Any]]:
    """Return the fields of a kind of row that are columns, in the order of the file."""
    own = [column for column in fields(kind) if column.name != "unknown"]
    return sorted(own, key=lambda column: column.default is not MISSING)


def header(kind: type[TableRow]) -> tuple[str, ...]:
    """Return the names of the columns that every table of this kind has."""
    return tuple(column.name for column in columns(kind) if column.default is MISSING)


def annotation(column: Field[Any], kind: type[Note]) -> Note | None:
    """Return what a field's type is annotated with, of the given kind; None if it isn't."""
    notes = getattr(column.type, "__metadata__", ())
    return next((note for note in notes if isinstance(note, kind)), None)


def read_table(path: Path, kind: type[Row]) -> list[Row]:
    """Read a table; the values of a column that the file lacks are None, or what its field's `Absent` says.

    Args:
        path: The CSV file; there are no rows if there is no such file.
        kind: A dataclass.

    Raises:
        UserError: If the file is damaged, or lacks a column that can't be None.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            names, *lines = list(csv.reader(file)) or [[]]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete it and quantize again") from error
    known = {column.name: column for column in columns(kind)}
    needed = [name for name, column in known.items() if name not in names and not _may_be_missing(column)]
    if needed:
        raise UserError(f"{path} has no column {', '.join(needed)}: it is damaged, delete it and quantize again")
    try:
        rows = []
        for line in lines:
            texts = dict(zip(names, line, strict=True))
            values = {name: _parse(column, texts[name]) for name, column in known.items() if name in texts}
            for name in known.keys() - texts.keys():
                absent = annotation(known[name], Absent)
                values[name] = absent.value(values) if absent else None
            rows.append(kind(**values, unknown={name: text for name, text in texts.items() if name not in known}))
        return rows
    except ValueError as error:
        raise UserError(f"{path} has a damaged row ({error}): delete the file and quantize again") from error


def write_table(path: Path, kind: type[Row], rows: Iterable[Row]) -> None:
    """Write a table, whole or not at all.

    Raises:
        UserError: If the file can't be written.
    """
    rows = list(rows)
    names = [
        column.name
        for column in columns(kind)
        if column.default is MISSING or any(getattr(row, column.name) != column.default for row in rows)
    ]
    unknown = list(dict.fromkeys(name for row in rows for name in row.unknown))
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow([*names, *unknown])
    for row in rows:
        values = [format_value(getattr(row, name)) for name in names]
        writer.writerow([*values, *(row.unknown.get(name, "") for name in unknown)])
    write_atomically(path, table.getvalue().encode())


def _may_be_missing(column: Field[Any]) -> bool:
    return annotation(column, Absent) is not None or type(None) in _types(column)


def _types(column: Field[Any]) -> tuple[type, ...]:
    """Return the types that a field's values may have."""
    kind: Any = column.type
    if hasattr(kind, "__metadata__"):
        kind = kind.__origin__
    return get_args(kind) or (kind,)


def _parse(column: Field[Any], text: str) -> object:
    options = _types(column)
    if renamed := annotation(column, Renamed):
        return "+".join(renamed.words.get(word, word) for word in text.split("+"))
    if type(None) in options and not text:
        return None
    if bool in options:
        if text not in ("True", "False"):
            raise ValueError(f"{text!r} is neither True nor False")
        return text == "True"
    if {int, float} <= set(options):
        return int(text) if text.isdigit() else float(text)
    return options[0](text)


def format_value(value: str | float | None) -> str:
    """Return a value as it stands in a table: nothing for None, a float with six decimals at most."""
    if value is None:
        return ""
    return repr(round(value, 6)) if isinstance(value, float) else str(value)
