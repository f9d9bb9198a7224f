"""The operators ``torch.ops.fused_resnet.*``: schema, kernels, fake kernels, autograd, autocast, flop formula.

====================  =====================================================================================
conv_bias_add_relu    relu(conv2d(input, weight, bias) + shortcut)
bias_add_relu         relu(input + bias + shortcut): one pass, for blocks whose normalisation is live
relu_backward         the gradient through ReLU and the bias gradient, both from one pass over memory
====================  =====================================================================================

``reference.py`` holds the definition of the first two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from . import _kernels
from ._arguments import Padding, Pair, check_convolution, check_operands, check_pass, check_relu_backward, is_channels_last, output_format
from ._derived import derive, training_captured

_library = torch.library.Library("fused_resnet", "DEF")
# The output's memory format follows the input's, so a compiler must not change that (the tag is new in torch 2.8).
_TAGS = (
    torch.Tag.pt2_compliant_tag,
    getattr(torch.Tag, "needs_exact_strides", None) or torch.Tag.needs_fixed_stride_order,
)
_library.define(
    "conv_bias_add_relu(Tensor input, Tensor weight, Tensor? bias, Tensor? shortcut, SymInt[2] stride, "
    "SymInt[4] padding, SymInt[2] dilation, SymInt groups, bool relu) -> Tensor",
    tags=_TAGS,
)
_library.define("bias_add_relu(Tensor input, Tensor? bias, Tensor? shortcut, bool relu) -> Tensor", tags=_TAGS)
_library.define("relu_backward(Tensor grad, Tensor output, bool bias_grad) -> (Tensor, Tensor)", tags=_TAGS)
conv = torch.ops.fused_resnet.conv_bias_add_relu.default
bias_add_relu = torch.ops.fused_resnet.bias_add_relu.default
relu_backward = torch.ops.fused_resnet.relu_backward.default


# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------


def _library_convolution(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Padding, dilation: Pair, groups: int
) -> Tensor:
    """The library's convolution; it pads both sides alike, so padding='same' with an even kernel pads first."""
    if padding.top != padding.bottom or padding.left != padding.right:
        input = F.pad(input, (padding.left, padding.right, padding.top, padding.bottom))
        padding = Padding(0, 0, 0, 0)
    return F.conv2d(input, weight, bias, stride, (padding.top, padding.left), dilation, groups)


def _two(values: Sequence[int], name: str) -> Pair:
    """A pair from a list: the schema's ``SymInt[2]`` lets other lengths through."""
    if len(values) != 2:
        raise ValueError(f"{name} must have 2 numbers, got {len(values)}: {tuple(values)}")
    return values[0], values[1]


def _conv_kernel(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shortcut: Tensor | None,
    stride: Pair,
    padding: Sequence[int],
    dilation: Pair,
    groups: int,
    relu: bool,
) -> Tensor:
    stride, padding, dilation = _two(stride, "stride"), Padding(*padding), _two(dilation, "dilation")
    plan = _kernels.cached(
        _kernels.convolution, input, weight, bias, shortcut, stride, padding, dilation, groups, relu
    )
    if plan is not None:
        return plan(input, weight, bias, shortcut)
    return general_path(input, weight, bias, shortcut, stride, padding, dilation, groups, relu)


def general_path(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shortcut: Tensor | None,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    relu: bool,
) -> Tensor:
    """The library's convolution, then our pass over its output, in place."""
    check_operands(input, weight, bias, shortcut)
    dtype = input.dtype
    if dtype in (torch.bfloat16, torch.float16) and (bias is not None or shortcut is not None):
        # So that the sum is rounded once, at the end.
        input, weight = input.float(), weight.float() if weight.is_cpu else derive(("wide",), (weight,), lambda held: held.float())
    output = _library_convolution(input, weight, None, stride, padding, dilation, groups)
    if not output.is_cpu:  # some of the library's convolutions for CUDA give other strides than its rule says
        output = output.contiguous(memory_format=output_format(input, weight, output.shape))
    return _kernels.bias_add_relu(output, bias, shortcut, relu, dtype, owned=True)


def _pass_kernel(input: Tensor, bias: Tensor | None, shortcut: Tensor | None, relu: bool) -> Tensor:
    check_pass(input, bias, shortcut)
    return _kernels.bias_add_relu(input, bias, shortcut, relu, input.dtype, owned=False)


def _relu_backward_kernel(grad: Tensor, output: Tensor, bias_grad: bool) -> tuple[Tensor, Tensor]:
    check_relu_backward(grad, output)
    return _kernels.relu_backward(grad, output, bias_grad)


for _key in ("CPU", "CUDA"):
    _library.impl("conv_bias_add_relu", _conv_kernel, _key)
    _library.impl("bias_add_relu", _pass_kernel, _key)
    _library.impl("relu_backward", _relu_backward_kernel, _key)


# ---------------------------------------------------------------------------------------------------------------------
# Fake kernels: shape, dtype and strides without the values
# ---------------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("fused_resnet::conv_bias_add_relu", lib=_library)
def _conv_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shortcut: Tensor | None,
    stride: Pair,
    padding: Sequence[int],
    dilation: Pair,
    groups: int,
    relu: bool,
) -> Tensor:
    shape = check_convolution(
        input, weight, bias, shortcut, _two(stride, "stride"), Padding(*padding), _two(dilation, "dilation"), groups
    )
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=output_format(input, weight, shape))


def _empty_as(t: Tensor) -> Tensor:
    """Uninitialised, dense, in the memory format of ``t``."""
    memory_format = torch.channels_last if is_channels_last(t) else torch.contiguous_format
    return torch.empty(t.shape, dtype=t.dtype, device=t.device, memory_format=memory_format)


@torch.library.register_fake("fused_resnet::bias_add_relu", lib=_library)
def _pass_fake(input: Tensor, bias: Tensor | None, shortcut: Tensor | None, relu: bool) -> Tensor:
    check_pass(input, bias, shortcut)
    return _empty_as(input)


@torch.library.register_fake("fused_resnet::relu_backward", lib=_library)
def _relu_backward_fake(grad: Tensor, output: Tensor, bias_grad: bool) -> tuple[Tensor, Tensor]:
    check_relu_backward(grad, output)
    return _empty_as(output), output.new_empty(output.shape[1] if bias_grad else 0)


# ---------------------------------------------------------------------------------------------------------------------
# Autograd
# ---------------------------------------------------------------------------------------------------------------------


def _below_autograd(op: Any, *args: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


class ConvBiasAddReLU(torch.autograd.Function):
    """One pass makes the masked gradient, which *is* the shortcut's gradient, and the bias gradient; the library's
    ``convolution_backward`` makes the other two from it."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shortcut: Tensor | None,
        stride: Pair,
        padding: Sequence[int],
        dilation: Pair,
        groups: int,
        relu: bool,
    ) -> Tensor:
        training_captured(input)
        output: Tensor = _below_autograd(
            conv, input, weight, bias, shortcut, stride, padding, dilation, groups, relu
        )
        ctx.geometry = stride, Padding(*padding), dilation, groups
        # The convolution's gradients need its operands; without one of them, changing those in place is nobody's business.
        saved = (input, weight) if ctx.needs_input_grad[0] or ctx.needs_input_grad[1] else (None, None)
        ctx.save_for_backward(*saved, output if relu else None)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        input, weight, output = ctx.saved_tensors
        need_input, need_weight, need_bias, need_shortcut = ctx.needs_input_grad[:4]
        masked, grad_bias = _through_relu(grad, output, need_bias)
        grad_input = grad_weight = None
        if need_input or need_weight:
            stride, padding, dilation, groups = ctx.geometry
            grad_input, grad_weight = _convolution_backward(
                masked, input, weight, stride, padding, dilation, groups, need_input, need_weight
            )
        return grad_input, grad_weight, grad_bias, masked if need_shortcut else None, None, None, None, None, None


class BiasAddReLU(torch.autograd.Function):
    """The same end of a block without the convolution."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, input: Tensor, bias: Tensor | None, shortcut: Tensor | None, relu: bool
    ) -> Tensor:
        training_captured(input)
        output: Tensor = _below_autograd(bias_add_relu, input, bias, shortcut, relu)
        ctx.save_for_backward(output if relu else None)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        need_input, need_bias, need_shortcut, _ = ctx.needs_input_grad
        masked, grad_bias = _through_relu(grad, ctx.saved_tensors[0], need_bias)
        return masked if need_input else None, grad_bias, masked if need_shortcut else None, None


class ReLUBackward(torch.autograd.Function):
    """The derivative of ``relu_backward`` in its gradient: the same mask again. (Its derivative in the output is 0.)"""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, output: Tensor, bias_grad: bool) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        ctx.save_for_backward(output)
        ctx.set_materialize_grads(False)
        masked, grad_bias = _below_autograd(relu_backward, grad, output, bias_grad)
        if not bias_grad:
            ctx.mark_non_differentiable(grad_bias)
        return masked, grad_bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_bias: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (output,) = ctx.saved_tensors
        if grad_bias is not None and grad_bias.numel():
            spread = grad_bias[:, None, None].expand(output.shape)
            grad = spread if grad is None else grad + spread
        if grad is None or not ctx.needs_input_grad[0]:
            return None, None, None
        return relu_backward(grad, output, False)[0], None, None


def _through_relu(grad: Tensor, output: Tensor | None, need_bias: bool) -> tuple[Tensor, Tensor | None]:
    """The gradient in front of the ReLU (if there was one: ``output`` is not None) and the bias gradient [K]."""
    if output is None:
        return grad, grad.sum((0, 2, 3)) if need_bias else None
    masked, grad_bias = relu_backward(grad, output, need_bias)
    return masked, grad_bias if need_bias else None


def _convolution_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The library's gradients of a convolution in its input and weight."""
    top, bottom, left, right = padding
    # torch 2.13's gradient of a bfloat16 weight leaves the elements of taps that meet nothing but padding unwritten.
    unmet = input.dtype == torch.bfloat16 and any(
        size <= (taps - 1) * step for size, taps, step in zip(input.shape[2:], weight.shape[2:], dilation, strict=True)
    )
    uneven = top != bottom or left != right or unmet
    if uneven:
        height, width = input.shape[2:]
        input = F.pad(input, (left, right, top, bottom))
    rest = (0, 0) if uneven else (top, left), dilation, False, (0, 0), groups
    backward = torch.ops.aten.convolution_backward
    grad_weight = None
    if need_weight and _writes_beyond_its_buffer(input, weight, stride, rest[0]):
        # Of the pixels that a 1x1 kernel meets it is a convolution with stride 1.
        met = input[:, :, :: stride[0], :: stride[1]]
        _, grad_weight, _ = backward(grad, met, weight, None, (1, 1), *rest, (False, True, False))
        need_weight = False
    grad_input = None
    if need_input or need_weight:
        grad_input, found, _ = backward(grad, input, weight, None, stride, *rest, (need_input, need_weight, False))
        grad_weight = found if need_weight else grad_weight
    if uneven and grad_input is not None:
        grad_input = grad_input[:, :, top : top + height, left : left + width]
    return grad_input, grad_weight


def _writes_beyond_its_buffer(input: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> bool:
    """Where oneDNN's gradient of a weight in channels_last is wrong or crashes: a 1x1 kernel with a stride over fewer channels than
    a register holds (https://github.com/uxlfoundation/oneDNN/issues/6035, in torch 2.13 too)."""
    _, channels, height, width = weight.shape
    return input.is_cpu and height == width == 1 and channels < 16 and max(stride) > 1 and max(padding) == 0


def _refuse_forward_mode(*tensors: Tensor | None) -> None:
    """There are no forward-mode derivatives; losing a tangent in silence would be worse than an error."""
    if forward_ad._current_level >= 0 and (
        torch._C._functorch.peek_interpreter_stack() is not None
        or any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)
    ):
        raise NotImplementedError(
            "fused_resnet has no forward-mode derivatives (jvp): use the function of the same name in fused_resnet.reference"
        )


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _conv_autograd(
    input: Tensor, weight: Tensor, bias: Tensor | None, shortcut: Tensor | None, *rest: Any
) -> Tensor:
    _refuse_forward_mode(input, weight, bias, shortcut)
    if _needs_grad(input, weight, bias, shortcut):
        output: Tensor = ConvBiasAddReLU.apply(input, weight, bias, shortcut, *rest)
        return output
    return _below_autograd(conv, input, weight, bias, shortcut, *rest)


def _pass_autograd(input: Tensor, bias: Tensor | None, shortcut: Tensor | None, relu: bool) -> Tensor:
    _refuse_forward_mode(input, bias, shortcut)
    if _needs_grad(input, bias, shortcut):
        output: Tensor = BiasAddReLU.apply(input, bias, shortcut, relu)
        return output
    return _below_autograd(bias_add_relu, input, bias, shortcut, relu)


def _relu_backward_autograd(grad: Tensor, output: Tensor, bias_grad: bool) -> tuple[Tensor, Tensor]:
    _refuse_forward_mode(grad)
    if _needs_grad(grad):
        return ReLUBackward.apply(grad, output, bias_grad)
    return _below_autograd(relu_backward, grad, output, bias_grad)


_library.impl("conv_bias_add_relu", _conv_autograd, "Autograd")
_library.impl("bias_add_relu", _pass_autograd, "Autograd")
_library.impl("relu_backward", _relu_backward_autograd, "Autograd")


# ---------------------------------------------------------------------------------------------------------------------
# Autocast: the convolution runs in the autocast dtype; the addition promotes, as it does in eager mode
# ---------------------------------------------------------------------------------------------------------------------


def _autocast(device: str) -> Any:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def kernel(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shortcut: Tensor | None,
        stride: Pair,
        padding: Sequence[int],
        dilation: Pair,
        groups: int,
        relu: bool,
    ) -> Tensor:
        dtype = torch.get_autocast_dtype(device)

        def cast(t: Any) -> Any:
            if t is None or t.dtype == dtype or not t.is_floating_point() or t.dtype == torch.float64:
                return t
            if t is weight and not _needs_grad(t) and not torch.compiler.is_compiling():
                return derive(("cast", dtype), (t,), lambda held: held.to(dtype))
            return t.to(dtype)

        with torch._C._ExcludeDispatchKeyGuard(keys):
            x, w, b = cast(input), cast(weight), cast(bias)
            if shortcut is None or shortcut.dtype == x.dtype:
                return conv(x, w, b, shortcut, stride, padding, dilation, groups, relu)
            sum_dtype = torch.promote_types(shortcut.dtype, x.dtype)
            output = conv(x, w, b, None, stride, padding, dilation, groups, False)
            return bias_add_relu(output.to(sum_dtype), None, shortcut.to(sum_dtype), relu)

    return kernel


def _pass_autocast(device: str) -> Any:
    """Addition promotes in eager mode: a bfloat16 map and a float32 shortcut give float32."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def kernel(input: Tensor, bias: Tensor | None, shortcut: Tensor | None, relu: bool) -> Tensor:
        dtype = input.dtype
        for t in (bias, shortcut):
            if t is not None:
                dtype = torch.promote_types(dtype, t.dtype)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return bias_add_relu(
                input.to(dtype),
                None if bias is None else bias.to(dtype),
                None if shortcut is None else shortcut.to(dtype),
                relu,
            )

    return kernel


for _device in ("cpu", "cuda"):
    _library.impl("conv_bias_add_relu", _autocast(_device), f"Autocast{_device.upper()}")
    _library.impl("bias_add_relu", _pass_autocast(_device), f"Autocast{_device.upper()}")


@register_flop_formula(torch.ops.fused_resnet.conv_bias_add_relu)
def _conv_flops(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    *args: Any,
    out_shape: Sequence[int] | None = None,
    **kwargs: Any,
) -> int:
    """Two operations for each multiply-add of the convolution, as PyTorch counts conv2d."""
    assert out_shape is not None
    return conv_flop_count(list(input_shape), list(weight_shape), list(out_shape))
