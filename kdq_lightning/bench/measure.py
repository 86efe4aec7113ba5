"""Fair timing: functions that are compared run in turns in one process, and tables name the hardware."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

WIDTH = 140  # columns of a table that goes into a file


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
        functions: Functions by name; each waits until its device has finished. Its first call is not counted.
        repeats: Calls of each function that are counted.
    """
    for function in functions.values():
        function()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            wall, processor = time.perf_counter(), time.process_time()
            function()
            seconds[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return {name: _summary(*zip(*pairs, strict=True)) for name, pairs in seconds.items()}


def _summary(wall: tuple[float, ...], processor: tuple[float, ...]) -> Timing:
    return Timing(statistics.median(wall), min(wall), max(wall), statistics.median(processor))


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
