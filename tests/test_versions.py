"""Versions of a run in order of their numbers, and which of them stands for the run."""

from pathlib import Path

import pytest

from kdq_lightning.runs.versions import (
    claim_version,
    is_finished,
    is_version,
    mark_finished,
    newest_finished,
    newest_unfinished,
    newest_version,
    next_number,
    version_folder,
    version_number,
    versions,
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run with versions 2, 9 and 10, of which 2 and 9 are finished, and with what is no version."""
    for name in ("version_10", "version_9", "version_2", "version_x", "version_", "packed", "version_3_old"):
        (tmp_path / name).mkdir()
    for number in (2, 9):
        mark_finished(tmp_path / f"version_{number}")
    return tmp_path


def test_versions_are_sorted_by_number(run: Path):
    assert [folder.name for folder in versions(run)] == ["version_2", "version_9", "version_10"]
    assert newest_version(run) == version_folder(run, 10) and next_number(run) == 11
    assert [version_number(run / name) for name in ("version_7", "version_x", "packed")] == [7, -1, -1]
    assert is_version(run / "version_2") and not is_version(run / "version_4") and not is_version(run / "packed")


def test_which_version_stands_for_the_run(run: Path):
    assert newest_finished(run) == run / "version_9" and newest_unfinished(run) == run / "version_10"
    assert (run / "version_9" / "finished").read_bytes() == b"" and not is_finished(run / "version_10")
    mark_finished(run / "version_10")
    assert newest_finished(run) == run / "version_10" and newest_unfinished(run) is None


def test_a_version_stands_for_itself(run: Path):
    assert newest_finished(run / "version_2") == run / "version_2" and newest_finished(run / "version_10") is None


def test_a_run_that_is_not_there(tmp_path: Path):
    gone = tmp_path / "gone"
    assert versions(gone) == [] and next_number(gone) == 0
    assert newest_version(gone) is newest_finished(gone) is newest_unfinished(gone) is None


def test_two_runs_that_start_at_once(run: Path, monkeypatch: pytest.MonkeyPatch):
    """Both find the same next number, and each gets a folder of its own."""
    monkeypatch.setattr("kdq_lightning.runs.versions.next_number", lambda run: 11)
    assert [claim_version(run) for _ in range(3)] == [11, 12, 13]
    assert newest_version(run) == version_folder(run, 13)
    monkeypatch.undo()
    assert claim_version(run / "new") == 0 and is_version(run / "new" / "version_0")
