"""The choice of bits a layer, against all choices there are."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdq_lightning.quantization.allocation import allocate, monotone

LAYERS = st.lists(
    st.lists(st.tuples(st.floats(0, 1e3), st.integers(0, 10**6)), min_size=1, max_size=11), min_size=1, max_size=8
)


def total(table: list[list[float]], choice: list[int]) -> float:
    """Sum what each layer's option has in a table."""
    return sum(layer[option] for layer, option in zip(table, choice, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_the_best_of_all_choices(seed):
    """Three layers, all 8^3 choices, a bucket a byte."""
    draw = random.Random(seed)
    weights = [draw.randrange(20, 400) for _ in range(3)]
    sizes = [[-(-count * bits // 8) for bits in range(1, 9)] for count in weights]
    errors = [sorted((draw.random() ** 4 for _ in range(8)), reverse=True) for _ in weights]
    choices = [list(choice) for choice in itertools.product(range(8), repeat=3)]
    for budget in range(total(sizes, [0, 0, 0]), total(sizes, [7, 7, 7]) + 20, 7):
        chosen = allocate(errors, sizes, budget)
        assert total(sizes, chosen) <= budget
        best = min(total(errors, choice) for choice in choices if total(sizes, choice) <= budget)
        assert total(errors, chosen) == pytest.approx(best, rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(LAYERS, st.integers(0, 10**7), st.integers(1, 300))
def test_never_above_the_budget(layers, extra, buckets):
    """Whatever the buckets round; and no single upgrade that fits lowers the error."""
    errors = [[error for error, _ in layer] for layer in layers]
    sizes = [[size for _, size in layer] for layer in layers]
    budget = sum(map(min, sizes)) + extra
    chosen = allocate(errors, sizes, budget, buckets)
    left = budget - total(sizes, chosen)
    assert left >= 0
    for layer, (option, own_errors, own_sizes) in enumerate(zip(chosen, errors, sizes, strict=True)):
        best = monotone(own_errors, own_sizes)
        for other, size in enumerate(own_sizes):
            assert size - own_sizes[option] > left or best[other] >= best[option], (layer, other)


def test_a_larger_option_is_no_worse():
    """Noise of the errors is taken away in the order of sizes, whatever that of the options."""
    assert monotone([5.0, 1.0, 3.0, 2.0], [1, 2, 3, 4]) == [5.0, 1.0, 1.0, 1.0]
    assert monotone([3.0, 1.0, 5.0], [3, 2, 1]) == [1.0, 1.0, 5.0]
    assert allocate([[5.0, 1.0, 3.0]], [[1, 2, 3]], 3) == [1]


def test_refuses_what_cannot_fit():
    """The caller names the smallest size."""
    with pytest.raises(ValueError, match="1 bytes more than 4"):
        allocate([[1.0], [1.0]], [[2], [3]], 4)
