"""Paired tests of two networks on the same images, over runs with different seeds."""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from kdq_lightning.errors import UserError

LEVEL = 0.05  # of every test; intervals cover 1 - LEVEL
RESAMPLES = 10_000

_BLOCK = 1000  # resamples whose counts are in memory at once


class Difference(NamedTuple):
    """A paired difference, in points of percent.

    Attributes:
        points: First minus second, on all images and runs.
        low: Lower end of the interval that covers 95 %.
        high: Its upper end.
        p: Two-sided p-value of "no difference".
        runs: Number of runs (seeds) of the side that has fewer; with 1 the interval covers the choice of images alone.
    """

    points: float
    low: float
    high: float
    p: float
    runs: int

    @property
    def sign(self) -> int:
        """1 or -1 of a significant difference, else 0."""
        if self.p >= LEVEL:
            return 0
        return 1 if self.points > 0 else -1

    @property
    def reversed(self) -> "Difference":
        """Second minus first."""
        return self._replace(points=-self.points, low=-self.high, high=-self.low)


class McNemar(NamedTuple):
    """McNemar's test of two classifiers on the same images.

    Attributes:
        first_only: Number of images that only the first gets right.
        second_only: Number of images that only the second gets right.
        exact: Two-sided exact p-value.
        mid_p: Its mid-p correction, which keeps the level and loses less power.
    """

    first_only: int
    second_only: int
    exact: float
    mid_p: float


def paired_bootstrap(
    first: NDArray[np.integer] | NDArray[np.bool_],
    second: NDArray[np.integer] | NDArray[np.bool_] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """Resample images and runs, and return the mean of `first` minus that of `second` with its percentile interval.

    Each resample draws images and runs. The images are drawn once for both sides, so that they stay paired; the runs of
    each side are drawn apart. Of n runs n - 1 are drawn, with replacement, because drawing n underestimates the
    variance of a mean of few runs (Rao & Wu 1988, Resampling inference with complex survey data, section 2). Drawing
    both images and runs makes intervals rather too wide than too narrow (Owen 2007, The pigeonhole bootstrap).
    Images with the same values in every run can be exchanged: the function draws how many of each kind there are
    (multinomial) instead of the index of each image.

    Args:
        first: 0 or 1 for wrong or right, or differences of these, -1 to 1; (runs, images).
        second: Likewise, (runs of the other side, the same images); None compares `first` with 0.
        resamples: Number of resamples; the smallest possible p-value is 2 / (resamples + 1).
        seed: Seed of the random numbers.

    Raises:
        UserError: If there are no images, or the two sides have different numbers of images.
    """
    first = np.atleast_2d(first)
    runs = len(first) if second is None else min(len(first), len(np.atleast_2d(second)))
    second = np.zeros_like(first[:1]) if second is None else np.atleast_2d(second)
    if first.shape[1] != second.shape[1] or not first.size or not second.size:
        raise UserError(
            f"a paired test needs the same images on both sides, got {first.shape[1]} and {second.shape[1]}:"
            " the records belong to different test sets"
        )
    values = np.concatenate([first, second]).astype(np.int8)  # (runs of both sides, images)
    patterns, counts = _different_images(values)
    shares = counts / counts.sum()
    sides = np.concatenate([np.full(len(first), 1 / len(first)), np.full(len(second), -1 / len(second))])
    observed = float(patterns @ shares @ sides)
    generator = np.random.default_rng(seed)
    drawn = []
    for start in range(0, resamples, _BLOCK):
        size = min(_BLOCK, resamples - start)
        means = (
            generator.multinomial(counts.sum(), shares, size) @ patterns.T / counts.sum()
        )  # (size, runs of both sides)
        weights = [_draw_runs(generator, len(side), size) for side in (first, second)]
        drawn.append((means[:, : len(first)] * weights[0]).sum(1) - (means[:, len(first) :] * weights[1]).sum(1))
    differences = np.concatenate(drawn)
    low, high = np.quantile(differences, [LEVEL / 2, 1 - LEVEL / 2])
    # Sums of a few products round differently from 0: an exact tie must count on both sides.
    beyond = min((differences <= 1e-12).sum(), (differences >= -1e-12).sum())
    p = min(1.0, 2 * (int(beyond) + 1) / (resamples + 1))
    return Difference(100 * observed, 100 * float(low), 100 * float(high), p, runs)


def _different_images(values: NDArray[np.int8]) -> tuple[NDArray[np.int8], NDArray[np.int64]]:
    """Return the different columns of an array in lexical order, and how often each occurs.

    As `np.unique(values, axis=1, return_counts=True)` does, but five times faster: it sorts numbers, not columns.

    Args:
        values: -1, 0 or 1, (runs, images).
    """
    rank = np.zeros(values.shape[1], np.int64)  # of each image among the different ones, by the runs so far
    for run in values:
        rank = np.unique(3 * rank + run, return_inverse=True)[1]
    _, index, counts = np.unique(rank, return_index=True, return_counts=True)
    return values[:, index], counts


def _draw_runs(generator: np.random.Generator, runs: int, size: int) -> NDArray[np.float64]:
    """Return the weight of each run in each resample, float (size, runs); the weights of a resample add up to 1."""
    drawn = max(runs - 1, 1)
    return generator.multinomial(drawn, np.full(runs, 1 / runs), size) / drawn


def mcnemar(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> McNemar:
    """Test whether two classifiers are right equally often (McNemar 1947; mid-p: Fagerland et al. 2013).

    The null hypothesis says that an image that only one of them gets right is equally likely to be the first's or the
    second's.

    Args:
        first: Whether the first classifier is right, bool (images,).
        second: Whether the second classifier is right, bool (images,), of the same images.
    """
    b, c = int((first & ~second).sum()), int((second & ~first).sum())
    n, least = b + c, min(b, c)
    logs = np.array([math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(least + 1)])
    chances = np.exp(logs - n * math.log(2))
    tail = 2 * float(chances.sum())  # more than 1 where both are right equally often
    return McNemar(b, c, min(1.0, tail), min(1.0, tail - float(chances[-1])))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p-values of a family of tests so that the chance of any false finding stays at the level (Holm 1979).

    Args:
        p_values: The p-value of each test.

    Returns:
        The adjusted p-values, in the same order, at most 1.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


Key = TypeVar("Key", bound=Hashable)


def holm_adjusted(tests: Mapping[Key, Difference]) -> dict[Key, Difference]:
    """Return a family of tests with their p-values adjusted; see `holm`."""
    adjusted = holm([test.p for test in tests.values()])
    return {key: test._replace(p=p) for (key, test), p in zip(tests.items(), adjusted, strict=True)}
