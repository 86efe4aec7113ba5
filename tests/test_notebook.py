"""The notebooks run, and are kept with the outputs that they give: `python -m tests.test_notebook` writes them anew."""

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
MOST_BYTES = 120_000  # of a picture


def execute(name: str, folder: Path) -> Any:
    """Return a notebook of its name as it was run: on the committed records, its files in `folder`."""
    import nbclient
    import nbformat

    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    place = NOTEBOOKS if name == "accuracy_vs_bits" else folder
    path = os.pathsep.join(filter(None, [str(NOTEBOOKS.parent), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path}
    client = nbclient.NotebookClient(
        notebook, timeout=300, coalesce_streams=True, resources={"metadata": {"path": str(place)}}
    )
    return client.execute(env=environment)


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def texts(notebook: Any) -> list[str]:
    """Return what a notebook prints and shows as text."""
    shown = [output.get("text") or output.get("data", {}).get("text/markdown") for output in outputs(notebook)]
    return [text for text in shown if text]


def pictures(notebook: Any) -> list[str]:
    return [output["data"]["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})]


def read(name: str) -> Any:
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("nbclient")
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


@pytest.mark.parametrize("name", ["accuracy_vs_bits", "quantize_your_own_network"])
def test_kept_with_small_outputs(name: str):
    """Every cell was run, in order, without an error; pictures are small, and no output is left from an earlier run."""
    kept = read(name)
    cells = [cell for cell in kept.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output.output_type in ("error",) or output.get("name") == "stderr" for output in outputs(kept))
    assert pictures(kept) and all(len(picture) * 3 / 4 < MOST_BYTES for picture in pictures(kept))


def test_accuracy_vs_bits(tmp_path: Path):
    """It says of the committed records what it said when it was kept; of other records it says what is in them."""
    kept, again = read("accuracy_vs_bits"), execute("accuracy_vs_bits", tmp_path)
    assert len(pictures(again)) == 2
    if "KDQ_RESULTS" not in os.environ:
        assert texts(again) == texts(kept), "write the outputs anew: python -m tests.test_notebook"
    assert "equal bytes" in texts(again)[-2]
    assert re.search(r"at most 100 kB, ship .*: ([\d,]+) bytes", texts(again)[-1])


@pytest.mark.slow(seconds=30)
def test_quantize_your_own_network(tmp_path: Path):
    """Eight bits cost nothing, two the most, mixed bits less in fewer bytes; files take what they are said to take."""
    pytest.importorskip("onnxruntime")
    again = execute("quantize_your_own_network", tmp_path)
    assert len(pictures(again)) == 1
    rows = re.findall(r"^(float|\d bits|mixed bits) +([\d,]+) bytes +([\d.]+) %$", "".join(texts(again)), re.MULTILINE)
    found = {name: (int(size.replace(",", "")), float(top1)) for name, size, top1 in rows}
    assert list(found) == ["float", "2 bits", "3 bits", "4 bits", "8 bits", "mixed bits"]
    assert found["float"][1] > 80
    assert abs(found["8 bits"][1] - found["float"][1]) < 2
    assert found["2 bits"][1] <= found["4 bits"][1] + 1
    assert found["mixed bits"][0] <= 54_000 < found["2 bits"][0] and found["mixed bits"][1] > found["2 bits"][1]
    assert (tmp_path / "digits-4bit.safetensors").stat().st_size == found["4 bits"][0]
    assert (tmp_path / "digits-4bit.onnx").is_file()
    assert kept_names(texts(again)) == kept_names(texts(read("quantize_your_own_network")))


def kept_names(shown: list[str]) -> list[str]:
    """Return the names of layers in a table."""
    return re.findall(r"^(features\.\S+|classifier\.\S+) ", "\n".join(shown), re.MULTILINE)


if __name__ == "__main__":
    import nbformat

    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as scratch:
            executed = execute(path.stem, Path(scratch))
        for cell in executed.cells:
            cell.metadata.pop("execution", None)  # times
        nbformat.write(executed, path)
        print(f"{path}: {path.stat().st_size:,} bytes")
