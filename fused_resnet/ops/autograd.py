"""What the dispatcher calls in front of the kernels: the operators' gradients, and their autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._compat import below_autograd, has_tangent, without_autocast
from .derived import derive, training_captured
from .schema import bias_add_relu, conv_bias_add_relu, relu_backward
from .spec import Geometry, Pair, geometry_of_operator


def _below_autograd(op: Any, *args: Any) -> Any:
    with below_autograd():
        return op(*args)


class ConvBiasAddReLU(torch.autograd.Function):
    """One pass makes the masked gradient, which *is* the shortcut's gradient, and the bias gradient; the library's
    ``convolution_backward`` makes the other two from it."""

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:  # type: ignore[override]
        """operands: the operator's, in its order."""
        input, weight, _, _, *parameters, relu = operands
        training_captured(input)
        output: Tensor = _below_autograd(conv_bias_add_relu, *operands)
        ctx.geometry = geometry_of_operator(weight, *parameters)
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
            grad_input, grad_weight = _convolution_backward(masked, input, weight, ctx.geometry, need_input, need_weight)
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
    grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry, need_input: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The library's gradients of a convolution in its input and weight."""
    stride, padding, dilation, groups = geometry
    top, bottom, left, right = padding
    # torch 2.13's gradient of a bfloat16 weight leaves the elements of taps that meet nothing but padding unwritten.
    unmet = input.dtype == torch.bfloat16 and any(
        size <= (taps - 1) * step for size, taps, step in zip(input.shape[2:], weight.shape[2:], dilation, strict=True)
    )
    uneven = unmet or not padding.is_symmetric
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
    if has_tangent(*tensors):
        raise NotImplementedError(
            "fused_resnet has no forward-mode derivatives (jvp): use the function of the same name in fused_resnet.reference"
        )


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def conv_autograd(input: Tensor, weight: Tensor, bias: Tensor | None, shortcut: Tensor | None, *parameters: Any) -> Tensor:
    _refuse_forward_mode(input, weight, bias, shortcut)
    if needs_grad(input, weight, bias, shortcut):
        output: Tensor = ConvBiasAddReLU.apply(input, weight, bias, shortcut, *parameters)
        return output
    return _below_autograd(conv_bias_add_relu, input, weight, bias, shortcut, *parameters)


def pass_autograd(input: Tensor, bias: Tensor | None, shortcut: Tensor | None, relu: bool) -> Tensor:
    _refuse_forward_mode(input, bias, shortcut)
    if needs_grad(input, bias, shortcut):
        output: Tensor = BiasAddReLU.apply(input, bias, shortcut, relu)
        return output
    return _below_autograd(bias_add_relu, input, bias, shortcut, relu)


def relu_backward_autograd(grad: Tensor, output: Tensor, bias_grad: bool) -> tuple[Tensor, Tensor]:
    _refuse_forward_mode(grad)
    if needs_grad(grad):
        return ReLUBackward.apply(grad, output, bias_grad)
    return _below_autograd(relu_backward, grad, output, bias_grad)


def conv_autocast(device: str) -> Callable[..., Tensor]:
    """The convolution runs in the autocast dtype; the addition promotes, as it does in eager mode."""
    below = without_autocast(device)

    def kernel(input: Tensor, weight: Tensor, bias: Tensor | None, shortcut: Tensor | None, *parameters: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device)

        def cast(t: Any) -> Any:
            if t is None or t.dtype == dtype or not t.is_floating_point() or t.dtype == torch.float64:
                return t
            if t is weight and not needs_grad(t) and not torch.compiler.is_compiling():
                return derive(("cast", dtype), (t,), lambda held: held.to(dtype))
            return t.to(dtype)

        with below():
            x, w, b = cast(input), cast(weight), cast(bias)
            if shortcut is None or shortcut.dtype == x.dtype:
                output: Tensor = conv_bias_add_relu(x, w, b, shortcut, *parameters)
                return output
            sum_dtype = torch.promote_types(shortcut.dtype, x.dtype)
            *geometry, relu = parameters
            output = conv_bias_add_relu(x, w, b, None, *geometry, False)
            return bias_add_relu(output.to(sum_dtype), None, shortcut.to(sum_dtype), relu)

    return kernel


def pass_autocast(device: str) -> Callable[..., Tensor]:
    """Addition promotes in eager mode: a bfloat16 map and a float32 shortcut give float32."""
    below = without_autocast(device)

    def kernel(input: Tensor, bias: Tensor | None, shortcut: Tensor | None, relu: bool) -> Tensor:
        dtype = input.dtype
        for t in (bias, shortcut):
            if t is not None:
                dtype = torch.promote_types(dtype, t.dtype)
        with below():
            output: Tensor = bias_add_relu(
                input.to(dtype),
                None if bias is None else bias.to(dtype),
                None if shortcut is None else shortcut.to(dtype),
                relu,
            )
            return output

    return kernel
