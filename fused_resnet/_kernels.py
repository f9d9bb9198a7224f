"""Calls into the compiled module: plans, packed weights, pointers. Without it, the same functions through PyTorch.

A plan is made once for each combination of shapes, strides and parameters (which is also when the arguments are checked)
and kept: a repeated call costs one look-up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._arguments import Padding, Pair, check_convolution, is_channels_last
from ._derived import derive
from ._extension import cpu
from ._select import reasons

Plan = Callable[[Tensor, Tensor, "Tensor | None", "Tensor | None"], Tensor]

_DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
_MOST_PLANS = 4096  # beyond this many shapes, start over: a plan is cheap to make again
_plans: dict[Any, Plan | None] = {}


def _layout(t: Tensor | None) -> Any:
    return None if t is None else (t.shape, t.stride(), t.dtype, t.device)


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shortcut: Tensor | None,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    relu: bool,
) -> Plan | None:
    """The plan of one convolution, or None where the general path serves."""
    return None


def bias_add_relu(
    input: Tensor, bias: Tensor | None, shortcut: Tensor | None, relu: bool, dtype: torch.dtype, owned: bool
) -> Tensor:
    """relu(input + bias + shortcut) as ``dtype``; writes over ``input`` where that is ``owned`` and fits."""
    output = input
    if bias is not None:
        output = output + bias.to(output.dtype)[:, None, None]
    if shortcut is not None:
        output = output + shortcut
    output = torch.relu(output) if relu else output
    output = output.to(dtype)
    if output is input and not owned:
        output = output.clone()
    return output.contiguous(memory_format=torch.channels_last if is_channels_last(input) else torch.contiguous_format)


def relu_backward(grad: Tensor, output: Tensor, bias_grad: bool) -> tuple[Tensor, Tensor]:
    """grad where not (output <= 0), else 0, in output's memory format; and its sum over N, P, Q [K], if asked for."""
    masked = torch.empty_like(output)
    masked.copy_(torch.where(output <= 0, 0, grad))
    return masked, masked.sum((0, 2, 3)) if bias_grad else masked.new_empty(0)
