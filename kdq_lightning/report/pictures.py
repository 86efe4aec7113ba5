"""Rows drawn: the four figures of a data set."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from kdq_lightning.report.budgets import pareto_front
from kdq_lightning.report.figures import Curve, plot_by_bits, plot_by_bytes
from kdq_lightning.report.rows import Row


def figures_of(dataset: str, rows: Sequence[Row]) -> dict[str, Figure]:
    """Return the figures of a data set by name: accuracy against bits and bytes, and what else the records tell."""
    accuracy = "test accuracy, %"
    figures = {
        "accuracy_vs_bits": plot_by_bits(curves_by_bits(rows, "test_top1"), accuracy, dataset),
        "accuracy_vs_bytes": plot_by_bytes(curves_by_bytes(rows), front_of(rows), accuracy, dataset),
    }
    for field, (what, log) in {
        "agreement_teacher": ("images with the teacher's class, %", False),
        "relative_error": ("relative error of layer outputs", True),
    }.items():
        if curves := curves_by_bits(rows, field):
            figures[field] = plot_by_bits(curves, what, dataset, log)
    return figures


def curves_by_bits(rows: Sequence[Row], field: str) -> list[Curve]:
    """Return a number of the records against the bit width, a curve a row; rows without it are left out."""
    curves = []
    for row in rows:
        found = {bits: cell.mean_and_deviation(field) for bits, cell in row.cells.items()}
        known = {bits: value for bits, value in found.items() if value is not None}
        if known:
            means, deviations = zip(*known.values(), strict=True)
            curves.append(Curve(row.label, row.strategy, list(known), means, deviations))
    return curves


def curves_by_bytes(rows: Sequence[Row]) -> list[Curve]:
    """Return test accuracy against the files' bytes, a curve a row."""
    labels = {row.label: row for row in rows}
    return [
        Curve(
            curve.label,
            curve.strategy,
            [labels[curve.label].cells[int(bits)].packed_bytes for bits in curve.x],
            curve.y,
            curve.deviations,
        )
        for curve in curves_by_bits(rows, "test_top1")
    ]


def front_of(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """Return bytes and test accuracy of the files that no other beats."""
    curves = curves_by_bytes(rows)
    sizes = [size for curve in curves for size in curve.x]
    accuracies = [accuracy for curve in curves for accuracy in curve.y]
    return [(sizes[i], accuracies[i]) for i in pareto_front(sizes, accuracies)]
