"""`kdq bench mixed`: test accuracy of bits chosen layer by layer, against other choices of the same bytes."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from torch import Tensor, nn

from kdq_lightning.bench.measure import hardware, print_table
from kdq_lightning.bench.mixed_figure import draw_choices
from kdq_lightning.data.datamodules import CIFARDataModule
from kdq_lightning.errors import UserError
from kdq_lightning.evaluation import Split, evaluate
from kdq_lightning.files import write_atomically
from kdq_lightning.quantization.copies import copy_for_walk
from kdq_lightning.quantization.mixed import Files, candidate_recipes, quantize_mixed
from kdq_lightning.quantization.probe import fit_images, probe
from kdq_lightning.quantization.quantize import place_among_all
from kdq_lightning.quantization.quantized import Quantized
from kdq_lightning.quantization.recipes import Recipe, best_recipe
from kdq_lightning.quantization.torch_state import isolated
from kdq_lightning.quantization.walks import Walks
from kdq_lightning.report.figures import render
from kdq_lightning.runs.checkpoints import add_network_arguments, load_network
from kdq_lightning.runs.trained_network import state_dict_bytes

MAX_MEMORY_GB = 8.0
FORMATS = (".svg", ".png")
BETWEEN = 0.5  # of the way from one uniform file to the next, in bytes


@dataclass
class Choice:
    """Accuracies of one way to choose bits, of as many bytes in every draw.

    Attributes:
        method: `float`, `uniform`, `first and last at 8 bits`, `random` or `mixed`.
        size: What its bytes are those of, such as "2 bits".
        file_bytes: Size of the packed file in each draw.
        top1: Test accuracy of each draw, percent; several a draw of random choices.
    """

    method: str
    size: str
    file_bytes: list[int] = field(default_factory=list)
    top1: list[float] = field(default_factory=list)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `kdq bench mixed`."""
    parser.add_argument("--weights", type=Path, required=True, help="Run folder, checkpoint or plain state dict.")
    add_network_arguments(parser)
    parser.add_argument("--dataset", type=str, default="cifar10", help="cifar10 or cifar100.")
    parser.add_argument("--root", type=Path, default=Path("data"), help="Folder that holds the data.")
    parser.add_argument("--bits", type=list[int], default=[2, 3], help="Uniform bit widths whose bytes are compared.")
    parser.add_argument("--images", type=int, default=512, help="Calibration images of a draw.")
    parser.add_argument("--draws", type=int, default=5, help="Calibration draws.")
    parser.add_argument("--random", type=int, default=4, help="Random choices for each bit width in a draw.")
    parser.add_argument("--test_images", type=int, default=None, help="So many of the test images; all if not given.")
    parser.add_argument("--figure", type=Path, default=None, help="Accuracy against bytes, .svg or .png.")
    parser.add_argument("--resume", action="store_true", help="Go on after the draws that the file of --json holds.")


def run(args: Namespace) -> dict[str, Any]:
    """Measure the accuracies, print the table, and return the figures; `--json` gets them after each draw.

    Raises:
        UserError: If the weights, the data or the figures to go on with can't be read, or the figure's name ends
            otherwise than its formats.
    """
    if args.figure and args.figure.suffix not in FORMATS:
        raise UserError(f"--figure {args.figure}: end its name with {' or '.join(FORMATS)}")
    if args.resume and not args.json:
        raise UserError("--resume goes on with a file of figures: name it by --json")
    trained = load_network(args.weights, args)
    data = CIFARDataModule(args.dataset, args.root, **trained.statistics._asdict())
    data.setup()
    model = trained.build()
    every = max(1, len(data.test_set.labels) // (args.test_images or len(data.test_set.labels)))
    test = Split(data.test_set.images[::every], data.test_set.labels[::every])  # sorted by class, so evenly taken
    whole = state_dict_bytes(model)
    settings: dict[str, Any] = {"network": trained.network, "weights": blake2b(whole, digest_size=8).hexdigest()}
    settings |= {name: list(values) for name, values in trained.statistics._asdict().items()}
    settings |= {"dataset": args.dataset, "calibration_images": args.images}
    settings |= {"bits": args.bits, "random_choices": args.random, "test_images": len(test.labels)}
    figures: dict[str, Any] = read_figures(args.json, settings) if args.resume else {"draws": 0}
    figures |= {**settings, "hardware": hardware()}
    rows = {(row["method"], row["size"]): Choice(**row) for row in figures.get("choices", ())}
    if not rows:
        rows["float", ""] = Choice("float", "", [len(whole)])
        rows["float", ""].top1.append(evaluate(model, test, trained.statistics).top1)
    for seed in range(figures["draws"], args.draws):
        data.split_seed = seed  # after setup it chooses calibration images alone
        images = data.normalize(data.calibration_images(args.images)[0])
        for method, size, network in quantized_networks(model, images, args.bits, args.random, seed):
            row = rows.setdefault((method, size), Choice(method, size))
            row.file_bytes.append(network.file_bytes())
            row.top1.append(evaluate(network.model, test, trained.statistics).top1)
        figures |= {"draws": seed + 1, "choices": list(map(asdict, rows.values()))}
        if args.json:
            write_atomically(args.json, (json.dumps(figures, indent=2) + "\n").encode())
    print_choices(f"{trained.network}, {args.dataset}, {len(test.labels)} test images", list(rows.values()))
    if args.figure:
        write_atomically(args.figure, render(draw_choices([figures]), args.figure.suffix.removeprefix(".")))
    return figures


def read_figures(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures in a file, which more draws are to join.

    Args:
        path: What an earlier `--json` wrote.
        settings: What the draws to come are made with, by the name that it has in the file.

    Raises:
        UserError: If the file can't be read, or its draws were made with other settings.
    """
    try:
        figures: dict[str, Any] = json.loads(path.read_bytes())
        made = {name: figures[name] for name in (*settings, "draws", "choices")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no figures of kdq bench mixed to go on with: leave out --resume") from error
    if other := [f"{name} {made[name]}, not {value}" for name, value in settings.items() if made[name] != value]:
        raise UserError(f"the draws in {path} were made with {', '.join(other)}: give the same, or another --json")
    return figures


def quantized_networks(
    model: nn.Module, images: Tensor, bits: Sequence[int], random_choices: int, seed: int
) -> list[tuple[str, str, Quantized]]:
    """Return method, size and network of each choice: uniform ones, those at their bytes, and half-way between two.

    Args:
        model: The float network, in eval mode.
        images: Calibration images, normalised.
        bits: Uniform bit widths.
        random_choices: For each of them.
        seed: Of the draws.
    """
    recipes = candidate_recipes(None)
    with isolated():
        network = copy_for_walk(model)
        calibration = place_among_all(fit_images(network, images), seed)
        plan = probe(network, model, calibration.images)
        walks = Walks(network, plan, calibration, MAX_MEMORY_GB, lambda *_: None)
        uniform = [best_recipe(width) for width in bits]
        names = [name for name in plan.samples if name not in plan.tied]
        ends = {names[0]: best_recipe(8), names[-1]: best_recipe(8)}
        raised = [{**dict.fromkeys(names, recipe), **ends} for recipe in uniform]
        sizes = [f"{width} bits" for width in bits]
        found = walks.run([*uniform, *raised])
        results: list[tuple[str, str, Quantized]] = []
        budgets: dict[int, str] = {}
        for method, networks in (("uniform", found[: len(bits)]), ("first and last at 8 bits", found[len(bits) :])):
            for size, result in zip(sizes, networks, strict=True):
                results.append((method, size, result))
                budgets[result.file_bytes()] = size if method == "uniform" else f"{size}, first and last at 8"
        whole = [result.file_bytes() for result in found[: len(bits)]]
        for i, (low, high) in enumerate(pairwise(whole)):
            budgets[int(low + BETWEEN * (high - low))] = f"half-way from {bits[i]} to {bits[i + 1]} bits"
        for budget, result in quantize_mixed(walks, recipes, list(budgets), 0).items():
            results.append(("mixed", budgets[budget], result))
        files = Files(network, names, plan.tied, recipes)
        draws = random.Random(seed)
        drawn = [random_choice(files, budget, draws) for budget in whole for _ in range(random_choices)]
        chosen: list[dict[str, Recipe]] = [
            dict(zip(names, [recipes[i] for i in choice], strict=True)) for choice in drawn
        ]
        for i, result in enumerate(walks.run(chosen)):
            results.append(("random", sizes[i // random_choices], result))
    return results


def random_choice(files: Files, budget: int, draws: random.Random) -> list[int]:
    """Give random layers one more level, or bit, until the budget is full; return the index of each one's recipe."""
    choice = [0] * len(files.names)
    room = budget - files.size(choice)
    growing = list(range(len(choice)))
    while growing:
        layer = draws.choice(growing)
        sizes, option = files.code_bytes[layer], choice[layer] + 1
        if option < len(sizes) and sizes[option] - sizes[option - 1] <= room:
            room -= sizes[option] - sizes[option - 1]
            choice[layer] = option
        else:
            growing.remove(layer)
    return choice


def print_choices(title: str, rows: Sequence[Choice]) -> None:
    """Print the mean accuracy of each choice, its range, and its distance to float."""
    network = rows[0].top1[0]
    print_table(
        title,
        ("method", "bytes of", "kB", "top-1 %", "range", "to float"),
        [
            (
                row.method,
                row.size,
                f"{fmean(row.file_bytes) / 1000:.2f}",
                f"{fmean(row.top1):.2f}",
                f"{min(row.top1):.2f}-{max(row.top1):.2f}" if len(row.top1) > 1 else "",
                f"{fmean(row.top1) - network:+.2f}",
            )
            for row in rows
        ],
    )
