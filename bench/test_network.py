"""How long does a whole network take before and after ``fuse_``?"""

from __future__ import annotations

from typing import Any

import pytest
from _suite import batches, contenders, run
from cases import NETWORKS

from fused_resnet.benchmark.contest import NetworkCase


@contenders
@batches
@pytest.mark.parametrize("name", NETWORKS)
def test_network(benchmark: Any, name: str, batch: int, contender: str) -> None:
    run(benchmark, NetworkCase(name), batch, contender)
