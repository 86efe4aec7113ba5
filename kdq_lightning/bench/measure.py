"""Fair timing: functions that are compared run in turns in one process, and tables name the hardware."""

import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

WIDTH = 140  # columns of a table that goes into a file
LONG = 60.0  # seconds; a call that takes longer has no cold start to speak of


@dataclass(frozen=True)
class Timing:
    """Seconds that the calls of a function took.

    Attributes:
        median: Wall time.
        fastest: Wall time.
        slowest: Wall time.
        processor: Median of the processor time of this process, which other processes disturb less.
    """

    median: float
    fastest: float
    slowest: float
    processor: float


def hardware() -> str:
    """Return one line that describes processor, threads, memory, versions and load."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [
        f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} used, {memory:.0f} GiB",
        *([torch.cuda.get_device_name()] if torch.cuda.is_available() else []),
        f"torch {torch.__version__}, lightning {version('lightning')}",
        f"load {os.getloadavg()[0]:.1f}",
    ]
    return "; ".join(parts)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def interleaved(functions: Mapping[str, Callable[[], object]], repeats: int = 5) -> dict[str, Timing]:
    """Time functions in turns, so that a changing clock rate or another process disturbs all of them alike.

    Args:
        functions: Functions by name; each waits until its device has finished. Its first call is not counted, unless
            it takes more than a minute.
        repeats: Calls of each function that are counted.
    """
    first = {name: _seconds(function) for name, function in functions.items()}
    seconds = {name: [pair] if pair[0] > LONG else [] for name, pair in first.items()}
    for _ in range(repeats):
        for name, function in functions.items():
            if len(seconds[name]) < repeats:
                seconds[name].append(_seconds(function))
    return {name: _summary(*zip(*pairs, strict=True)) for name, pairs in seconds.items()}


def _seconds(function: Callable[[], object]) -> tuple[float, float]:
    """Return the wall and the processor seconds of a call."""
    wall, processor = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - processor


def _summary(wall: tuple[float, ...], processor: tuple[float, ...]) -> Timing:
    return Timing(statistics.median(wall), min(wall), max(wall), statistics.median(processor))


@contextmanager
def peak_memory() -> Iterator[Callable[[], float]]:
    """Yield a function that returns, after the block, the peak memory of the process within it, in 2^30 bytes.

    Only Linux lets a process forget its former peak; elsewhere the peak is that since its start.
    """
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")
    except OSError:
        unit = 1 if hasattr(resource, "RUSAGE_THREAD") else 1024  # kilobytes on Linux, bytes on macOS
        yield lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit / 2**20
        return
    peak: list[float] = []
    yield lambda: peak[0]
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    peak.append(int(line.split()[1]) / 2**20)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with a line about the hardware below it; all columns but the first are aligned to the right."""
    table = Table(title=title, caption=hardware(), title_justify="left", caption_justify="left")
    for place, name in enumerate(header):
        table.add_column(name, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    console.print(table)
