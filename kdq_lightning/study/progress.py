"""Shows how far a study is: its running runs on a terminal, a line for each start and end elsewhere."""

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.text import Text

from kdq_lightning.quantization.methods import DEFAULT_METHOD
from kdq_lightning.runs.records import FLOAT_BITS, read_records
from kdq_lightning.runs.versions import is_version
from kdq_lightning.study.run import Run
from kdq_lightning.training.lightning_internals import drawing_waits

TAIL = 4096  # bytes at the end of a log in which the last epoch's line is
REFRESHED = 2  # times a second, on a terminal


class Stage(NamedTuple):
    """What a running command does.

    Attributes:
        text: In words, such as "epoch 3/16".
        share: Of the epochs that are done, 0 to 1; None if that isn't known.
    """

    text: str
    share: float | None = None


def read_stage(run: Run, begin: int = 0) -> Stage:
    """Return what a running command does, by the lines of epochs in its log.

    Args:
        run: The run.
        begin: Bytes of the log that are older than the command.
    """
    if run.command == "quantize":
        return Stage("quantizing")
    try:
        with run.log.open("rb") as file:
            file.seek(max(begin, file.seek(0, 2) - TAIL))
            epochs = re.findall(r"^epoch (\d+)(?:/(\d+))?  ", file.read().decode(errors="replace"), re.MULTILINE)
    except OSError:
        epochs = []
    if not epochs:
        return Stage("starting")
    done, total = int(epochs[-1][0]), int(epochs[-1][1] or 0)
    if done == total:
        return Stage("quantizing", 1.0)
    return Stage(f"epoch {done + 1}/{total}", done / total) if total else Stage(f"epoch {done + 1}")


class Progress:
    """Shows the runs that are going, and prints a line for each that ends, with an estimate of the time that is left.

    While it is entered it draws on a terminal what each run does and where its log lies. Elsewhere it prints a line
    when a run starts.
    """

    def __init__(self, total: int, left: int, devices: int, found: Mapping[Run, Sequence[Path]] | None = None) -> None:
        """Print how many runs there are, how many of them are done, and where their records lie.

        Args:
            total: Number of runs of the study.
            left: Number of runs that are not done.
            devices: How many run at the same time.
            found: The folders of the records of the runs that are done.
        """
        self.left, self.devices = left, devices
        self.width = len(str(left))
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.started: dict[Run, float] = {}
        self.log_begins: dict[Run, int] = {}
        self.busy: list[Run] = []
        self.waiting: Sequence[Run] = ()
        self.console = Console(file=sys.stdout)  # kept, as a run's output is redirected
        self.live = Live(
            get_renderable=self._shown,
            console=self.console,
            refresh_per_second=REFRESHED,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._print(f"{total} runs, {total - left} of them have their records already")
        places = Counter(_place(folders[0]) for folders in (found or {}).values())
        for place, count in sorted(places.items()):
            self._print(f"  {count} in {place}")

    def __enter__(self) -> Self:
        """Start to draw, on a terminal."""
        if self.console.is_terminal and self.left:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take away what was drawn."""
        self.stop()

    def stop(self) -> None:
        """Take away what was drawn, and draw no more."""
        self.live.stop()

    def start(self, run: Run, waiting: Sequence[Run]) -> None:
        """Start the clock of a run.

        Args:
            run: The run.
            waiting: Runs that have not ended yet, this one among them.
        """
        self.started[run] = monotonic()
        self.log_begins[run] = run.log.stat().st_size if run.log.is_file() else 0
        self.busy.append(run)
        self.waiting = waiting
        if not self.live.is_started:
            self._print(f"{self._label(run)}: started, log {run.log}")

    def finish(self, run: Run, ok: bool, waiting: Sequence[Run]) -> None:
        """Print the line of a run that has ended.

        Args:
            run: The run.
            ok: Whether it succeeded.
            waiting: Runs that have not ended yet.
        """
        seconds = monotonic() - self.started[run]
        self.busy.remove(run)
        self.waiting = waiting
        if ok:
            self.seconds[run.name].append(seconds)
        outcome = f"done in {format_seconds(seconds)}" if ok else f"FAILED, see {run.log}"
        line = f"{self._label(run)}: {', '.join([outcome, *accuracies(run)] if ok else [outcome])}"
        remaining = self.remaining(waiting)
        self._print(f"{line}; {format_seconds(remaining)} left" if remaining else line)

    def remaining(self, waiting: Sequence[Run]) -> float | None:
        """Return the seconds that the waiting runs will take; None if none waits or nothing is known yet.

        A run is expected to take as long as the same run with other seeds did, else as long as the mean of all runs.
        Before any run has ended, its share of the epochs tells how long the one takes that is going.

        Args:
            waiting: Runs that have not ended yet; of those that are going, the time that is left counts.
        """
        now = monotonic()
        elapsed = {run: now - self.started[run] for run in self.busy}
        every = [seconds for measured in self.seconds.values() for seconds in measured]
        if not every:
            shares = {run: read_stage(run, self.log_begins[run]).share for run in self.busy}
            every = [elapsed[run] / share for run, share in shares.items() if share]
        if not every or not waiting:
            return None
        means = {name: sum(measured) / len(measured) for name, measured in self.seconds.items()}
        overall = sum(every) / len(every)
        expected = [max(means.get(run.name, overall) - elapsed.get(run, 0), 0) for run in waiting]
        return sum(expected) / min(self.devices, len(waiting))

    def _label(self, run: Run) -> str:
        number = list(self.started).index(run) + 1
        return f"[{number:{self.width}}/{self.left}] {run.label}"

    def _print(self, line: str) -> None:
        """Print a line above what is drawn, never wrapped, as it may hold a path; rich's thread waits with drawing."""
        with drawing_waits(self.live):
            self.console.print(Text(line), soft_wrap=True)
            self.console.file.flush()

    def _shown(self) -> Text:
        """Return what is drawn: of each run that is going what it does, and its log."""
        lines = []
        for run in list(self.busy):
            seconds = monotonic() - self.started[run]
            stage = read_stage(run, self.log_begins[run])
            lines += [f"{self._label(run)}: {stage.text}, {format_seconds(seconds)}", f"      log {run.log}"]
        if remaining := self.remaining(self.waiting):
            lines.append(f"      {format_seconds(remaining)} left")
        return Text("\n".join(lines), no_wrap=True, overflow="ellipsis")


def _place(folder: Path) -> Path:
    """Return the folder that holds the run of a version's folder."""
    return folder.parent.parent if is_version(folder) else folder.parent


def accuracies(run: Run) -> list[str]:
    """Return the accuracy in float and at the fewest bits of a run that has ended, in words; nothing without records.

    The mean over peers of the best known method, on the test images unless they were left alone.
    """
    records = read_records(run.finished) if run.finished is not None else []
    values: defaultdict[int | float, list[float]] = defaultdict(list)
    for record in records:
        if record.method in ("", DEFAULT_METHOD) and record.top1 is not None:
            values[record.bits].append(record.top1)
    fewest = min(values, default=FLOAT_BITS)
    names: dict[int | float, str] = {FLOAT_BITS: "float"} | ({} if fewest == FLOAT_BITS else {fewest: f"{fewest} bits"})
    return [f"{name} {np.mean(values[bits]):.1f} %" for bits, name in names.items() if bits in values]


def format_seconds(seconds: float) -> str:
    """Return a duration in words, such as 40 s, 12 min or 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
