"""The benchmark of mixed bits: each choice is what its name says, and of the bytes that it is compared at."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from safetensors.torch import save_file

from kdq_lightning.bench import mixed
from kdq_lightning.bench.mixed_figure import draw_choices
from kdq_lightning.data.datamodules import CIFARDataModule
from kdq_lightning.errors import UserError
from kdq_lightning.networks import build_network
from kdq_lightning.quantization import quantize


def test_choices_and_their_bytes():
    torch.manual_seed(0)
    network = build_network("resnet8", 10).eval()
    found = mixed.quantized_networks(network, torch.randn(48, 3, 8, 8), [2, 3], 2, seed=1)
    by_name = {}
    for method, size, result in found:
        by_name.setdefault((method, size), []).append(result)
    assert {key: len(results) for key, results in by_name.items() if key[0] == "random"} == {
        ("random", "2 bits"): 2,
        ("random", "3 bits"): 2,
    }
    for bits in (2, 3):
        (uniform,), (raised,) = by_name["uniform", f"{bits} bits"], by_name["first and last at 8 bits", f"{bits} bits"]
        assert {weight.bits for weight in uniform.weights.values()} == {bits}
        inner = list(raised.weights.values())
        assert [inner[0].bits, inner[-1].bits, *{weight.bits for weight in inner[1:-1]}] == [8, 8, bits]
        for rival, name in ((uniform, f"{bits} bits"), (raised, f"{bits} bits, first and last at 8")):
            (ours,) = by_name["mixed", name]
            assert rival.file_bytes() - 150 < ours.file_bytes() <= rival.file_bytes()
        sizes = [result.file_bytes() for result in by_name["random", f"{bits} bits"]]
        # A random network may have a layer that solving doesn't improve: rounded plainly, it gains no bias.
        assert all(uniform.file_bytes() - 400 < size <= uniform.file_bytes() + 300 for size in sizes)
        grids = [[len(w.grid) for w in result.weights.values()] for result in by_name["random", f"{bits} bits"]]
        assert grids[0] != grids[1]
    low, half, high = (
        by_name[key][0].file_bytes()
        for key in (("uniform", "2 bits"), ("mixed", "half-way from 2 to 3 bits"), ("uniform", "3 bits"))
    )
    assert abs(half - (low + high) / 2) < 150


def test_the_command(images: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch):
    """Figures are written after each draw, with every accuracy and size of what is chosen."""
    torch.manual_seed(0)
    save_file(build_network("resnet8", 10).state_dict(), "weights.safetensors")
    asked = []

    def choose(model, calibration, bits, random_choices, seed):
        asked.append((tuple(calibration.shape), bits, random_choices, seed))
        found = quantize(model, [calibration], (2, 3), solver="rounding", refine=0)
        return [("uniform", "2 bits", found[2]), ("random", "2 bits", found[3]), ("random", "2 bits", found[2])]

    monkeypatch.setattr(mixed, "quantized_networks", choose)
    parser = ArgumentParser()
    mixed.add_arguments(parser)
    parser.add_argument("--json", type=Path)
    monkeypatch.setattr(mixed, "CIFARDataModule", partial(CIFARDataModule, val_size=0.2))
    options = ["--weights=weights.safetensors", "--network=resnet8"]
    options += ["--mean", ".5", ".5", ".5", "--std", ".2", ".2", ".2"]
    options += [
        f"--root={images}",
        "--bits=[2]",
        "--images=16",
        "--draws=2",
        "--random=2",
        "--json=figures.json",
        "--figure=f.svg",
    ]
    figures = mixed.run(parser.parse_args(options))
    assert json.loads(Path("figures.json").read_text()) == figures
    assert asked == [((16, 3, 32, 32), [2], 2, seed) for seed in (0, 1)]
    assert figures["draws"] == 2 and figures["test_images"] == 30
    assert [(row["method"], len(row["top1"]), len(row["file_bytes"])) for row in figures["choices"]] == [
        ("float", 1, 1),
        ("uniform", 2, 2),
        ("random", 4, 4),
    ]
    assert Path("f.svg").read_text().rstrip().endswith("</svg>")
    check_resuming(parser, options, asked, figures)
    with pytest.raises(UserError, match=r"--figure f\.jpg: end its name with \.svg or \.png"):
        mixed.run(parser.parse_args([*options[:-1], "--figure=f.jpg"]))


def check_resuming(parser: ArgumentParser, options: list[str], asked: list[tuple[Any, ...]], figures: dict[str, Any]):
    """Draw after draw gives what all draws at once give; draws of other settings are refused, and kept."""

    def bench(*more: str) -> dict[str, Any]:
        return mixed.run(parser.parse_args([*options, "--json=parts.json", *more]))

    asked.clear()
    bench("--draws=1")
    assert {**bench("--resume"), "hardware": figures["hardware"]} == figures
    assert [seed for *_, seed in asked] == [0, 1]
    parts = Path("parts.json").read_text()
    assert bench("--resume")["choices"] == figures["choices"]
    for option, name in (
        (["--random=3"], "random_choices 2, not 3"),
        (["--images=8"], "calibration_images 16, not 8"),
        (["--mean", ".4", ".5", ".5"], r"mean \[0\.5, 0\.5, 0\.5\], not \[0\.4, 0\.5, 0\.5\]"),
    ):
        with pytest.raises(UserError, match=rf"the draws in parts\.json were made with {name}: give the same"):
            bench("--resume", *option)
    torch.manual_seed(1)
    save_file(build_network("resnet8", 10).state_dict(), "others.safetensors")
    with pytest.raises(UserError, match=r"parts\.json were made with weights \w+, not \w+: give the same"):
        bench("--resume", "--weights=others.safetensors")
    assert [seed for *_, seed in asked] == [0, 1] and Path("parts.json").read_text() == parts
    Path("list.json").write_text("[1]")
    Path("cut.json").write_text(json.dumps({key: value for key, value in json.loads(parts).items() if key != "draws"}))
    for name in ("absent", "list", "cut"):
        with pytest.raises(UserError, match=rf"{name}\.json holds no figures of kdq bench mixed to go on with"):
            bench("--resume", f"--json={name}.json")
    with pytest.raises(UserError, match="--resume goes on with a file of figures: name it by --json"):
        mixed.run(parser.parse_args([option for option in options if "--json" not in option] + ["--resume"]))


def test_the_figure_shows_means_and_deviations():
    choices = [
        {"method": "float", "size": "", "file_bytes": [9000], "top1": [90.0]},
        {"method": "uniform", "size": "2 bits", "file_bytes": [1000, 1000], "top1": [80.0, 82.0]},
        {"method": "mixed", "size": "3 bits", "file_bytes": [2000, 2000], "top1": [87.0, 89.0]},
        {"method": "mixed", "size": "2 bits", "file_bytes": [990, 1000], "top1": [84.0, 85.0]},
    ]
    one = {"network": "resnet8", "dataset": "digits", "draws": 2, "choices": choices}
    other = {**one, "network": "resnet14", "draws": 1, "choices": [{**row, "top1": row["top1"][:1]} for row in choices]}
    first, second = draw_choices([one, other]).axes
    assert (first.get_title(), second.get_title()) == ("resnet8, digits, 2 draws", "resnet14, digits, 1 draw")
    across, *_ = first.lines
    assert list(across.get_ydata()) == [90.0, 90.0]
    mixed_curve, uniform_curve = first.containers
    assert mixed_curve[0].get_xydata().tolist() == [[0.995, 84.5], [2.0, 88.0]]
    assert uniform_curve[0].get_xydata().tolist() == [[1.0, 81.0]]
    low, high = uniform_curve[2][0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((81.0 - 2**0.5, 81.0 + 2**0.5))
