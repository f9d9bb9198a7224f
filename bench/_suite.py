"""One benchmark of pytest-benchmark: the contender is compared with float64 before it is timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fused_resnet import _machine
from fused_resnet.cli import _contenders

NAMES = [name for name in _contenders.CONTENDERS if not _contenders.missing(name)]


def run(benchmark: Any, case: _contenders.Case, batch: int, contender: str) -> None:
    """Time one contender of one case, float32, under inference_mode; benchmarks of one case and batch share a group."""
    contest = _contenders.prepare(case, batch, torch.float32, "forward", [contender], seed=0)
    try:
        errors = contest.errors()[contender]
        assert contest.ok(errors), f"{contender} is wrong: {errors}, allowed {contest.allowed}"
        benchmark.group = f"{case.name}, batch {batch}"
        benchmark.extra_info.update(
            contender=contender,
            error=errors["error"],
            gflop=case.flops(batch) / 1e9,
            threads=torch.get_num_threads(),
            machine=_machine.short(),
        )
        benchmark.pedantic(contest.calls[contender], rounds=30, iterations=_iterations(case, batch), warmup_rounds=3)
    finally:
        contest.close()


def _iterations(case: _contenders.Case, batch: int) -> int:
    """Calls a sample: about 0.1 GFLOP, some milliseconds at most, and well above the clock's resolution."""
    return max(1, min(100, round(1e8 / case.flops(batch))))


contenders = pytest.mark.parametrize("contender", NAMES)
batches = pytest.mark.parametrize("batch", [1, 8])
