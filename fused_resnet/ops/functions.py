"""The operators in a step of training: ``torch.autograd.Function``s, which go to the kernels by the shortest way."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from .._compat import below_autograd, has_tangent, nobody_listens, profiler_enabled, without_autocast
from .cpu import CpuPlan
from .derived import training_captured
from .plans import backends, find, find_gradient
from .role import Rectified, Role
from .schema import bias_add_relu, conv_bias_add_relu, conv_input_gradient, conv_weight_gradient, relu_backward
from .spec import Geometry, Operand, geometry_of_operator, is_channels_last, output_format

_NO_RANGE = contextlib.nullcontext()
_without_autocast = without_autocast("cpu")


def call_below_autograd(op: Any, *args: Any) -> Any:
    with below_autograd():
        return op(*args)


class ConvBiasAddReLU(torch.autograd.Function):
    """One pass makes the masked gradient, which *is* the shortcut's gradient, and the bias gradient; the other two are made from it, by
    ``conv_input_gradient`` and ``conv_weight_gradient``. In a block that pass is the end of the next convolution's input gradient."""

    @staticmethod
    def forward(ctx: Any, role: Role, *operands: Any) -> Any:  # type: ignore[override]
        """operands: the operator's, in its order."""
        input, weight, bias, _, *parameters, relu = operands
        training_captured(input)
        need_input, need_weight = ctx.needs_input_grad[1:3]
        ctx.geometry = geometry_of_operator(weight, *parameters)
        if role.by_library:
            stride, padding, dilation, groups = ctx.geometry
            with below_autograd():
                output = torch.conv2d(input, weight, bias, stride, padding[::2], dilation, groups)
        else:
            output = _training_forward(need_weight, *operands)
        ctx.role = role
        ctx.input_size, ctx.weight_size = input.shape, weight.shape
        ctx.input_format = output_format(input, weight, input.shape)
        ctx.weight_format = torch.channels_last if is_channels_last(weight) else torch.contiguous_format
        ctx.set_materialize_grads(False)
        # What no wanted gradient needs, to change in place is nobody's business.
        need_values = need_weight or (need_input and role.reads is not None)
        ctx.save_for_backward(input if need_values else None, weight if need_input else None, output if relu else None)
        return (output, input) if role.forks else output

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, other: Tensor | None = None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """other: the gradient of the input's other reader."""
        input, weight, output = ctx.saved_tensors
        role = ctx.role
        need_input, need_weight, need_bias, need_shortcut = ctx.needs_input_grad[1:5]
        if grad is None:
            return None, other, *[None] * 8
        made = None if role.makes is not None and role.makes.reader_masks else output
        masked, grad_bias = _through_relu(grad, made, need_bias)
        grad_input = grad_weight = None
        # The weight's gradient first: it is small and stays. Behind the input's, it would lie in the holes that glibc's heap has for maps.
        if need_weight:
            # Differentiated further, this gradient reads the input too, and a ReLU in front that relies on this convolution does not mask:
            # what goes back to the input passes a second ReLU, which changes no value.
            values = torch.relu(input) if role.reads is not None and torch.is_grad_enabled() else input
            channels_last = ctx.weight_format is torch.channels_last
            grad_weight = gradient("weight", masked, values, ctx.weight_size, channels_last, ctx.geometry)
        if need_input:
            channels_last = ctx.input_format is torch.channels_last
            through = role.reads is not None  # then nobody else reads the input
            end = input if through else other
            at_hand = input if masked.is_cuda else None  # cuDNN is asked by way of it, oneDNN is not
            grad_input = gradient("input", masked, weight, ctx.input_size, channels_last, ctx.geometry, end, through, at_hand)
        return None, grad_input, grad_weight, grad_bias, masked if need_shortcut else None, *[None] * 5


class BiasAddReLU(torch.autograd.Function):
    """The same end of a block without the convolution."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, input: Tensor, bias: Tensor | None, shortcut: Tensor | None, relu: bool
    ) -> Tensor:
        training_captured(input)
        output: Tensor = call_below_autograd(bias_add_relu, input, bias, shortcut, relu)
        ctx.save_for_backward(output if relu else None)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        need_input, need_bias, need_shortcut, _ = ctx.needs_input_grad
        masked, grad_bias = _through_relu(grad, ctx.saved_tensors[0], need_bias)
        return masked if need_input else None, grad_bias, masked if need_shortcut else None, None


class ReLUInPlace(torch.autograd.Function):
    """A ReLU over its input whose reader may have its gradient made already."""

    @staticmethod
    def forward(ctx: Any, rectified: Rectified, input: Tensor) -> Tensor:  # type: ignore[override]
        ctx.mark_dirty(input)
        with below_autograd():
            torch.relu_(input)
        ctx.rectified = rectified
        ctx.save_for_backward(input)
        return input

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        (output,) = ctx.saved_tensors
        return None, grad if ctx.rectified.reader_masks else _through_relu(grad, output, False)[0]


class AddReLUInPlace(torch.autograd.Function):
    """``relu(input + shortcut)`` over ``input``, as a block's author has it with ``out += shortcut``: no other tensor is made."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, shortcut: Tensor, relu: bool) -> Tensor:  # type: ignore[override]
        training_captured(input)
        ctx.mark_dirty(input)
        if nobody_listens(input, shortcut):  # gradient mode is off here
            found = backends.of(input).bias_add_relu(input, None, shortcut, relu, input.dtype, owned=True)
        else:
            found = call_below_autograd(bias_add_relu, input, None, shortcut, relu)
        if found is not input:  # somebody listens, or it has gaps
            input.copy_(found)
        ctx.save_for_backward(input if relu else None)
        return input

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        need_input, need_shortcut, _ = ctx.needs_input_grad
        masked, _ = _through_relu(grad, ctx.saved_tensors[0], False)
        return masked if need_input else None, masked if need_shortcut else None, None


class ReLUBackward(torch.autograd.Function):
    """The derivative of ``relu_backward`` in its gradient: the same mask again. (Its derivative in the output is 0.)"""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, output: Tensor, bias_grad: bool) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        ctx.save_for_backward(output)
        ctx.set_materialize_grads(False)
        masked, grad_bias = call_below_autograd(relu_backward, grad, output, bias_grad)
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


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def refuse_forward_mode(*tensors: Tensor | None) -> None:
    """There are no forward-mode derivatives; losing a tangent in silence would be worse than an error."""
    if has_tangent(*tensors):
        raise NotImplementedError(
            "fused_resnet has no forward-mode derivatives (jvp): use the function of the same name in fused_resnet.reference"
        )


def convolution_in_block(role: Role, input: Tensor, weight: Tensor, bias: Tensor | None, shortcut: Tensor | None, *parameters: Any) -> Any:
    """``conv_bias_add_relu`` of CPU tensors one of which wants a gradient, with what it does for its neighbours: its output, and the input
    again where it ``forks``.

    Raises:
        TypeError, ValueError: as ``conv_bias_add_relu``; or what the library raises, where it is ``by_library``.
    """
    with _without_autocast():  # which has cast them
        found = ConvBiasAddReLU.apply(role, input, weight, bias, shortcut, *parameters)
    if role.reads is not None:
        role.reads.reader_masks = True
    return found


def relu_(input: Tensor, rectified: Rectified) -> Tensor:
    """``relu(input)`` over ``input``, which is no view."""
    output: Tensor = ReLUInPlace.apply(rectified, input)
    return output


def add_relu_(input: Tensor, shortcut: Tensor, relu: bool) -> Tensor:
    """``relu(input + shortcut)``, of one shape and dtype, over ``input``, which is no view."""
    refuse_forward_mode(input, shortcut)
    output: Tensor = AddReLUInPlace.apply(input, shortcut, relu)
    return output


def _through_relu(grad: Tensor, output: Tensor | None, need_bias: bool) -> tuple[Tensor, Tensor | None]:
    """The gradient in front of the ReLU (if there was one: ``output`` is not None) and the bias gradient [K]."""
    if output is None:
        quiet = need_bias and nobody_listens(grad, but_for_profiler=True)
        return grad, (backends.of(grad).bias_gradient(grad) if quiet else grad.sum((0, 2, 3))) if need_bias else None
    if nobody_listens(grad, output, but_for_profiler=True):
        with _named("relu_backward"):
            masked, grad_bias = backends.of(output).relu_backward(grad, output, need_bias)
    else:
        masked, grad_bias = relu_backward(grad, output, need_bias)
    return masked, grad_bias if need_bias else None


def _named(name: str) -> contextlib.AbstractContextManager[Any]:
    """A range of the profiler for an operator that goes straight to its kernel."""
    return record_function(f"fused_resnet::{name}") if profiler_enabled() else _NO_RANGE


def _training_forward(
    trains_weight: bool, input: Tensor, weight: Tensor, bias: Tensor | None, shortcut: Tensor | None, *parameters: Any
) -> Tensor:
    """The operator below autograd, by the shortest way. A weight that is trained is another one in each step, so nothing of it is kept."""
    if nobody_listens(input, weight, bias, shortcut, but_for_profiler=True):  # gradient mode is off here
        plan = find(geometry_of_operator, input, weight, bias, shortcut, *[tuple(p) if isinstance(p, list) else p for p in parameters])
        with _named("conv_bias_add_relu"):
            run = plan.once if trains_weight and isinstance(plan, CpuPlan) else plan
            return run(input, weight, bias, shortcut)
    output: Tensor = call_below_autograd(conv_bias_add_relu, input, weight, bias, shortcut, *parameters)
    return output


GRADIENTS: dict[Operand, Any] = {"input": conv_input_gradient, "weight": conv_weight_gradient}


def gradient(
    operand: Operand,
    grad: Tensor,
    other: Tensor,
    size: torch.Size,
    channels_last: bool,
    geometry: Geometry,
    end: Tensor | None = None,
    masked: bool = False,
    input: Tensor | None = None,
) -> Tensor:
    """``conv_input_gradient`` or ``conv_weight_gradient`` by the shortest way: the dispatcher and the way back into Python take longer than a
    small gradient. end: is added to an input's gradient or, ``masked``, the output of the ReLU that this goes through. input: of an input's
    gradient, the input where it is at hand."""
    if nobody_listens(grad, other, end, but_for_profiler=True):
        plan = find_gradient(operand, grad, other, size, channels_last, *geometry, end=end, masked=masked)
        with _named(f"conv_{operand}_gradient"):
            return plan(grad, other, end, input)
    found: Tensor = GRADIENTS[operand](grad, other, size, channels_last, *geometry)
    if end is None:
        return found
    return _through_relu(found, end, False)[0] if masked else found + end
