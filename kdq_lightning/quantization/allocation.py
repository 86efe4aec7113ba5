"""Which bit width each layer gets within a budget of bytes: the choice of least error in all."""

from collections.abc import Sequence

import numpy as np

BUCKETS = 10_000


def allocate(
    errors: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int, buckets: int = BUCKETS
) -> list[int]:
    """Choose an option for each layer so that the sum of their errors is least and that of their sizes fits.

    Dynamic programming over the bytes that are left when every layer has its smallest option, in buckets to which
    sizes are rounded up: with a bucket a byte the choice is the best there is. What the rounding left over goes to the
    upgrades that lower the error most for their bytes.

    Args:
        errors: Of each layer's options. One larger than that of a smaller option is taken for as small.
        sizes: Of the same, in bytes.
        budget: Bytes of all layers together, at least the sum of the smallest.
        buckets: At most so many.

    Returns:
        The index of each layer's option.
    """
    errors = [monotone(*layer) for layer in zip(errors, sizes, strict=True)]
    extra = [[size - min(layer) for size in layer] for layer in sizes]
    room = budget - sum(map(min, sizes))
    if room < 0:
        raise ValueError(f"the smallest options take {-room} bytes more than {budget}")
    unit = max(1, -(-room // buckets))
    chosen = _cheapest(errors, [[-(-size // unit) for size in layer] for layer in extra], room // unit)
    return _upgraded(errors, extra, room, chosen)


def monotone(errors: Sequence[float], sizes: Sequence[int]) -> list[float]:
    """Return for each option of a layer the least error among those that are no larger."""
    return [min(e for e, other in zip(errors, sizes, strict=True) if other <= size) for size in sizes]


def _cheapest(errors: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], room: int) -> list[int]:
    """Choose the options of least error within `room`, of equals the first."""
    least = np.zeros(room + 1)  # error of the layers so far by the room that they may take
    choices = []
    for layer_errors, layer_costs in zip(errors, costs, strict=True):
        table = np.full((len(layer_errors), room + 1), np.inf)
        for option, (error, cost) in enumerate(zip(layer_errors, layer_costs, strict=True)):
            if cost <= room:
                table[option, cost:] = least[: room + 1 - cost] + error
        choices.append(table.argmin(0))
        least = table.min(0)
    chosen = []
    for choice, layer_costs in zip(reversed(choices), reversed(costs), strict=True):
        chosen.append(int(choice[room]))
        room -= layer_costs[chosen[-1]]
    return chosen[::-1]


def _upgraded(
    errors: Sequence[Sequence[float]], extra: Sequence[Sequence[int]], room: int, chosen: list[int]
) -> list[int]:
    """Spend what is left on the options that lower the error most for their bytes, until none fits."""
    room -= sum(layer[option] for layer, option in zip(extra, chosen, strict=True))
    while True:
        best, gain = None, 0.0
        for i, option in enumerate(chosen):
            for other, (error, size) in enumerate(zip(errors[i], extra[i], strict=True)):
                less, more = errors[i][option] - error, size - extra[i][option]
                if less > 0 and more <= room and (more <= 0 or less / more > gain):
                    best, gain = (i, other), less / more if more > 0 else float("inf")
        if best is None:
            return chosen
        i, other = best
        room -= extra[i][other] - extra[i][chosen[i]]
        chosen = [*chosen[:i], other, *chosen[i + 1 :]]
