"""Timing of several contenders side by side: their samples are interleaved, so that they share whatever the machine is doing.

A round takes one sample of each contender; each round starts with the next one, so that none always runs behind the same
neighbour. A sample is a loop of enough calls to be well above the clock's resolution; where it is taken, in this process or in
one of the contender's own, is the sampler's business. Samples during which a foreign process held one of the cores are left
out. What is reported are medians and the 20 % and 80 % quantiles of the samples, in seconds a call.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Call = Callable[[], Any]
Clock = Callable[[], float]

FEWEST = 3  # rounds under which a median says little


class Lost(Exception):
    """A sampler can give no more samples. Its contender is left out from then on; the others are timed on."""


@dataclass(frozen=True)
class Sample:
    """One sample. ``disturbed``: another process held a core meanwhile."""

    seconds: float
    disturbed: bool = False


Sampler = Callable[[], Sample]


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median and quantiles over ``len(samples)`` samples of ``inner`` calls each.

    ``left_out``: samples that did not count because another process held a core. ``contested``: there were so many of them
    that all samples count after all; the figures are then not to be trusted.
    """

    samples: tuple[float, ...]
    inner: int
    left_out: int = 0
    contested: bool = False

    @classmethod
    def of(cls, samples: Sequence[Sample], inner: int, fewest: int = FEWEST) -> Timing:
        """What the calm ones of these samples say, or all of them if fewer than ``fewest`` were calm."""
        calm = [sample.seconds for sample in samples if not sample.disturbed]
        if len(calm) < fewest:
            return cls(tuple(sample.seconds for sample in samples), inner, 0, True)
        return cls(tuple(calm), inner, len(samples) - len(calm))

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
        if seconds_a_call(call, inner, clock) * inner >= least:
            return inner
        inner *= 2


def seconds_a_call(call: Call, inner: int, clock: Clock) -> float:
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


def rounds(
    samplers: Mapping[str, Sampler], repeat: int = 20, seconds: float = math.inf, clock: Clock = time.perf_counter
) -> dict[str, list[Sample]]:
    """Take samples in rounds until ``repeat`` of each contender are calm, at most 3 * repeat rounds, fewer if ``seconds`` pass
    first, but never under FEWEST. A contender that is lost on the way is missing from the result.
    """
    taken: dict[str, list[Sample]] = {name: [] for name in samplers}
    begin = clock()
    for done in range(3 * repeat):
        calm = [sum(not sample.disturbed for sample in samples) for samples in taken.values()]
        if min(calm, default=repeat) >= repeat or (done >= FEWEST and clock() - begin >= seconds):
            break
        names = list(taken)
        shift = done % len(names)
        for name in names[shift:] + names[:shift]:
            try:
                taken[name].append(samplers[name]())
            except Lost:
                del taken[name]
    return taken


def interleave(
    contenders: Mapping[str, Call],
    repeat: int = 20,
    seconds: float = math.inf,
    least: float = 1e-3,
    warmup: int = 2,
    clock: Clock = time.perf_counter,
    contested: Callable[[], Callable[[], bool]] = lambda: Contention().much,
) -> dict[str, Timing]:
    """Time contenders that all live in this process, as ``rounds`` does.

    ``least``: shortest sample in seconds. ``warmup``: calls of each before anything is measured (compilation, packing, caches).
    ``contested``: called before a sample; what it returns is called after it and says whether the sample is to be left out.
    """
    for call in contenders.values():
        for _ in range(warmup):
            call()
    inner = {name: autorange(call, least, clock) for name, call in contenders.items()}

    def sampler(name: str) -> Sampler:
        def take() -> Sample:
            disturbed = contested()
            taken = seconds_a_call(contenders[name], inner[name], clock)
            return Sample(taken, disturbed())

        return take

    taken = rounds({name: sampler(name) for name in contenders}, repeat, seconds, clock)
    return {name: Timing.of(samples, inner[name], min(FEWEST, repeat)) for name, samples in taken.items()}


def geometric_mean(ratios: Iterable[float]) -> float:
    """exp of the mean log; nan for none."""
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan
