"""The public functions: ``conv_bias_add_relu``, ``bias_add_relu``, ``why_not``.

They turn convenient arguments (a number for a pair, 'same') into the registered operators' plain ones, report what is wrong with
them, and take the shortest way to the kernel. ``_operators.py`` holds the operators; ``reference.py`` the definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _kernels, _operators
from ._arguments import Padding, Pair, check_convolution, check_pass, check_tensor, pad, pair
from ._select import reasons

__all__ = ["bias_add_relu", "conv_bias_add_relu", "why_not"]

_PLAIN = (Tensor, torch.nn.Parameter)
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
    operands accumulate in float32 and round once, at the end. ``relu(nan)`` is nan. Differentiable twice in the four tensors;
    the gradient passes the ReLU where ``not (output <= 0)``.

    Raises:
        TypeError: for a wrong type or dtype. ValueError: for a wrong value or shape. Both before any work.
    """
    if input is not None and nobody_listens(input, weight, bias, shortcut) and _plain(stride, padding, dilation, groups, relu):
        plan = _kernels.cached(
            _plan_of_call, input, weight, bias, shortcut, stride, padding, dilation, groups, relu
        )
        if plan is not None:
            return plan(input, weight, bias, shortcut)
        stride, padding, dilation = geometry(weight, stride, padding, dilation, groups)
        return _operators.general_path(input, weight, bias, shortcut, stride, padding, dilation, groups, relu)
    stride, padding, dilation = geometry(weight, stride, padding, dilation, groups)
    try:
        return _operators.conv(input, weight, bias, shortcut, stride, padding, dilation, groups, bool(relu))
    except _REFUSALS:
        # The dispatcher refused before any work: not a tensor, sparse, quantized, ... Say it in our words if it is that.
        check_convolution(input, weight, bias, shortcut, stride, padding, dilation, groups)
        raise


def geometry(weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: Any) -> tuple[Pair, Padding, Pair]:
    """Stride, padding and dilation as the operator takes them."""
    stride, dilation = pair(stride, "stride", 1), pair(dilation, "dilation", 1)
    if type(groups) is not int and not isinstance(groups, torch.SymInt):
        raise TypeError(f"groups must be an int, got {groups!r}")
    if isinstance(padding, str):
        check_tensor(weight, "weight", 4)
    return stride, pad(padding, weight, stride, dilation), dilation


def is_quiet() -> bool:
    """Whether nothing outside of its tensors keeps a call from going straight to the kernel: no autocast, no
    tracing, no mode, no profiler. (torch.compile traces this function's caller: that is to be asked before.)"""
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch.is_autocast_enabled("cpu")
        or torch.is_autocast_enabled("cuda")
        or torch._C._autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def nobody_listens(*tensors: Any) -> bool:
    """Whether a call with these tensors (None: no tensor) may go straight to the kernel: it ``is_quiet``, and these are plain CPU or CUDA
    tensors that want no gradient. The dispatcher and the way back into Python take longer than a small convolution."""
    if torch.compiler.is_compiling() or not is_quiet():
        return False
    grad = torch.is_grad_enabled()
    for t in tensors:
        if t is not None and (
            type(t) not in _PLAIN or t.layout is not torch.strided or not (t.is_cpu or t.is_cuda) or (grad and t.requires_grad)
        ):
            return False
    return True


def _plain(stride: Any, padding: Any, dilation: Any, groups: Any, relu: Any) -> bool:
    """Whether the parameters can be looked up: 1, 1.0 and True are the same key, but only one of them is legal."""
    for value in (stride, padding, dilation):
        kind = type(value)
        if kind is not int and kind is not str and not (kind is tuple and all(type(v) is int for v in value)):
            return False
    return type(groups) is int and type(relu) is bool


def _plan_of_call(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shortcut: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    relu: bool,
) -> _kernels.Plan | None:
    stride, padding, dilation = geometry(weight, stride, padding, dilation, groups)
    return _kernels.convolution(input, weight, bias, shortcut, stride, padding, dilation, groups, bool(relu))


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
        return _operators.bias_add_relu(input, bias, shortcut, bool(relu))
    except _REFUSALS:
        check_pass(input, bias, shortcut)
        raise


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
) -> list[str]:
    """Why this call of ``conv_bias_add_relu`` would not take the hot path: a list of sentences, empty when it will."""
    check_tensor(input, "input", 4)
    check_tensor(weight, "weight", 4)
    stride, padding, dilation = geometry(weight, stride, padding, dilation, groups)
    shape = check_convolution(input, weight, bias, shortcut, stride, padding, dilation, groups)
    return reasons(input, weight, shortcut, stride, padding, dilation, groups, shape)
