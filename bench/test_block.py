"""How long does a residual block take before and after ``fuse_``?"""

from __future__ import annotations

from typing import Any

import pytest
from _suite import batches, contenders, run
from cases import BLOCKS, BlockCase


@contenders
@batches
@pytest.mark.parametrize("case", BLOCKS, ids=lambda case: case.name)
def test_block(benchmark: Any, case: BlockCase, batch: int, contender: str) -> None:
    run(benchmark, case, batch, contender)
