"""What the dispatcher calls in front of the kernels: whether a gradient is wanted, and autocast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._compat import has_tangent, without_autocast
from .derived import derive
from .functions import GRADIENTS, BiasAddReLU, ConvBiasAddReLU, ReLUBackward, call_below_autograd, needs_grad, refuse_forward_mode
from .gradients import library_gradient
from .role import ALONE
from .schema import bias_add_relu, conv_bias_add_relu, relu_backward
from .spec import Operand, geometry_of_operator


def conv_autograd(input: Tensor, weight: Tensor, bias: Tensor | None, shortcut: Tensor | None, *parameters: Any) -> Tensor:
    refuse_forward_mode(input, weight, bias, shortcut)
    if needs_grad(input, weight, bias, shortcut):
        output: Tensor = ConvBiasAddReLU.apply(ALONE, input, weight, bias, shortcut, *parameters)
        return output
    return call_below_autograd(conv_bias_add_relu, input, weight, bias, shortcut, *parameters)


def pass_autograd(input: Tensor, bias: Tensor | None, shortcut: Tensor | None, relu: bool) -> Tensor:
    refuse_forward_mode(input, bias, shortcut)
    if needs_grad(input, bias, shortcut):
        output: Tensor = BiasAddReLU.apply(input, bias, shortcut, relu)
        return output
    return call_below_autograd(bias_add_relu, input, bias, shortcut, relu)


def relu_backward_autograd(grad: Tensor, output: Tensor, bias_grad: bool) -> tuple[Tensor, Tensor]:
    refuse_forward_mode(grad)
    if needs_grad(grad):
        return ReLUBackward.apply(grad, output, bias_grad)
    return call_below_autograd(relu_backward, grad, output, bias_grad)


def gradient_autograd(operand: Operand) -> Callable[..., Tensor]:
    def kernel(grad: Tensor, other: Tensor, size: Sequence[int], channels_last: bool, *geometry: Any) -> Tensor:
        if needs_grad(grad, other) or has_tangent(grad, other):  # differentiated further: by the library
            memory_format = torch.channels_last if channels_last else torch.contiguous_format
            return library_gradient(operand, grad, other, size, memory_format, geometry_of_operator(grad, *geometry))
        found: Tensor = call_below_autograd(GRADIENTS[operand], grad, other, size, channels_last, *geometry)
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
