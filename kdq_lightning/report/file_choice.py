"""Files of so many bytes with such an accuracy: which one to take, and which are worth having at all."""

from collections.abc import Sequence
from typing import NamedTuple


class Range(NamedTuple):
    """A range of budgets within which each side's best file stays the same.

    Attributes:
        low: Smallest budget in bytes, included.
        high: Smallest budget beyond the range, infinite for the last.
        first: Index of the first side's best file, None where none fits.
        second: Index of the second side's.
    """

    low: float
    high: float
    first: int | None
    second: int | None


def best_within(sizes: Sequence[float], accuracies: Sequence[float], max_bytes: float) -> int | None:
    """Return the index of the most accurate file of at most `max_bytes`; of equals the smallest, None if none fits."""
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
        accuracies: Their accuracies, on images that the final figure is not read off.
        max_bytes: The most accurate file within them is chosen.
        min_accuracy: The smallest file that reaches it is chosen, of equals the most accurate.
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
    """Return the indices of the files that no other beats in one of size and accuracy and equals in the other.

    Returns:
        In order of size; exact copies are all on the front or all off it.
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
    """Split the budgets, from the smallest file up, where either side's best file changes.

    Args:
        first_sizes: Bytes of the first side's files.
        first_accuracies: Their accuracies, on which the best are chosen.
        second_sizes: Bytes of the second side's files.
        second_accuracies: Their accuracies.
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
