"""A study's YAML file, read into the commands that it stands for.

```yaml
seeds: [0, 1, 2]
overrides:                            # options of every run
  data.root: data
runs:                                 # in this order; the folder of an earlier run of the same seed is {its name}
  teacher:
    config: teacher_cpu.yaml
    weights: {path: net.pth, network: resnet56, mean: [...], std: [...]}  # optional: see `PublicWeights`
  vanilla:
    config: vanilla_cpu.yaml          # beside the study's file
    seeds: [0]                        # some of the study's; all if not given
    overrides: {model.init_args.teacher: "{teacher}"}
```
"""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from kdq_lightning.commands.arguments import read_yaml
from kdq_lightning.commands.parse_errors import plain_sentence
from kdq_lightning.data.normalization import Channels
from kdq_lightning.errors import UserError
from kdq_lightning.study.run import Run

PLAN_FILE = "plan.yaml"  # what `--budget_minutes` has planned, beside the study's runs
TEACHER = "model.init_args.teacher"
_REFERENCE = re.compile(r"\{(\w+)\}")

Content = TypeVar("Content")


@dataclass(frozen=True)
class PublicWeights:
    """Trained weights that someone else has published, in place of a training.

    Attributes:
        path: Plain state dict, such as `.safetensors` or `.pth`.
        network: The network's name.
        mean: Channel means of the inputs that the network was trained on.
        std: Their channel deviations.
        network_args: Further arguments of the network; None if it has none.
    """

    path: str
    network: str
    mean: Channels
    std: Channels
    network_args: dict | None = None  # type: ignore[type-arg]


@dataclass(frozen=True)
class RunEntry:
    """What a study's file says of a run.

    Attributes:
        config: Its config, a path relative to the study's file.
        overrides: Options in place of the config's; a run's name in braces stands for that run's folder.
        seeds: Some of the study's seeds; None for all of them.
        weights: See `PublicWeights`; None if the run is trained.
    """

    config: str
    overrides: dict | None = None  # type: ignore[type-arg]  # jsonargparse would parse the values of dict[str, Any]
    seeds: list[int] | None = None
    weights: dict | None = None  # type: ignore[type-arg]


@dataclass(frozen=True)
class Study:
    """What a study's file says.

    Attributes:
        runs: What `RunEntry` describes, by the run's name.
        seeds: Seeds of every run.
        overrides: Options of every run, in place of its config's.
    """

    runs: dict  # type: ignore[type-arg]
    seeds: list[int] = field(default_factory=lambda: [0])
    overrides: dict | None = None  # type: ignore[type-arg]


def read_study(path: Path, root: Path) -> list[Run]:
    """Read a study's file.

    Args:
        path: The file.
        root: Folder of all runs; the study's get `<root>/<file's name>/seed<N>/<run>`.

    Returns:
        The runs: all of the first seed, all of the second, ...

    Raises:
        UserError: If the file is missing or says something that isn't understood.
    """
    study = _parse(Study, read_yaml(path, "configs/study_cpu.yaml"), f"{path}: the study")
    if not study.seeds or not study.runs:
        raise UserError(f"{path}: the study has no {'runs' if study.seeds else 'seeds'}: name at least one")
    entries = {str(name): _parse(RunEntry, entry, f"{path}: run {name}") for name, entry in study.runs.items()}
    weights = {
        name: _parse(PublicWeights, entry.weights, f"{path}: the group weights of run {name}")
        for name, entry in entries.items()
        if entry.weights is not None
    }
    for name, entry in entries.items():
        if entry.seeds == [] or not set(entry.seeds or []) <= set(study.seeds):
            raise UserError(f"{path}: run {name} has the seeds {entry.seeds}: give some of the study's, {study.seeds}")
        if not (path.parent / entry.config).is_file():
            raise UserError(
                f"{path}: run {name} names the config {path.parent / entry.config}, which does not exist: give a path"
                " relative to the study's file"
            )
    absent = [name for name, given in weights.items() if not Path(given.path).is_file()]
    present = {name: given for name, given in weights.items() if name not in absent}
    planned = _read_planned(root / path.stem / PLAN_FILE)
    if planned and (unplanned := entries.keys() - planned.keys()):
        raise UserError(
            f"{root / path.stem / PLAN_FILE} knows nothing of {', '.join(sorted(unplanned))}: delete it, and give"
            " --budget_minutes again"
        )
    options = {
        name: {**(study.overrides or {}), **(entry.overrides or {}), **planned.get(name, {})}
        for name, entry in entries.items()
    }
    runs: list[Run] = []
    for seed in dict.fromkeys(study.seeds):
        chosen = {name: entry for name, entry in entries.items() if entry.seeds is None or seed in entry.seeds}
        folder = root / path.stem / f"seed{seed}"
        of_seed = _runs_of_a_seed(path, seed, folder, chosen, options, present)
        runs += [run for run in of_seed if not runs or not run.serves_all_seeds]
    for name in absent:
        print(f"{weights[name].path} is not there: {name} is trained instead", file=sys.stderr)
    return runs


def _parse(kind: type[Content], content: object, what: str) -> Content:
    """Return a part of the file as one of the dataclasses above.

    Raises:
        UserError: If keys are unknown or missing, or a value has another type.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    try:
        if not isinstance(content, dict):
            raise ArgumentError(None, f"Expected keys with values, got {content!r}")
        return kind(**vars(parser.parse_object(content)))
    except ArgumentError as error:
        known = ", ".join(f"{key} ({_name_of(hint)})" for key, hint in get_type_hints(kind).items())
        raise UserError(f"{what} is not understood: {plain_sentence(error.message)}; its keys are {known}") from error


def _name_of(hint: object) -> str:
    """Return what an error calls the type of a key: str, list[int], dict, numbers."""
    if hint == Channels:
        return "numbers"
    return getattr(hint, "__name__", "") if isinstance(hint, type) else str(hint).removesuffix(" | None")


def _runs_of_a_seed(
    path: Path,
    seed: int,
    root: Path,
    entries: Mapping[str, RunEntry],
    options: Mapping[str, Mapping[str, Any]],
    weights: Mapping[str, PublicWeights],
) -> list[Run]:
    """Return the runs of a seed, in the file's order.

    Args:
        path: The study's file.
        seed: The seed.
        root: Folder of the seed's run folders.
        entries: What the file says of each run of the seed.
        options: The options of each run, with names in braces.
        weights: Public weights that are there, by the name of the run that they replace.

    Raises:
        UserError: If a run needs another that doesn't stand before it.
    """
    runs: list[Run] = []
    places: dict[str, str] = {}  # where the weights of each run lie
    for name, entry in entries.items():
        own = dict(options[name])
        named = dict.fromkeys(_REFERENCE.findall(str(list(own.values()))))
        if missing := [needed for needed in named if needed not in places]:
            raise UserError(
                f"{path}: run {name} needs {{{missing[0]}}}, and no run of that name stands before it with seed {seed}"
            )
        if name in weights:
            own |= {"model.init_args.weights": weights[name].path}
            own |= _described(weights[name], "weights", "network_args")
        taught_by = _REFERENCE.fullmatch(str(own.get(TEACHER, "")))
        if taught_by and (teacher := weights.get(taught_by[1])):
            own |= {f"{TEACHER}_network": teacher.network}
            own |= _described(teacher, "teacher", "teacher_network_args")
        arguments = [
            *("--config", str(path.parent / entry.config), "--name", name, "--seed_everything", str(seed)),
            *("--trainer.default_root_dir", str(root)),
            *(f"--{key}={_as_text(value, places)}" for key, value in own.items()),
        ]
        needs = tuple(needed for needed in named if needed not in weights)
        command = "quantize" if name in weights else "fit"
        run = Run(name, seed, command, tuple(arguments), root, needs)
        places[name] = weights[name].path if name in weights else str(run.folder)
        runs.append(run)
    return runs


def _read_planned(path: Path) -> dict[str, Mapping[str, Any]]:
    """Return the options that a plan gives to each run; none if nothing is planned."""
    if not path.is_file():
        return {}
    try:
        runs = yaml.safe_load(path.read_text(encoding="utf-8"))["runs"]
        return {name: dict(entry["options"]) for name, entry in runs.items()}
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a plan ({error}): delete it, and give --budget_minutes again") from error


def _described(weights: PublicWeights, option: str, args_option: str) -> dict[str, Any]:
    """Return the options that say what inputs and arguments the network of published weights has.

    Args:
        weights: The published weights.
        option: Name of the option that names their file.
        args_option: Name of the option for the network's arguments, which is left out if there are none.
    """
    found: dict[str, Any] = {f"{option}_mean": list(weights.mean), f"{option}_std": list(weights.std)}
    if weights.network_args:
        found[args_option] = weights.network_args
    return {f"model.init_args.{name}": value for name, value in found.items()}


def _as_text(value: object, places: Mapping[str, str]) -> str:
    """Return an option's value as the command line takes it, with run folders in place of names in braces."""
    if isinstance(value, str):
        return _REFERENCE.sub(lambda match: places[match[1]], value)
    return str(yaml.safe_dump(value, default_flow_style=True, width=10**6)).removesuffix("\n").removesuffix("\n...")
