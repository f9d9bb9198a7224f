"""Special values (NaN, infinities, a negative zero, a denormal, the largest) at chosen places of an operand."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_resnet import testing
from fused_resnet.cases import ConvCase, Operands

SPECIAL = ("nan", "inf", "-inf", "-0", "denormal", "max")


def value_of(special: str, dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    return {"denormal": info.tiny * info.eps, "max": info.max}.get(special) or float(special.replace("-0", "-0.0"))


def plant(t: Tensor, place: int, special: str) -> Tensor:
    """A copy with the value at one place along the channels and the first, middle or last of everything else."""
    t = t.clone()
    if special == "denormal":
        t.zero_()  # beside anything else it would be absorbed
    index = [(place * (n - 1)) // 2 for n in t.shape]  # place 0, 1, 2: first, middle, last
    t[tuple(index)] = value_of(special, t.dtype)
    return t


def operands_with(
    case: ConvCase, dtype: torch.dtype, operand: str, place: int, special: str, generator: torch.Generator
) -> Operands:
    operands = testing.integer_operands(case, dtype, generator)
    if special == "denormal":  # whatever is added to it must be 0
        absorbing = ("bias", "shortcut") if operand in ("input", "weight") else ("input", "bias", "shortcut")
        operands = operands._replace(**{field: torch.zeros_like(getattr(operands, field)) for field in absorbing})
    if special == "max":  # ones: nothing that could overflow in only one order
        operands = operands._replace(input=operands.input.sign(), weight=operands.weight.sign())
    return operands._replace(**{operand: plant(getattr(operands, operand), place, special)})
