"""The pictures of a run in TensorBoard."""

from dataclasses import replace
from pathlib import Path

import pytest

from kdq_lightning.runs.records import LayerRecord, Record
from kdq_lightning.training.run_figures import accuracy_figure, accuracy_range, layer_errors_figure
from tests.records import write_run


def rows(folder: Path, peer: str, offset: float) -> list[Record]:
    """Return a network at 2 and 4 bits by both methods, and in float."""
    (record,) = write_run(folder, "dml", {4: 90.0}, peers=(peer,))
    wanted = [("default", 2), ("default", 4), ("gpfq", 2), ("gpfq", 4), ("", 32)]
    return [replace(record, method=method, bits=bits, test_top1=90 + offset + bits / 10) for method, bits in wanted]


def test_accuracy_of_all_peers_and_methods_in_one_picture(tmp_path: Path):
    figure = accuracy_figure([*rows(tmp_path, "peer0", 0), *rows(tmp_path, "peer1", 1)], images=10_000)
    assert figure.get_suptitle() == "DML on cifar10"
    by_bits, by_bytes = figure.axes
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in by_bits.lines if line.get_linestyle() != "--"]
    assert lines == [([2, 4], [90.2, 90.4])] * 2 + [([2, 4], [91.2, 91.4])] * 2
    dashed = [line for line in by_bits.lines if line.get_linestyle() == "--"]
    assert [line.get_ydata()[0] for line in dashed] == [93.2, 94.2]
    assert by_bytes.get_legend_handles_labels()[1] == [
        *("peer0, default", "peer0, gpfq", "peer0, float", "peer1, default", "peer1, gpfq", "peer1, float"),
    ]
    colours = {line.get_label(): line.get_color() for line in by_bytes.lines}
    assert colours["peer0, default"] == colours["peer1, default"] != colours["peer0, gpfq"]


@pytest.mark.parametrize(("smallest", "largest"), [(25_490, 44_200), (55_200, 98_000), (25_490, 700_000)])
def test_sizes_have_ticks_that_can_be_read(smallest: int, largest: int, tmp_path: Path):
    sizes = zip(rows(tmp_path, "", 0), (smallest, smallest, largest, largest, largest), strict=True)
    figure = accuracy_figure([replace(record, packed_bytes=size) for record, size in sizes], images=10_000)
    (low, high), ticks = figure.axes[1].get_xlim(), figure.axes[1].get_xticks()
    assert 2 <= len([tick for tick in ticks if low <= tick <= high]) <= 6


@pytest.mark.parametrize(
    ("accuracies", "images", "least"),
    [([99.44, 99.16], 359, 20 / 3.59), ([91.73, 91.74], 10_000, 2), ([10, 90], 359, 80), ([100, 100], 20, 100)],
)
def test_the_axis_never_zooms_into_an_image(accuracies: list[float], images: int, least: float):
    low, high = accuracy_range(accuracies, images)
    assert low <= min(accuracies) and max(accuracies) < high <= 100.5
    assert high - low >= least - 1e-9


def test_layer_errors(tmp_path: Path):
    """A chart a bit width with the layers' names, and a bar a method; what stayed in float has none."""
    names = ["conv1", "layer1.0.conv1", "linear"]
    layers = [
        LayerRecord(
            name=name, solver="gpfq", codebook="int", levels=4, rows=9, scale_granularity="channel",
            relative_error=0.1 * i + 1 / bits, zeros=0.0, packed_bytes=9, seconds=0.1, note="", network="resnet8",
            method=method, bits=bits,
        )
        for method in ("default", "gpfq") for bits in (2, 3) for i, name in enumerate(names)
    ]  # fmt: skip
    left = replace(layers[0], name="embedding", codebook="", levels=0)
    figure = layer_errors_figure(rows(tmp_path, "", 0), [left, *layers])
    assert [axes.get_ylabel() for axes in figure.axes] == ["2 bits", "3 bits"]
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == names
    for bits, axes in zip((2, 3), figure.axes, strict=True):
        heights = [[bar.get_height() for bar in bars] for bars in axes.containers]
        assert heights == [pytest.approx([0.1 * i + 1 / bits for i in range(3)])] * 2
    places = sorted(bar.get_x() + bar.get_width() / 2 for bars in figure.axes[0].containers for bar in bars)
    assert places == pytest.approx([-0.2, 0.2, 0.8, 1.2, 1.8, 2.2])
