"""The figures that dashboard, report and notebook share."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from kdq_lightning.runs.records import FLOAT_BITS, Record
from kdq_lightning.strategies import appearance


@dataclass(frozen=True)
class Curve:
    """One line of a figure.

    Attributes:
        label: In the legend.
        strategy: As in the records; it gives colour and marker.
        x: Bit widths, or bytes.
        y: What is shown there.
        deviations: Over seeds; empty or None where there is none.
    """

    label: str
    strategy: str
    x: Sequence[float]
    y: Sequence[float]
    deviations: Sequence[float | None] = field(default_factory=tuple)

    @property
    def errors(self) -> list[float]:
        """The deviation of each point, 0 where there is none."""
        return [deviation or 0.0 for deviation in self.deviations] or [0.0] * len(self.x)


def accuracy_figure(curves: Mapping[str, Sequence[Record]]) -> Figure:
    """Draw accuracy against bit width and against the bytes of the file side by side, one curve a network.

    Args:
        curves: Records by the name in the legend.
    """
    figure = Figure(figsize=(11, 4), layout="constrained")
    by_bits, by_bytes = figure.subplots(1, 2, sharey=True)
    _draw_by_bits(by_bits, [_curve(name, records, "bits") for name, records in curves.items()])
    _draw_by_bytes(by_bytes, [_curve(name, records, "packed_bytes") for name, records in curves.items()])
    _frame(by_bits, "top-1 accuracy, %")
    _frame(by_bytes, "")
    _legend(by_bytes)
    return figure


def _curve(name: str, records: Sequence[Record], x: str) -> Curve:
    """Return one network's accuracies over a field of its records."""
    points = [(getattr(record, x), record.top1) for record in records if record.top1 is not None]
    return Curve(name, records[0].strategy if records else "", [x for x, _ in points], [y for _, y in points])


def plot_by_bits(curves: Sequence[Curve], ylabel: str, title: str = "", log: bool = False) -> Figure:
    """Draw something against the bit width; the float networks stand apart, to the right of the widest.

    Args:
        curves: With bit widths as x.
        ylabel: What is drawn, with its unit.
        title: Above the figure.
        log: Draw y in powers of ten.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(title=title)
    _draw_by_bits(axes, curves)
    if log:
        axes.set_yscale("log")
    _frame(axes, ylabel)
    _legend(axes)
    return figure


def plot_by_bytes(
    curves: Sequence[Curve], front: Sequence[tuple[float, float]], ylabel: str, title: str = ""
) -> Figure:
    """Draw accuracy against the size of the file, with the Pareto front over all curves.

    Args:
        curves: With bytes as x.
        front: Size and accuracy of the files on the front, in order of size.
        ylabel: What is drawn, with its unit.
        title: Above the figure.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(title=title)
    if front:
        sizes, accuracies = zip(*front, strict=True)
        (line,) = axes.step(sizes, accuracies, where="post", label="Pareto front", color="#F0E442", linewidth=7)
        line.set(alpha=0.7, zorder=0)
    _draw_by_bytes(axes, curves)
    _frame(axes, ylabel)
    _legend(axes)
    return figure


def _draw_by_bits(axes: Axes, curves: Sequence[Curve]) -> None:
    widths = sorted({x for curve in curves for x in curve.x} - {FLOAT_BITS})
    beyond = (widths[-1] if widths else 0) + 1
    for curve, style in zip(curves, _styles(curves), strict=True):
        points = list(zip(curve.x, curve.y, curve.errors, strict=True))
        quantized = [point for point in points if point[0] != FLOAT_BITS]
        whole = [(beyond, y, error) for x, y, error in points if x == FLOAT_BITS]
        if quantized:
            x, y, errors = zip(*quantized, strict=True)
            axes.errorbar(x, y, errors, label=curve.label, capsize=2, **style)
        if whole:
            x, y, errors = zip(*whole, strict=True)
            label = None if quantized else curve.label
            axes.errorbar(x, y, errors, label=label, capsize=2, **{**style, "linestyle": "none"})
    has_float = any(FLOAT_BITS in curve.x for curve in curves)
    axes.set_xticks([*widths, *([beyond] if has_float else [])])
    axes.set_xticklabels([*(f"{width:g}" for width in widths), *(["float"] if has_float else [])])
    axes.set_xlabel("bit width")


def _draw_by_bytes(axes: Axes, curves: Sequence[Curve]) -> None:
    for curve, style in zip(curves, _styles(curves), strict=True):
        axes.errorbar(curve.x, curve.y, curve.errors, label=curve.label, capsize=2, **style)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: format_bytes(size)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("bytes of the file")


def format_bytes(size: float) -> str:
    """Return a size in decimal units, three digits: 89.3 kB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= 0.9995 * unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.0f} B"


def render(figure: Figure, kind: str) -> bytes:
    """Return a figure as the content of a file; equal figures give equal bytes.

    Args:
        figure: Of this module.
        kind: "svg" or "png".
    """
    content = io.BytesIO()
    with rc_context({"svg.hashsalt": "kdq"}):
        figure.savefig(content, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return content.getvalue()


def _frame(axes: Axes, ylabel: str) -> None:
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _styles(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """Return how each curve is drawn: colour and marker are the strategy's, further curves of a strategy are dashed."""
    drawn = [curve.strategy for curve in curves]
    return [
        {
            "color": appearance(curve.strategy, i).colour,
            "marker": appearance(curve.strategy).marker,
            "markersize": 5,
            "linewidth": 1.5,
            "linestyle": ("-", "--", ":", "-.")[drawn[:i].count(curve.strategy) % 4],
        }
        for i, curve in enumerate(curves)
    ]


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
