"""The definition of every operation in this package, in plain PyTorch.

Each function here has the name and the signature of the fused one; what it returns is what the fused one must return. It is
the only specification: the tests, ``python -m fused_resnet check`` and the benchmarks all compare with this file.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["bias_add_relu", "conv_bias_add_relu"]


def conv_bias_add_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    shortcut: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    relu: bool = True,
) -> Tensor:
    """``relu(conv2d(input, weight, bias) + shortcut)``: the second half of a residual block (He et al. 2015, eq. 1).

    Shapes: input [N, C, H, W], weight [K, C / groups, R, S], bias [K], shortcut and result [N, K, P, Q].
    bfloat16 and float16 operands are computed in float32 and rounded once, at the end.
    """
    dtype = input.dtype
    if dtype in (torch.bfloat16, torch.float16):
        input, weight = input.float(), weight.float()
        bias = None if bias is None else bias.float()
        shortcut = None if shortcut is None else shortcut.float()
    output = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    if shortcut is not None:
        output = output + shortcut
    if relu:
        output = F.relu(output)
    return output.to(dtype)


def bias_add_relu(
    input: Tensor,
    bias: Tensor | None = None,
    shortcut: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    """``relu(input + bias + shortcut)``: the end of a residual block whose normalisation is live.

    Shapes: input, shortcut and result [N, K, P, Q], bias [K].
    """
    dtype = input.dtype
    output = input.float() if dtype in (torch.bfloat16, torch.float16) else input
    if bias is not None:
        output = output + bias.to(output.dtype)[:, None, None]
    if shortcut is not None:
        output = output + shortcut
    output = F.relu(output) if relu else output.clone()
    return output.to(dtype)
