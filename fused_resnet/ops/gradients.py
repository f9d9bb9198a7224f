"""The gradients of a convolution in its input and its weight: which way each takes, and the library's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import Backend, GradientPlan
from .spec import ConvSpec, Geometry, Layout, Pair, check_allocated, check_convolution, check_tensor, dtype_name, layout

_BACKWARD = torch.ops.aten.convolution_backward.default


def input_gradient_spec(
    grad: Tensor, weight: Tensor, input_size: Sequence[int], memory_format: torch.memory_format, geometry: Geometry
) -> ConvSpec:
    """The spec of the convolution whose input gradient is wanted: ``input`` lies as that gradient will, ``output`` as ``grad`` does.

    Raises:
        TypeError, ValueError: for arguments that are not legal.
    """
    shape = check_input_gradient(grad, weight, input_size, geometry)
    strides = torch.empty(shape, device="meta", memory_format=memory_format).stride()
    return ConvSpec(
        grad.dtype, grad.device, Layout(shape, strides), layout(weight), None, None, layout(grad), geometry, relu=False
    )


def gradient_of(spec: ConvSpec) -> ConvSpec:
    """The spec of the input gradient of a convolution, whose output's gradient lies as the output does."""
    n, c, h, w = spec.input.shape
    dense = (c * h * w, 1, w * c, c) if spec.output.is_channels_last else (c * h * w, h * w, w, 1)
    return spec._replace(input=Layout((n, c, h, w), dense), bias=None, shortcut=None, relu=False)


def check_input_gradient(grad: Tensor, weight: Tensor, input_size: Sequence[int], geometry: Geometry) -> tuple[int, int, int, int]:
    """Check one call of the operator; returns the input's shape [N, C, H, W]."""
    check_tensor(grad, "grad", 4)
    if isinstance(weight, Tensor) and weight.dtype != grad.dtype:
        raise TypeError(f"weight must have grad's dtype {dtype_name(grad.dtype)}, got {dtype_name(weight.dtype)}")
    check_tensor(weight, "weight", 4, grad)
    if len(input_size) != 4:
        raise ValueError(f"input_size must have 4 numbers [N, C, H, W], got {len(input_size)}: {tuple(input_size)}")
    n, c, h, w = input_size
    if any([type(size) is int and size < 0 for size in input_size]):  # of those that a compiler has not fixed the answer would be a guard
        raise ValueError(f"input_size must not be negative, got {tuple(input_size)}")
    shape = check_convolution(grad.new_empty(()).expand(n, c, h, w), weight, None, None, geometry)
    if tuple(grad.shape) != shape:
        raise ValueError(f"grad must have the output's shape {list(shape)}, got {list(grad.shape)}")
    return n, c, h, w


class InputGradient:
    """The plan of an input gradient: ours, and the library's where there is none or it refuses the values."""

    __slots__ = ("_geometry", "_memory_format", "_ours", "_size", "_strides")

    def __init__(self, spec: ConvSpec, ours: GradientPlan | None) -> None:
        self._ours, self._geometry = ours, spec.geometry
        self._size, self._strides = spec.input
        self._memory_format = torch.channels_last if spec.input.is_channels_last else torch.contiguous_format

    @property
    def kernel(self) -> Any:
        """Of the compiled module; None: the library's."""
        return None if self._ours is None else self._ours.kernel

    def __call__(self, grad: Tensor, weight: Tensor) -> Tensor:
        found = None if self._ours is None else self._ours(grad, weight)
        if found is not None:
            return found
        check_allocated(grad, "grad")
        check_allocated(weight, "weight")
        found = library_input_gradient(grad, weight, self._size, self._memory_format, self._geometry)
        if found.stride() != self._strides:  # where they say nothing of the memory format: of one channel, one pixel, no image
            found = torch.empty_strided(self._size, self._strides, dtype=found.dtype, device=found.device).copy_(found)
        return found


def input_gradient_plan(spec: ConvSpec, backend: Backend) -> InputGradient:
    return InputGradient(spec, None if backend.why_general_input_gradient(spec) else backend.input_gradient_plan(spec))


def library_input_gradient(
    grad: Tensor, weight: Tensor, size: Sequence[int], memory_format: torch.memory_format, geometry: Geometry, input: Tensor | None = None
) -> Tensor:
    """The library's gradient of a convolution in its input of this size, differentiable in ``grad`` and ``weight``. input: any of this size
    and memory format, if there is one, for the library asks for one; else one is made, without values."""
    stride, padding, dilation, groups = geometry
    top, bottom, left, right = padding
    n, c, height, width = size
    if not padding.is_symmetric:
        size, top, left, input = (n, c, height + top + bottom, width + left + right), 0, 0, None
    if input is None:
        input = torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=memory_format)
    rest = stride, (top, left), dilation, False, (0, 0), groups
    found: Tensor = _BACKWARD(grad, input, weight, None, *rest, (True, False, False))[0]
    if not padding.is_symmetric:
        found = found[:, :, padding.top : padding.top + height, padding.left : padding.left + width]
    return found.contiguous(memory_format=memory_format)


def library_weight_gradient(
    grad: Tensor, input: Tensor, size: Sequence[int], memory_format: torch.memory_format, geometry: Geometry
) -> Tensor:
    """The library's gradient of a convolution in its weight of this size, differentiable in ``grad`` and ``input``."""
    stride, padding, dilation, groups = geometry
    top, bottom, left, right = padding
    # torch 2.13's gradient of a bfloat16 weight leaves the elements of taps that meet nothing but padding unwritten.
    unmet = input.dtype == torch.bfloat16 and any(
        length <= (taps - 1) * step for length, taps, step in zip(input.shape[2:], size[2:], dilation, strict=True)
    )
    if unmet or not padding.is_symmetric:
        input = F.pad(input, (left, right, top, bottom))
        top = left = 0
    if _writes_beyond_its_buffer(input, size, stride, (top, left)):
        # Of the pixels that a 1x1 kernel meets it is a convolution with stride 1.
        input, stride = input[:, :, :: stride[0], :: stride[1]], (1, 1)
    weight = torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=memory_format)  # for its shape alone
    rest = stride, (top, left), dilation, False, (0, 0), groups
    found: Tensor = _BACKWARD(grad, input, weight, None, *rest, (False, True, False))[1]
    return found


def _writes_beyond_its_buffer(input: Tensor, size: Sequence[int], stride: Pair, padding: Pair) -> bool:
    """Where oneDNN's gradient of a weight in channels_last is wrong or crashes: a 1x1 kernel with a stride over fewer channels than
    a register holds (https://github.com/uxlfoundation/oneDNN/issues/6035, in torch 2.13 too)."""
    _, channels, height, width = size
    return input.is_cpu and height == width == 1 and channels < 16 and max(stride) > 1 and max(padding) == 0
