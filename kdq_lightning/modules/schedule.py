"""The learning rate over the steps of a run."""

from collections.abc import Callable

Cycle = Callable[[int], float]  # step -> share of the peak learning rate


def one_cycle(total: int, warmup: float, start: int = 0) -> Cycle:
    """Return the share of the peak learning rate at a step: linear from 0 up, then linear down to 0.

    Args:
        total: Number of steps of the cycle.
        warmup: Share of them that rise.
        start: The cycle's first step; before it, the share is 0.
    """
    rising = warmup * total

    def share(step: int) -> float:
        step -= start
        if step < 0 or step >= total:
            return 0.0
        return min((step + 1) / (rising + 1), (total - step) / max(total - rising, 1), 1.0)

    return share
