"""`kdq bench quantization`: accuracy against published GPFQ and rounding, seconds against the least possible."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from torch import Tensor

from kdq_lightning.bench.measure import hardware, print_table
from kdq_lightning.bench.peers import PEERS
from kdq_lightning.bench.quantization_accuracy import COMPARED, Accuracy, QuantizationCost, measure_accuracy
from kdq_lightning.bench.quantization_speed import PATCHES, Speed, measure_speed
from kdq_lightning.bench.solver_profile import Step, profile_layer
from kdq_lightning.data.datamodules import CIFARDataModule
from kdq_lightning.errors import UserError
from kdq_lightning.evaluation import Split
from kdq_lightning.runs.checkpoints import add_network_arguments, load_network

NAMES = (*COMPARED, *PEERS)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `kdq bench quantization`."""
    parser.add_argument("--weights", type=Path, required=True, help="Run folder, checkpoint or plain state dict.")
    add_network_arguments(parser)
    parser.add_argument("--dataset", type=str, default="cifar10", help="cifar10 or cifar100.")
    parser.add_argument("--root", type=Path, default=Path("data"), help="Folder that holds the data.")
    parser.add_argument("--bits", type=list[int], default=[2, 3, 4], help="Bit widths of the accuracies.")
    parser.add_argument("--methods", type=list[str], default=list(COMPARED), help=f"Some of {', '.join(NAMES)}.")
    parser.add_argument("--images", type=int, default=512, help="Calibration images of a draw.")
    parser.add_argument("--draws", type=int, default=5, help="Calibration draws; 0 leaves the accuracies out.")
    parser.add_argument("--speed_images", type=int, default=512, help="Calibration images of the timings.")
    parser.add_argument("--repeats", type=int, default=5, help="Repeats of the timings; 0 leaves them out.")
    parser.add_argument("--cases", type=list[str], default=list(PATCHES), help=f"Timings: {', '.join(PATCHES)}.")
    parser.add_argument("--max_memory_gb", type=float, default=8.0, help="Of a timed walk, see kdq_lightning.quantize.")
    parser.add_argument("--columns", type=int, default=4608, help="Of the layer that is profiled; 0 leaves it out.")
    parser.add_argument("--neurons", type=int, default=512, help="Of the layer that is profiled.")


def run(args: Namespace) -> dict[str, Any]:
    """Measure accuracies and seconds, print the tables, and return their figures.

    Raises:
        UserError: If the weights or the data can't be read, or a method is unknown.
    """
    for what, given, names in (("method", args.methods, NAMES), ("case", args.cases, PATCHES)):
        if unknown := set(given) - set(names):
            raise UserError(f"unknown {what} {min(unknown)!r}: choose from {', '.join(names)}")
    trained = load_network(args.weights, args)
    data = CIFARDataModule(args.dataset, args.root, **trained.statistics._asdict())
    data.setup()
    model = trained.build()
    figures: dict[str, Any] = {"network": trained.network, "dataset": args.dataset, "hardware": hardware()}
    if args.draws:
        draws = [_draw(data, args.images, seed) for seed in range(args.draws)]
        test = Split(data.test_set.images, data.test_set.labels)
        accuracies, costs = measure_accuracy(model, draws, test, trained.statistics, args.bits, args.methods)
        title = f"{trained.network}, {args.dataset}, {len(test.labels)} test images, {args.images} calibration images"
        print_accuracies(title, accuracies)
        print_costs(f"{trained.network}, {len(args.bits)} bit widths together, a draw", costs)
        figures |= {"accuracies": list(map(asdict, accuracies)), "costs": list(map(asdict, costs))}
    if args.repeats:
        images = data.normalize(_draw(data, args.speed_images, 0))
        speeds = measure_speed(model, images, args.repeats, args.cases, args.max_memory_gb)
        print_speeds(f"{trained.network}, processor seconds on one thread, median of {args.repeats}", speeds)
        figures["speeds"] = list(map(asdict, speeds))
    if args.columns:
        steps = profile_layer(args.columns, args.neurons)
        print_steps(f"A layer of {args.columns} columns and {args.neurons} neurons, 4 bits, one thread", steps)
        figures["layer"] = list(map(asdict, steps))
    return figures


def _draw(data: CIFARDataModule, images: int, seed: int) -> Tensor:
    """Return calibration images, stratified by class, uint8 (images, 3, 32, 32)."""
    data.split_seed = seed  # after setup it chooses calibration images alone
    return data.calibration_images(images)[0]


def print_accuracies(title: str, rows: Sequence[Accuracy]) -> None:
    """Print the accuracy of each method and bit width, mean and range over the draws, and its distance to float."""
    header = ("method", "bits", "levels", "recipe", "packed kB", "top-1 %", "range", "to float")
    network = rows[0].mean
    print_table(
        title,
        header,
        [
            (
                row.method,
                str(row.bits),
                str(row.levels or ""),
                row.recipe,
                f"{row.packed_bytes / 1000:.1f}" if row.packed_bytes else "",
                f"{row.mean:.2f}",
                f"{min(row.top1):.2f}-{max(row.top1):.2f}" if len(row.top1) > 1 else "",
                f"{row.mean - network:+.2f}",
            )
            for row in rows
        ],
    )


def print_costs(title: str, costs: Sequence[QuantizationCost]) -> None:
    """Print the mean seconds and the peak memory of each method over the draws."""
    rows = []
    for method in dict.fromkeys(cost.method for cost in costs):
        own = [cost for cost in costs if cost.method == method]
        seconds = sum(cost.seconds for cost in own) / len(own)
        rows.append((method, f"{seconds:.1f}", f"{max(cost.peak_gb for cost in own):.2f}"))
    print_table(title, ("method", "seconds", "peak GiB"), rows)


def print_speeds(title: str, rows: Sequence[Speed]) -> None:
    """Print seconds, and their ratios to the floor and to a walk at one bit width on the same images and patches."""
    by_case = {(row.what, row.patches, row.images, row.widths): row.seconds for row in rows}
    print_table(
        title,
        ("what", "patches", "images", "widths", "seconds", "wall range", "x floor", "x one walk", "peak GiB"),
        [
            (
                row.what,
                row.patches,
                str(row.images),
                str(row.widths),
                f"{row.seconds:.2f}",
                f"{row.fastest:.2f}-{row.slowest:.2f}",
                _ratio(row.seconds, by_case.get(("floor", row.patches, row.images, row.widths))),
                _ratio(row.seconds, by_case.get(("walk", row.patches, row.images, 1))),
                f"{row.peak_gb:.2f}",
            )
            for row in rows
        ],
    )


def _ratio(seconds: float, reference: float | None) -> str:
    return f"{seconds / reference:.2f}" if reference else ""


def print_steps(title: str, steps: Sequence[Step]) -> None:
    """Print the seconds of each step of a layer, and its share of the solver's."""
    whole = next(step.seconds for step in steps if step.name == "solve")
    header = ("step", "processor seconds", "share of solve")
    print_table(title, header, [(s.name, f"{s.seconds:.2f}", f"{s.seconds / whole:.0%}") for s in steps])
