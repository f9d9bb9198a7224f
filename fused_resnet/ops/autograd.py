"""What the dispatcher calls in front of the kernels: the operators' gradients, and their autocast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._compat import below_autograd, has_tangent, nobody_listens, without_autocast
from .cpu import CpuPlan
from .derived import derive, training_captured
from .gradients import library_gradient, library_input_gradient, library_weight_gradient
from .plans import backends, find, find_gradient
from .schema import bias_add_relu, conv_bias_add_relu, conv_input_gradient, conv_weight_gradient, relu_backward
from .spec import Geometry, Operand, geometry_of_operator, is_channels_last, output_format


def _below_autograd(op: Any, *args: Any) -> Any:
    with below_autograd():
        return op(*args)


class ConvBiasAddReLU(torch.autograd.Function):
    """One pass makes the masked gradient, which *is* the shortcut's gradient, and the bias gradient; the other two are made from it, by
    ``conv_input_gradient`` and ``conv_weight_gradient``."""

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:  # type: ignore[override]
        """operands: the operator's, in its order."""
        input, weight, _, _, *parameters, relu = operands
        training_captured(input)
        output = _training_forward(ctx.needs_input_grad[1], *operands)
        ctx.geometry = geometry_of_operator(weight, *parameters)
        need_input, need_weight = ctx.needs_input_grad[:2]
        ctx.input_size, ctx.weight_size = input.shape, weight.shape
        ctx.input_format = output_format(input, weight, input.shape)
        ctx.weight_format = torch.channels_last if is_channels_last(weight) else torch.contiguous_format
        # What no wanted gradient needs, to change in place is nobody's business.
        ctx.save_for_backward(input if need_weight else None, weight if need_input else None, output if relu else None)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        input, weight, output = ctx.saved_tensors
        need_input, need_weight, need_bias, need_shortcut = ctx.needs_input_grad[:4]
        masked, grad_bias = _through_relu(grad, output, need_bias)
        grad_input = grad_weight = None
        if masked.is_cuda:  # there are no kernels of ours
            if need_input:  # the library asks for the input
                grad_input = library_input_gradient(masked, weight, ctx.input_size, ctx.input_format, ctx.geometry, input)
            if need_weight:
                grad_weight = library_weight_gradient(masked, input, ctx.weight_size, ctx.weight_format, ctx.geometry)
        else:
            if need_input:
                channels_last = ctx.input_format is torch.channels_last
                grad_input = gradient("input", masked, weight, ctx.input_size, channels_last, ctx.geometry)
            if need_weight:
                channels_last = ctx.weight_format is torch.channels_last
                grad_weight = gradient("weight", masked, input, ctx.weight_size, channels_last, ctx.geometry)
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


class AddReLUInPlace(torch.autograd.Function):
    """``relu(input + shortcut)`` over ``input``, as a block's author has it with ``out += shortcut``: no other tensor is made."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, shortcut: Tensor, relu: bool) -> Tensor:  # type: ignore[override]
        training_captured(input)
        ctx.mark_dirty(input)
        if nobody_listens(input, shortcut):  # gradient mode is off here
            found = backends.of(input).bias_add_relu(input, None, shortcut, relu, input.dtype, owned=True)
        else:
            found = _below_autograd(bias_add_relu, input, None, shortcut, relu)
        if found is not input:  # somebody listens, or it has gaps
            input.copy_(found)
        ctx.save_for_backward(input if relu else None)
        return input

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        need_input, need_shortcut, _ = ctx.needs_input_grad
        masked, _ = _through_relu(grad, ctx.saved_tensors[0], False)
        return masked if need_input else None, masked if need_shortcut else None, None


def add_relu_(input: Tensor, shortcut: Tensor, relu: bool) -> Tensor:
    """``relu(input + shortcut)``, of one shape and dtype, over ``input``, which is no view."""
    _refuse_forward_mode(input, shortcut)
    output: Tensor = AddReLUInPlace.apply(input, shortcut, relu)
    return output


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


def _training_forward(
    trains_weight: bool, input: Tensor, weight: Tensor, bias: Tensor | None, shortcut: Tensor | None, *parameters: Any
) -> Tensor:
    """The operator below autograd, by the shortest way. A weight that is trained is another one in each step, so nothing of it is kept."""
    if nobody_listens(input, weight, bias, shortcut):  # gradient mode is off here
        plan = find(geometry_of_operator, input, weight, bias, shortcut, *[tuple(p) if isinstance(p, list) else p for p in parameters])
        return plan.once(input, weight, bias, shortcut) if trains_weight and isinstance(plan, CpuPlan) else plan(input, weight, bias, shortcut)
    output: Tensor = _below_autograd(conv_bias_add_relu, input, weight, bias, shortcut, *parameters)
    return output


_GRADIENTS: dict[Operand, Any] = {"input": conv_input_gradient, "weight": conv_weight_gradient}


def gradient(operand: Operand, grad: Tensor, other: Tensor, size: torch.Size, channels_last: bool, geometry: Geometry) -> Tensor:
    """``conv_input_gradient`` or ``conv_weight_gradient`` by the shortest way: the dispatcher and the way back into Python take longer than a
    small gradient."""
    if nobody_listens(grad, other):
        return find_gradient(operand, grad, other, size, channels_last, *geometry)(grad, other)
    found: Tensor = _GRADIENTS[operand](grad, other, size, channels_last, *geometry)
    return found


def gradient_autograd(operand: Operand) -> Callable[..., Tensor]:
    def kernel(grad: Tensor, other: Tensor, size: Sequence[int], channels_last: bool, *geometry: Any) -> Tensor:
        if needs_grad(grad, other) or has_tangent(grad, other):  # differentiated further: by the library
            memory_format = torch.channels_last if channels_last else torch.contiguous_format
            return library_gradient(operand, grad, other, size, memory_format, geometry_of_operator(grad, *geometry))
        found: Tensor = _below_autograd(_GRADIENTS[operand], grad, other, size, channels_last, *geometry)
        return found

    return kernel


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
