"""Calls into the compiled module: plans, packed weights, pointers. Without it, the same functions through PyTorch.

A plan is made once for each combination of shapes, strides and parameters (which is also when the arguments are checked)
and kept: a repeated call costs one look-up.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _gpu, _numerics
from ._arguments import SUSPICIOUS, Padding, Pair, check_allocated, check_convolution, check_operands, is_channels_last, output_format
from ._derived import find, unchanged
from ._extension import cpu
from ._select import cpu_reasons, reasons

Plan = Callable[[Tensor, Tensor, "Tensor | None", "Tensor | None"], Tensor]
Packer = Callable[[Tensor], "Tensor | None"]

DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
_MOST_PLANS = 4096  # beyond this many shapes, start over: a plan is cheap to make again
_SMALL = 1 << 16  # elements: a pass less saves less than our call costs more
_UNKNOWN: Any = object()
_plans: dict[Any, Any] = {}  # layouts and parameters -> Plan, or None for the general path
_algorithm = "auto"


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shortcut: Tensor | None,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    relu: bool,
) -> Plan | None:
    """The plan of one convolution, or None where the general path serves and needs more than the library's convolution.

    Raises for arguments that are not legal."""
    shape = check_convolution(input, weight, bias, shortcut, stride, padding, dilation, groups)
    if reasons(input, weight, shortcut, stride, padding, dilation, groups, shape):
        symmetric = padding.top == padding.bottom and padding.left == padding.right
        if not _gpu.serves(input) and input.is_cpu and input.dtype in (torch.float32, torch.float64) and symmetric:
            return _library_plan(shape, stride, (padding.top, padding.left), dilation, groups, relu)
        return None
    if _gpu.serves(input):
        strides = _output_strides(input, weight, shape)
        return _gpu.convolution(shape, input, weight, bias, shortcut, stride, padding, dilation, groups, relu, strides)
    return _plan(shape, input, weight, bias, shortcut, stride, padding, dilation, relu, torch.get_num_threads())


def cached(
    make: Callable[..., Plan | None],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shortcut: Tensor | None,
    *parameters: Any,
) -> Plan | None:
    """``make`` with these arguments, or what it returned before for the same layouts and parameters."""
    try:
        key = (
            input.shape,
            input.stride(),
            input.dtype,
            input.is_cpu,
            weight.shape,
            weight.stride(),
            weight.dtype,
            weight.is_cpu,
            None if bias is None else (bias.shape, bias.stride(), bias.dtype, bias.is_cpu),
            None if shortcut is None else (shortcut.shape, shortcut.stride(), shortcut.dtype, shortcut.is_cpu),
            parameters,
            torch.get_num_threads() if input.is_cpu else _gpu.state(input, weight, bias, shortcut),
            _numerics.setting,
        )
    except (AttributeError, RuntimeError):  # None, no tensor at all, a nested one, which has no shape: making the plan says so
        return make(input, weight, bias, shortcut, *parameters)
    plan = _plans.get(key, _UNKNOWN)
    if plan is _UNKNOWN:
        changes = _numerics.changes
        plan = make(input, weight, bias, shortcut, *parameters)
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        if changes == _numerics.changes:
            _plans[key] = plan
    return plan


def _output_strides(input: Tensor, weight: Tensor, shape: tuple[int, int, int, int]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta", memory_format=output_format(input, weight, shape)).stride()


def _maker(
    shape: tuple[int, int, int, int],
    input: Tensor,
    weight: Tensor,
    has_bias: bool,
    shortcut_strides: tuple[int, ...] | None,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    relu: bool,
    output_strides: tuple[int, ...],
    threads: int,
) -> Callable[[str], Any]:
    """What makes the compiled convolution, given an algorithm."""
    arguments = (
        DTYPES[input.dtype],
        tuple(input.shape),
        tuple(weight.shape),
        shape,
        stride,
        (padding.top, padding.left),
        dilation,
        input.stride(),
        output_strides,
        shortcut_strides,
        has_bias,
        relu,
        threads,
    )
    strict = _numerics.current == "strict"
    return lambda algorithm: cpu.Convolution(*arguments, algorithm, strict)  # type: ignore[union-attr]


def explain_convolution(input: Tensor, weight: Tensor, stride: int, padding: Pair) -> dict[str, str]:
    """How a convolution of these (meta) tensors with bias, shortcut and ReLU would be computed on the CPU, and why.

    Raises:
        TypeError, ValueError: for arguments that are not legal.
    """
    pads = Padding(padding[0], padding[0], padding[1], padding[1])
    strides, ones = (stride, stride), (1, 1)
    shape = check_convolution(input, weight, None, None, strides, pads, ones, 1)
    channels_last = is_channels_last(input)
    why = cpu_reasons("cpu", input.dtype, input.shape, weight.shape, strides, pads, ones, 1, channels_last)
    if why:
        return {"path": "general: the library's convolution, then addition and ReLU in one pass", "reason": "; ".join(why)}
    output = _output_strides(input, weight, shape)
    threads = torch.get_num_threads()
    kernel = _maker(shape, input, weight, True, output, strides, pads, ones, True, output, threads)(_algorithm)
    return {
        "path": f"hot: one kernel, {kernel.isa}, {threads} thread{'s' if threads > 1 else ''}",
        "algorithm": kernel.algorithm,
        "reason": kernel.reason,
        "blocking": kernel.describe(),
        "workspace": f"{kernel.workspace_bytes / 1024:.0f} KiB",
        "weights": f"{kernel.packed_bytes / 1024:.0f} KiB packed",
    }


def _plan(
    shape: tuple[int, int, int, int],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shortcut: Tensor | None,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    relu: bool,
    threads: int,
) -> Plan:
    output_strides = _output_strides(input, weight, shape)
    dtype, bias_strided = input.dtype, bias is not None and not bias.is_contiguous()
    shortcut_strides = None if shortcut is None else shortcut.stride()
    make = _maker(shape, input, weight, bias is not None, shortcut_strides, stride, padding, dilation, relu, output_strides, threads)
    kernel = make(_algorithm)
    weight_strides = weight.stride()
    run, packed_weight = kernel.run, _packer(kernel, weight_strides)

    @functools.cache
    def direct() -> tuple[Any, Packer]:
        """Direct convolution: right where Winograd's transforms of this weight or this input are not finite."""
        kernel = make("direct")
        return kernel.run, _packer(kernel, weight_strides)

    def call(input: Tensor, weight: Tensor, bias: Tensor | None, shortcut: Tensor | None) -> Tensor:
        x = input.data_ptr()
        b = 0 if bias is None else bias.data_ptr()
        s = 0 if shortcut is None else shortcut.data_ptr()
        if x < SUSPICIOUS or (b < SUSPICIOUS and bias is not None) or (s < SUSPICIOUS and shortcut is not None):
            check_operands(input, weight, bias, shortcut)
        if bias_strided:
            assert bias is not None
            bias = bias.contiguous()
            b = bias.data_ptr()
        packed = packed_weight(weight)
        output = torch.empty_strided(shape, output_strides, dtype=dtype)
        if packed is None or not run(x, packed.data_ptr(), b, s, output.data_ptr()):
            run_direct, packed_directly = direct()
            packed = packed_directly(weight)
            assert packed is not None
            run_direct(x, packed.data_ptr(), b, s, output.data_ptr())
        return output

    call.kernel = kernel  # type: ignore[attr-defined]  # what tests and `env` ask: instruction set, blocking, workspace
    return call


def _library_plan(
    shape: tuple[int, int, int, int], stride: Pair, padding: Pair, dilation: Pair, groups: int, relu: bool
) -> Plan:
    """The library's convolution, then addition and ReLU in place: our one pass, or where the map is small the library's two."""
    small = shape[0] * shape[1] * shape[2] * shape[3] < _SMALL

    def call(input: Tensor, weight: Tensor, bias: Tensor | None, shortcut: Tensor | None) -> Tensor:
        check_operands(input, weight, bias, shortcut)
        output = torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
        if shortcut is None:
            return output.relu_() if relu else output
        if not small:
            return bias_add_relu(output, None, shortcut, relu, output.dtype, owned=True)
        output.add_(shortcut)
        return output.relu_() if relu else output

    call.kernel = None  # type: ignore[attr-defined]
    return call


def _packer(kernel: Any, strides: tuple[int, ...]) -> Packer:
    """The packed weight of a kernel, of a weight with these strides, kept until that changes; None where it is of no use: see ``pack``."""
    packed_bytes, pack = kernel.packed_bytes, kernel.pack
    tag = (f"packed: {kernel.packing}, strides {strides}",)

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


def bias_add_relu(
    input: Tensor, bias: Tensor | None, shortcut: Tensor | None, relu: bool, dtype: torch.dtype, owned: bool
) -> Tensor:
    """relu(input + bias + shortcut) as ``dtype``; writes over ``input`` where that is ``owned`` (nobody else's) and fits.

    ``input`` may be float32 where ``dtype`` is narrower: it is then rounded once, here.

    Raises:
        RuntimeError: for an operand whose storage was freed.
    """
    check_operands(input, bias=bias, shortcut=shortcut)
    channels_last = is_channels_last(input)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    in_place = owned and input.dtype == dtype and input.is_contiguous(memory_format=memory_format)
    if bias is None and shortcut is None and not relu and in_place:
        return input
    on_gpu = _gpu.serves(input) and not _gpu.why_no_kernels(input.device)
    if not on_gpu and (cpu is None or not input.is_cpu or dtype not in DTYPES):
        return _bias_add_relu_library(input, bias, shortcut, relu, dtype, owned, memory_format)
    output = input if in_place else torch.empty(input.shape, dtype=dtype, device=input.device, memory_format=memory_format)
    if on_gpu:
        _gpu.bias_add_relu(input, bias, shortcut, relu, output)
        return output
    assert cpu is not None
    bias = None if bias is None else bias.contiguous()
    cpu.bias_add_relu(
        DTYPES[dtype],
        tuple(input.shape),
        output.stride(),
        input.stride(),
        input.stride() if shortcut is None else shortcut.stride(),
        relu,
        input.dtype != dtype,
        input.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if shortcut is None else shortcut.data_ptr(),
        output.data_ptr(),
        torch.get_num_threads(),
    )
    return output


def _bias_add_relu_library(
    input: Tensor,
    bias: Tensor | None,
    shortcut: Tensor | None,
    relu: bool,
    dtype: torch.dtype,
    owned: bool,
    memory_format: torch.memory_format,
) -> Tensor:
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
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
    result = torch.empty(input.shape, dtype=dtype, device=input.device, memory_format=memory_format)
    return output if output.stride() == result.stride() else result.copy_(output)


def relu_backward(grad: Tensor, output: Tensor, bias_grad: bool) -> tuple[Tensor, Tensor]:
    """grad where not (output <= 0), else 0, in output's memory format; and its sum over N, P, Q [K], or an empty tensor."""
    check_allocated(grad, "grad")
    check_allocated(output, "output")
    memory_format = torch.channels_last if is_channels_last(output) else torch.contiguous_format
    result = torch.empty(output.shape, dtype=output.dtype, device=output.device, memory_format=memory_format)
    sums = output.new_empty(output.shape[1] if bias_grad else 0)
    if _gpu.serves(output) and not _gpu.why_no_kernels(output.device):
        _gpu.relu_backward(grad, output, result, sums if bias_grad else None)
        return result, sums
    if cpu is None or not output.is_cpu:
        torch.where(output <= 0, grad.new_zeros(()), grad, out=result)
        if bias_grad:
            sums = result.sum((0, 2, 3))
        return result, sums
    cpu.relu_backward(
        DTYPES[output.dtype],
        tuple(output.shape),
        result.stride(),
        grad.stride(),
        output.stride(),
        grad.data_ptr(),
        output.data_ptr(),
        result.data_ptr(),
        sums.data_ptr() if bias_grad else 0,
        torch.get_num_threads(),
    )
    return result, sums


def use_isa(name: str) -> None:
    """Compute with this instruction set from now on. For tests and benchmarks; users set FUSED_RESNET_ISA."""
    assert cpu is not None
    cpu.set_isa(name)
    _numerics.record("isa", name)


def use_algorithm(name: str) -> None:
    """Compute with this algorithm wherever it can: auto, direct, winograd2 or winograd4. For tests and benchmarks."""
    global _algorithm
    _algorithm = name
    _numerics.record("algorithm", name)


def algorithm() -> str:
    """What ``use_algorithm`` has set."""
    return _algorithm
