"""Choose among files by their bytes and accuracies: the best within a budget, and the Pareto front."""

from collections.abc import Sequence
from typing import NamedTuple

SAME_SIZE = 64  # bytes: the header's names and numbers alone make files of one network differ by some


def rounded_sizes(sizes: Sequence[int]) -> list[int]:
    """Return for each size the largest of those that count as equal to it: the next is at most `SAME_SIZE` above.

    Args:
        sizes: Bytes of each file.
    """
    rounded: dict[int, int] = {}
    descending = sorted(set(sizes), reverse=True)
    for above, size in zip([None, *descending], descending, strict=False):
        near = above is not None and rounded[above] - size <= SAME_SIZE
        rounded[size] = rounded[above] if above is not None and near else size
    return [rounded[size] for size in sizes]


class Range(NamedTuple):
    """A range of budgets within which each side's best file stays the same.

    Attributes:
        low: Smallest budget in bytes, included.
        high: Smallest budget in bytes above the range, infinite for the last range.
        first: Index of the first side's best file, None if none fits.
        second: Index of the second side's best file, likewise.
    """

    low: float
    high: float
    first: int | None
    second: int | None


def best_within(sizes: Sequence[float], accuracies: Sequence[float], max_bytes: float) -> int | None:
    """Return the index of the most accurate file of at most `max_bytes`, of equals the smallest; None if none fits."""
    fitting = [i for i, size in enumerate(sizes) if size <= max_bytes]
    return max(fitting, key=lambda i: (accuracies[i], -sizes[i]), default=None)


def choose_file(
    sizes: Sequence[float],
    accuracies: Sequence[float],
    max_bytes: float | None = None,
    min_accuracy: float | None = None,
) -> int | None:
    """Return the index of the file to ship, None if none meets the options.

    Args:
        sizes: Bytes of each file.
        accuracies: Accuracy of each file, on other images than those of the accuracy that is reported.
        max_bytes: Most bytes that the file may have. Without `min_accuracy` the most accurate such file is chosen.
        min_accuracy: Least accuracy of the file. The smallest such file is chosen, of equals the most accurate.
    """
    if min_accuracy is None:
        return best_within(sizes, accuracies, float("inf") if max_bytes is None else max_bytes)
    good = [
        i
        for i, accuracy in enumerate(accuracies)
        if accuracy >= min_accuracy and (max_bytes is None or sizes[i] <= max_bytes)
    ]
    return min(good, key=lambda i: (sizes[i], -accuracies[i]), default=None)


def pareto_front(sizes: Sequence[float], accuracies: Sequence[float]) -> list[int]:
    """Return the indices of the files on the Pareto front, in order of size.

    A file is not on the front if another one is smaller and at least as accurate, or more accurate and not larger.
    Files of equal size and accuracy are all on the front, or none of them is.
    """
    order = sorted(range(len(sizes)), key=lambda i: (sizes[i], -accuracies[i]))
    front: list[int] = []
    for i in order:
        is_copy = bool(front) and (sizes[i], accuracies[i]) == (sizes[front[-1]], accuracies[front[-1]])
        if is_copy or not front or accuracies[i] > accuracies[front[-1]]:
            front.append(i)
    return front


def budget_ranges(
    first_sizes: Sequence[float],
    first_accuracies: Sequence[float],
    second_sizes: Sequence[float],
    second_accuracies: Sequence[float],
) -> list[Range]:
    """Return the ranges of budgets, from the smallest file up; a new range starts where a side's best file changes.

    Args:
        first_sizes: Bytes of the first side's files.
        first_accuracies: Accuracies of the first side's files.
        second_sizes: Bytes of the second side's files.
        second_accuracies: Accuracies of the second side's files.
    """
    ranges: list[Range] = []
    for size in sorted({*first_sizes, *second_sizes}):
        best = best_within(first_sizes, first_accuracies, size), best_within(second_sizes, second_accuracies, size)
        if ranges and (ranges[-1].first, ranges[-1].second) == best:
            continue
        if ranges:
            ranges[-1] = ranges[-1]._replace(high=size)
        ranges.append(Range(size, float("inf"), *best))
    return ranges
