"""Reads what commands print."""


def scores(printed: str, name: str = "top-1, %") -> list[float]:
    """Return a line of the table that `kdq test` prints: the network's score, or the mean and each peer's."""
    lines = [line.split(name)[1].split() for line in printed.splitlines() if line.lstrip().startswith(name)]
    return [float(cell) for cell in lines[0]] if lines else []
