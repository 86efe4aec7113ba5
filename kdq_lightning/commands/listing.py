"""`kdq list`: the names that options take, one a line, so that they can be searched."""

import inspect
import re
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator

from kdq_lightning.commands.arguments import OneLineErrors
from kdq_lightning.networks import network_names
from kdq_lightning.quantization.codebooks import CODEBOOKS
from kdq_lightning.quantization.methods import CUSTOM_METHOD, METHODS, MIXED_METHOD
from kdq_lightning.quantization.solvers import SOLVERS

ABOUT_METHODS = {
    "default": "the best known solver and codebook for each bit width, at most 2^b levels",
    "gpfq": "the published recursion whole, 2^b + 1 levels and one scale a layer",
    "mixed": "default with bits of its own for each layer: --quantization.budgets [100kB]",
    "custom": "default with a solver or codebook of your own",
}


def main(args: list[str]) -> int:
    """Run `kdq list`."""
    parser = OneLineErrors(prog="kdq list", description=__doc__)
    parser.add_argument("kind", choices=list(LISTS), help="What to list.")
    for line in LISTS[parser.parse_args(args).kind]():
        print(_cut_between_words(line) if sys.stdout.isatty() else line)
    return 0


def _cut_between_words(line: str) -> str:
    """Return a line as lines of the terminal's width; what follows a name stays in its column."""
    column = re.match(r"\S+ {2,}", line)
    indent = " " * (len(column.group()) if column else 2)
    width = shutil.get_terminal_size().columns
    return textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def list_networks() -> Iterator[str]:
    """Yield every network; on a terminal, of the thousands of other packages only how many there are."""
    if not sys.stdout.isatty():
        yield from network_names()
        return
    packages = Counter(name.partition("/")[0] if "/" in name else "" for name in network_names())
    yield from (name for name in network_names() if "/" not in name)
    for package, count in packages.items():
        if package:
            yield f"{f'{package}/NAME':<20}{count:,} networks: kdq list networks | grep {package}/"
    yield f"{'my_file.function':<20}your own, from a file in this folder: docs/any_network.md"


def list_methods() -> Iterator[str]:
    """Yield the methods of quantization, then the solvers and codebooks that make a method of one's own."""
    for name in (*METHODS, MIXED_METHOD, CUSTOM_METHOD):
        yield f"{name:<20}{ABOUT_METHODS[name]}"
    yield f"--quantization.solver takes {', '.join(SOLVERS)}; --quantization.codebook {', '.join(CODEBOOKS)}"


def list_strategies() -> Iterator[str]:
    """Yield the classes that `--model` takes."""
    from kdq_lightning.commands.model_parser import STRATEGY_CLASSES  # Lightning, which takes seconds to import

    yield from map(_described, STRATEGY_CLASSES)


def list_data() -> Iterator[str]:
    """Yield the classes that `--data` takes."""
    from kdq_lightning.commands.model_parser import SOURCES

    yield from map(_described, SOURCES)


def _described(kind: type) -> str:
    """Return a class's name and the first line of its docstring."""
    return f"{kind.__name__:<24}{inspect.getdoc(kind) or ''}".partition("\n")[0]


LISTS: dict[str, Callable[[], Iterator[str]]] = {
    "networks": list_networks,
    "strategies": list_strategies,
    "data": list_data,
    "methods": list_methods,
}
