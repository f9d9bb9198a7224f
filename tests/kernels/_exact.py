"""What tests of exact integers, and of Winograd, share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from _calls import plan_of
from torch import Tensor

import fused_resnet
from fused_resnet import _settings
from fused_resnet._extension import cpu
from fused_resnet.cases import ConvCase, Operands

ISAS = cpu.available_isas() if cpu is not None else ["none"]


def winograd_fits(case: ConvCase, algorithm: str = "winograd2") -> bool:
    """F(2x2, 3x3) is also there for stride 2."""
    strides = [(1, 1), (2, 2)] if algorithm == "winograd2" else [(1, 1)]
    return case.kernel == (3, 3) and case.stride in strides and case.dilation == (1, 1) and case.groups == 1


EXACT_ALGORITHMS = pytest.mark.parametrize("algorithm", ["direct", "winograd2"], indirect=True)


WINOGRAD = ("winograd2", "winograd4")


def fits(case: ConvCase, algorithm: str) -> bool:
    return algorithm == "direct" or winograd_fits(case, algorithm)


def algorithm_of(operands: Operands, **parameters: Any) -> str:
    return str(plan_of(operands, **parameters).kernel.algorithm)  # type: ignore[attr-defined]


def shape_only(case: ConvCase, dtype: torch.dtype = torch.float32) -> Operands:
    """Operands of these shapes on one element of memory."""
    x, w = (torch.zeros((), dtype=dtype).expand(shape) for shape in (case.input_shape, case.weight_shape))
    return Operands(x, w, None, None)


def kernel_of(case: ConvCase, dtype: torch.dtype = torch.float32) -> Any:
    return plan_of(shape_only(case, dtype), **case.parameters).kernel  # type: ignore[attr-defined]


def results_of(numerics: str, call: Callable[[], Tensor]) -> Tensor:
    _settings.change(algorithm="auto")
    fused_resnet.set_numerics(numerics)
    return call()
