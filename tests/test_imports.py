"""The house: a module imports from lower floors and from its own folder, and what is pure torch needs no Lightning."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "kdq_lightning"

FLOORS = {
    "cli": 10,
    "study": 9,
    "bench": 8,
    "commands": 7,
    "training": 6,
    "modules": 5,
    "report": 5,
    "runs": 4,
    "evaluation": 4,
    "data": 3,
    "quantization": 3,
    "byte_axis": 3,
    "networks": 2,
    "files": 2,
    "losses": 1,
    "random_draws": 1,
    "errors": 1,
    "strategies": 1,
}
"""The floor of every file and folder of the package; what stands on one floor doesn't know each other."""

WITHOUT_LIGHTNING = [
    "quantization",
    "losses",
    "networks",
    "report",
    "strategies",
    "random_draws",
    "commands.report",
    "cli",
]


def imports_of(path: Path) -> Iterator[str]:
    """Yield the dotted names below `kdq_lightning.` that a file imports, or names in a string as importlib takes it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names = [node.module or ""]
            if node.module == "kdq_lightning":
                names = [f"kdq_lightning.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            names = [node.value]
        else:
            continue
        yield from (name.removeprefix("kdq_lightning.") for name in names if name.startswith("kdq_lightning."))


def room(name: str) -> str:
    """Return the file or folder at the package's top that a dotted name lies in."""
    return name.partition(".")[0]


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_down(path: Path):
    """To a lower floor, or within the folder."""
    here = room(path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."))
    assert here in FLOORS, f"give {here} a floor in FLOORS"
    for name in imports_of(path):
        there = room(name)
        assert there in FLOORS, f"{path} names kdq_lightning.{name}, which has no floor"
        assert there == here or FLOORS[there] < FLOORS[here], f"{here} imports kdq_lightning.{name}, which is not below"


def test_no_circle_within_a_folder():
    """Files of one folder import each other in one direction."""
    graph = {}
    for path in FILES:
        name = path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
        graph[name] = set(imports_of(path))
    graph = {name: {other for other in others if other in graph} for name, others in graph.items()}
    while leaves := [name for name, others in graph.items() if not others]:
        graph = {name: others - set(leaves) for name, others in graph.items() if name not in leaves}
    assert not graph, f"these import each other in a circle, or those that do: {sorted(graph)}"


def test_every_floor_is_inhabited():
    """A name without a file has left the house."""
    assert all((PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file() for name in FLOORS)


def test_no_lightning():
    """In one process, as importing torch takes seconds."""
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(f'kdq_lightning.{name}')\n"
    code += "    assert 'lightning' not in sys.modules, name\n"
    code += "from kdq_lightning import load_packed, quantize\nassert 'lightning' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, *WITHOUT_LIGHTNING], check=True)
