"""The notebook runs on records, and draws its figures; it is kept without outputs."""

import os
from pathlib import Path

import pytest

from tests.records import write_study

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "accuracy_vs_bits.ipynb"


def test_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs don't belong into the repository"
    # In continuous integration: the quickstart's own results.
    if "KDQ_RESULTS" not in os.environ:
        write_study(tmp_path / "runs", "digits", ("teacher", "control", "vanilla"))
        monkeypatch.setenv("KDQ_RESULTS", str(tmp_path / "runs"))
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]), prepend=os.pathsep)
    executed = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2
    assert "equal bytes" in str(outputs[-1]["data"])
