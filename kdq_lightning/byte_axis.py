"""The axis of a figure that shows the bytes of a file, alike in every figure."""

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from kdq_lightning.files import format_bytes


def scale_by_bytes(axes: Axes) -> None:
    """Give the x axis a logarithmic scale, and ticks such as "50 kB" that don't overlap.

    Args:
        axes: What has been drawn in already; its x are bytes.
    """
    axes.set_xscale("log")
    low, high = axes.get_xlim()  # over few sizes LogLocator gives one tick, or so many that they overlap
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 4 * low else MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: format_bytes(size)))
    axes.xaxis.set_minor_formatter(NullFormatter())
