"""Timing of several contenders side by side: their samples are interleaved, so that they share whatever the machine is doing.

A round takes one sample of each contender; each round starts with the next one, so that none always runs behind the same
neighbour. A sample is a loop of enough calls to be well above the clock's resolution. Rounds in which another process held
one of our cores are left out, for all contenders alike. What is reported are medians and the
20 % and 80 % quantiles of the samples, in seconds a call.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Call = Callable[[], Any]
Clock = Callable[[], float]

FEWEST = 3  # rounds under which a median says little


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median and quantiles over ``len(samples)`` samples of ``inner`` calls each.

    ``left_out``: rounds that did not count because another process held a core. ``contested``: there were so many of them
    that all rounds count after all; the figures are then not to be trusted.
    """

    samples: tuple[float, ...]
    inner: int
    left_out: int = 0
    contested: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def q20(self) -> float:
        return quantile(self.samples, 0.2)

    @property
    def q80(self) -> float:
        return quantile(self.samples, 0.8)

    def as_dict(self) -> dict[str, Any]:
        return {
            "median_ms": self.median * 1e3,
            "q20_ms": self.q20 * 1e3,
            "q80_ms": self.q80 * 1e3,
            "samples": len(self.samples),
            "inner": self.inner,
            "left_out": self.left_out,
            "contested": self.contested,
        }


def quantile(samples: Iterable[float], q: float) -> float:
    """The q-quantile with linear interpolation between the sorted samples."""
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def autorange(call: Call, least: float, clock: Clock = time.perf_counter) -> int:
    """How many calls make a sample of at least ``least`` seconds (a power of two, found by doubling)."""
    inner = 1
    while True:
        if _sample(call, inner, clock) * inner >= least:
            return inner
        inner *= 2


def _sample(call: Call, inner: int, clock: Clock) -> float:
    start = clock()
    for _ in range(inner):
        call()
    return (clock() - start) / inner


class Contention:
    """The share of their time that this process's threads spent waiting for a core, since the object was made.

    Threads of one parallel loop wait for each other: where another process holds one of the cores, a loop of 1 ms takes one
    or more of the scheduler's turns (some 10 ms), and whoever has fewer loops looks faster than it is.
    """

    MUCH = 0.05  # beyond this share, a ratio says more of the other process than of ours

    def __init__(self, folder: Path = Path("/proc/self/task")) -> None:
        self._folder = folder
        self._before = self._read()

    def _read(self) -> dict[str, tuple[int, int]]:
        """Thread -> nanoseconds on a core, nanoseconds ready to run but waiting for one. Empty where the system does not tell."""
        times = {}
        for file in self._folder.glob("*/schedstat"):
            try:
                on_core, waiting, _ = file.read_text().split()
            except (OSError, ValueError):  # the thread has ended
                continue
            times[file.parent.name] = int(on_core), int(waiting)
        return times

    def share(self) -> float | None:
        """Waiting over waiting and running, or None where the system does not tell."""
        on_core = waiting = 0
        for thread, (running, ready) in self._read().items():
            before = self._before.get(thread, (0, 0))
            on_core += running - before[0]
            waiting += ready - before[1]
        return waiting / (on_core + waiting) if on_core + waiting > 0 else None

    def much(self) -> bool:
        return (self.share() or 0.0) > self.MUCH


def interleave(
    contenders: Mapping[str, Call],
    repeat: int = 20,
    seconds: float = math.inf,
    least: float = 1e-3,
    warmup: int = 2,
    clock: Clock = time.perf_counter,
    contested: Callable[[], Callable[[], bool]] = lambda: Contention().much,
) -> dict[str, Timing]:
    """Time the contenders in rounds until ``repeat`` of them count, at most 3 * repeat rounds, fewer if ``seconds`` pass first,
    but never under FEWEST.

    ``least``: shortest sample in seconds. ``warmup``: calls of each before anything is measured (compilation, packing, caches).
    ``contested``: called before a round; what it returns is called after it and says whether the round is to be left out.
    """
    for call in contenders.values():
        for _ in range(warmup):
            call()
    inner = {name: autorange(call, least, clock) for name, call in contenders.items()}
    names = list(contenders)
    rounds: list[tuple[bool, dict[str, float]]] = []
    calm = 0
    begin = clock()
    while calm < repeat and len(rounds) < 3 * repeat:
        if len(rounds) >= FEWEST and clock() - begin >= seconds:
            break
        shift = len(rounds) % len(names)
        disturbed = contested()
        samples = {name: _sample(contenders[name], inner[name], clock) for name in names[shift:] + names[:shift]}
        rounds.append((disturbed(), samples))
        calm += not rounds[-1][0]
    all_count = calm < min(FEWEST, repeat)
    kept = [samples for disturbed_, samples in rounds if all_count or not disturbed_]
    return {
        name: Timing(tuple(samples[name] for samples in kept), inner[name], len(rounds) - len(kept), all_count) for name in names
    }


def geometric_mean(ratios: Iterable[float]) -> float:
    """exp of the mean log; nan for none."""
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan
