"""Fair timing: what is compared runs in one process, in turns, and is quoted with the machine it ran on."""

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
    """Seconds that a function took."""

    median: float
    fastest: float
    slowest: float
    processor: float  # median of the process's own time, which a busy machine stretches less than the clock's


def hardware() -> str:
    """Describe processor, threads, memory, versions and load in one line."""
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
    """Time functions in turns, so that a drifting clock rate or a noisy neighbour meets all of them.

    Args:
        functions: What to time, by name; each waits for its device itself. One call of each warms up and isn't counted.
        repeats: Calls of each that are counted.
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
    """Print a table, first column to the left and numbers to the right, under a line about the hardware."""
    table = Table(title=title, caption=hardware(), title_justify="left", caption_justify="left")
    for place, name in enumerate(header):
        table.add_column(name, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    console.print(table)
