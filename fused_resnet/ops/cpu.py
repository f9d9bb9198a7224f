"""Calls into the compiled module for the CPU: plans, packed weights, pointers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import _settings
from . import select
from .backend import Backend
from .derived import find, unchanged
from .spec import OTHER, SUSPICIOUS, ConvSpec, Operand, address, check_allocated, check_operands, dtype_name

Packer = Callable[[Tensor], "Tensor | None"]


class CpuBackend(Backend):
    """The compiled module's kernels; without it, the library's."""

    def __init__(self, module: ModuleType | None, missing: str) -> None:
        self.module, self.missing = module, missing

    def why_no_kernels(self, device: torch.device) -> str:
        return self.missing if self.module is None else ""

    def why_general(self, spec: ConvSpec) -> list[str]:
        return [self.missing] if self.module is None else select.why_general_on_cpu(spec)

    def convolution(self, spec: ConvSpec, algorithm: str) -> Any:
        """The compiled convolution."""
        assert self.module is not None
        return self.module.Convolution(**_shape_of(spec, algorithm), **_end_of(spec))

    def fresh_convolution(self, spec: ConvSpec, algorithm: str) -> Any:
        """The same of a weight that is used once, as it is in memory."""
        assert self.module is not None
        return self.module.FreshConvolution(**_shape_of(spec, algorithm), **_end_of(spec), weight_strides=spec.weight.strides)

    def why_general_gradient(self, operand: Operand, spec: ConvSpec) -> list[str]:
        return [self.missing] if self.module is None else select.why_general_gradient_on_cpu(operand, spec)

    def gradient(self, operand: Operand, spec: ConvSpec, algorithm: str, masked: bool = False) -> Any:
        """The compiled gradient of a convolution."""
        assert self.module is not None
        made = self.module.InputGradient if operand == "input" else self.module.WeightGradient
        end = None if spec.shortcut is None else spec.shortcut.strides
        return made(**_shape_of(spec, algorithm), weight_strides=spec.weight.strides, end_strides=end, masked=masked)

    def gradient_plan(self, operand: Operand, spec: ConvSpec, masked: bool) -> CpuGradientPlan:
        return CpuGradientPlan(operand, spec, self, masked)

    def kernel_plan(self, spec: ConvSpec) -> CpuPlan:
        return CpuPlan(spec, self)

    def explain(self, spec: ConvSpec) -> dict[str, str]:
        """How a convolution would be computed, and why."""
        why = self.why_general(spec)
        if why:
            return {"path": "general: the library's convolution, then addition and ReLU in one pass", "reason": "; ".join(why)}
        kernel = self.convolution(spec, _settings.current.algorithm)
        return {**_told(kernel), "weights": f"{kernel.packed_bytes / 1024:.0f} KiB packed"}

    def explain_gradient(self, operand: Operand, spec: ConvSpec) -> dict[str, str]:
        """The same of its gradient."""
        why = self.why_general_gradient(operand, spec)
        if why:
            return {"path": "general: the library's gradient", "reason": "; ".join(why)}
        return _told(self.gradient(operand, spec, _settings.current.algorithm))

    def has_passes(self, dtype: torch.dtype) -> bool:
        return dtype != torch.float16

    def run_bias_add_relu(self, input: Tensor, bias: Tensor | None, shortcut: Tensor | None, relu: bool, output: Tensor) -> None:
        assert self.module is not None
        self.module.bias_add_relu(
            dtype_name(output.dtype),
            tuple(input.shape),
            output.stride(),
            input.stride(),
            input.stride() if shortcut is None else shortcut.stride(),
            relu,
            input.dtype != output.dtype,
            input.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if shortcut is None else shortcut.data_ptr(),
            output.data_ptr(),
            torch.get_num_threads(),
        )

    def run_relu_backward(self, grad: Tensor, output: Tensor, result: Tensor, sums: Tensor | None) -> None:
        self._relu_backward(grad, output, result, sums)

    def run_bias_gradient(self, grad: Tensor, sums: Tensor) -> None:
        self._relu_backward(grad, None, None, sums)

    def _relu_backward(self, grad: Tensor, output: Tensor | None, result: Tensor | None, sums: Tensor | None) -> None:
        assert self.module is not None
        strides = [grad.stride() if t is None else t.stride() for t in (result, grad, output)]
        grad_at, output_at, result_at, sums_at = [0 if t is None else t.data_ptr() for t in (grad, output, result, sums)]
        self.module.relu_backward(
            dtype_name(grad.dtype), tuple(grad.shape), *strides, grad_at, output_at, result_at, sums_at, torch.get_num_threads()
        )


def _shape_of(spec: ConvSpec, algorithm: str) -> dict[str, Any]:
    """What every compiled convolution and gradient is made of."""
    stride, padding, dilation, _ = spec.geometry
    return {
        "dtype": spec.dtype_name,
        "input": spec.input.shape,
        "weight": spec.weight.shape,
        "output": spec.output.shape,
        "stride": stride,
        "pad": (padding.top, padding.left),
        "dilation": dilation,
        "input_strides": spec.input.strides,
        "output_strides": spec.output.strides,
        "threads": torch.get_num_threads(),
        "algorithm": algorithm,
        "strict": _settings.current.numerics == "strict",
    }


def _end_of(spec: ConvSpec) -> dict[str, Any]:
    """What follows a convolution."""
    shortcut = None if spec.shortcut is None else spec.shortcut.strides
    return {"shortcut_strides": shortcut, "has_bias": spec.bias is not None, "relu": spec.relu}


def _told(kernel: Any) -> dict[str, str]:
    threads = torch.get_num_threads()
    return {
        "path": f"hot: one kernel, {kernel.isa}, {threads} thread{'s' if threads > 1 else ''}",
        "algorithm": kernel.algorithm,
        "reason": kernel.reason,
        "blocking": kernel.describe(),
        "workspace": f"{kernel.workspace_bytes / 1024:.0f} KiB",
    }


class CpuPlan:
    """A convolution by one kernel, and directly where Winograd's transforms of a weight or an input are not finite."""

    __slots__ = ("_bias_is_strided", "_directly", "_dtype", "_fresh", "_packed", "_run", "_shape", "_strides", "kernel")

    def __init__(self, spec: ConvSpec, backend: CpuBackend) -> None:
        self.kernel = backend.convolution(spec, _settings.current.algorithm)
        self._run, self._packed = self.kernel.run, _packer(self.kernel, spec.weight.strides)
        self._shape, self._strides = spec.output
        self._dtype = spec.dtype
        self._bias_is_strided = spec.bias is not None and spec.bias.strides != (1,)

        @functools.cache
        def directly() -> tuple[Any, Packer]:
            kernel = backend.convolution(spec, "direct")
            return kernel.run, _packer(kernel, spec.weight.strides)

        self._directly = directly
        chosen = _settings.current.algorithm
        self._fresh = functools.cache(lambda direct: backend.fresh_convolution(spec, "direct" if direct else chosen))

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None, shortcut: Tensor | None) -> Tensor:
        x, b, s, _held = self._addresses(input, weight, bias, shortcut)
        packed = self._packed(weight)
        output = torch.empty_strided(self._shape, self._strides, dtype=self._dtype)
        if packed is None or not self._run(x, packed.data_ptr(), b, s, output.data_ptr()):
            run, packer = self._directly()
            packed = packer(weight)
            assert packed is not None
            run(x, packed.data_ptr(), b, s, output.data_ptr())
        return output

    def once(self, input: Tensor, weight: Tensor, bias: Tensor | None, shortcut: Tensor | None) -> Tensor:
        """The same bits with a weight that will be another one at the next call: it is packed into memory of the call's own."""
        x, b, s, _held = self._addresses(input, weight, bias, shortcut)
        w = address(weight, "weight")
        output = torch.empty_strided(self._shape, self._strides, dtype=self._dtype)
        if not self._fresh(False).run(x, w, b, s, output.data_ptr()):
            self._fresh(True).run(x, w, b, s, output.data_ptr())
        return output

    def _addresses(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, shortcut: Tensor | None
    ) -> tuple[int, int, int, Tensor | None]:
        """Of input, bias and shortcut, 0 for none; and what keeps the bias's memory."""
        x = input.data_ptr()
        b = 0 if bias is None else bias.data_ptr()
        s = 0 if shortcut is None else shortcut.data_ptr()
        if x < SUSPICIOUS or (b < SUSPICIOUS and bias is not None) or (s < SUSPICIOUS and shortcut is not None):
            check_operands(input, weight, bias, shortcut)
        if self._bias_is_strided:
            assert bias is not None
            bias = bias.contiguous()
            b = bias.data_ptr()
        return x, b, s, bias


class CpuGradientPlan:
    """A gradient by our kernels. Where Winograd's transforms are not finite it is made directly. None, for the library, where a weight is not
    finite, or a weight's gradient: times the zeros around a map, which belong to no sum, an infinity would be NaN. A weight is packed in each
    call, into memory of the call's own: between two steps of training it changes."""

    __slots__ = ("_directly", "_dtype", "_is_direct", "_other", "_shape", "_strides", "kernel")

    def __init__(self, operand: Operand, spec: ConvSpec, backend: CpuBackend, masked: bool = False) -> None:
        self.kernel = backend.gradient(operand, spec, _settings.current.algorithm, masked)
        self._shape, self._strides = spec.input if operand == "input" else spec.weight
        self._dtype = spec.dtype
        self._other = OTHER[operand]
        self._is_direct = operand == "weight" and self.kernel.algorithm == "direct"  # an input gradient tells of its first part
        self._directly = functools.cache(lambda: backend.gradient(operand, spec, "direct", masked))

    def __call__(self, grad: Tensor, other: Tensor, end: Tensor | None = None) -> Tensor | None:
        addresses = [address(grad, "grad"), address(other, self._other)]
        if self._other == "weight":
            addresses.append(0 if end is None else address(end, "end"))
        result = torch.empty_strided(self._shape, self._strides, dtype=self._dtype)
        addresses.append(result.data_ptr())
        if self.kernel.run(*addresses) or (not self._is_direct and self._directly().run(*addresses)):
            return result
        return None


def _packer(kernel: Any, strides: tuple[int, ...]) -> Packer:
    """The packed weight of a kernel, of a weight with these strides, kept until that changes; None where it is of no use: see ``pack``."""
    packed_bytes, pack = kernel.packed_bytes, kernel.pack
    tag = f"packed: {kernel.packing}, strides {strides}"

    def make(held: Tensor) -> Tensor | None:
        buffer = torch.empty(packed_bytes, dtype=torch.uint8)
        return buffer if pack(held.data_ptr(), strides, buffer.data_ptr()) else None

    def packed(weight: Tensor) -> Tensor | None:
        kept = unchanged(tag, weight)
        if kept is None:
            check_allocated(weight, "weight")
            kept = find(tag, (weight,), make)
        value: Tensor | None = kept.value
        return value

    return packed
