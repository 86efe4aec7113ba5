"""Paired tests against slow loops, scipy and statsmodels."""

import time

import numpy as np
import pytest

from kdq_lightning.errors import UserError
from kdq_lightning.report.significance import _different_images, holm, mcnemar, paired_bootstrap


def classifiers(images: int, runs: int, accuracy: float, seed: int) -> np.ndarray:
    """Return (runs, images) of right and wrong; images differ in difficulty, so runs and classifiers are alike."""
    generator = np.random.default_rng(seed)
    difficulty = np.random.default_rng(99).normal(size=images)
    noise = generator.normal(size=(runs, images))
    threshold = np.quantile(difficulty + generator.normal(size=images), accuracy)
    return difficulty + noise < threshold


def slow_bootstrap(first: np.ndarray, second: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Resample indices of images and runs, one resample at a time."""
    generator = np.random.default_rng(seed)
    images = first.shape[1]
    found = []
    for _ in range(resamples):
        chosen = generator.integers(0, images, images)
        sides = []
        for side in (first, second):
            rows = generator.integers(0, len(side), max(len(side) - 1, 1))
            sides.append(side[rows][:, chosen].mean())
        found.append(100 * (sides[0] - sides[1]))
    return np.array(found)


@pytest.mark.parametrize(("runs", "others"), [(1, 1), (3, 1), (3, 4)])
def test_bootstrap_equals_resampled_indices(runs: int, others: int):
    first, second = classifiers(500, runs, 0.80, seed=1), classifiers(500, others, 0.76, seed=2)
    ours = paired_bootstrap(first, second, resamples=8000)
    slow = slow_bootstrap(first, second, 8000, seed=3)
    low, high = np.quantile(slow, [0.025, 0.975])
    assert ours.points == pytest.approx(100 * (first.mean() - second.mean()))
    assert ours.low == pytest.approx(low, abs=0.25) and ours.high == pytest.approx(high, abs=0.25)
    p = 2 * min((slow <= 0).mean(), (slow >= 0).mean())
    assert ours.p == pytest.approx(p, abs=0.02)
    assert ours.runs == min(runs, others)


@pytest.mark.parametrize("runs", [1, 2, 6, 50])
def test_different_images_are_numpys_unique_columns(runs: int):
    """In the same order: the random draws, and with them every interval, depend on it."""
    values = np.random.default_rng(runs).integers(-1, 2, (runs, 300)).astype(np.int8)
    for ours, numpys in zip(_different_images(values), np.unique(values, axis=1, return_counts=True), strict=True):
        assert np.array_equal(ours, numpys)


def test_bootstrap_is_scipys_for_one_run_each():
    scipy_stats = pytest.importorskip("scipy.stats")
    first, second = classifiers(400, 1, 0.8, seed=1)[0], classifiers(400, 1, 0.7, seed=2)[0]
    differences = 100 * (first.astype(float) - second)
    theirs = scipy_stats.bootstrap((differences,), np.mean, n_resamples=8000, method="percentile", rng=0)
    ours = paired_bootstrap(first, second, resamples=8000)
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.3)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.3)


def test_bootstrap_takes_differences():
    """A drop (float minus quantized) minus another drop is one paired contrast."""
    floats, quantized = classifiers(300, 2, 0.9, seed=1), classifiers(300, 2, 0.7, seed=2)
    drop = floats.astype(np.int8) - quantized
    none = np.zeros_like(drop)
    ours = paired_bootstrap(drop)
    assert ours.runs == 2 and ours.points == pytest.approx(100 * (floats.mean() - quantized.mean()))
    slow = slow_bootstrap(drop, none, 5000, seed=1)
    assert ours.low == pytest.approx(np.quantile(slow, 0.025), abs=0.4)


def test_bootstrap_covers_the_truth_over_seeds():
    """The interval of two runs each knows the scatter of seeds: resampling all runs would miss half of it."""
    generator = np.random.default_rng(0)
    misses = 0
    for trial in range(200):
        accuracies = 0.8 + 0.05 * generator.normal(size=4)  # the seeds' scatter dwarfs the images'
        runs = generator.random((4, 4000)) < accuracies[:, None]
        found = paired_bootstrap(runs[:2], runs[2:], resamples=400, seed=trial)
        misses += not found.low <= 0 <= found.high
    # With 2 runs a side even this is too narrow, as any percentile of so few values is.
    assert misses <= 42  # 51 if all n runs were drawn, 154 if none


def test_bootstrap_of_equals_and_of_nothing():
    same = classifiers(100, 1, 0.8, seed=1)
    assert paired_bootstrap(same, same) == (0, 0, 0, 1, 1)
    with pytest.raises(UserError, match="different test sets"):
        paired_bootstrap(same, same[:, :50])
    with pytest.raises(UserError, match="same images"):
        paired_bootstrap(same[:, :0], same[:, :0])


def test_bootstrap_is_fast_and_repeatable():
    first, second = classifiers(10_000, 3, 0.77, seed=1), classifiers(10_000, 3, 0.76, seed=2)
    start = time.perf_counter()
    found = paired_bootstrap(first, second)
    assert time.perf_counter() - start < 3  # 0.1 s on a free core
    assert found == paired_bootstrap(first, second) != paired_bootstrap(first, second, seed=1)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (5, 5), (1, 0), (12, 4), (4, 12), (300, 371), (0, 60)])
def test_mcnemar(b: int, c: int):
    binom = pytest.importorskip("scipy.stats").binom
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    first = np.repeat([True, False, True, False], [b, c, 40, 7])
    second = np.repeat([False, True, True, False], [b, c, 40, 7])
    ours = mcnemar(first, second)
    assert (ours.first_only, ours.second_only) == (b, c)
    theirs = tables.mcnemar([[40, b], [c, 7]], exact=True).pvalue if b + c else 1.0
    assert ours.exact == pytest.approx(theirs, rel=1e-9)
    middle = 2 * binom.cdf(min(b, c) - 1, b + c, 0.5) + binom.pmf(min(b, c), b + c, 0.5)
    assert ours.mid_p == pytest.approx(middle, rel=1e-9)


def test_holm_is_statsmodels():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p_values = [0.04, 0.001, 0.03, 0.5, 0.009, 0.03]
    assert holm(p_values) == pytest.approx(multitest.multipletests(p_values, method="holm")[1])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]
