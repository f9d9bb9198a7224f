"""What the operators of ``schema.py`` do: kernels, fake kernels, autograd, autocast, flop formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from . import autograd
from .plans import backends, find
from .schema import library
from .spec import check_convolution, check_pass, check_relu_backward, empty_as, geometry_of_operator, output_format


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


_KERNELS = {
    "conv_bias_add_relu": (_conv, autograd.conv_autograd),
    "bias_add_relu": (_pass, autograd.pass_autograd),
    "relu_backward": (_relu_backward, autograd.relu_backward_autograd),
}
for _name, (_kernel, _differentiable) in _KERNELS.items():
    for _device in ("CPU", "CUDA"):
        library.impl(_name, _kernel, _device)
    library.impl(_name, _differentiable, "Autograd")
for _device in ("cpu", "cuda"):
    library.impl("conv_bias_add_relu", autograd.conv_autocast(_device), f"Autocast{_device.upper()}")
    library.impl("bias_add_relu", autograd.pass_autocast(_device), f"Autocast{_device.upper()}")


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
