"""The figures of the report and of the notebook: accuracy and other numbers against bits and bytes."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from kdq_lightning.files import format_bytes
from kdq_lightning.quantization.methods import MIXED_METHOD
from kdq_lightning.report.file_choice import pareto_front
from kdq_lightning.report.findings import Findings
from kdq_lightning.report.rows import Cell, Row
from kdq_lightning.runs.records import FLOAT_BITS, MEASURES
from kdq_lightning.strategies import Appearance


@dataclass(frozen=True)
class Curve:
    """One line of a figure.

    Attributes:
        label: Its name in the legend.
        appearance: Its colour and marker.
        x: Bit widths, or bytes.
        y: The number that is shown at each x.
        deviations: Deviation over seeds at each x, None where there is none.
    """

    label: str
    appearance: Appearance
    x: Sequence[float]
    y: Sequence[float]
    deviations: Sequence[float | None]

    @property
    def errors(self) -> list[float]:
        """The length of each error bar, 0 where there is no deviation."""
        return [deviation or 0.0 for deviation in self.deviations]


def draw_figures(findings: Findings) -> dict[str, Figure]:
    """Return the figures of a data set by name: accuracy against bits and bytes, and what else the records have."""
    dataset, rows = findings.dataset, findings.rows
    uniform = [row for row in rows if row.method != MIXED_METHOD]
    by_bytes = _curves(rows, "test_top1", lambda bits, cell: cell.packed_bytes)
    points = [point for curve in by_bytes for point in zip(curve.x, curve.y, strict=True)]
    front = [points[i] for i in pareto_front([size for size, _ in points], [accuracy for _, accuracy in points])]
    figures = {}
    for name, measure in MEASURES.items():
        curves = _curves(uniform, name, lambda bits, cell: bits)
        if name == "test_top1":
            figures["accuracy_vs_bits"] = plot_by_bits(curves, measure.axis, dataset)
            figures["accuracy_vs_bytes"] = plot_by_bytes(by_bytes, front, measure.axis, dataset)
        elif measure.axis and curves:
            figures[name] = plot_by_bits(curves, measure.axis, dataset, measure.log)
    return figures


def _curves(rows: Sequence[Row], measure: str, x: Callable[[int, Cell], float]) -> list[Curve]:
    """Return a curve for each row that has a number; `x` says where a cell stands, given its bit width."""
    curves = []
    for row in rows:
        known = [
            (x(bits, cell), *cell.summaries[measure]) for bits, cell in row.cells.items() if measure in cell.summaries
        ]
        if known:
            curves.append(Curve(row.label, row.appearance, *zip(*known, strict=True)))
    return curves


def plot_by_bits(curves: Sequence[Curve], ylabel: str, title: str = "", log: bool = False) -> Figure:
    """Draw a number against the bit width; the float networks stand to the right of the largest bit width.

    Args:
        curves: With bit widths as x.
        ylabel: Name of the number, with its unit.
        title: Stands above the figure.
        log: Whether the y axis is logarithmic.
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
        front: Bytes and accuracy of the files on the front, in order of bytes.
        ylabel: Name of the number, with its unit.
        title: Stands above the figure.
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


def render(figure: Figure, kind: str) -> bytes:
    """Return the content of a figure's file; equal figures give equal bytes.

    Args:
        figure: A figure that this module has drawn.
        kind: The file's format, "svg" or "png".
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
    """Return Matplotlib's options of each curve: the strategy's colour and marker; its second curve is dashed."""
    drawn = [curve.appearance for curve in curves]
    return [
        {
            "color": curve.appearance.colour,
            "marker": curve.appearance.marker,
            "markersize": 5,
            "linewidth": 1.5,
            "linestyle": ("-", "--", ":", "-.")[drawn[:i].count(curve.appearance) % 4],
        }
        for i, curve in enumerate(curves)
    ]


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
