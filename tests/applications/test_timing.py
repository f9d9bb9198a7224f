"""The timing engine, with a clock that the test holds; the contenders' processes, with contenders that the test writes."""

from __future__ import annotations

import itertools
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from _calls import PATIENCE

from fused_resnet.benchmark import worker
from fused_resnet.benchmark.contest import Contest, prepare
from fused_resnet.benchmark.team import Team
from fused_resnet.benchmark.timing import FEWEST, Contention, Lost, Sample, Timing, autorange, geometric_mean, interleave, quantile, rounds
from fused_resnet.cases import BlockCase


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


def test_disturbed_samples_are_left_out() -> None:
    """Every second sample is disturbed and takes ten times as long; none of that is in the figures."""
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


def test_a_disturbed_sample_leaves_the_others_their_round() -> None:
    disturbed = itertools.cycle([True, False])
    samplers = {"a": lambda: Sample(1.0, next(disturbed)), "b": lambda: Sample(2.0)}
    taken = rounds(samplers, repeat=3)
    assert [sample.disturbed for sample in taken["a"]] == [True, False] * 3
    assert Timing.of(taken["a"], 1) == Timing((1.0,) * 3, 1, left_out=3)
    assert Timing.of(taken["b"], 1) == Timing((2.0,) * 6, 1)


def test_a_lost_contender_is_left_out_and_the_others_go_on() -> None:
    left = iter([Sample(1.0), Sample(1.0)])

    def losing() -> Sample:
        with suppress(StopIteration):
            return next(left)
        raise Lost

    taken = rounds({"loses": losing, "stays": lambda: Sample(2.0)}, repeat=5)
    assert {name: len(samples) for name, samples in taken.items()} == {"stays": 5}
    assert rounds({}, repeat=5) == {}


@pytest.mark.smoke
def test_settle_waits_for_the_other_threads(tmp_path: Path) -> None:
    def write(thread: int, state: str) -> Path:
        (tmp_path / str(thread)).mkdir(exist_ok=True)
        file = tmp_path / str(thread) / "stat"
        file.write_text(f"{thread} (name with ) in it) {state} 1 2 3\n")
        return file

    write(os.getpid(), "R")
    file = write(os.getpid() + 1, "S")
    assert not worker._running(tmp_path)
    file = write(os.getpid() + 1, "R")
    assert worker._running(tmp_path)
    worker.settle(0.01, tmp_path)  # gives up
    file.unlink()
    worker.settle(1000.0, tmp_path)
    assert not worker._running(tmp_path / "nowhere")


FAKES = """
import os, sys, time
from pathlib import Path
from fused_resnet.benchmark.worker import Built

LOG = Path(os.environ["FAKES_LOG"])

def built(task, name, call=lambda: None, factor=1.0):
    def logged():
        with LOG.open("a") as log:
            log.write(f"{name} {os.getpid()}\\n")
        call()
        time.sleep(1e-3)
        return factor * task.module(*task.inputs)
    return Built(logged, lambda output: (output,))

def first(task, threads, folder): return built(task, "first")
def second(task, threads, folder): return built(task, "second")
def wrong(task, threads, folder): return built(task, "wrong", factor=1.001)
def talks(task, threads, folder):
    print("to stdout")
    os.write(1, b"{to stdout as C does}\\n")
    return built(task, "talks")
def raises(task, threads, folder): raise ValueError("no such\\nlayer")
def dies(task, threads, folder):
    print("a last word", file=sys.stderr, flush=True)
    os.abort()
def sleeps(task, threads, folder): time.sleep(1000)
def dies_later(task, threads, folder):
    calls = iter(range(8))
    return built(task, "dies_later", lambda: next(calls, None) is not None or os._exit(7))
def forks(task, threads, folder):
    import subprocess
    child = subprocess.Popen(["sleep", "1000"])
    LOG.write_text(str(child.pid))
    return built(task, "second")
"""


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Contenders as fakes:name, and the file in which their calls leave a line."""
    (tmp_path / "fakes.py").write_text(FAKES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("FAKES_LOG", str(tmp_path / "log"))
    return tmp_path / "log"


@pytest.fixture(scope="module")
def contest() -> Iterator[Contest]:
    with torch.no_grad():
        yield prepare(BlockCase("basic", 8, 8, (4, 4)), 1, torch.float32, "forward", seed=0)


def team(*names: str) -> Team:
    return Team({name: f"fakes:{name}" for name in names}, threads=1)


def gone(process: int) -> bool:
    """Whether a process has ended, or does so in much less than the 1000 seconds that those here would last."""
    for _ in range(20_000):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":  # nobody has asked for its status yet
            return True
        time.sleep(0.01)
    return False


ORDER = ("first", "second", "wrong", "talks")


def test_processes_take_turns(fakes: Path, contest: Contest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each contender is in a process of its own, and a sample of one is over before one of the next begins.

    The processes import the package that is imported here, and not what the current folder holds under its name.
    """
    (tmp_path / "decoy" / "fused_resnet").mkdir(parents=True)
    (tmp_path / "decoy" / "fused_resnet" / "__init__.py").write_text("raise ImportError('the decoy')")
    monkeypatch.chdir(tmp_path / "decoy")
    with team(*ORDER) as members:
        members.open(contest.task)
        results = {name: members.build(name, least=0.0, warmup=2) for name in ORDER}
        assert members.failed == {}
        fakes.write_text("")
        timings = members.time(repeat=3, seconds=math.inf)
    assert [len(timings[name].samples) + timings[name].left_out >= 3 for name in results] == [True] * 4
    lines = [line.split() for line in fakes.read_text().splitlines()]
    names = [name for name, _ in lines]
    assert names[::2] == names[1::2]  # of each sample the call that is not timed, and the one that is
    # Each round starts with the next one.
    assert names[:24:2] == [name for shift in range(3) for name in (*ORDER[shift:], *ORDER[:shift])]
    assert len({process for _, process in lines}) == 4
    assert all(gone(int(process)) for _, process in lines)
    for name, result in results.items():
        assert result is not None
        errors = contest.errors(result)
        assert contest.ok(errors) == (name != "wrong"), (name, errors)


def test_a_failure_is_a_sentence_and_the_others_are_timed(
    fakes: Path, contest: Contest, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("raises", "dies", "sleeps", "dies_later", "first")
    with team(*names) as members:
        for _ in range(2):  # a new process for the next case
            members.open(contest.task)
            for name in names:
                monkeypatch.setattr(members, "BUILD", 0.2 if name == "sleeps" else 900.0)
                assert (members.build(name, least=0.0, warmup=2) is None) == (name in ("raises", "dies", "sleeps"))
            assert set(members.time(repeat=5, seconds=math.inf)) == {"first"}
            assert members.failed == {
                "raises": "ValueError: no such layer",
                "dies": "its process ended by SIGABRT: a last word",
                "sleeps": "no answer within 0 s",
                "dies_later": "its process ended with status 7",
            }


def test_an_interrupt_leaves_no_process(fakes: Path, contest: Contest) -> None:
    """Nor one of those that a contender has started itself."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    children = []

    def work() -> None:
        with team("forks", "sleeps") as members:
            members.open(contest.task)
            members.build("forks", least=0.0, warmup=2)
            children.append(int(fakes.read_text().split("second")[0]))
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            members.build("sleeps", least=0.0, warmup=2)

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            work()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert gone(children[0])


def test_a_worker_ends_with_its_parent(fakes: Path, contest: Contest) -> None:
    """However it ended: what the worker sees is the end of its stdin."""
    with team("first") as members:
        members.open(contest.task)
        members.build("first", least=0.0, warmup=2)
        process = members._members["first"]._process
        assert process is not None
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=PATIENCE) == 0
