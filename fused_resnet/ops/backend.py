"""What computes for the tensors of one kind of device. ``Backend`` itself has no kernels: everything is the library's.

``cpu.py`` and ``cuda.py`` have one each with the kernels of the compiled modules.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Protocol

import torch
from torch import Tensor

from .spec import LOW_PRECISION, ConvSpec, Operand, check_allocated, check_operands, empty_as, is_channels_last


class Plan(Protocol):
    """One convolution, ready to run on any tensors of its spec. It does not change once made."""

    kernel: Any  # of the compiled module: what tests and benchmarks ask. None: the library's

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None, shortcut: Tensor | None) -> Tensor: ...


class GradientPlan(Protocol):
    """A gradient of one convolution by our kernels, ready to run. It does not change once made. None: these values are for the library."""

    kernel: Any

    def __call__(self, grad: Tensor, other: Tensor, end: Tensor | None) -> Tensor | None: ...


class Backend:
    """The operations for one kind of device. Operands have been checked, but for storages that were freed."""

    on_gpu = False

    def why_no_kernels(self, device: torch.device) -> str:
        """Why none of our kernels can run on this device; "" if they can."""
        return f"there are no kernels for {device.type} tensors in this build"

    def state(self, *tensors: Tensor | None) -> Hashable:
        """What a plan for these tensors depends on besides its spec and the settings."""
        return torch.get_num_threads()

    def call_state(self, x: Tensor) -> Hashable:
        """What a call that is repeated for tensors like ``x`` depends on besides their layout and the settings: more than its plan
        does (``state``), for packed weights belong to it."""
        return torch.get_num_threads()

    def why_general(self, spec: ConvSpec) -> list[str]:
        """Why a convolution takes the general path; none: ``kernel_plan`` has a kernel for it."""
        return [self.why_no_kernels(spec.device)]

    def kernel_plan(self, spec: ConvSpec) -> Plan:
        """The plan of a convolution on the hot path."""
        raise NotImplementedError

    def why_general_gradient(self, operand: Operand, spec: ConvSpec) -> list[str]:
        """Why the library makes a convolution's gradient in its input or weight; none: ``gradient_plan`` has a kernel for it. spec: with the
        layouts of that gradient (``input`` or ``weight``) and of the output's (``output``)."""
        return [self.why_no_kernels(spec.device) or f"there are no gradient kernels for {spec.device.type} tensors"]

    def gradient_plan(self, operand: Operand, spec: ConvSpec, masked: bool) -> GradientPlan:
        """The plan of such a gradient by our kernels. spec: with the layout of what an input's gradient ends with (``shortcut``), if there is
        something: an addend or, ``masked``, the output of the ReLU that it goes through."""
        raise NotImplementedError

    def bias_add_relu(
        self, input: Tensor, bias: Tensor | None, shortcut: Tensor | None, relu: bool, dtype: torch.dtype, owned: bool
    ) -> Tensor:
        """relu(input + bias + shortcut) as ``dtype``; writes over ``input`` where that is ``owned`` (nobody else's) and fits.

        ``input`` may be float32 where ``dtype`` is narrower: it is then rounded once, here.

        Raises:
            RuntimeError: for an operand whose storage was freed.
        """
        check_operands(input, bias=bias, shortcut=shortcut)
        memory_format = torch.channels_last if is_channels_last(input) else torch.contiguous_format
        in_place = owned and input.dtype == dtype and input.is_contiguous(memory_format=memory_format)
        if bias is None and shortcut is None and not relu and in_place:
            return input
        if self.why_no_kernels(input.device) or not self.has_passes(dtype):
            return _bias_add_relu(input, bias, shortcut, relu, dtype, owned)
        output = input if in_place else empty_as(input, dtype)
        self.run_bias_add_relu(input, None if bias is None else bias.contiguous(), shortcut, relu, output)
        return output

    def relu_backward(self, grad: Tensor, output: Tensor, bias_grad: bool) -> tuple[Tensor, Tensor]:
        """grad where not (output <= 0), else 0, in output's memory format; and its sum over N, P, Q [K], or an empty tensor.

        Raises:
            RuntimeError: for an operand whose storage was freed.
        """
        check_allocated(grad, "grad")
        check_allocated(output, "output")
        result = empty_as(output, output.dtype)
        if self.why_no_kernels(output.device):
            torch.where(output <= 0, grad.new_zeros(()), grad, out=result)
            return result, result.sum((0, 2, 3)) if bias_grad else output.new_empty(0)
        sums = output.new_empty(output.shape[1] if bias_grad else 0)
        self.run_relu_backward(grad, output, result, sums if bias_grad else None)
        return result, sums

    def bias_gradient(self, grad: Tensor) -> Tensor:
        """The sum of a gradient over N, P, Q [K], in an order that does not depend on the number of threads.

        Raises:
            RuntimeError: where its storage was freed.
        """
        check_allocated(grad, "grad")
        if self.why_no_kernels(grad.device) or self.on_gpu:
            return grad.sum((0, 2, 3))
        sums = grad.new_empty(grad.shape[1])
        self.run_bias_gradient(grad, sums)
        return sums

    def has_passes(self, dtype: torch.dtype) -> bool:
        """Whether ``run_bias_add_relu`` gives this dtype."""
        return True

    def run_bias_add_relu(self, input: Tensor, bias: Tensor | None, shortcut: Tensor | None, relu: bool, output: Tensor) -> None:
        """output = relu(input + bias + shortcut), rounded to output's dtype; output may be input. bias is contiguous."""
        raise NotImplementedError

    def run_relu_backward(self, grad: Tensor, output: Tensor, result: Tensor, sums: Tensor | None) -> None:
        """result = grad where not (output <= 0), else 0; sums [K], if there is one, its sum over N, P, Q."""
        raise NotImplementedError

    def run_bias_gradient(self, grad: Tensor, sums: Tensor) -> None:
        """sums [K] = the gradient's sum over N, P, Q."""
        raise NotImplementedError


def _bias_add_relu(
    input: Tensor, bias: Tensor | None, shortcut: Tensor | None, relu: bool, dtype: torch.dtype, owned: bool
) -> Tensor:
    """``Backend.bias_add_relu`` by the library's operations."""
    wide = torch.float32 if dtype in LOW_PRECISION else dtype
    output = input.to(wide)
    if bias is not None:
        output = output + bias.to(wide)[:, None, None]
    if shortcut is not None:
        output = output + shortcut.to(wide)
    if relu:
        output = torch.relu(output)
    output = output.to(dtype)
    if output is input and not owned:
        output = output.clone()
    # A new tensor also where the strides are ambiguous and the format's own are expected.
    result = empty_as(input, dtype)
    return output if output.stride() == result.stride() else result.copy_(output)
