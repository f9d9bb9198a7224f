"""Comparisons that say why they fail, and tolerances as formulas.

The envelope for floats, with u the unit roundoff (eps / 2):

    |ours - truth| - u_out |truth|  <=  2 max(PyTorch's largest error, scale),        for every element

- *truth* is the reference in float64.
- *PyTorch's error* is the reference's in the accumulator's type (float32 for float32, bfloat16 and float16): what the library
  does to the same data before the one rounding to the output's type, which the term u_out |truth| allows for.
- *scale* is what such a sum is expected to lose: L additions, each rounding a partial sum of about the size of
  sqrt(sum of squared terms), errors of random sign: u_acc sqrt(L) sqrt(sum (x w)^2 + b^2 + s^2), the largest over the outputs.
  It keeps a tensor of a few elements, where the library may be exact by luck, from failing us. For float64, where the truth is
  no better than the candidate, it is the whole of the tolerance.

A NaN never passes: NaNs and infinities must be at the same places in both tensors before anything is subtracted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..cases import Operands

Operator = Callable[..., Tensor]


@dataclass(frozen=True)
class Comparison:
    """The outcome; ``reason`` is empty when it passed. Errors are absolute, ``allowed`` bounds ``error``."""

    reason: str = ""
    error: float = 0.0
    peer_error: float = 0.0
    allowed: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.reason

    def __bool__(self) -> bool:
        return self.ok


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type in which a convolution of this dtype sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _where(bad: Tensor) -> str:
    return f"{int(bad.sum())} of {bad.numel()} elements, first at {bad.nonzero()[0].tolist()}"


def _special(ours: Tensor, expected: Tensor) -> str:
    """Why shape or NaNs or infinities differ, or ''."""
    if ours.shape != expected.shape:
        return f"shape {list(ours.shape)} instead of {list(expected.shape)}"
    for what, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        bad = test(ours) != test(expected)
        if bad.any():
            return f"{what} in only one of the two: {_where(bad)}"
    return ""


def compare_exact(ours: Tensor, expected: Tensor) -> Comparison:
    """Every element equal, NaN where NaN is expected; dtype and shape too."""
    if ours.dtype != expected.dtype:
        return Comparison(f"dtype {ours.dtype} instead of {expected.dtype}")
    reason = _special(ours, expected)
    if reason:
        return Comparison(reason)
    bad = (ours != expected) & ~torch.isnan(expected)
    if not bad.any():
        return Comparison()
    error = (ours.double() - expected.double())[bad].abs().max().item()
    return Comparison(f"not equal: {_where(bad)}", error)


def compare_tensors(ours: Tensor, truth: Tensor, peer: Tensor, scale: float) -> Comparison:
    """The envelope: ``ours`` and ``peer`` against the float64 ``truth``. ``scale``: see this file's head."""
    reason = _special(ours, truth)
    if reason:
        return Comparison(reason)
    finite = torch.isfinite(truth)
    target = truth[finite]
    if not target.numel():
        return Comparison()
    excess = (ours[finite].double() - target).abs() - unit_roundoff(ours.dtype) * target.abs()
    error = max(excess.max().item(), 0.0)
    # The library may lose a NaN or gain an infinity of its own; that must not widen the bound.
    theirs = (peer[finite].double() - target).abs()
    peer_error = theirs[torch.isfinite(theirs)].max().item() if torch.isfinite(theirs).any() else 0.0
    allowed = 2 * max(peer_error, scale)
    if error <= allowed:
        return Comparison("", error, peer_error, allowed)
    return Comparison(
        f"error {error:.3g} beyond the output's rounding, allowed {allowed:.3g} (PyTorch's own {peer_error:.3g})",
        error,
        peer_error,
        allowed,
    )


def error_scale(operands: Operands, dtype: torch.dtype, cutting: bool = False, **parameters: Any) -> float:
    """u_acc sqrt(L) max sqrt(sum (x w)^2 + b^2 + s^2), over the outputs whose terms are finite.

    ``cutting``: tensor cores add at least 8 products at a time, exactly, and cut the sum where float32 would round it. That loses
    2 u_acc at most, always in the same direction: L / 8 such losses add up, 2 u_acc (L / 8) max sqrt(...), which is then the scale
    where it is more.
    """
    squares = Operands(*(None if t is None else t.double().square() for t in operands))  # type: ignore[arg-type]
    total = reference.conv_bias_add_relu(*squares, **{**parameters, "relu": False})
    total = total[torch.isfinite(total)]
    if not total.numel():
        return 0.0
    length = operands.weight[0].numel() + 2
    additions = max(length**0.5, length / 4) if cutting else length**0.5
    return unit_roundoff(accumulator(dtype)) * float(additions * total.max().sqrt().item())


def tf32_allowed(operands: Operands, **parameters: Any) -> Tensor:
    """What TF32 may add to an output's error: each operand of a product keeps 10 bits behind its first. The tensor cores read
    the upper 19 bits of a float32, which cuts the rest off (2^-10 of the operand at most; rounding would be half of it):

        2 (1 + 2^-11) 2^-10 sum |x w|
    """
    sizes = Operands(operands.input.double().abs(), operands.weight.double().abs(), None, None)
    total = reference.conv_bias_add_relu(*sizes, **{**parameters, "relu": False})
    return 2 * (1 + 2**-11) * 2**-10 * total


def truth_and_peer(operands: Operands, **parameters: Any) -> tuple[Tensor, Tensor]:
    """The reference in float64, and in the accumulator's type, which is PyTorch's own result before the last rounding."""

    def run(dtype: torch.dtype) -> Tensor:
        converted = (None if t is None else t.detach().to(dtype) for t in operands)
        return reference.conv_bias_add_relu(*converted, **parameters)  # type: ignore[arg-type]

    return run(torch.float64), run(accumulator(operands.input.dtype))


def compare_forward(function: Operator, operands: Operands, exact: bool, cutting: bool = False, **parameters: Any) -> Comparison:
    """``function`` against the reference on one set of operands: equal for integer data, else within the envelope (``cutting``:
    as in ``error_scale``).

    The memory format must be the one that eager ``conv2d`` gives, and the result must own its memory.
    """
    with torch.no_grad():
        ours = function(*operands, **parameters)
        dtype = operands.input.dtype
        if ours.dtype != dtype:
            return Comparison(f"dtype {ours.dtype} instead of {dtype}")
        eager = F.conv2d(
            operands.input,
            operands.weight,
            None,
            *(parameters.get(name, default) for name, default in _GEOMETRY.items()),
        )
        if ours.shape == eager.shape and ours.stride() != eager.stride():
            return Comparison(f"strides {ours.stride()} where eager conv2d gives {eager.stride()}")
        storage = ours.untyped_storage().data_ptr()
        if ours.numel() and any(t is not None and t.untyped_storage().data_ptr() == storage for t in operands):
            return Comparison("the result is an alias of an argument")
        if exact:
            return compare_exact(ours, reference.conv_bias_add_relu(*operands, **parameters))
        truth, peer = truth_and_peer(operands, **parameters)
        return compare_tensors(ours, truth, peer, error_scale(operands, dtype, cutting, **parameters))


_GEOMETRY: dict[str, Any] = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}


def compare_gradients(function: Operator, operands: Operands, grad: Tensor, **parameters: Any) -> dict[str, Comparison]:
    """Gradients of ``function`` against the reference's, exactly: for integer operands and an integer ``grad``.

    Integer data make outputs of exactly 0, so the value of the mask at the kink is compared too. The reference computes in float64, for
    not every gradient of the library in float32 is right; what it finds is rounded once, to the operands' dtype.
    """

    def run(f: Operator, dtype: torch.dtype) -> list[Tensor | None]:
        leaves = [None if t is None else t.detach().to(dtype, copy=True).requires_grad_() for t in operands]
        output = f(*leaves, **parameters)
        wanted = [t for t in leaves if t is not None]
        return [None if g is None else g.to(grad.dtype) for g in torch.autograd.grad(output, wanted, grad.to(dtype), allow_unused=True)]

    names = [name for name, t in operands._asdict().items() if t is not None]
    found, expected = run(function, operands.input.dtype), run(reference.conv_bias_add_relu, torch.float64)
    return {name: _compare_gradient(*pair) for name, *pair in zip(names, found, expected, strict=True)}


def _compare_gradient(ours: Tensor | None, expected: Tensor | None) -> Comparison:
    if ours is None or expected is None:
        return Comparison() if ours is expected else Comparison("a gradient in only one of the two")
    return compare_exact(ours, expected)


def relative_error(ours: Tensor, truth: Tensor) -> float:
    """Largest difference over the largest value of the truth; inf where only one of the two is a number."""
    if _special(ours, truth):
        return float("inf")
    finite = torch.isfinite(truth)
    if not finite.any():
        return 0.0
    difference = (ours.double() - truth)[finite].abs().max().item()
    size = truth[finite].abs().max().item()
    return float(difference / size) if size else float(difference)


def norm_error(ours: Tensor, truth: Tensor) -> float:
    """2-norm of the difference over the 2-norm of the truth; inf where only one of the two is a number."""
    if _special(ours, truth):
        return float("inf")
    finite = torch.isfinite(truth)
    difference = (ours.double() - truth)[finite].norm().item()
    size = truth[finite].norm().item()
    return float(difference / size) if size else float(difference)
