"""Operands of a convolution: small integers whose sums are exact, floats, and the memory layouts an operand may have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..cases import ConvCase, Operands

# Largest absolute value of an integer operand.
MAGNITUDE = {torch.float64: 8, torch.float32: 8, torch.bfloat16: 2, torch.float16: 2}

# Every integer up to here is representable: 2 to the number of significand bits. What must stay below is, for bfloat16 and
# float16, the *output* (their accumulator is float32, which is wider).
EXACT = {torch.float64: 2**53, torch.float32: 2**24, torch.bfloat16: 2**8, torch.float16: 2**11}


def terms(dtype: torch.dtype) -> int:
    """How many products one output may sum so that every result is exact, whatever the order of the additions.

    With operands of at most m, an output is at most terms * m^2 + m (bias) + m (shortcut), and so is every partial sum.
    Up to EXACT[dtype] all of these are integers that the format holds: no addition rounds, and neither does the store.
    float32: (2^24 - 16) / 64 = 262143 terms, more than any convolution here has. bfloat16: (256 - 4) / 4 = 63 terms.
    """
    m = MAGNITUDE[dtype]
    return (EXACT[dtype] - 2 * m) // (m * m)


def integers(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Integers in [-m, m], half of them zero: sums that are exactly 0, where a wrong ReLU mask shows, are then common."""
    m = MAGNITUDE[dtype]
    values = torch.randint(-m, m + 1, shape, generator=generator)
    return (values * torch.randint(0, 2, shape, generator=generator)).to(dtype)


def _sparse_weight(case: ConvCase, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Integer weights with at most ``terms(dtype)`` that are not zero for each output channel, at random places."""
    k, most = case.outputs, terms(dtype)
    if case.reduction <= most:
        return integers(case.weight_shape, dtype, generator)
    m = MAGNITUDE[dtype]
    flat = torch.zeros(k, case.reduction)
    places = torch.rand(k, case.reduction, generator=generator).argsort(1)[:, :most]
    values = torch.randint(1, m + 1, (k, most), generator=generator)
    signs = torch.randint(0, 2, (k, most), generator=generator) * 2 - 1
    return flat.scatter_(1, places, (values * signs).float()).reshape(case.weight_shape).to(dtype)


def integer_operands(case: ConvCase, dtype: torch.dtype, generator: torch.Generator) -> Operands:
    """Operands for which every correct direct convolution gives the same bits."""
    return Operands(
        integers(case.input_shape, dtype, generator),
        _sparse_weight(case, dtype, generator),
        integers((case.outputs,), dtype, generator) if case.bias else None,
        integers(case.output_shape, dtype, generator) if case.shortcut else None,
    )


def float_operands(case: ConvCase, dtype: torch.dtype, generator: torch.Generator) -> Operands:
    """Normal operands, drawn in float64 and rounded to ``dtype``."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return Operands(
        normal(*case.input_shape),
        normal(*case.weight_shape) * case.reduction**-0.5,
        normal(case.outputs) if case.bias else None,
        normal(*case.output_shape) if case.shortcut else None,
    )


def unit_gradient(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A gradient of -1, 0 and 1 for integer operands, with so few that are not 0 that every gradient is exact.

    Each element of the four gradients is a sum over some of this one's elements, each times at most m: with no more than
    EXACT[dtype] / m that are not 0, every sum, in any order, is an integer that the format holds.
    """
    count = 1
    for n in shape:
        count *= n
    most = min(EXACT[dtype] // MAGNITUDE[dtype], count // 2)
    flat = torch.zeros(count)
    places = torch.randperm(count, generator=generator)[:most]
    flat[places] = torch.randint(0, 2, (most,), generator=generator).float() * 2 - 1
    return flat.reshape(shape).to(dtype)


def _sliced(t: Tensor) -> Tensor:
    """Cut out of the middle of a buffer that is larger along every axis and filled with NaN: a read outside shows."""
    buffer = t.new_full([n + 3 for n in t.shape], float("nan"))
    view = buffer[tuple(slice(1, 1 + n) for n in t.shape)]
    return view.copy_(t)


def _stepped(t: Tensor) -> Tensor:
    """Every second element of a buffer, along the last two axes (along the only one for a vector)."""
    buffer = t.new_full([*t.shape[:-2], *(2 * n for n in t.shape[-2:])], float("nan"))
    view = buffer[..., ::2, ::2] if t.dim() > 1 else buffer[::2]
    return view.copy_(t)


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.contiguous()


def _sliced_channels_last(t: Tensor) -> Tensor:
    """A channels_last tensor cut out of one with more channels: what splitting a map by channels gives."""
    if t.dim() != 4:
        return _sliced(t)
    n, c, h, w = t.shape
    buffer = t.new_full((n, h, w, c + 5), float("nan"))
    return buffer[..., 2 : 2 + c].permute(0, 3, 1, 2).copy_(t)


def _offset(t: Tensor) -> Tensor:
    """Contiguous, but starting one element into its buffer: not aligned to any vector."""
    buffer = t.new_full((t.numel() + 1,), float("nan"))
    return buffer[1:].view(t.shape).copy_(t)


def _transposed(t: Tensor) -> Tensor:
    """Height and width exchanged in memory."""
    return t.mT.contiguous().mT if t.dim() == 4 else t.contiguous()


def _expanded(t: Tensor) -> Tensor:
    """Stride 0 along the batch and both spatial axes. The values are those of the first row, column and image."""
    return t[:1, :, :1, :1].expand(t.shape) if t.dim() == 4 and t.numel() else t[:1].expand(t.shape) if t.numel() else t


# Each gives a tensor of the same shape and dtype; all but ``expanded`` keep the values too.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": _channels_last,
    "sliced": _sliced,
    "sliced channels_last": _sliced_channels_last,
    "stepped": _stepped,
    "offset": _offset,
    "transposed": _transposed,
    "expanded": _expanded,
}


def layout(operands: Operands, **names: str) -> Operands:
    """Lay out some operands anew: ``layout(operands, input="channels_last", shortcut="expanded")``."""
    changed: dict[str, Any] = {}
    for operand, name in names.items():
        t = getattr(operands, operand)
        changed[operand] = None if t is None else LAYOUTS[name](t)
    return operands._replace(**changed)
