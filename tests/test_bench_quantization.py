"""The quantization benchmark on small networks: figures are what they say, and its command prints and returns them."""

import json
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from safetensors.torch import save_file
from torch import nn

from kdq_lightning.bench import quantization
from kdq_lightning.bench.quantization_accuracy import measure_accuracy, peak_memory
from kdq_lightning.bench.quantization_speed import floor, measure_speed
from kdq_lightning.bench.solver_profile import profile_layer
from kdq_lightning.data.normalization import Statistics
from kdq_lightning.errors import UserError
from kdq_lightning.evaluation import Split
from kdq_lightning.networks import build_network
from kdq_lightning.quantization import quantize


def small_network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 10, bias=False)).eval()


HALF = Statistics((0.5, 0.5, 0.5), (1.0, 1.0, 1.0))


def halves(images):
    return images.float() / 255 - 0.5


def top1(network, images, labels):
    return 100 * (network(halves(images)).argmax(1) == labels).double().mean().item()


def pictures(count, side=12):
    generator = torch.Generator().manual_seed(1)
    colours = torch.randint(192, (count, 3, 1, 1), generator=generator)
    return (colours + torch.randint(64, (count, 3, side, side), generator=generator)).to(torch.uint8)


def test_accuracies_are_those_of_the_quantized_networks():
    network, images = small_network(), pictures(200)
    labels = network(halves(images)).argmax(1)
    draws = [images[:20], images[20:40]]
    rows, costs = measure_accuracy(network, draws, Split(images, labels), HALF, (2, 8))
    assert [(row.method, row.bits) for row in rows] == [
        ("float", 32),
        *((method, bits) for method in ("gpfq", "rounding", "default") for bits in (2, 8)),
    ]
    assert rows[0].top1 == [100]
    assert [len(row.top1) for row in rows[1:]] == [2] * 6
    assert [(row.levels, row.recipe) for row in rows[1:5]] == [
        (5, "gpfq/paper"),
        (257, "gpfq/paper"),
        (4, "rounding/int"),
        (256, "rounding/int"),
    ]
    again = quantize(network, [halves(draws[1])], (2,), mode="official", seed=1)[2]
    assert rows[1].top1[1] == top1(again.model, images, labels)
    assert rows[4].mean > 98  # plain rounding at 8 bits
    assert [cost.method for cost in costs] == ["gpfq"] * 2 + ["rounding"] * 2 + ["default"] * 2
    assert all(cost.seconds > 0 and 0.05 < cost.peak_gb < 100 for cost in costs)


def test_a_peer_takes_part():
    pytest.importorskip("brevitas")
    network, images = small_network(), pictures(100)
    labels = network(halves(images)).argmax(1)
    _, *rows = measure_accuracy(network, [images[:20]], Split(images, labels), HALF, (8,), ["brevitas_gpfq"])[0]
    assert [(row.method, row.levels) for row in rows] == [("brevitas_gpfq", 255)]
    assert rows[0].mean > 95


def test_peak_memory_sees_what_was_freed_and_forgets_what_was_before():
    with peak_memory() as before:
        big = torch.ones(2**27)  # half a GiB
        del big
    with peak_memory() as after:
        pass
    assert before() == pytest.approx(after() + 0.5, abs=0.1)


def test_floor_does_the_forwards_and_products_of_the_walk(monkeypatch):
    network, images = small_network(), halves(pictures(70))
    options = {"solver": "rounding", "refine": 0, "match_moments": False}  # which holds nothing out
    layers = quantize(network, [images], (3,), patch_fraction=0.5, **options)[3].layers
    forwards, products = [], []
    network.register_forward_hook(lambda _, inputs, __: forwards.append(len(inputs[0])))
    multiply = torch.matmul
    monkeypatch.setattr(torch, "matmul", lambda a, b: (products.append((*a.shape, b.shape[-1])), multiply(a, b))[1])
    floor(network, images, layers, widths=2)()
    assert sum(forwards) == 3 * 70
    assert [layer.rows for layer in layers] == [70 * 13, 70 * 5, 70]
    assert products == [(1, 27, 910, 27)] * 4 + [(2, 18, 350, 18)] * 4 + [(1, 4, 70, 4)] * 4


def test_speeds_of_every_case():
    rows = measure_speed(small_network(), halves(pictures(8)), repeats=1)
    cases = [(row.what, row.patches, row.images, row.widths) for row in rows]
    assert cases == [
        ("floor", "published", 8, 1),
        ("walk", "published", 8, 1),
        ("floor", "all", 2, 1),
        ("walk", "all", 2, 1),
        ("floor", "10 %", 4, 1),
        ("walk", "10 %", 4, 1),
        ("floor", "10 %", 8, 1),
        ("walk", "10 %", 8, 1),
        ("floor", "10 %", 8, 7),
        ("walk", "10 %", 8, 7),
        ("floor", "default", 8, 7),
        ("walk", "default", 8, 7),
        ("published", "published", 8, 1),
    ]
    assert all(row.seconds > 0 and 0 < row.fastest <= row.slowest and row.peak_gb > 0.1 for row in rows)


def test_speeds_of_a_chosen_case(capsys):
    rows = measure_speed(small_network(), halves(pictures(8)), 1, ["default"])
    assert [(row.what, row.patches) for row in rows] == [("floor", "default"), ("walk", "default")]
    quantization.print_speeds("small", rows)
    ratio = f"{rows[1].seconds / rows[0].seconds:.2f}"
    assert [
        line for line in capsys.readouterr().out.splitlines() if "walk" in line and "default" in line and ratio in line
    ]


class FewImages:
    """A stand-in for the datamodule: 60 pictures."""

    def __init__(self, dataset, root, mean, std):
        self.test_set = type("Set", (), {"images": pictures(60, 32), "labels": torch.arange(60) % 10})
        self.test_set.__len__ = lambda _: 60
        self.test_set = self.test_set()

    def setup(self):
        pass

    def normalize(self, images):
        return halves(images)

    def calibration_images(self, count):
        return pictures(60, 32).roll(self.split_seed, 0)[:count], torch.arange(count)


def parse(*words: str):
    parser = ArgumentParser()
    quantization.add_arguments(parser)
    return parser.parse_args(list(words))


def test_command(tmp_path: Path, monkeypatch, capsys):
    save_file(build_network("resnet8", 10).state_dict(), tmp_path / "net.safetensors")
    monkeypatch.setattr(quantization, "CIFARDataModule", FewImages)
    monkeypatch.setenv("COLUMNS", "160")
    plain = [f"--weights={tmp_path / 'net.safetensors'}", "--network=resnet8", "--mean", "0.5", "0.5", "0.5"]
    args = parse(*plain, "--std", "1", "1", "1", "--images=8", "--draws=2", "--bits=[2]", "--repeats=0", "--columns=80")
    figures = quantization.run(args)
    printed = capsys.readouterr().out
    assert "gpfq" in printed and "gpfq/paper" in printed and "peak GiB" in printed
    assert json.loads(json.dumps(figures))["accuracies"][1]["method"] == "gpfq"
    assert "choose_scale" in printed and "coordinate_descent" in printed
    assert "speeds" not in figures and len(figures["accuracies"][1]["top1"]) == 2


def test_steps_of_a_layer_add_up_to_the_solver():
    collect, whole, *steps = profile_layer(300, 40)
    assert (collect.name, whole.name) == ("collect", "solve") and min(collect.seconds, whole.seconds) > 0
    assert {"choose_scale", "greedy", "coordinate_descent", "least_squares"} <= {step.name for step in steps}
    assert sum(step.seconds for step in steps) == pytest.approx(whole.seconds)
    assert [step.seconds for step in steps] == sorted((step.seconds for step in steps), reverse=True)


def test_unknown_method_is_named():
    with pytest.raises(UserError, match="unknown method 'magic'"):
        quantization.run(parse("--weights=a", '--methods=["magic"]'))
    with pytest.raises(UserError, match="unknown case 'some': choose from published, all, 10 %, default"):
        quantization.run(parse("--weights=a", '--cases=["some"]'))
