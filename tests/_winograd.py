"""Winograd convolution on paper: its transforms, and its rounding error as formulas.

In one dimension an output is y = A [(G g) * (B d)], with one product at each position j. Let input and weight be independent,
of zero mean and equal size. Then a product at position j has the variance |G_j|^2 |B_j|^2, with rows G_j and B_j, and output i,
which weighs it with A_ij, a value of variance 3. Roundings are relative to what is rounded, so they are larger than those of a
sum of the same length by the root of

    loss_i = sum over j of A_ij^2 |G_j|^2 |B_j|^2 / 3            in one dimension, the product of two of them in two

Direct convolution has loss 1. F(2x2, 3x3) has 1.7, with a ninth of the roundings (C instead of 9 C additions) and so a smaller
error; F(4x4, 3x3) has 2.1 to 8.2, 4.8 on average.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet import testing
from fused_resnet.cases import Operands
from fused_resnet.testing.compare import accumulator, unit_roundoff

# (m, step, alpha): an output tile of m x m pixels, from an input tile of alpha x alpha, the next one `step` further.
TILES = {("winograd2", 1): (2, 2, 4), ("winograd2", 2): (2, 4, 5), ("winograd4", 1): (4, 4, 6)}


def transforms(algorithm: str, stride: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """A [m, alpha], G [alpha, 3] and B [alpha, alpha] of csrc/cpu/winograd_transforms.h."""
    rows: tuple[list[list[float]], ...]
    if (algorithm, stride) == ("winograd2", 1):
        rows = (
            [[1, 1, 1, 0], [0, 1, -1, -1]],
            [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]],
            [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
        )
    elif algorithm == "winograd2":
        rows = (
            [[1, 1, 0, 1, 0], [0, 1, 1, 0, 1]],
            [[1, 0, 0], [1, 0, 1], [0, 0, 1], [0, 1, 0], [0, 1, 0]],
            [[1, 0, -1, 0, 0], [0, 0, 1, 0, 0], [0, 0, -1, 0, 1], [0, 1, 0, 0, 0], [0, 0, 0, 1, 0]],
        )
    else:
        a, b = 5 / 8, 3 / 2
        p, q, n, o = a * a, b * b, 1 / (2 * a * a * (a * a - b * b)), 1 / (2 * b * b * (b * b - a * a))
        rows = (
            [[1, 1, 1, 1, 1, 0], [0, a, -a, b, -b, 0], [0, p, p, q, q, 0], [0, a * p, -a * p, b * q, -b * q, 1]],
            [[1 / (p * q), 0, 0], [n, a * n, p * n], [n, -a * n, p * n], [o, b * o, q * o], [o, -b * o, q * o], [0, 0, 1]],
            [
                [p * q, 0, -p - q, 0, 1, 0],
                [0, -a * q, -q, a, 1, 0],
                [0, a * q, -q, -a, 1, 0],
                [0, -b * p, -p, b, 1, 0],
                [0, b * p, -p, -b, 1, 0],
                [0, p * q, 0, -p - q, 0, 1],
            ],
        )
    one, two, three = (torch.tensor(r, dtype=torch.float64) for r in rows)
    return one, two, three


def losses(algorithm: str, stride: int = 1) -> Tensor:
    """loss_i of the m outputs of one dimension."""
    a, g, b = transforms(algorithm, stride)
    return a.square() @ (g.square().sum(1) * b.square().sum(1)) / 3


def norm_bound(algorithm: str, stride: int, channels: int, dtype: torch.dtype) -> float:
    """Of ||error|| / ||convolution||, before bias and shortcut.

    The sum over C channels rounds C partial sums, whose variances grow evenly to that of the sum: C / 2 roundings of the
    whole. Beside it, two roundings in each direction of the input's transform, one of the weight's, and two in each
    direction of the output's: 9. A rounding has the variance u^2 / 3 times the average of 1 / m^2 over mantissas m, which are
    spread evenly in log m from 1 to 2: 3 / (8 log 2). Over all outputs the loss is the average's square in two dimensions,
    and its root the average. And 1.5 times all that, for data that is not quite the model's.
    """
    u = unit_roundoff(accumulator(dtype))
    variance = (channels / 2 + 9) / 3 * 3 / (8 * math.log(2))
    return 1.5 * u * float(losses(algorithm, stride).mean()) * math.sqrt(variance)


def largest_loss(algorithm: str, stride: int) -> float:
    """Of the errors' size over direct convolution's, at the output of a tile where it is largest."""
    return 1.0 if algorithm == "direct" else max(1.0, float(losses(algorithm, stride).max()))


def rounds_transforms(isa: str, dtype: torch.dtype) -> bool:
    """Whether the transformed operands are rounded to bfloat16, for instructions that multiply bfloat16."""
    return isa == "avx512_bf16" and dtype == torch.bfloat16


def element_scale(operands: Operands, algorithm: str, isa: str, **parameters: Any) -> float:
    """What ``testing.compare_tensors`` takes as scale: the size of an error at one output; it allows twice that.

    Direct convolution: ``testing.error_scale``. Winograd: that of the same sums, but of a tile's whole input times the
    whole kernel, for a tile mixes them (an output may itself read one small tap of them and zeros beside), and the loss.
    """
    dtype = operands.input.dtype
    scale = testing.error_scale(operands, dtype, **parameters)
    if algorithm == "direct" or not operands.input.numel():
        return scale
    x, w, bias, shortcut = (None if t is None else t.double() for t in operands)
    assert x is not None
    assert w is not None
    stride = parameters["stride"][0] if isinstance(parameters["stride"], tuple) else parameters["stride"]
    alpha = TILES[algorithm, stride][2]
    tiles = F.avg_pool2d(x.square(), alpha, 1, alpha // 2, count_include_pad=True, divisor_override=1)
    taps = w.square().sum((2, 3))
    squares = float((taps @ tiles.flatten(2)).max()) * 9 / alpha**2  # over 9 of alpha^2 pixels, as an output's sum is
    for t in (bias, shortcut):
        squares += 0.0 if t is None else float(t.square().max())
    length = w[0].numel() + 2
    loss = largest_loss(algorithm, stride)
    size = unit_roundoff(accumulator(dtype)) * math.sqrt(length)
    if rounds_transforms(isa, dtype):
        size += unit_roundoff(torch.bfloat16) * math.sqrt(2)  # two operands of each term
    return max(scale, loss * size * math.sqrt(squares))
