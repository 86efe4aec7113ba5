"""The figures that the dashboard, the report and the notebook share."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from kdq_lightning.results import FLOAT_BITS, Record


def accuracy_figure(curves: Mapping[str, Sequence[Record]]) -> Figure:
    """Draw accuracy against bit width and against the bytes of the packed file, one curve a network.

    Args:
        curves: Records by the name in the legend. The float network, if among them, is a dashed line on the left and
            a star on the right.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_bits, by_bytes = figure.subplots(1, 2, sharey=True)
    for i, (name, records) in enumerate(curves.items()):
        quantized = [record for record in records if record.bits != FLOAT_BITS]
        accuracies = [record.top1 for record in quantized]
        style = {"color": f"C{i}", "marker": "o", "markersize": 4}
        by_bits.plot([record.bits for record in quantized], accuracies, label=name, **style)
        by_bytes.plot([record.packed_bytes / 1000 for record in quantized], accuracies, **style)
        for record in records:
            if record.bits == FLOAT_BITS and record.top1 is not None:
                by_bits.axhline(record.top1, color=f"C{i}", linestyle="--", linewidth=1)
                by_bytes.plot(record.packed_bytes / 1000, record.top1, color=f"C{i}", marker="*", markersize=10)
    by_bits.set(xlabel="bits a weight (dashed: float32)", ylabel="top-1 accuracy (%)")
    by_bits.set_xticks(sorted({r.bits for rs in curves.values() for r in rs if r.bits != FLOAT_BITS}))
    by_bytes.set(xlabel="packed file (kB; ★: float32)", xscale="log")
    by_bytes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    by_bytes.xaxis.set_major_formatter("{x:g}")
    by_bytes.xaxis.set_minor_formatter(NullFormatter())
    for axes in (by_bits, by_bytes):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    by_bits.legend(frameon=False)
    return figure
