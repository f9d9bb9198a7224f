"""One benchmark of pytest-benchmark: the contender is compared with float64 before it is timed."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_resnet import _machine
from fused_resnet.benchmark.contenders import CONTENDERS, missing
from fused_resnet.benchmark.contest import Case, prepare

# In this process, so only those that share torch's threads; `fused-resnet bench` has the others, each in a process of its own.
NAMES = [name for name, contender in CONTENDERS.items() if contender.torch and not missing(name)]


def run(benchmark: Any, case: Case, batch: int, contender: str) -> None:
    """Time one contender of one case, float32, forward; benchmarks of one case and batch share a group."""
    contest = prepare(case, batch, torch.float32, "forward", seed=0)
    module, name = CONTENDERS[contender].builder.split(":")
    built = getattr(importlib.import_module(module), name)(contest.task, torch.get_num_threads(), Path())
    with built.context():
        errors = contest.errors(built.results(built.call()))
        assert contest.ok(errors), f"{contender} is wrong: {errors}, allowed {contest.allowed}"
        benchmark.group = f"{case.name}, batch {batch}"
        benchmark.extra_info.update(
            contender=contender,
            error=errors["error"],
            gflop=case.flops(batch) / 1e9,
            threads=torch.get_num_threads(),
            machine=_machine.short(),
        )
        benchmark.pedantic(built.call, rounds=30, iterations=_iterations(case, batch), warmup_rounds=3)


def _iterations(case: Case, batch: int) -> int:
    """Calls a sample: about 0.1 GFLOP, some milliseconds at most, and well above the clock's resolution."""
    return max(1, min(100, round(1e8 / case.flops(batch))))


contenders = pytest.mark.parametrize("contender", NAMES)
batches = pytest.mark.parametrize("batch", [1, 8])
