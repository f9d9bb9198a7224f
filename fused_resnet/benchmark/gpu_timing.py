"""Timing on a GPU: contenders in one process, their samples interleaved, each call on another set of buffers.

A contender takes turns on several sets of buffers, together larger than the L2 cache several times over: what a layer of a network
reads has been written long ago. Its results rotate too. Time is taken by CUDA events around a run of calls; as the calls come from
Python, and as the replay of a CUDA graph that holds a call on each set. On the CPU (for the tests of this) by the clock.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from . import timing
from .output import finite

_LEAST_CACHE = 60 << 20  # bytes: an H100's or H200's L2
_MOST_SETS = 512
_ROUNDS_OF_CACHE = 3
Call = Callable[[int], Any]  # computes on the set of buffers of this number


def sets_of(bytes_a_call: int, device: torch.device) -> int:
    """How many sets of buffers exceed the L2 cache several times; few for large ones, and at most some hundreds."""
    if device.type == "cpu":
        return 2
    cache = max(_LEAST_CACHE, int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)))
    free = torch.cuda.mem_get_info(device)[0]
    wanted = math.ceil(_ROUNDS_OF_CACHE * cache / max(bytes_a_call, 1))
    # A contender keeps its results, and one of them works in the other memory format: a set is there several times.
    return max(1, min(max(wanted, 2), _MOST_SETS, free // 12 // max(bytes_a_call, 1)))


def synchronised(device: torch.device) -> timing.Clock:
    """A clock that waits for the device."""
    if device.type == "cpu":
        return time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


class Turns:
    """A contender that goes on to the next set with each call. A result lives until its set comes round again."""

    calls = 1

    def __init__(self, call: Call, sets: int) -> None:
        self._call = call
        self._next = 0
        self.kept: list[Any] = [None] * sets

    def __call__(self) -> None:
        self.kept[self._next] = self._call(self._next)
        self._next = (self._next + 1) % len(self.kept)

    def round(self) -> None:
        """One call on each set."""
        for _ in self.kept:
            self()


class Graph:
    """The same as a CUDA graph of one call on each set; a replay counts as so many calls. On the CPU, those calls."""

    def __init__(self, call: Call, sets: int, device: torch.device) -> None:
        self.calls = sets
        self._turns = turns = Turns(call, sets)
        if device.type == "cpu":
            self._replay: Callable[[], Any] = turns.round
            return
        # Plans, packed weights and cuDNN's choice are made before; on another stream, as PyTorch wants it.
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            turns.round()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            turns.round()
        self._replay = graph.replay

    def __call__(self) -> None:
        self._replay()

    @property
    def kept(self) -> list[Any]:
        return self._turns.kept


def seconds_a_call(run: Turns | Graph, times: int, device: torch.device) -> float:
    """Over ``times`` runs, in the device's own time."""
    if device.type == "cpu":
        return timing.seconds_a_call(run, times, time.perf_counter) / run.calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / (times * run.calls)


def compete(
    runs: Mapping[str, Turns | Graph],
    device: torch.device,
    failed: dict[str, str],
    repeat: int = 9,
    seconds: float = 4.0,
    least: float = 2e-3,
) -> dict[str, dict[str, Any]]:
    """Time the contenders side by side: name -> median and quantiles in milliseconds. One that raises goes to ``failed``."""
    samplers: dict[str, timing.Sampler] = {}
    clock = synchronised(device)
    times = {}
    for name, run in runs.items():
        try:
            run()
            times[name] = timing.autorange(run, least, clock)
        except Exception as error:  # the others are still to be timed
            failed[name] = sentence(error)
            continue

        def take(name: str = name, run: Turns | Graph = run) -> timing.Sample:
            try:
                return timing.Sample(seconds_a_call(run, times[name], device))
            except Exception as error:
                failed[name] = sentence(error)
                raise timing.Lost from error

        samplers[name] = take
    taken = timing.rounds(samplers, repeat, seconds)
    found = {}
    for name, samples in taken.items():
        measured = timing.Timing.of(samples, times[name] * runs[name].calls, min(timing.FEWEST, repeat))
        found[name] = {key: value for key, value in measured.as_dict().items() if key not in ("left_out", "contested")}
    return found


def sentence(error: BaseException) -> str:
    """An error for a table: its type and the beginning of what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def ratio(theirs: float | None, ours: float | None) -> float | None:
    return finite(theirs / ours) if theirs and ours else None


def release(device: torch.device) -> None:
    """Give back what a case has used: graphs hold memory of their own until they are gone."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
