"""Compares tensors: exactly equal, equal up to the order of additions, or equal for the first image."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def all_close(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> bool:
    """Whether as many tensors were found as expected, and each is close."""
    return len(found) == len(expected) and all(close(a, b, tolerance) for a, b in zip(found, expected, strict=True))


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether two tensors agree but for the order of sums; those that aren't finite are left to the walk to place."""
    if a.shape != b.shape:
        return False
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    a, b = a.double(), b.double()
    size = float(b.abs().max()) if b.numel() else 0.0
    return not math.isfinite(size) or torch.allclose(a, b, rtol=tolerance, atol=tolerance * size)


def holds_first(batch: Tensor, alone: Tensor, tolerance: float) -> bool:
    """Whether what a batch gives holds what its first image gives alone, along the one dimension that they differ in.

    A tensor without such a dimension, such as a scalar, says nothing of single images.
    """
    longer = [dim for dim in range(alone.dim()) if batch.shape[dim : dim + 1] != alone.shape[dim : dim + 1]]
    if batch.dim() != alone.dim() or len(longer) != 1 or alone.shape[longer[0]] == 0:
        return True
    (dim,) = longer
    count, rest = divmod(batch.shape[dim], alone.shape[dim])
    if rest or not count:
        return True
    every = torch.arange(0, batch.shape[dim], count, device=batch.device)  # images last, as (tokens · images)
    return close(batch.narrow(dim, 0, alone.shape[dim]), alone, tolerance) or close(
        batch.index_select(dim, every), alone, tolerance
    )


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, NaN counting as equal to NaN."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
