"""The pictures of one run for TensorBoard: accuracy of all networks and methods, and the errors of the layers."""

from collections.abc import Sequence
from itertools import groupby

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdq_lightning.byte_axis import scale_by_bytes
from kdq_lightning.quantization.methods import CUSTOM_METHOD, DEFAULT_METHOD, MIXED_METHOD
from kdq_lightning.runs.records import FLOAT_BITS, LayerRecord, Record
from kdq_lightning.strategies import appearances

COLOURS = {DEFAULT_METHOD: "#0072B2", "gpfq": "#D55E00", CUSTOM_METHOD: "#009E73", MIXED_METHOD: "#CC79A7"}
LINES = (
    ("-", "o", "#555555"),
    (":", "s", "#AAAAAA"),
    ("-.", "^", "#777777"),
)  # of a network, and grey of its float line
LEAST_POINTS, LEAST_IMAGES = 2.0, 20  # that the axis of accuracy spans


def accuracy_figure(records: Sequence[Record], images: int) -> Figure:
    """Draw accuracy against the bit width and against the bytes of the file, one above the other.

    A curve is a network and method; a dashed line is a float network.

    Args:
        records: Of all networks, methods and bit widths of a run.
        images: Number of images that the accuracies were measured on.
    """
    figure = Figure(figsize=(5.5, 7), layout="constrained")  # as narrow as TensorBoard shows it
    figure.suptitle(title_of(records))
    by_bits, by_bytes = figure.subplots(2, 1, sharey=True)
    names = list(dict.fromkeys(record.name for record in records))
    for name, (line, marker, grey) in zip(names, LINES * len(names), strict=False):
        of_network = [record for record in records if record.name == name and record.top1 is not None]
        quantized = sorted((record for record in of_network if record.bits != FLOAT_BITS), key=lambda row: row.method)
        for method, group in groupby(quantized, key=lambda record: record.method):
            rows = list(group)
            style = {"linestyle": line, "marker": marker, "color": COLOURS.get(method), "markersize": 5}
            accuracies = [row.top1 for row in rows]
            if method != MIXED_METHOD:
                by_bits.plot([row.bits for row in rows], accuracies, **style)
            label = f"{name}, {method}"
            by_bytes.plot([row.packed_bytes for row in rows], accuracies, label=label, **style)
        for record in of_network:
            if record.bits == FLOAT_BITS:
                for axes in (by_bits, by_bytes):
                    axes.axhline(record.top1 or 0.0, linestyle="--", linewidth=1.2, color=grey, label=f"{name}, float")
    by_bits.set(xlabel="bit width", ylabel="top-1 accuracy, %")
    by_bits.set_ylim(*accuracy_range([record.top1 for record in records if record.top1 is not None], images))
    uniform = (record for record in records if record.method not in ("", MIXED_METHOD))
    by_bits.set_xticks(sorted({int(record.bits) for record in uniform}))
    by_bytes.set(xlabel="bytes of the file", ylabel="top-1 accuracy, %")
    scale_by_bytes(by_bytes)
    _frame(by_bits, by_bytes)
    figure.legend(*by_bytes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def accuracy_range(accuracies: Sequence[float], images: int) -> tuple[float, float]:
    """Return the lower and upper end of an axis, so wide that a few test images are no cliff.

    Args:
        accuracies: What it shows, in percent.
        images: Number of images that they were measured on.
    """
    low, high = (min(accuracies), max(accuracies)) if accuracies else (0.0, 100.0)
    span = max((high - low) * 1.1, LEAST_POINTS, 100 * LEAST_IMAGES / images)
    low, high = (low + high - span) / 2, (low + high + span) / 2
    over = max(0.0, high - 100.5)  # half a point above 100, so that a curve there is seen
    return max(0.0, low - over), min(high, 100.5)


def layer_errors_figure(records: Sequence[Record], layers: Sequence[LayerRecord]) -> Figure:
    """Draw the relative error of each layer's outputs, a bar chart a bit width, the methods side by side.

    Args:
        records: Of a network, for the title.
        layers: Of the same, those of a method and bit width in the order of execution.
    """
    layers = [layer for layer in layers if layer.codebook]
    names = list(dict.fromkeys(layer.name for layer in layers))
    widths = sorted({layer.bits for layer in layers})
    methods = sorted({layer.method for layer in layers})
    figure = Figure(figsize=(max(5.5, 0.2 * len(names) + 1.5), 1.1 * len(widths) + 2), layout="constrained")
    figure.suptitle(f"{title_of(records)}, {records[0].name}:\nrelative error of each layer's outputs")
    charts = figure.subplots(len(widths), 1, sharex=True, squeeze=False)[:, 0]
    thickness = 0.8 / len(methods)
    for bits, axes in zip(widths, charts, strict=True):
        for i, method in enumerate(methods):
            errors = {
                layer.name: layer.relative_error for layer in layers if (layer.bits, layer.method) == (bits, method)
            }
            places = [names.index(name) + (i - (len(methods) - 1) / 2) * thickness for name in errors]
            axes.bar(places, list(errors.values()), thickness, color=COLOURS.get(method), label=method)
        axes.set_ylabel(f"{bits:g} bit{'s' if bits > 1 else ''}")
    charts[-1].set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    figure.legend(*charts[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(methods), frameon=False)
    _frame(*charts)
    return figure


def title_of(records: Sequence[Record]) -> str:
    """Return strategy and data, such as "Vanilla KD on cifar10"."""
    (look,) = appearances([records[0].strategy]).values()
    return f"{look.title} on {records[0].dataset}"


def _frame(*charts: Axes) -> None:
    for axes in charts:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
