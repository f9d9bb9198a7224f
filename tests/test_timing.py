"""The timing engine, with a clock that the test holds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from fused_resnet._timing import FEWEST, Contention, Timing, autorange, geometric_mean, interleave, quantile


class Clock:
    """Stands still but for what the calls take."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def call(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.calls.append(name)
            self.now += seconds

        return run


def calm() -> Callable[[], bool]:
    return lambda: False


def test_quantiles() -> None:
    assert quantile([5, 1, 3, 2, 4], 0.5) == 3
    assert quantile([1, 2], 0.25) == 1.25
    assert quantile([7], 0.8) == 7
    timing = Timing((1.0, 2.0, 3.0, 4.0, 5.0, 6.0), 1)
    assert (timing.q20, timing.median, timing.q80) == (2.0, 3.5, 5.0)


def test_autorange_doubles_until_long_enough() -> None:
    clock = Clock()
    assert autorange(clock.call("a", 1.0), least=5.0, clock=clock) == 8
    assert autorange(clock.call("a", 9.0), least=5.0, clock=clock) == 1


def test_rounds_are_interleaved_and_rotate() -> None:
    clock = Clock()
    calls = {name: clock.call(name, 1.0) for name in "abc"}
    timings = interleave(calls, repeat=3, least=1.0, warmup=0, clock=clock, contested=calm)
    assert "".join(clock.calls) == "abc" + "abc" + "bca" + "cab"  # one each to find the range, then three rounds
    assert {len(timing.samples) for timing in timings.values()} == {3}


def test_medians_are_seconds_a_call() -> None:
    clock = Clock()
    timings = interleave(
        {"slow": clock.call("s", 0.5), "fast": clock.call("f", 0.125)}, repeat=5, least=1.0, clock=clock, contested=calm
    )
    assert timings["slow"].median == 0.5
    assert timings["slow"].inner == 2
    assert timings["fast"].median == 0.125
    assert timings["fast"].inner == 8


def test_time_limit_leaves_the_fewest_rounds() -> None:
    clock = Clock()
    timings = interleave({"a": clock.call("a", 1.0)}, repeat=50, seconds=0.5, clock=clock, contested=calm)
    assert len(timings["a"].samples) == FEWEST


def test_disturbed_rounds_are_left_out() -> None:
    """Every second round is disturbed and takes ten times as long; none of that is in the figures."""
    clock = Clock()
    turns = itertools.cycle([False, True])
    slow = {"now": False}

    def contested() -> Callable[[], bool]:
        slow["now"] = next(turns)
        return lambda: slow["now"]

    def call() -> None:
        clock.now += 10.0 if slow["now"] else 1.0

    timing = interleave({"a": call}, repeat=4, clock=clock, contested=contested)["a"]
    assert timing.samples == (1.0,) * 4
    assert timing.left_out == 3
    assert not timing.contested


def test_always_disturbed_is_said() -> None:
    clock = Clock()
    timing = interleave({"a": clock.call("a", 1.0)}, repeat=4, clock=clock, contested=lambda: lambda: True)["a"]
    assert timing.contested
    assert len(timing.samples) == 12  # three times as many rounds were tried, and all count
    assert timing.as_dict()["contested"] is True


def test_contention_is_waiting_over_waiting_and_running(tmp_path: Path) -> None:
    def write(thread: str, running: int, waiting: int) -> None:
        (tmp_path / thread).mkdir(exist_ok=True)
        (tmp_path / thread / "schedstat").write_text(f"{running} {waiting} 5\n")

    write("1", 1000, 70)
    contention = Contention(tmp_path)
    write("1", 1900, 70)
    assert contention.share() == 0
    assert not contention.much()
    write("2", 50, 50)  # a thread that began meanwhile counts from 0
    assert contention.share() == pytest.approx(50 / 1000)
    write("2", 50, 1050)
    assert contention.much()
    assert Contention(tmp_path / "nowhere").share() is None
    assert not Contention(tmp_path / "nowhere").much()


def test_geometric_mean() -> None:
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert math.isnan(geometric_mean([]))
