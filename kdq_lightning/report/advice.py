"""Chooses what to ship for each range of budgets: a larger file only where it is better than a smaller one."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kdq_lightning.report.duels import Duel, File
from kdq_lightning.report.significance import LEVEL, paired_bootstrap

CLEAR = 0.5
"""Points of validation accuracy that make a larger file better where no paired test can tell."""


class Advice(NamedTuple):
    """What to ship in a range of budgets.

    Attributes:
        low: Smallest budget of the range, in bytes.
        file: The file to ship.
        needs: Bytes that a budget must have for it: those of the larger file of the first comparison.
        duel: Its last comparison with a file of the other track; one without if there is none.
    """

    low: float
    file: File
    needs: int
    duel: Duel

    @property
    def other(self) -> File | None:
        """The other track's file in the comparison, None if none fits."""
        return self.duel.teacher if self.file is self.duel.student else self.duel.student


def advise(duels: Sequence[Duel]) -> list[Advice]:
    """Return what to ship, a range of budgets after the other: a larger file only where it is better.

    Of a duel the winner is a candidate, without a winner the smaller file. It takes the place of the file before it if
    it is better: than one of its own track by `is_better`, than one of the other track if it won its duel.

    Args:
        duels: `Findings.duels`.
    """
    advice: list[Advice] = []
    for duel in duels:
        files = [file for file in (duel.student, duel.teacher) if file]
        winner = {"student": duel.student, "teacher": duel.teacher}.get(duel.winner or "")
        file = winner or min(files, key=lambda file: (file.size, -file.validation_top1))
        last = advice[-1] if advice else None
        if last and file == last.file:
            advice[-1] = last._replace(duel=duel)
            continue
        same_track = last is not None and file.row.is_teachers == last.file.row.is_teachers
        if last is None or (is_better(file, last.file) if same_track else winner is not None):
            advice.append(Advice(duel.low, file, max(file.cell.packed_bytes for file in files), duel))
    return advice


def is_better(file: File, other: File) -> bool:
    """Tell whether a file is better than a smaller one of its track, on validation images.

    The paired test says so at the level `LEVEL`; where the images that either gets right aren't known, a distance of
    `CLEAR` points does.
    """
    own, others = file.cell.correct_validation, other.cell.correct_validation
    if not own or not others:
        return file.validation_top1 - other.validation_top1 >= CLEAR
    difference = paired_bootstrap(np.stack(list(own.values())), np.stack(list(others.values())))
    return difference.points > 0 and difference.p < LEVEL
