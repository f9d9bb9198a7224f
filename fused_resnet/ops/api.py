"""The public functions: ``conv_bias_add_relu``, ``bias_add_relu``, ``why_not``.

They turn convenient arguments (a number for a pair, 'same') into the registered operators' plain ones, report what is wrong with
them, and take the shortest way to the kernel. ``registration.py`` holds the operators; ``reference.py`` the definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .._compat import nobody_listens
from . import schema
from .gradients import gradient_of
from .plans import backends, find
from .spec import Operand, check_convolution, check_pass, check_tensor, geometry_of_call, spec_of

__all__ = ["bias_add_relu", "conv_bias_add_relu", "why_not"]

# What the dispatcher, or a kernel that gets None for a tensor, raises before any work.
_REFUSALS = (AttributeError, NotImplementedError, RuntimeError, TypeError)


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
    """``relu(conv2d(input, weight, bias, stride, padding, dilation, groups) + shortcut)`` as one kernel.

    The end of a residual block, a[l+2] = ReLU(W a[l+1] + b + shortcut) (He et al. 2015, arXiv:1512.03385, eq. 1).

    Args:
        input: [N, C, H, W], any strides; N may be 0.
        weight: [K, C / groups, R, S], any strides.
        bias: [K] or None.
        shortcut: [N, K, P, Q], the output's shape, or None. May be ``input`` itself, a view or an expanded tensor.
        stride, dilation: int or pair (height, width), in pixels.
        padding: int or pair, zeros added on both sides, in pixels; or 'same' or 'valid' as in ``conv2d``.
        groups: number of blocked connections from input to output channels.
        relu: False leaves the ReLU out.

    Returns:
        [N, K, P, Q] in the memory format that eager ``conv2d`` would give; never an alias of an argument.

    Dtypes: float64, float32, bfloat16 on the CPU; those and float16 on CUDA; one dtype and one device for all. Low-precision
    operands accumulate in float32 and round once, at the end; twice, after the convolution too, where the library computes a large one
    on CUDA that no kernel of ours takes (``why_not``). ``relu(nan)`` is nan. Differentiable twice in the four tensors; the gradient
    passes the ReLU where ``not (output <= 0)``.

    Raises:
        TypeError: for a wrong type or dtype. ValueError: for a wrong value or shape. Both before any work.
    """
    if input is not None and nobody_listens(input, weight, bias, shortcut) and _plain(stride, padding, dilation, groups, relu):
        plan = find(geometry_of_call, input, weight, bias, shortcut, stride, padding, dilation, groups, relu)
        return plan(input, weight, bias, shortcut)
    geometry = geometry_of_call(weight, stride, padding, dilation, groups)
    try:
        output: Tensor = schema.conv_bias_add_relu(input, weight, bias, shortcut, *geometry, bool(relu))
    except _REFUSALS:
        # The dispatcher refused before any work: not a tensor, sparse, quantized, ... Say it in our words if it is that.
        check_convolution(input, weight, bias, shortcut, geometry)
        raise
    return output


def _plain(stride: Any, padding: Any, dilation: Any, groups: Any, relu: Any) -> bool:
    """Whether the parameters can be looked up: 1, 1.0 and True are the same key, but only one of them is legal."""
    for value in (stride, padding, dilation):
        kind = type(value)
        if kind is not int and kind is not str and not (kind is tuple and all(type(v) is int for v in value)):
            return False
    return type(groups) is int and type(relu) is bool


def bias_add_relu(
    input: Tensor, bias: Tensor | None = None, shortcut: Tensor | None = None, relu: bool = True
) -> Tensor:
    """``relu(input + bias + shortcut)`` in one pass over memory, forward and backward.

    Args:
        input: [N, K, P, Q]. bias: [K] or None. shortcut: [N, K, P, Q] or None. relu: False leaves the ReLU out.

    Returns:
        [N, K, P, Q], contiguous or channels_last as ``input`` is; never an alias of an argument.

    Raises:
        TypeError, ValueError: as ``conv_bias_add_relu``.
    """
    try:
        output: Tensor = schema.bias_add_relu(input, bias, shortcut, bool(relu))
    except _REFUSALS:
        check_pass(input, bias, shortcut)
        raise
    return output


def why_not(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    shortcut: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    relu: bool = True,
    gradient: Operand | None = None,
) -> list[str]:
    """Why this call of ``conv_bias_add_relu`` would not take the hot path: a list of sentences, empty when it will.

    gradient: "input" or "weight" asks the same of the gradient in that.
    """
    check_tensor(input, "input", 4)
    check_tensor(weight, "weight", 4)
    geometry = geometry_of_call(weight, stride, padding, dilation, groups)
    spec = spec_of(input, weight, bias, shortcut, geometry, relu)
    if gradient is None:
        return backends.of(input).why_general(spec)
    if gradient not in ("input", "weight"):
        raise ValueError(f"gradient must be 'input', 'weight' or None, got {gradient!r}")
    return backends.of(input).why_general_gradient(gradient, gradient_of(gradient, spec))
