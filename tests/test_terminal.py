"""What commands print on a terminal, and in a file."""

import io
import sys
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from kdq_lightning.cli import main
from kdq_lightning.commands import report
from kdq_lightning.networks import network_names
from kdq_lightning.runs.records import packed_path, read_records
from kdq_lightning.training.result_tables import terminal_table
from tests.records import write_run


def test_the_answer_is_cut_between_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """On a terminal; in a file a paragraph is one line."""
    for strategy, accuracy in (("teacher", 95), ("control", 80)):
        network = "resnet50" if strategy == "teacher" else "resnet18"
        write_run(tmp_path / strategy / "version_0", strategy, {2: accuracy, 32: accuracy}, network=network)
    shown = []
    for is_terminal in (False, True):
        monkeypatch.setattr(
            report, "Console", partial(Console, force_terminal=is_terminal, width=50, color_system=None)
        )
        assert main(["report", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
        shown.append(capsys.readouterr().out.partition("what to ship")[0])
    in_file, on_terminal = shown
    assert max(map(len, on_terminal.splitlines())) <= 50 < max(map(len, in_file.splitlines()))
    assert on_terminal.split() == in_file.split()


def test_a_command_in_the_answer_is_not_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A narrow terminal, too, gets it in one line, to be copied."""
    folder = tmp_path / "run" / "version_0"
    write_run(folder, "control", {2: 80, 32: 90})
    packed = packed_path(folder, read_records(folder)[0])
    packed.parent.mkdir()
    packed.touch()
    monkeypatch.setattr(report, "Console", partial(Console, force_terminal=True, width=50, color_system=None))
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "out"), "--max_bytes", "4kB"]) == 0
    assert f"    kdq export {packed} --to onnx --out {packed.stem}.onnx\n" in capsys.readouterr().out


def test_networks_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The thousands of other packages are counted; a file gets every name."""
    assert main(["list", "networks"]) == 0
    assert capsys.readouterr().out.splitlines() == list(network_names())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["list", "networks"]) == 0
    lines = capsys.readouterr().out.splitlines()
    count = sum(name.startswith("torchvision/") for name in network_names())
    assert (
        "resnet56" in lines and f"torchvision/NAME    {count} networks: kdq list networks | grep torchvision/" in lines
    )
    assert len(lines) < 20 and max(map(len, lines)) <= 80


@pytest.mark.parametrize("kind", ["strategies", "data", "methods"])
def test_lists_are_cut_between_words_on_a_terminal(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """What a name is stays in its column; a file gets a line a name."""
    assert main(["list", kind]) == 0
    in_file = capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["list", kind]) == 0
    on_terminal = capsys.readouterr().out
    assert on_terminal.split() == in_file.split()
    assert max(map(len, on_terminal.splitlines())) <= 80 < max(map(len, in_file.splitlines()))


def test_the_table_names_the_network_of_a_peer(tmp_path: Path):
    """Below the peer; a network without peers stands once."""
    for strategy, peers in (("dml", ("peer0", "peer1")), ("control", ("",))):
        write_run(tmp_path / strategy, strategy, {2: 60, 4: 70, 32: 80}, peers=peers)
        console = Console(width=80, record=True, file=io.StringIO())
        console.print(terminal_table(read_records(tmp_path / strategy)))
        printed = console.export_text()
        assert printed.count("resnet18") == len(peers) and printed.count("peer") == (2 if len(peers) > 1 else 0)
