"""How long does one convolution with bias, shortcut and ReLU take, beside PyTorch's three calls?"""

from __future__ import annotations

from typing import Any

import pytest
from _suite import batches, contenders, run
from cases import CONVS, ConvCase


@contenders
@batches
@pytest.mark.parametrize("case", CONVS, ids=lambda case: case.name)
def test_operator(benchmark: Any, case: ConvCase, batch: int, contender: str) -> None:
    run(benchmark, case, batch, contender)


@contenders
def test_small_call(benchmark: Any, contender: str) -> None:
    """What a call costs when there is next to nothing to compute: [1, 16, 4, 4]."""
    run(benchmark, ConvCase(16, 16, (4, 4), (3, 3), padding=(1, 1), shortcut=True), 1, contender)
