"""Fair timing: calls take turns, and the warm-up isn't counted."""

import time

import torch

from kdq_lightning.bench import measure
from kdq_lightning.bench.measure import hardware, interleaved, peak_memory


def test_functions_take_turns_after_a_warm_up():
    calls = []

    def slow_at_first():
        time.sleep(0.3 if "slow" not in calls else 0.01)
        calls.append("slow")

    timings = interleaved({"slow": slow_at_first, "quick": lambda: calls.append("quick")}, repeats=3)
    assert calls == ["slow", "quick"] * 4
    slow, quick = timings["slow"], timings["quick"]
    assert 0.01 <= slow.fastest <= slow.median <= slow.slowest < 0.3
    assert slow.processor < slow.median  # sleeping is no work
    assert quick.median < 0.01


def test_a_first_call_of_minutes_counts(monkeypatch):
    calls = []
    monkeypatch.setattr(measure, "LONG", 0.05)
    functions = {"long": lambda: (calls.append("long"), time.sleep(0.1)), "quick": lambda: calls.append("quick")}
    timings = interleaved(functions, repeats=2)
    assert calls == ["long", "quick", "long", "quick", "quick"]
    assert 0.1 <= timings["long"].fastest <= timings["long"].slowest


def test_memory_that_was_held_and_let_go_is_seen():
    with peak_memory() as before:
        pass
    with peak_memory() as peak:
        held = torch.ones(100 * 2**20)  # 400 MiB
        del held
    assert peak() - before() > 0.35


def test_hardware_is_one_line_with_versions():
    assert torch.__version__ in hardware() and "lightning" in hardware() and "\n" not in hardware()
