"""The figures of the report and of the notebook: accuracy and other numbers against bits and bytes."""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from textwrap import fill
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kdq_lightning.byte_axis import scale_by_bytes
from kdq_lightning.quantization.methods import MIXED_METHOD
from kdq_lightning.report.findings import Findings
from kdq_lightning.report.published import NETWORKS, published_curves
from kdq_lightning.report.rows import Cell, Row, by_method, method_title, trained_label
from kdq_lightning.runs.records import FLOAT_BITS, MEASURES
from kdq_lightning.strategies import Appearance

LABEL_WIDTH = 28  # characters of a line in a legend, and in the title of a panel
LEAST_POINTS = 2.0  # that an axis of accuracy shows, so that a few images are no cliff


@dataclass(frozen=True)
class Curve:
    """One line of a figure.

    Attributes:
        label: Its name in the legend.
        appearance: Its colour and marker.
        x: Bit widths, or bytes.
        y: The number that is shown at each x.
        deviations: Deviation over seeds at each x, None where there is none.
        bits: Bit width of each point; `FLOAT_BITS` for the float network.
    """

    label: str
    appearance: Appearance
    x: Sequence[float]
    y: Sequence[float]
    deviations: Sequence[float | None]
    bits: Sequence[float]

    @property
    def errors(self) -> list[float]:
        """The length of each error bar, 0 where there is no deviation."""
        return [deviation or 0.0 for deviation in self.deviations]

    @property
    def quantized(self) -> list[tuple[float, float, float]]:
        """The points of quantized networks: x, y, and length of the error bar."""
        points = zip(self.x, self.y, self.errors, self.bits, strict=True)
        return [(x, y, error) for x, y, error, bits in points if bits != FLOAT_BITS]

    @property
    def floats(self) -> list[float]:
        """The number of the float network, if it is known."""
        return [y for y, bits in zip(self.y, self.bits, strict=True) if bits == FLOAT_BITS]


def draw_figures(findings: Findings) -> dict[str, Figure]:
    """Return the figures of a data set by name.

    `accuracy_vs_bytes` and `accuracy_vs_bits` show the first method, the former the files of mixed bits, too.
    `methods` shows all methods and the published study. There is one more for each number that has an axis
    (`MEASURES`).
    """
    dataset = findings.dataset
    methods = by_method(findings.rows)
    rows = next(iter(methods.values()))
    by_bytes = _curves([*rows, *methods.get(MIXED_METHOD, [])], "test_top1", lambda bits, cell: cell.packed_bytes)
    shipped = [(a.file.cell.packed_bytes, a.file.cell.summaries["test_top1"].mean) for a in findings.advice]
    figures = {}
    for name, measure in MEASURES.items():
        curves = _curves(rows, name, lambda bits, cell: bits)
        if name == "test_top1":
            figures["accuracy_vs_bytes"] = plot_by_bytes(by_bytes, shipped, measure.axis, dataset)
            figures["accuracy_vs_bits"] = plot_by_bits(curves, measure.axis, dataset, least=LEAST_POINTS)
            if methods_figure := plot_methods(findings, measure.axis):
                figures["methods"] = methods_figure
        elif measure.axis and curves:
            figures[name] = plot_by_bits(curves, measure.axis, dataset, measure.log)
    return figures


def plot_methods(findings: Findings, ylabel: str) -> Figure | None:
    """Draw accuracy against the bit width of all methods and of the published study, a strategy a panel.

    Args:
        findings: On a data set.
        ylabel: Name of the accuracy, with its unit.

    Returns:
        The figure; None if there is one method, and no published accuracy.
    """
    methods = {method: rows for method, rows in by_method(findings.rows).items() if method != MIXED_METHOD}
    titles = list(dict.fromkeys(trained_label(row) for rows in methods.values() for row in rows))
    known = published_curves(findings.dataset)
    if len(methods) < 2 and not known.keys() & {row.strategy for row in findings.rows}:
        return None
    columns = min(4, len(titles))
    lines = math.ceil(len(titles) / columns)
    figure = Figure(figsize=(2.4 * columns + 0.6, 2.3 * lines + 0.6), layout="constrained")
    networks = {True: NETWORKS[0], False: NETWORKS[1]}
    panels = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    for title, axes in zip(titles, panels, strict=False):
        own = [row for rows in methods.values() for row in rows if trained_label(row) == title]
        for row, line in zip(own, ("-", ":", "-.", "--"), strict=False):
            curves = [
                replace(curve, label=method_title(row.method))
                for curve in _curves([row], "test_top1", lambda bits, cell: bits)
            ]
            _draw_by_bits(axes, curves, linestyle=line)
        if own[0].strategy in known:
            look = {"color": own[0].appearance.colour, "marker": own[0].appearance.marker, "linestyle": "none"}
            axes.plot(
                *known[own[0].strategy],
                label=f"published ({networks[own[0].is_teachers]})",
                markerfacecolor="none",
                markersize=5,
                **look,
            )
        axes.set_title(fill(title, LABEL_WIDTH, break_long_words=False), fontsize=9)
        _frame(axes, "", LEAST_POINTS)
        axes.set_xlabel("")
        axes.legend(fontsize=7, frameon=False, loc="lower right")
    for axes in panels[len(titles) :]:
        axes.set_visible(False)
    for axes in panels[len(titles) - columns : len(titles)]:  # the lowest of each column
        axes.tick_params(labelbottom=True)
    figure.supxlabel("bits a weight", fontsize=10)
    figure.supylabel(ylabel, fontsize=10)
    return figure


def _curves(rows: Sequence[Row], measure: str, x: Callable[[int, Cell], float]) -> list[Curve]:
    """Return a curve for each row that has a number; `x` says where a cell stands, given its bit width."""
    curves = []
    for row in rows:
        known = [
            (x(bits, cell), *cell.summaries[measure], cell.measurements[0].record.bits)
            for bits, cell in row.cells.items()
            if measure in cell.summaries
        ]
        if known:
            curves.append(Curve(row.label, row.appearance, *zip(*known, strict=True)))
    return curves


def plot_by_bits(
    curves: Sequence[Curve], ylabel: str, title: str = "", log: bool = False, least: float = 0.0
) -> Figure:
    """Draw a number against the bit width; a float network is a dashed line.

    Args:
        curves: With bit widths as x.
        ylabel: Name of the number, with its unit.
        title: Stands above the figure.
        log: Whether the y axis is logarithmic.
        least: Range that the y axis shows at least.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(title=title)
    _draw_by_bits(axes, curves)
    if log:
        axes.set_yscale("log")
    _frame(axes, ylabel, least)
    _legend(axes)
    return figure


def plot_by_bytes(
    curves: Sequence[Curve], shipped: Sequence[tuple[float, float]], ylabel: str, title: str = ""
) -> Figure:
    """Draw accuracy against the size of the file, with the files to ship as steps over the budget.

    Args:
        curves: With bytes as x.
        shipped: Bytes and accuracy of the files to ship, in order of the budget.
        ylabel: Name of the number, with its unit.
        title: Stands above the figure.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(title=title)
    if shipped:
        sizes, accuracies = zip(*shipped, strict=True)
        largest = max(max(curve.x) for curve in curves)
        style: dict[str, Any] = {
            "label": "files to ship",
            "color": "#F0E442",
            "linewidth": 7,
            "marker": "o",
            "markersize": 15,
        }
        axes.step(
            [*sizes, largest], [*accuracies, accuracies[-1]], where="post", markevery=slice(-1), zorder=0, **style
        )
    _draw_by_bytes(axes, curves)
    _frame(axes, ylabel, LEAST_POINTS)
    _legend(axes)
    return figure


def _draw_by_bits(axes: Axes, curves: Sequence[Curve], **styles: object) -> None:
    """Draw each curve; the float network is a thin line across, because it has no place among the bit widths."""
    for shift, curve, own in zip(_around_zero(len(curves)), curves, _styles(curves), strict=True):
        style = {**own, **styles}
        label: str | None = curve.label
        if curve.quantized:
            x, y, errors = zip(*curve.quantized, strict=True)
            axes.errorbar([bits + 0.07 * shift for bits in x], y, errors, label=label, capsize=2, **style)
            label = None
        for value in curve.floats:
            axes.axhline(value, color=style["color"], label=label, linewidth=1, linestyle=(0, (6, 4)), alpha=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("bits a weight")


def _draw_by_bytes(axes: Axes, curves: Sequence[Curve]) -> None:
    """Draw each curve, and the bit width at the highest of the points that have about the same number of bytes."""
    highest: dict[tuple[float, int], tuple[float, float]] = {}
    for shift, curve, style in zip(_around_zero(len(curves)), curves, _styles(curves), strict=True):
        x = [size * 1.006**shift for size in curve.x]
        axes.errorbar(x, curve.y, curve.errors, label=curve.label, capsize=2, **style)
        for size, y, error, bits in zip(curve.x, curve.y, curve.errors, curve.bits, strict=True):
            place = bits, round(20 * math.log(size))  # files of one network lie within a twentieth of their size
            highest[place] = max(highest.get(place, (y + error, size)), (y + error, size))
    for (bits, _), (y, size) in highest.items():
        name = "float" if bits == FLOAT_BITS else f"{bits:g}"
        axes.annotate(name, (size, y), (0, 6), textcoords="offset points", ha="center", fontsize=8, color="#555555")
    scale_by_bytes(axes)
    axes.set_xlabel("bytes of the file; the small numbers are bits a weight")


def _around_zero(count: int) -> list[float]:
    """Return steps of 1 around 0, by which points of several curves stand beside each other."""
    return [index - (count - 1) / 2 for index in range(count)]


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


def _frame(axes: Axes, ylabel: str, least: float = 0.0) -> None:
    """Label the y axis; it shows a range of `least` or more, so that one image's difference doesn't look like much."""
    low, high = axes.get_ylim()
    if high - low < least:
        axes.set_ylim((low + high - least) / 2, (low + high + least) / 2)
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
    curves, labels = axes.get_legend_handles_labels()
    if curves:
        labels = [fill(label, LABEL_WIDTH, break_long_words=False) for label in labels]
        axes.legend(curves, labels, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
