"""A study's YAML file, read into the commands that it stands for.

```yaml
seeds: [0, 1, 2]
overrides:                            # options of every run
  data.root: data
runs:                                 # in this order; the folder of an earlier run of the same seed is {its name}
  teacher: {config: teacher_cpu.yaml}
  vanilla:
    config: vanilla_cpu.yaml          # beside the study's file
    seeds: [0]                        # some of the study's; all if not given
    overrides: {model.init_args.teacher: "{teacher}"}
  vanilla_paper:                      # the same network, quantized in another way
    config: vanilla_cpu.yaml
    quantizes: vanilla
    overrides: {quantization.codebook: paper}
```
"""

import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kdq_lightning.errors import UserError
from kdq_lightning.runs.checkpoints import FINISHED, versions

PLAN = "plan.yaml"  # what `--budget_minutes` has planned, beside the study's runs
TEACHER = "model.init_args.teacher"
_REFERENCE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Run:
    """One run of a study.

    Attributes:
        name: In the study's file.
        seed: Its seed.
        command: `fit`, or `quantize` for a network that is trained already.
        options: Of the command, with their dashes.
        root: Folder of the seed's run folders.
        needs: Names of the runs of the same seed whose weights it reads.
    """

    name: str
    seed: int
    command: str
    options: tuple[str, ...]
    root: Path
    needs: tuple[str, ...]

    @property
    def label(self) -> str:
        """Name and seed."""
        return f"{self.name}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        """Where its versions lie."""
        return self.root / (f"{self.name}-quantized" if self.command == "quantize" else self.name)

    @property
    def log(self) -> Path:
        """What it printed."""
        return self.root / f"{self.name}.log"

    @property
    def arguments(self) -> list[str]:
        """The command and its options, for `kdq_lightning.cli.main`."""
        return [self.command, *self.options]

    @property
    def settings_arguments(self) -> list[str]:
        """The same as a training, whose settings can be read before any weights are there."""
        return ["fit", *(option for option in self.options if not option.startswith("--ckpt_path="))]

    @property
    def line(self) -> str:
        """The command as one types it."""
        return shlex.join(["kdq", *self.arguments])

    @property
    def serves_all_seeds(self) -> bool:
        """Whether it quantizes public weights, which know no seed."""
        return self.command == "quantize" and not self.needs

    @property
    def is_trained(self) -> bool:
        """Whether its weights are here, for the runs that need them."""
        return self.command == "quantize" or self.finished is not None

    @property
    def finished(self) -> Path | None:
        """The newest finished version, whose weights other runs read."""
        return next((version for version in reversed(versions(self.folder)) if (version / FINISHED).exists()), None)

    @property
    def unfinished(self) -> Path | None:
        """The newest version, if it has a checkpoint to go on from."""
        newest = next(reversed(versions(self.folder)), None)
        if self.command != "fit" or newest is None or not (newest / "checkpoints" / "last.ckpt").is_file():
            return None
        return newest


def read_plan(path: Path, root: Path) -> list[Run]:
    """Read a study's file.

    Args:
        path: The file.
        root: Folder of all runs; the study's get `<root>/<file's name>/seed<N>/<run>`.

    Returns:
        The runs: all of the first seed, all of the second, ...

    Raises:
        UserError: If the file is missing or says something that isn't understood.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): name a study such as configs/study_cpu.yaml"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML ({error})") from error
    study = _checked(path, "the study", content, required={"runs"}, optional={"seeds", "overrides"})
    seeds, entries = _seeds(path, "the study", study, default=[0]), study["runs"]
    if not isinstance(entries, dict) or not entries:
        raise UserError(f"{path}: runs must be names with a config each")
    for name, entry in entries.items():
        if strange := set(_seeds(path, name, entry, default=seeds)) - set(seeds):
            raise UserError(f"{path}: run {name} has the seeds {sorted(strange)}, which are not among the study's")
    everyones = _overrides(path, "the study", study)
    planned = _read_planned(root / path.stem / PLAN)
    if planned and (unplanned := entries.keys() - planned.keys()):
        raise UserError(
            f"{root / path.stem / PLAN} knows nothing of {', '.join(sorted(unplanned))}: delete it, and give"
            " --budget_minutes again"
        )
    runs = [
        run
        for i, seed in enumerate(seeds)
        for run in _runs_of_a_seed(path, entries, everyones, planned, root / path.stem / f"seed{seed}", seed)
        if i == 0 or not run.serves_all_seeds
    ]
    for name in dict.fromkeys(run.name for run in runs if run.command == "fit" and "weights" in entries[run.name]):
        print(f"{entries[name]['weights']['path']} is not there: {name} is trained instead", file=sys.stderr)
    return runs


def _runs_of_a_seed(
    path: Path,
    entries: Mapping[str, Any],
    everyones: Mapping[str, Any],
    planned: Mapping[str, Mapping[str, Any]],
    root: Path,
    seed: int,
) -> list[Run]:
    runs: list[Run] = []
    public: dict[str, Mapping[str, Any]] = {}  # weights that exist already, by run
    places: dict[str, str] = {}
    for name, content in entries.items():
        entry = _checked(
            path, name, content, required={"config"}, optional={"overrides", "quantizes", "seeds", "weights"}
        )
        weights = _public_weights(path, name, entry)
        if seed not in _seeds(path, name, entry, default=[seed]) and not weights:
            continue
        config = path.parent / str(entry["config"])
        if not config.is_file():
            raise UserError(f"{path}: run {name} names the config {config}, which does not exist")
        overrides = {**everyones, **_overrides(path, name, entry), **planned.get(name, {})}
        named = dict.fromkeys(_REFERENCE.findall(str(list(overrides.values()))))
        if quantized := entry.get("quantizes"):
            named[str(quantized)] = None
        if missing := [needed for needed in named if needed not in places]:
            raise UserError(
                f"{path}: run {name} needs {{{missing[0]}}}, and no run of that name stands before it with seed {seed}"
            )
        if weights:
            public[name] = weights
            overrides |= {"model.init_args.weights": weights["path"], **_statistics("weights", weights)}
        taught_by = _REFERENCE.fullmatch(str(overrides.get(TEACHER, "")))
        if taught_by and (teacher := public.get(taught_by[1])):
            overrides |= {f"{TEACHER}_network": teacher["network"], **_statistics("teacher", teacher)}
        options = [
            *("--config", str(config), "--name", str(name), "--seed_everything", str(seed)),
            *("--trainer.default_root_dir", str(root)),
            *(f"--{key}={_as_text(value, places)}" for key, value in overrides.items()),
        ]
        if quantized:
            options.append(f"--ckpt_path={places.get(str(quantized))}")
        needs = tuple(needed for needed in named if needed not in public)
        run = Run(str(name), seed, "quantize" if weights or quantized else "fit", tuple(options), root, needs)
        places[name] = str(weights["path"] if weights else run.folder)
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


def _seeds(path: Path, what: str, entry: object, default: list[int]) -> list[int]:
    seeds = entry.get("seeds", default) if isinstance(entry, dict) else default
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise UserError(f"{path}: seeds of {what} must be a list of whole numbers, got {seeds}")
    return list(dict.fromkeys(seeds))


def _public_weights(path: Path, name: str, entry: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return what is said of weights that exist already; None if nothing is, or their file isn't there."""
    if "weights" not in entry:
        return None
    required = {"path", "network", "mean", "std"}
    weights = _checked(path, f"weights of {name}", entry["weights"], required=required, optional=set())
    return weights if Path(weights["path"]).is_file() else None


def _statistics(option: str, weights: Mapping[str, Any]) -> dict[str, Any]:
    return {f"model.init_args.{option}_{key}": weights[key] for key in ("mean", "std")}


def _as_text(value: object, places: Mapping[str, str]) -> str:
    """Return an option's value as the command line takes it, with run folders in place of names in braces."""
    if isinstance(value, str):
        return _REFERENCE.sub(lambda match: places[match[1]], value)
    return str(yaml.safe_dump(value, default_flow_style=True, width=10**6)).removesuffix("\n").removesuffix("\n...")


def _overrides(path: Path, what: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    overrides = entry.get("overrides") or {}
    if not isinstance(overrides, dict):
        raise UserError(f"{path}: overrides of {what} must be options with their values, got {overrides}")
    return {str(key): value for key, value in overrides.items()}


def _checked(path: Path, what: str, content: object, required: set[str], optional: set[str]) -> dict[str, Any]:
    """Return a mapping with known keys alone."""
    if not isinstance(content, dict):
        raise UserError(f"{path}: {what} must have the keys {', '.join(sorted(required | optional))}")
    if missing := required - content.keys():
        raise UserError(f"{path}: {what} lacks {', '.join(sorted(missing))}")
    if unknown := content.keys() - required - optional:
        raise UserError(
            f"{path}: {what} has the unknown {', '.join(sorted(map(str, unknown)))}; known are"
            f" {', '.join(sorted(required | optional))}"
        )
    return content
