"""The versions of a run, `<run>/version_0`, `<run>/version_1`, ..., and which of them are finished.

When training or quantization has ended, an empty file `finished` is written. Other runs use the weights of the newest
version that has it.
"""

import re
from pathlib import Path

FINISHED = "finished"
_NAME = re.compile(r"version_(\d+)")


def version_folder(run: Path, number: int) -> Path:
    """Return the folder of a version, which need not exist."""
    return run / f"version_{number}"


def version_number(folder: Path) -> int:
    """Return the number in a version folder's name; -1 if the name is not that of a version."""
    name = _NAME.fullmatch(folder.name)
    return int(name[1]) if name else -1


def versions(run: Path) -> list[Path]:
    """Return the version folders of a run, oldest first; none if the run doesn't exist."""
    return sorted(filter(is_version, run.glob("version_*")), key=version_number)


def next_number(run: Path) -> int:
    """Return the number after that of a run's newest version; 0 if it has none."""
    return max(map(version_number, versions(run)), default=-1) + 1


def claim_version(run: Path) -> int:
    """Make the folder of a run's next version and return its number, which no other process gets."""
    number = next_number(run)
    while True:
        try:
            version_folder(run, number).mkdir(parents=True)
            return number
        except FileExistsError:  # a run that started at the same moment has made it
            number += 1


def is_version(folder: Path) -> bool:
    """Return whether a folder exists and is a version of some run."""
    return folder.is_dir() and version_number(folder) >= 0


def mark_finished(version: Path) -> None:
    """Write down that a version came to its end."""
    (version / FINISHED).touch()


def is_finished(version: Path) -> bool:
    """Return whether a version came to its end."""
    return (version / FINISHED).exists()


def newest_version(run: Path) -> Path | None:
    """Return the newest version of a run; None if it has none."""
    return next(reversed(versions(run)), None)


def newest_finished(run: Path) -> Path | None:
    """Return the newest finished version of a run, whose weights stand for it; None if it has none.

    Args:
        run: A run folder, or a version's own folder, which stands for itself.
    """
    return next((version for version in [*reversed(versions(run)), run] if is_finished(version)), None)


def newest_unfinished(run: Path) -> Path | None:
    """Return the newest version of a run if it isn't finished, so that one can go on with it; None otherwise."""
    newest = newest_version(run)
    return None if newest is None or is_finished(newest) else newest
