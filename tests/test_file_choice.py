"""Choices by bytes and accuracy against brute force."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdq_lightning.report.file_choice import best_within, budget_ranges, choose_file, pareto_front

FILES = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 8)), max_size=8)


def unzip(files: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    return [size for size, _ in files], [accuracy for _, accuracy in files]


@given(FILES)
def test_pareto_front(files: list[tuple[int, int]]):
    def is_beaten(file: tuple[int, int]) -> bool:
        return any(s <= file[0] and a >= file[1] and (s, a) != file for s, a in files)

    front = pareto_front(*unzip(files))
    assert sorted(front) == [i for i, file in enumerate(files) if not is_beaten(file)]
    assert [files[i][0] for i in front] == sorted(files[i][0] for i in front)


@given(FILES, st.integers(0, 13))
def test_best_within(files: list[tuple[int, int]], budget: int):
    fitting = [(accuracy, -size) for size, accuracy in files if size <= budget]
    chosen = best_within(*unzip(files), budget)
    assert (chosen is None) == (not fitting)
    if chosen is not None:
        assert (files[chosen][1], -files[chosen][0]) == max(fitting)


@given(FILES, FILES)
def test_budget_ranges(first: list[tuple[int, int]], second: list[tuple[int, int]]):
    """At any budget the range that holds it names the best files; neighbours differ; nothing is below the first."""
    ranges = budget_ranges(*unzip(first), *unzip(second))
    for budget in range(14):
        found = [(r.first, r.second) for r in ranges if r.low <= budget < r.high]
        best = best_within(*unzip(first), budget), best_within(*unzip(second), budget)
        assert found == ([best] if best != (None, None) else [])
    for left, right in pairwise(ranges):
        assert left.high == right.low and (left.first, left.second) != (right.first, right.second)
    assert not ranges or ranges[-1].high == math.inf


@pytest.mark.parametrize(
    ("max_bytes", "min_accuracy", "chosen"),
    [
        (None, None, 3),
        (250, None, 2),
        (99, None, None),
        (None, 70, 1),
        (None, 75, 3),
        (250, 75, None),
        (None, 99, None),
    ],
)
def test_choose_file(max_bytes: float | None, min_accuracy: float | None, chosen: int | None):
    assert choose_file([100, 200, 201, 400], [60, 70, 71, 80], max_bytes, min_accuracy) == chosen
