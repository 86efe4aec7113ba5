"""The slow tests in parts of about the same length, of which continuous integration runs one each time."""

from collections.abc import Mapping


def share_out(seconds: Mapping[str, float], parts: int) -> list[list[str]]:
    """Return the names of the tests in each part: the longest test first, each into the part that is shortest so far.

    Args:
        seconds: About how long each test takes, by its name.
        parts: How many parts there are.
    """
    lengths, shares = [0.0] * parts, [[] for _ in range(parts)]
    for name in sorted(seconds, key=lambda name: (-seconds[name], name)):
        shortest = lengths.index(min(lengths))
        lengths[shortest] += seconds[name]
        shares[shortest].append(name)
    return shares


def read_part(text: str) -> tuple[int, int]:
    """Return part and parts of a text such as "2/6", the second of six.

    Raises:
        ValueError: If it says something else.
    """
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise ValueError(f"KDQ_SLOW_PART is {text!r}: give the part and the number of parts, such as 2/6")
    return int(part), int(parts)
