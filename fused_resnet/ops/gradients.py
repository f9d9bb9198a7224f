"""The gradients of a convolution in its input and its weight: which way each takes, and the library's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import Backend, GradientPlan
from .spec import OTHER, ConvSpec, Geometry, Layout, Operand, Pair, check_allocated, check_convolution, check_tensor, dtype_name, layout

_BACKWARD = torch.ops.aten.convolution_backward.default


def gradient_spec(
    operand: Operand,
    grad: Tensor,
    other: Tensor,
    size: Sequence[int],
    memory_format: torch.memory_format,
    geometry: Geometry,
    end: Tensor | None = None,
) -> ConvSpec:
    """The spec of the convolution whose gradient in ``operand`` is wanted: that operand lies as the gradient will, ``output`` as ``grad`` does,
    ``shortcut`` as what an input's gradient ends with.

    Raises:
        TypeError, ValueError: for arguments that are not legal.
    """
    shape = check_gradient(operand, grad, other, size, geometry)
    wanted = Layout(shape, torch.empty(shape, device="meta", memory_format=memory_format).stride())
    input, weight = (wanted, layout(other)) if operand == "input" else (layout(other), wanted)
    if end is not None:
        check_tensor(end, "end", 4, grad)
        if operand != "input" or end.shape != shape:
            raise ValueError(f"end must be as the input's gradient, {list(shape)}, got {list(end.shape)}")
    return ConvSpec(grad.dtype, grad.device, input, weight, None, None if end is None else layout(end), layout(grad), geometry, relu=False)


def gradient_of(operand: Operand, spec: ConvSpec) -> ConvSpec:
    """The spec of such a gradient of a convolution, whose output's gradient lies as the output does."""
    spec = spec._replace(bias=None, shortcut=None, relu=False)
    if operand == "weight":
        return spec
    n, c, h, w = spec.input.shape
    dense = (c * h * w, 1, w * c, c) if spec.output.is_channels_last else (c * h * w, h * w, w, 1)
    return spec._replace(input=Layout((n, c, h, w), dense))


def check_gradient(operand: Operand, grad: Tensor, other: Tensor, size: Sequence[int], geometry: Geometry) -> tuple[int, int, int, int]:
    """Check one call of the operator; returns the operand's shape."""
    check_tensor(grad, "grad", 4)
    name, dimensions = OTHER[operand], "[N, C, H, W]" if operand == "input" else "[K, C, R, S]"
    if isinstance(other, Tensor) and other.dtype != grad.dtype:
        raise TypeError(f"{name} must have grad's dtype {dtype_name(grad.dtype)}, got {dtype_name(other.dtype)}")
    check_tensor(other, name, 4, grad)
    if len(size) != 4:
        raise ValueError(f"{operand}_size must have 4 numbers {dimensions}, got {len(size)}: {tuple(size)}")
    a, b, c, d = size
    if any([type(length) is int and length < 0 for length in size]):  # of those that a compiler has not fixed the answer would be a guard
        raise ValueError(f"{operand}_size must not be negative, got {tuple(size)}")
    wanted = grad.new_empty(()).expand(a, b, c, d)
    shape = check_convolution(*((wanted, other) if operand == "input" else (other, wanted)), None, None, geometry)
    if tuple(grad.shape) != shape:
        raise ValueError(f"grad must have the output's shape {list(shape)}, got {list(grad.shape)}")
    return a, b, c, d


class Gradient:
    """The plan of a gradient of a convolution: ours, and the library's where there is none or it refuses the values. An input's may end
    with an addition or, ``masked``, with the gradient through the ReLU that gave the input."""

    __slots__ = ("_backend", "_geometry", "_masked", "_memory_format", "_operand", "_ours", "_size", "_strides")

    def __init__(self, operand: Operand, spec: ConvSpec, backend: Backend, ours: GradientPlan | None, masked: bool = False) -> None:
        self._operand, self._backend, self._ours, self._masked = operand, backend, ours, masked
        self._geometry = spec.geometry
        wanted = spec.input if operand == "input" else spec.weight
        self._size, self._strides = wanted
        self._memory_format = torch.channels_last if wanted.is_channels_last else torch.contiguous_format

    @property
    def kernel(self) -> Any:
        """Of the compiled module; None: the library's."""
        return None if self._ours is None else self._ours.kernel

    def __call__(self, grad: Tensor, other: Tensor, end: Tensor | None = None, input: Tensor | None = None) -> Tensor:
        """end: what is added, or the ReLU's output. input: of an input's gradient, the input itself where it is at hand (see
        ``library_input_gradient``)."""
        found = None if self._ours is None else self._ours(grad, other, end)
        if found is not None:
            return found
        check_allocated(grad, "grad")
        check_allocated(other, OTHER[self._operand])
        if self._operand == "input":
            found = library_input_gradient(grad, other, self._size, self._memory_format, self._geometry, input)
        else:
            found = library_weight_gradient(grad, other, self._size, self._memory_format, self._geometry)
        if end is not None:
            found = self._backend.relu_backward(found, end, False)[0] if self._masked else found.add_(end)
        if found.stride() != self._strides:  # where they say nothing of the memory format: of one channel, one pixel, no image
            found = torch.empty_strided(self._size, self._strides, dtype=found.dtype, device=found.device).copy_(found)
        return found


def gradient_plan(operand: Operand, spec: ConvSpec, backend: Backend, masked: bool) -> Gradient:
    ours = None if backend.why_general_gradient(operand, spec) else backend.gradient_plan(operand, spec, masked)
    return Gradient(operand, spec, backend, ours, masked)


def library_gradient(
    operand: Operand, grad: Tensor, other: Tensor, size: Sequence[int], memory_format: torch.memory_format, geometry: Geometry
) -> Tensor:
    """The library's gradient of a convolution in an operand of this size, differentiable in ``grad`` and the other one."""
    library = library_input_gradient if operand == "input" else library_weight_gradient
    return library(grad, other, size, memory_format, geometry)


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
    return found.contiguous(memory_format=memory_format)


def _writes_beyond_its_buffer(input: Tensor, size: Sequence[int], stride: Pair, padding: Pair) -> bool:
    """Where oneDNN's gradient of a weight in channels_last is wrong or crashes: a 1x1 kernel with a stride over fewer channels than
    a register holds (https://github.com/uxlfoundation/oneDNN/issues/6035, in torch 2.13 too)."""
    _, channels, height, width = size
    return input.is_cpu and height == width == 1 and channels < 16 and max(stride) > 1 and max(padding) == 0
