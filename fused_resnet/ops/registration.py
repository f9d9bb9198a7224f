"""What the operators of ``schema.py`` do: kernels, fake kernels, autograd, autocast, flop formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from . import autograd
from .gradients import check_gradient
from .plans import backends, find, find_gradient
from .schema import library
from .spec import Operand, check_convolution, check_pass, check_relu_backward, empty_as, geometry_of_operator, output_format


def _conv(input: Tensor, weight: Tensor, bias: Tensor | None, shortcut: Tensor | None, *parameters: Any) -> Tensor:
    stride, padding, dilation, groups, relu = parameters
    plan = find(geometry_of_operator, input, weight, bias, shortcut, tuple(stride), tuple(padding), tuple(dilation), groups, relu)
    return plan(input, weight, bias, shortcut)


def _pass(input: Tensor, bias: Tensor | None, shortcut: Tensor | None, relu: bool) -> Tensor:
    check_pass(input, bias, shortcut)
    return backends.of(input).bias_add_relu(input, bias, shortcut, relu, input.dtype, owned=False)


def _relu_backward(grad: Tensor, output: Tensor, bias_grad: bool) -> tuple[Tensor, Tensor]:
    check_relu_backward(grad, output)
    return backends.of(output).relu_backward(grad, output, bias_grad)


def _gradient(operand: Operand) -> Callable[..., Tensor]:
    def kernel(grad: Tensor, other: Tensor, size: Sequence[int], channels_last: bool, *geometry: Any) -> Tensor:
        stride, padding, dilation, groups = geometry
        plan = find_gradient(
            operand, grad, other, tuple(size), channels_last, tuple(stride), tuple(padding), tuple(dilation), groups
        )
        return plan(grad, other)

    return kernel


# Fake kernels: shape, dtype and strides without the values.


@torch.library.register_fake("fused_resnet::conv_bias_add_relu", lib=library)
def _conv_fake(input: Tensor, weight: Tensor, bias: Tensor | None, shortcut: Tensor | None, *parameters: Any) -> Tensor:
    shape = check_convolution(input, weight, bias, shortcut, geometry_of_operator(weight, *parameters[:4]))
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=output_format(input, weight, shape))


@torch.library.register_fake("fused_resnet::bias_add_relu", lib=library)
def _pass_fake(input: Tensor, bias: Tensor | None, shortcut: Tensor | None, relu: bool) -> Tensor:
    check_pass(input, bias, shortcut)
    return empty_as(input, input.dtype)


@torch.library.register_fake("fused_resnet::relu_backward", lib=library)
def _relu_backward_fake(grad: Tensor, output: Tensor, bias_grad: bool) -> tuple[Tensor, Tensor]:
    check_relu_backward(grad, output)
    return empty_as(output, output.dtype), output.new_empty(output.shape[1] if bias_grad else 0)


def _gradient_fake(operand: Operand) -> Callable[..., Tensor]:
    def fake(grad: Tensor, other: Tensor, size: Sequence[int], channels_last: bool, *geometry: Any) -> Tensor:
        shape = check_gradient(operand, grad, other, size, geometry_of_operator(grad, *geometry))
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        return torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format)

    return fake


torch.library.register_fake("fused_resnet::conv_input_gradient", _gradient_fake("input"), lib=library)
torch.library.register_fake("fused_resnet::conv_weight_gradient", _gradient_fake("weight"), lib=library)


_KERNELS = {
    "conv_bias_add_relu": (_conv, autograd.conv_autograd),
    "bias_add_relu": (_pass, autograd.pass_autograd),
    "relu_backward": (_relu_backward, autograd.relu_backward_autograd),
    "conv_input_gradient": (_gradient("input"), autograd.gradient_autograd("input")),
    "conv_weight_gradient": (_gradient("weight"), autograd.gradient_autograd("weight")),
}
for _name, (_kernel, _differentiable) in _KERNELS.items():
    for _device in ("CPU", "CUDA"):
        library.impl(_name, _kernel, _device)
    library.impl(_name, _differentiable, "Autograd")
for _device in ("cpu", "cuda"):
    library.impl("conv_bias_add_relu", autograd.conv_autocast(_device), f"Autocast{_device.upper()}")
    library.impl("bias_add_relu", autograd.pass_autocast(_device), f"Autocast{_device.upper()}")


# As PyTorch counts each half of convolution_backward: as many as forward; with groups, a weight's as if there were none.


@register_flop_formula(torch.ops.fused_resnet.conv_input_gradient)
def _input_gradient_flops(
    grad_shape: Sequence[int], weight_shape: Sequence[int], input_size: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    return conv_flop_count(list(input_size), list(weight_shape), list(grad_shape))


@register_flop_formula(torch.ops.fused_resnet.conv_weight_gradient)
def _weight_gradient_flops(
    grad_shape: Sequence[int], input_shape: Sequence[int], weight_size: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    def turned(shape: Sequence[int]) -> list[int]:
        return [shape[1], shape[0], *shape[2:]]

    return conv_flop_count(turned(input_shape), turned(grad_shape), turned(weight_size))


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
