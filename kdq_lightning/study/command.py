"""`kdq study`: runs those runs of a study that have no records yet, then writes the report."""

import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kdq_lightning.commands.arguments import OneLineErrors
from kdq_lightning.commands.report import write_report
from kdq_lightning.errors import UserError
from kdq_lightning.study.budget import make_plan
from kdq_lightning.study.done import find_done
from kdq_lightning.study.execution import execute
from kdq_lightning.study.plan import PLAN_FILE, read_study
from kdq_lightning.study.progress import Progress
from kdq_lightning.study.run import Run

ROOT = Path("runs")


def main(args: list[str]) -> int:
    """Run the study, and return the exit code: 0 if all of its runs have their records, else 1."""
    parser = OneLineErrors(prog="kdq study", description="A list of runs, resumable, and the report over them.")
    parser.add_argument("config", type=Path, help="The study's file, such as configs/study_quickstart.yaml.")
    parser.add_argument("--dry_run", action="store_true", help="Print the commands that are left, and run none.")
    parser.add_argument("--devices", type=int, default=1, help="Runs at once: one a GPU, or one a process on the CPU.")
    parser.add_argument("--seeds", type=list[int] | None, default=None, help="Only the runs of these seeds: [0].")
    parser.add_argument("--results", type=Path | None, default=None, help="Folder of records that exist elsewhere.")
    parser.add_argument(
        "--budget_minutes", type=float | None, default=None, help="Plan the epochs that fit, by a few measured steps."
    )
    options = parser.parse_args(args)
    if options.devices < 1:
        raise UserError(f"--devices must be at least 1, got {options.devices}")
    if options.results is not None and not options.results.is_dir():
        raise UserError(f"--results {options.results} is not a folder: give one that holds run folders")
    plan = ROOT / options.config.stem / PLAN_FILE
    runs = read_study(options.config, ROOT)
    chosen = _of_seeds(runs, options.seeds)
    if plan.is_file():
        print(f"epochs as planned in {plan}; delete it to plan anew", file=sys.stderr)
    elif options.budget_minutes is not None:
        make_plan(runs, chosen, options.budget_minutes, options.devices, plan)
        runs = read_study(options.config, ROOT)
        chosen = _of_seeds(runs, options.seeds)
    done = find_done(runs, _places(options.results))
    left = still_to_run(chosen, done)
    if options.dry_run:
        print("\n".join(run.line for run in left))
        return 0
    failed: list[Run] = []
    tried: set[Run] = set()
    while True:  # a teacher that was trained again leaves its students to do
        found = {run: folders for run, folders in done.items() if run in chosen and run not in left}
        with Progress(len(chosen), len(left), options.devices, found) as progress, _say_how_to_go_on(progress, args):
            failed += execute(left, options.devices, progress)
        tried.update(left)
        done = find_done(runs, _places(options.results))
        left = [run for run in still_to_run(chosen, done) if run not in tried]
        if not left:
            break
    missing = [run for run in chosen if run not in done]
    if done:
        folders = dict.fromkeys(folder for found in done.values() for folder in found)
        write_report(list(folders), ROOT / options.config.stem / "report")
    for run in missing:
        print(f"not done: {run.label} ({_reason(run, failed)})")
    if missing:
        print(f"{len(missing)} of {len(chosen)} runs are not done; the same command goes on with them")
    return int(bool(missing))


@contextmanager
def _say_how_to_go_on(progress: Progress, args: Sequence[str]) -> Iterator[None]:
    """Print in which runs the study was stopped by Ctrl-C or SIGTERM, and the command that goes on.

    Raises:
        SystemExit: With 130 or 143.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        code = 128 + signal.SIGINT if isinstance(stop, KeyboardInterrupt) else stop.code
        progress.stop()
        where = f" in {' and '.join(run.label for run in progress.busy)}" if progress.busy else ""
        command = shlex.join(["kdq", "study", *args])
        print(f"kdq: stopped{where}; what is done is kept, go on with: {command}", file=sys.stderr)
        raise SystemExit(code) from stop


def _of_seeds(runs: Sequence[Run], seeds: Sequence[int] | None) -> list[Run]:
    """Return the runs of the given seeds; all runs if `seeds` is None.

    Raises:
        UserError: If a seed is not one of the study's, or the list is empty.
    """
    known = {run.seed for run in runs}
    if seeds is not None and (not seeds or not known.issuperset(seeds)):
        raise UserError(f"--seeds must name seeds of the study, some of {sorted(known)}, got {seeds}")
    return [run for run in runs if seeds is None or run.seed in seeds or run.serves_all_seeds]


def _places(results: Path | None) -> list[Path]:
    """Return the existing folders in which records are searched: the folder of all runs, and `--results`."""
    return [place for place in (ROOT, results) if place is not None and place.is_dir()]


def _reason(run: Run, failed: Sequence[Run]) -> str:
    """Return why a run does not have all of its records, in words."""
    if needed := [other.name for other in failed if other.name in run.needs and other.seed == run.seed]:
        return f"it needs {' and '.join(needed)}"
    return f"it failed, see {run.log}" if run in failed else f"it ended without all its records, see {run.log}"


def still_to_run(runs: Sequence[Run], done: dict[Run, list[Path]]) -> list[Run]:
    """Return the runs that have no records, and those whose weights these need and that are not here, in order.

    Args:
        runs: All runs, each after those that it needs.
        done: Runs that have their records, with the folders of these.
    """
    wanted: list[Run] = []
    for run in reversed(runs):
        is_needed = any(run.name in other.needs and run.seed == other.seed for other in wanted)
        if run not in done or (is_needed and not run.is_trained):
            wanted.append(run)
    return wanted[::-1]
