"""Fair timing: calls take turns, and the warm-up isn't counted."""

import time

import torch

from kdq_lightning.bench.measure import hardware, interleaved


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


def test_hardware_is_one_line_with_versions():
    assert torch.__version__ in hardware() and "lightning" in hardware() and "\n" not in hardware()
