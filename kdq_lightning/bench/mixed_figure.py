"""The figure of `kdq bench mixed`: test accuracy against bytes, with bits chosen layer by layer and otherwise."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLES: dict[str, dict[str, Any]] = {
    "mixed": {"color": "#0072B2", "marker": "o", "linestyle": "-", "label": "bits chosen layer by layer"},
    "uniform": {"color": "#D55E00", "marker": "s", "linestyle": "--", "label": "the same bits in every layer"},
    "first and last at 8 bits": {
        "color": "#E69F00",
        "marker": "^",
        "linestyle": ":",
        "label": "first and last layer at 8",
    },
    "random": {"color": "#999999", "marker": "x", "linestyle": "", "label": "random bits of each layer"},
}
"""Matplotlib's options of each method of `Choice`; colours that colour-blind readers tell apart (Okabe & Ito)."""


def draw_choices(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Return a panel for each network: means over the draws, and bars of one sample deviation.

    Args:
        records: Figures that `kdq bench mixed` returns; one for each network.
    """
    figure = Figure(figsize=(4.2 * len(records) + 2.4, 3.6), layout="constrained")
    panels = figure.subplots(1, len(records), squeeze=False)[0]
    for axes, record in zip(panels, records, strict=True):
        _draw_network(axes, record)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    return figure


def _draw_network(axes: Axes, record: Mapping[str, Any]) -> None:
    """Draw the choices of one network."""
    points: dict[str, list[tuple[float, float, float]]] = {method: [] for method in STYLES}
    for choice in record["choices"]:
        top1 = choice["top1"]
        if choice["method"] == "float":
            axes.axhline(top1[0], color="#000000", linewidth=1, linestyle=(0, (6, 4)), alpha=0.6, label="float")
            continue
        deviation = stdev(top1) if len(top1) > 1 else 0.0
        points[choice["method"]].append((fmean(choice["file_bytes"]) / 1000, fmean(top1), deviation))
    for method, style in STYLES.items():
        if points[method]:
            kilobytes, accuracies, deviations = zip(*sorted(points[method]), strict=True)
            axes.errorbar(kilobytes, accuracies, deviations, capsize=2, markersize=5, linewidth=1.5, **style)
    draws = f"{record['draws']} draw{'s' if record['draws'] > 1 else ''}"
    axes.set(
        title=f"{record['network']}, {record['dataset']}, {draws}", xlabel="kB of the file", ylabel="test top-1, %"
    )
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
