"""Runs the commands of a study.

They run one after another in this process, or several at the same time in processes of their own.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import TextIO

import torch

from kdq_lightning.commands.messages import exit_code_of
from kdq_lightning.commands.running import read_settings, run_command
from kdq_lightning.runs.config_hash import version_hash
from kdq_lightning.study.progress import Progress
from kdq_lightning.study.provenance import is_outdated
from kdq_lightning.study.run import Run

QUIET = ("--trainer.enable_progress_bar=false",)  # what is printed goes into a log


def execute(runs: Sequence[Run], devices: int, progress: Progress) -> list[Run]:
    """Run all commands. If one fails, the others go on, except those that need its weights.

    Args:
        runs: Each after those that it needs.
        devices: How many run at the same time.
        progress: Prints a line for every run.

    Returns:
        The runs that failed.
    """
    return run_here(runs, progress) if devices == 1 else run_at_once(runs, devices, progress)


def arguments_of(run: Run) -> list[str]:
    """Return the arguments of a run's command.

    A run that was cut off is resumed, unless its settings or its teacher have changed since.
    """
    goes_on = (
        run.unfinished is not None
        and version_hash(run.unfinished) == read_settings(run.arguments).config_hash
        and not is_outdated(run, run.unfinished)
    )
    return [*run.arguments, *QUIET, *(["--ckpt_path", "last"] if goes_on else [])]


def run_here(runs: Sequence[Run], progress: Progress) -> list[Run]:
    """Run the commands one after the other in this process, and return the runs that failed."""
    failed: list[Run] = []
    for i, run in enumerate(runs):
        if _is_hopeless(run, failed):
            failed.append(run)
            continue
        progress.start(run, [other for other in runs[i:] if not _is_hopeless(other, failed)])
        with _open_log(run) as log:
            ok = _call(run, log)
        failed += [] if ok else [run]
        progress.finish(run, ok, [other for other in runs[i + 1 :] if not _is_hopeless(other, failed)])
    return failed


def _call(run: Run, log: TextIO) -> bool:
    """Run a command with its output in the log, and return whether it succeeded.

    Raises:
        KeyboardInterrupt: If Ctrl-C has ended the run where it leaves nothing to save, which ends the study, too.
        SystemExit: If it was stopped elsewhere.
    """
    with redirect_stdout(log), redirect_stderr(log):
        try:
            code = exit_code_of(lambda: run_command(arguments_of(run)))
            if code == 128 + signal.SIGINT:
                raise KeyboardInterrupt
            return code == 0
        except SystemExit as stop:
            if stop.code != 2:  # 2: an option is wrong; else Lightning was told to stop
                raise
    return False


def run_at_once(runs: Sequence[Run], devices: int, progress: Progress) -> list[Run]:
    """Run the commands in up to `devices` processes at a time, and return the runs that failed.

    The processes share the cores; where there are GPUs, each process sees one.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(cores // devices, 1)  # a thread a core in every run would slow all of them down
    waiting, failed = list(runs), []
    busy: dict[int, tuple[Run, subprocess.Popen[bytes]]] = {}
    try:
        while waiting or busy:
            for device in [device for device, (_, process) in busy.items() if process.poll() is not None]:
                run, process = busy.pop(device)
                failed += [] if process.returncode == 0 else [run]
                progress.finish(run, process.returncode == 0, [*waiting, *(other for other, _ in busy.values())])
            failed += [run for run in waiting if _is_hopeless(run, failed)]
            waiting = [run for run in waiting if run not in failed]
            unfinished = [*waiting, *(run for run, _ in busy.values())]
            ready = [run for run in waiting if not any(_needs(run, other) for other in unfinished)]
            for device, run in zip((d for d in range(devices) if d not in busy), ready, strict=False):
                progress.start(run, [*waiting, *(other for other, _ in busy.values())])
                busy[device] = run, _launch(run, device, threads)
                waiting.remove(run)
            time.sleep(0.1)
    finally:
        for _, process in busy.values():
            process.terminate()  # which saves a checkpoint
        for _, process in busy.values():
            process.wait()
    return failed


def _launch(run: Run, device: int, threads: int) -> subprocess.Popen[bytes]:
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    if torch.cuda.is_available():
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        environment["CUDA_VISIBLE_DEVICES"] = names[device % len(names)]
    with _open_log(run) as log:
        command = [sys.executable, "-m", "kdq_lightning.commands", *arguments_of(run)]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def _open_log(run: Run) -> TextIO:
    run.log.parent.mkdir(parents=True, exist_ok=True)
    return run.log.open("a", encoding="utf-8")


def _needs(run: Run, other: Run) -> bool:
    """Return whether a run reads the weights of another."""
    return other.name in run.needs and other.seed == run.seed


def _is_hopeless(run: Run, failed: Sequence[Run]) -> bool:
    """Return whether a run needs one that failed."""
    return any(_needs(run, other) for other in failed)
