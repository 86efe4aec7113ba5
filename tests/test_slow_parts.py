"""The parts of the slow tests: each test in exactly one of them, all about as long."""

import pytest

from tests.slow_parts import read_part, share_out


@pytest.mark.parametrize("parts", [1, 2, 6, 9])
def test_every_test_is_in_one_part(parts: int):
    seconds = {f"test_{i}": 7 * i % 31 + 1.0 for i in range(40)}
    shares = share_out(seconds, parts)
    assert len(shares) == parts
    assert sorted(name for share in shares for name in share) == sorted(seconds)
    lengths = [sum(seconds[name] for name in share) for share in shares]
    assert max(lengths) - min(lengths) <= max(seconds.values())
    assert share_out(dict(reversed(seconds.items())), parts) == shares  # the order of collection doesn't matter


def test_more_parts_than_tests():
    assert share_out({"a": 1.0, "b": 2.0}, 3) == [["b"], ["a"], []]


def test_the_part_that_is_asked_for():
    assert read_part("1/6") == (1, 6) and read_part("6/6") == (6, 6)
    for wrong in ("0/6", "7/6", "3", "/", "a/6", "-1/6", "1/0"):
        with pytest.raises(ValueError, match="such as 2/6"):
            read_part(wrong)
