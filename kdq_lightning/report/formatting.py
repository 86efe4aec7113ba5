"""How numbers stand in sentences and tables."""

import math

from kdq_lightning.report.rows import Cell
from kdq_lightning.report.significance import LEVEL, Difference

MISSING = "missing"


def format_summary(cell: Cell, measure: str, decimals: int = 2) -> str:
    """Return a number of a cell as "mean ± deviation", such as "90.26 ± 0.28"; a single seed has no deviation.

    Args:
        cell: Of a row.
        measure: Name in `MEASURES`.
        decimals: Number of decimals.
    """
    if measure not in cell.summaries:
        return MISSING
    mean, deviation = cell.summaries[measure]
    return f"{mean:,.{decimals}f}" + ("" if deviation is None else f" ± {deviation:,.{decimals}f}")


def format_difference(difference: Difference, with_p: bool = True) -> str:
    """Return a difference as "+1.20 [+0.50, +1.90], p = 0.001", in points with its 95 % interval."""
    points, low, high = (round(value, 2) + 0.0 for value in difference[:3])  # + 0.0: no "-0.00"
    text = f"{points:+.2f} [{low:+.2f}, {high:+.2f}]"
    return f"{text}, {format_p(difference.p)}" if with_p else text


def format_p(p: float) -> str:
    """Return a p-value as "p = 0.012" or "p = 2e-07"; one below the level never looks as if it were not."""
    if p < 0.001:
        return f"p = {p:.1g}"
    return f"p = {p:.3f}" if (round(p, 3) < LEVEL) == (p < LEVEL) else f"p = {math.floor(p * 10_000) / 10_000:.4f}"
