"""A converted network's call beside the native calls that it is made of: what do the checks, Python and the way between the two cost?

    python bench/network_calls.py --json bench/results/network_calls.json [--threads 1 2]

Each network in float32, batch 1, the memory format that networks are given (contiguous). Times in turn, medians, in microseconds:

- ``call``: the model. ``parts``: its native calls, and the layers that are called between or behind them if there are any, without a check.
- ``checks``: all that a repeated call depends on, looked at in a loop (warm); ``cold``: the same once between two calls. On one thread:
  a call's threads look at the bytes of the parameters together.
- ``in turn``: batch 1 and batch 2 alternating, over as many calls of either in a row.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import fused_resnet
from fused_resnet import _machine, _plain, cases
from fused_resnet.benchmark.output import progress, table, write_json
from fused_resnet.benchmark.timing import interleave
from fused_resnet.runtime.bound import BoundCall


def checks_of(model: Any, x: Tensor) -> Callable[[], None]:
    """All that a repeated call of ``model`` looks at before its native calls."""
    decision = model._fused_resnet.current
    graph = decision.inlined
    cached = list(graph.store.cached.values())

    def check() -> None:
        if not decision.holds(model) or not graph.holds(model) or cached[0].find(x) is None or not cached[0].guard.holds():
            raise SystemExit("something changed between two calls of the same model")

    return check


def parts_of(model: Any, x: Tensor) -> Callable[[], Tensor]:
    """The native calls and the called layers of ``model``, one after the other."""
    graph = model._fused_resnet.current.inlined
    steps: list[Callable[[Tensor], Tensor]] = []
    value = x
    for part in graph.parts:
        if part.segment is not None:
            found = graph.store.cached[part.segment.number].find(value)
            if found is None:
                raise SystemExit("a native part of the network is not repeated")
            steps.append(found[0])
            value = found[0](value)
        else:
            for node in part.nodes:
                if not isinstance(node, BoundCall):
                    raise SystemExit(f"a {type(node).__name__} runs by itself")
                steps.append(partial(_called, node))
                value = steps[-1](value)

    def run() -> Tensor:
        value = x
        for step in steps:
            value = step(value)
        return value

    return run


def _called(node: BoundCall, x: Tensor) -> Tensor:
    result: Tensor = node.function(x, *node.args, **node.kwargs)
    return result


def cold(check: Callable[[], None], call: Callable[[], Any], count: int) -> float:
    """Seconds of ``check`` right after ``call``, the median of ``count``."""
    taken = []
    for _ in range(count):
        call()
        start = time.perf_counter()
        check()
        taken.append(time.perf_counter() - start)
    return median(taken)


def measure(name: str, seconds: float) -> dict[str, Any]:
    size, make = cases.NETWORKS[name]
    model: Any = _plain.randomise(make(), torch.Generator().manual_seed(0)).eval()
    fused_resnet.fuse_(model)
    one, two = torch.randn(1, 3, size, size), torch.randn(2, 3, size, size)
    for x in (one, two, one):
        model(x)
    parts, check = parts_of(model, one), checks_of(model, one)
    if not torch.equal(parts(), model(one)):
        raise SystemExit(f"the parts of {name} are not what it does")

    def in_turn() -> None:
        for _ in range(3):
            model(one), model(two)

    def in_a_row() -> None:
        for x in (one, two):
            model(x), model(x), model(x)

    # Those that are compared, by themselves and several calls in a row: what another kind of call leaves in the caches is not theirs.
    compared: list[dict[str, Callable[[], Any]]] = [
        {"call": lambda: model(one), "parts": parts},
        {"in turn": in_turn, "in a row": in_a_row},
        {"checks": check},
    ]
    timings = {}
    for contenders in compared:
        timings |= interleave(contenders, repeat=15, seconds=seconds / len(compared), least=25e-3)
    us = {key: 1e3 * timing.as_dict()["median_ms"] for key, timing in timings.items()}
    found = {"call_us": us["call"], "parts_us": us["parts"], "checks_us": us["checks"]}
    found["cold_checks_us"] = 1e6 * cold(check, lambda: model(one), 31)
    contested = any(timing.as_dict()["contested"] for timing in timings.values())
    return {**found, "overhead": us["call"] / us["parts"] - 1, "in_turn": us["in turn"] / us["in a row"], "contested": contested}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=tuple(cases.NETWORKS), default=tuple(cases.NETWORKS))
    parser.add_argument("--threads", type=int, nargs="+", default=(1, torch.get_num_threads()))
    parser.add_argument("--seconds", type=float, default=20, help="for each network, at most")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results, rows = [], []
    every = list(product(sorted(set(options.threads)), options.networks))
    with torch.no_grad(), progress(len(every), "networks") as step:
        for threads, name in every:
            step(name)
            torch.set_num_threads(threads)
            found = measure(name, options.seconds)
            results.append({"threads": threads, "network": name, **found})
            times = [f"{found[key]:.0f}" for key in ("call_us", "parts_us", "checks_us", "cold_checks_us")]
            rows.append([threads, name, *times, f"{100 * found['overhead']:.1f} %", f"{found['in_turn']:.3f}"])
    print(table(["threads", "network", "call us", "parts us", "checks us", "cold", "overhead", "in turn / in a row"], rows))
    print(_machine.short())
    write_json(options.json, {"machine": _machine.describe(paths=False), "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
