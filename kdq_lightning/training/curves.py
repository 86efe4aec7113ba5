"""The points that quantization gives to loggers: accuracy against bits and bytes, and single numbers of a run."""

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from statistics import NormalDist, fmean
from typing import NamedTuple

from kdq_lightning.quantization.methods import CUSTOM_METHOD, DEFAULT_METHOD, METHODS, MIXED_METHOD
from kdq_lightning.runs.records import FLOAT_BITS, MEASURES, Record, identity

SUMMARIZED = (2, 3, 4, 8)  # bit widths whose accuracies stand beside the hyper-parameters
PEERS = ("", "/peer0", "/peer1")  # ends of tags that the charts of the custom scalars show

SUMMARY_TAGS = {FLOAT_BITS: "quantized/float", **{bits: f"quantized/accuracy_{bits}bit" for bits in SUMMARIZED}}
"""Tags of the numbers that stand beside the hyper-parameters, by bit width."""


class Point(NamedTuple):
    """A point of a curve.

    Attributes:
        tag: Of the curve.
        step: Bit width, bytes, or 0 for a number that stands alone.
        value: The number.
    """

    tag: str
    step: int
    value: float


def points_of(records: Sequence[Record], images: int) -> list[Point]:
    """Return all points of a run.

    Args:
        records: Of all its networks, methods and bit widths, those of a network one after another.
        images: Number of images that the records' accuracies (`Record.top1`) were measured on.
    """
    points = list(_summary(records))
    for name, group in groupby(records, key=lambda record: identity(record).name):
        of_network = list(group)
        points += _network_points(of_network, f"/{name}" if of_network[0].peer else "", images)
    return points


def _network_points(records: Sequence[Record], suffix: str, images: int) -> Iterator[Point]:
    """Yield the points of one network; its tags end in `suffix`."""

    def with_interval(tag: str, value: float | None, step: int) -> Iterator[Point]:
        if value is not None:
            for end, shown in zip(("", "_low", "_high"), (value, *interval(value, images)), strict=True):
                yield Point(f"quantized/{tag}{end}{suffix}", step, shown)

    floats = [record for record in records if record.bits == FLOAT_BITS]
    quantized = [record for record in records if record.bits != FLOAT_BITS]
    for record in quantized:
        method, bits = tag_of(record.method), identity(record).bits
        yield from with_interval(f"accuracy_vs_bytes{method}", record.top1, record.packed_bytes)
        if record.method == MIXED_METHOD:
            continue
        yield from with_interval(f"accuracy_vs_bits{method}", record.top1, bits)
        if record.method == DEFAULT_METHOD:
            yield from with_interval("agreement_vs_bits", record.agreement_float, bits)
        for name in record.unknown:  # what a user's own evaluation found, and added columns
            number = record.number(name) if name.startswith(("val_", "test_")) or name in MEASURES else None
            if number is not None:
                yield Point(f"quantized/{name}_vs_bits{method}{suffix}", bits, number)
    for bits in sorted({identity(record).bits for record in quantized if record.method != MIXED_METHOD}):
        yield from with_interval("float_accuracy", floats[0].top1 if floats else None, bits)


def _summary(records: Sequence[Record]) -> Iterator[Point]:
    """Yield the numbers beside the hyper-parameters: of `default`, means over the peers, alike in every run."""
    for bits, tag in SUMMARY_TAGS.items():
        row = "" if bits == FLOAT_BITS else DEFAULT_METHOD, bits
        accuracies = [record.top1 for record in records if identity(record)[1:] == row and record.top1 is not None]
        if accuracies:
            yield Point(tag, 0, fmean(accuracies))


def charts() -> dict[str, list[tuple[str, ...]]]:
    """Return the charts of the custom scalars by title: tags of value, lower and upper bound of each series.

    They are alike in every run, as TensorBoard shows charts of their own for each other layout. It gives all series of
    a run one colour, so each published method has charts of its own, where a network is one curve.
    """
    own = (DEFAULT_METHOD, CUSTOM_METHOD)  # a run has one of them
    float_line = ("float_accuracy",) * 3  # without its interval, which would cover the others
    series: dict[str, list[tuple[str, ...]]] = {
        "accuracy vs bytes, default and mixed": _margins("bytes", (*own, MIXED_METHOD)),
        "accuracy vs bits, default": [*_margins("bits", own), float_line],
    }
    for method in METHODS:
        if method not in own:
            series[f"accuracy vs bytes, {method}"] = _margins("bytes", (method,))
            series[f"accuracy vs bits, {method}"] = [*_margins("bits", (method,)), float_line]
    return {
        title: [tuple(f"quantized/{tag}{suffix}" for tag in tags) for suffix in PEERS for tags in shown]
        for title, shown in series.items()
    }


def _margins(axis: str, methods: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the names of value, lower and upper bound of each method's curve over an axis, `bits` or `bytes`."""
    tags = [f"accuracy_vs_{axis}{tag_of(method)}" for method in methods]
    return [(tag, f"{tag}_low", f"{tag}_high") for tag in tags]


def tag_of(method: str) -> str:
    """Return what a method adds to the tags of its curves: nothing for `default`."""
    return "" if method == DEFAULT_METHOD else f"_{method}"


def interval(percent: float, images: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of images, in percent.

    Source: Wilson 1927, Probable Inference, the Law of Succession, and Statistical Inference.

    Args:
        percent: The share, in percent.
        images: Number of images that it is a share of.
    """
    share, z = percent / 100, NormalDist().inv_cdf(0.975)
    centre = share + z**2 / (2 * images)
    radius = z * math.sqrt(share * (1 - share) / images + z**2 / (4 * images**2))
    low, high = ((centre + side * radius) / (1 + z**2 / images) for side in (-1, 1))
    return 100 * max(low, 0.0), 100 * min(high, 1.0)
