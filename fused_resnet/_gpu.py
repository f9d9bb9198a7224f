"""Calls into the compiled CUDA module: plans, weights as the tensor cores read them, streams.

``_kernels.py`` asks here first for whatever lives on a GPU. The tests put the module's twin for the host in its place
(``use_twin``), which runs the general kernels on CPU tensors, thread block by thread block: everything here but the launch itself
is then what a GPU gets.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _extension, _numerics
from ._arguments import Padding, Pair, check_convolution, check_operands, output_format, pad, pair
from ._derived import derive

Plan = Callable[[Tensor, Tensor, "Tensor | None", "Tensor | None"], Tensor]

DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_ALIGNMENT = 16  # bytes: of every operand of a tensor-core kernel
_FEW = 4  # channels to which a stem's 1 to 3 are padded: csrc/cuda/config.h holds the same number
# Multiply-adds up to which a call is taken to be all launches, so that one kernel without tensor cores beats the library's several.
# Not measured yet, as little as what follows from it in ``reasons``: bench/gpu_report.py will tell.
_SMALL = 1 << 24

_MOST_PLANS = 4096  # beyond this many, start over
_UNKNOWN: Any = object()
_joined_plans: dict[Any, Any] = {}

_twin: ModuleType | None = None
_algorithm = "auto"


def module() -> ModuleType | None:
    """The compiled module, or its twin for the host."""
    return _twin if _twin is not None else _extension.cuda()


def serves(t: Tensor) -> bool:
    """Whether a tensor is for this file."""
    return t.is_cuda or (_twin is not None and t.is_cpu)


def why_no_kernels(device: torch.device) -> str:
    """Why none of our kernels can run on this device; "" if they can."""
    return "" if _twin is not None else _why_no_kernels(device.index or 0)


@functools.cache
def _why_no_kernels(index: int) -> str:
    found = _extension.cuda()
    if found is None:
        return _extension.cuda_missing()
    try:
        capability = found.capability(index)
    except RuntimeError as error:  # a driver older than the runtime that the module was built with
        return f"our CUDA module cannot use the device: {error}"
    return too_old(capability, found.BUILD["architectures"].split(), torch.cuda.get_device_name(index))


def too_old(capability: tuple[int, int], architectures: Sequence[str], name: str) -> str:
    """A sentence for a GPU that is older than what a build is for; "" for any other. What was built runs on later ones too."""
    first = min(int(a.rstrip("a")) for a in architectures)
    if capability >= (first // 10, first % 10):
        return ""
    return (
        f"the CUDA kernels of this build are for compute capability {first // 10}.{first % 10} and later, "
        f"{name} has {capability[0]}.{capability[1]}"
    )


def tf32() -> bool:
    """Whether PyTorch lets convolutions of float32 round their operands to TF32 (``torch.backends.cudnn.allow_tf32``)."""
    getter = getattr(torch._C, "_get_fp32_precision_getter", None)
    if getter is not None:  # torch 2.9: the older question raises where the newer setting was used
        return bool(getter("cuda", "conv") == "tf32")
    return bool(torch._C._get_cudnn_allow_tf32())


def state(*tensors: Tensor | None) -> Any:
    """What a plan depends on besides layouts and parameters: the devices, and what PyTorch allows."""
    return tf32(), *[t.device if t is not None else None for t in tensors]


def stream(device: torch.device) -> int:
    """The current stream of a device, as an address."""
    return int(torch._C._cuda_getCurrentRawStream(device.index)) if device.type == "cuda" else 0


def reasons(
    device: torch.device, dtype: torch.dtype, weight_shape: tuple[int, ...], output_pixels: int, groups: int
) -> list[str]:
    """Why a convolution takes the general path on a GPU."""
    missing = why_no_kernels(device)
    if missing:
        return [missing]
    if _algorithm != "auto":
        return []
    if groups != 1:
        return [f"groups = {groups}: our fast kernels are for groups = 1"]
    outputs, channels, height, width = weight_shape
    if output_pixels * outputs * channels * height * width <= _SMALL or dtype == torch.float64:
        return []  # the kernel without tensor cores serves, if need be
    if dtype == torch.float32 and not tf32():
        return ["float32 without TF32 (torch.backends.cudnn.allow_tf32): no tensor-core kernel can, and the library serves large ones"]
    vector = 16 // dtype.itemsize
    if (channels % vector and not _is_few(channels, dtype)) or outputs % vector:
        name = str(dtype).removeprefix("torch.")
        return [f"{channels} input and {outputs} output channels: the tensor cores want multiples of {vector} in {name}"]
    return []


def _is_few(channels: int, dtype: torch.dtype) -> bool:
    """Whether a kernel for a network's stem is for as few channels."""
    return channels <= _FEW and dtype.itemsize == 2


def _pad_channels(t: Tensor) -> Tensor:
    """[N, _FEW, H, W] in channels_last: ``t`` and zeros."""
    n, c, h, w = t.shape
    padded = torch.empty((n, _FEW, h, w), dtype=t.dtype, device=t.device, memory_format=torch.channels_last)
    padded[:, :c] = t
    padded[:, c:] = 0
    return padded


def convolution(
    shape: tuple[int, int, int, int],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shortcut: Tensor | None,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    relu: bool,
    output_strides: tuple[int, ...],
) -> Plan:
    """The plan of one convolution."""
    compiled = module()
    assert compiled is not None
    dtype, device = input.dtype, input.device
    if _algorithm == "auto" and groups == 1 and shape[0]:
        rest = stride, padding, dilation, groups, relu
        large = shape[0] * shape[2] * shape[3] * weight.numel() > _SMALL
        if large and not _are_dense(input, shortcut, shape, output_strides):
            turned = torch.empty(shape, device="meta", memory_format=torch.channels_last).stride()
            plan = convolution(shape, _turn(input), weight, bias, None if shortcut is None else _turn(shortcut), *rest, turned)
            if plan.kernel.tensor_cores:  # type: ignore[attr-defined]
                return _turned(plan, shape, output_strides)
        elif input.shape[1] < _FEW and _is_few(input.shape[1], dtype) and _are_dense(input, shortcut, shape, output_strides):
            plan = convolution(shape, _pad_channels(input), _pad_channels(weight), bias, shortcut, *rest, output_strides)
            if plan.kernel.tensor_cores:  # type: ignore[attr-defined]
                return _with_padded_channels(plan)
    index = device.index or 0

    def make(algorithm: str) -> Any:
        return compiled.Convolution(
            DTYPES[dtype],
            tuple(input.shape),
            tuple(weight.shape),
            shape,
            stride,
            (padding.top, padding.left),
            dilation,
            groups,
            input.stride(),
            weight.stride(),
            output_strides,
            None if shortcut is None else shortcut.stride(),
            bias is not None,
            relu,
            index,
            tf32(),
            algorithm,
        )

    kernel = make(_algorithm)
    run, tensor_cores = kernel.run, kernel.tensor_cores
    general = make("general").run if tensor_cores else run

    def call(input: Tensor, weight: Tensor, bias: Tensor | None, shortcut: Tensor | None) -> Tensor:
        check_operands(input, weight, bias, shortcut)
        output = torch.empty_strided(shape, output_strides, dtype=dtype, device=device)
        bias = None if bias is None else bias.contiguous()
        execute = run
        if tensor_cores:
            packed = krsc(weight)
            if _aligned(input, packed, bias, shortcut):
                weight = packed
            else:  # a view that begins in the middle of 16 bytes
                execute = general
        execute(
            input.data_ptr(),
            weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if shortcut is None else shortcut.data_ptr(),
            output.data_ptr(),
            stream(device),
        )
        return output

    call.kernel = kernel  # type: ignore[attr-defined]  # what tests and `env` ask
    return call


def joined(
    input: Tensor,
    layer: tuple[Tensor, Tensor | None],
    other: Tensor,
    projection: tuple[Tensor, Tensor | None],
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    projection_stride: Any,
    relu: bool,
) -> Tensor | None:
    """``relu(conv2d(input, *layer, ...) + conv2d(other, *projection, projection_stride))``: one sum on the tensor cores, rounded
    once; or None where no kernel of this build and device computes it."""
    weight, _ = layer
    key = (
        *((t.shape, t.stride(), t.dtype) for t in (input, weight, other, projection[0])),
        *(None if b is None else (b.shape, b.dtype) for b in (layer[1], projection[1])),
        *(stride, padding, dilation, groups, projection_stride, relu),
        *(state(input, *layer, other, *projection), _numerics.setting),
    )
    plan = _joined_plans.get(key, _UNKNOWN)
    if plan is _UNKNOWN:
        changes = _numerics.changes
        plan = _joined_plan(input, layer, other, projection, stride, padding, dilation, groups, projection_stride, relu)
        if len(_joined_plans) >= _MOST_PLANS:
            _joined_plans.clear()
        if changes == _numerics.changes:
            _joined_plans[key] = plan
    return None if plan is None else plan(input, layer, other, projection)


def _joined_plan(
    input: Tensor,
    layer: tuple[Tensor, Tensor | None],
    other: Tensor,
    projection: tuple[Tensor, Tensor | None],
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    projection_stride: Any,
    relu: bool,
) -> Callable[..., Tensor | None] | None:
    compiled, weight, device = module(), layer[0], input.device
    if _algorithm != "auto" or groups != 1 or why_no_kernels(device):
        return None
    try:
        stride, dilation = pair(stride, "stride", 1), pair(dilation, "dilation", 1)
        padding = pad(padding, weight, stride, dilation)
        shape = check_convolution(input, weight, layer[1], None, stride, padding, dilation, groups)
        projection_stride = pair(projection_stride, "stride", 1)
        projected = check_convolution(other, *projection, None, projection_stride, Padding(0, 0, 0, 0), (1, 1), 1)
    except (TypeError, ValueError):
        return None  # layer by layer, it raises the same error, or broadcasts
    if shape != projected or input.dtype != other.dtype or output_format(input, weight, shape) != torch.channels_last:
        return None
    output_strides = torch.empty(shape, device="meta", memory_format=torch.channels_last).stride()
    assert compiled is not None
    kernel = compiled.Convolution(
        DTYPES[input.dtype],
        tuple(input.shape),
        tuple(weight.shape),
        shape,
        stride,
        (padding.top, padding.left),
        dilation,
        groups,
        input.stride(),
        weight.stride(),
        output_strides,
        None,
        layer[1] is not None or projection[1] is not None,
        relu,
        device.index or 0,
        tf32(),
        joined=(other.shape[1], projection_stride, other.stride()),
    )
    if not kernel.tensor_cores:
        return None
    run = kernel.run

    def call(input: Tensor, layer: tuple[Tensor, Tensor | None], other: Tensor, projection: tuple[Tensor, Tensor | None]) -> Tensor | None:
        check_operands(input, *layer)
        check_operands(other, *projection)
        first, second, bias = krsc(layer[0]), krsc(projection[0]), _sum_of_biases(layer[1], projection[1])
        if not _aligned(input, other, first, second, bias):
            return None
        output = torch.empty_strided(shape, output_strides, dtype=input.dtype, device=device)
        run(
            input.data_ptr(),
            first.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0,
            output.data_ptr(),
            stream(device),
            other.data_ptr(),
            second.data_ptr(),
        )
        return output

    return call


def _sum_of_biases(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        bias = second if first is None else first
        return None if bias is None else bias.contiguous()
    return derive(("sum of biases",), (first, second), lambda a, b: (a.float() + b.float()).to(a.dtype))


def _are_dense(input: Tensor, shortcut: Tensor | None, shape: Sequence[int], output_strides: Sequence[int]) -> bool:
    """Whether input, shortcut and output are channels_last without gaps, as the tensor cores read and write."""
    output = torch.empty_strided(tuple(shape), tuple(output_strides), device="meta")
    return all([t is None or t.is_contiguous(memory_format=torch.channels_last) for t in (input, shortcut, output)])


def _turn(t: Tensor) -> Tensor:
    """Channels_last in its strides too where they are ambiguous: of one channel, say."""
    _, c, h, w = t.shape
    if t.is_contiguous(memory_format=torch.channels_last):
        return t.as_strided(t.shape, (c * h * w, 1, w * c, c))
    return torch.empty_strided(t.shape, (c * h * w, 1, w * c, c), dtype=t.dtype, device=t.device).copy_(t)


def _turned(plan: Plan, shape: tuple[int, ...], output_strides: tuple[int, ...]) -> Plan:
    """For contiguous tensors and others: turned to channels_last on the way in, and the output back."""

    def call(input: Tensor, weight: Tensor, bias: Tensor | None, shortcut: Tensor | None) -> Tensor:
        output = plan(_turn(input), weight, bias, None if shortcut is None else _turn(shortcut))
        if output.stride() == output_strides:
            return output
        return torch.empty_strided(shape, output_strides, dtype=output.dtype, device=output.device).copy_(output)

    call.kernel = plan.kernel  # type: ignore[attr-defined]
    return call


def _with_padded_channels(plan: Plan) -> Plan:
    def call(input: Tensor, weight: Tensor, bias: Tensor | None, shortcut: Tensor | None) -> Tensor:
        return plan(_pad_channels(input), derive(("padded channels",), (weight,), _pad_channels), bias, shortcut)

    call.kernel = plan.kernel  # type: ignore[attr-defined]
    return call


def _aligned(*tensors: Tensor | None) -> bool:
    return not any([t is not None and t.data_ptr() % _ALIGNMENT for t in tensors])


def krsc(weight: Tensor) -> Tensor:
    """The weight with its memory in the order [K, R, S, C], without gaps: itself if it is so, else a copy that is kept until it
    changes."""
    k, c, r, s = weight.shape
    wanted = (r * s * c, 1, s * c, c)
    if all([size == 1 or stride == want for size, stride, want in zip((k, c, r, s), weight.stride(), wanted, strict=True)]):
        return weight

    def make(held: Tensor) -> Tensor:
        return torch.empty_strided(held.shape, wanted, dtype=held.dtype, device=held.device).copy_(held)

    return derive(("krsc",), (weight,), make)


def bias_add_relu(input: Tensor, bias: Tensor | None, shortcut: Tensor | None, relu: bool, output: Tensor) -> None:
    """output = relu(input + bias + shortcut), rounded to output's dtype; output may be input."""
    compiled = module()
    assert compiled is not None
    bias = None if bias is None else bias.contiguous()
    compiled.bias_add_relu(
        DTYPES[output.dtype],
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
        input.device.index or 0,
        stream(input.device),
    )


def relu_backward(grad: Tensor, output: Tensor, result: Tensor, sums: Tensor | None) -> None:
    """result = grad where not (output <= 0), else 0; sums [K], if there is one, its sum over N, P, Q."""
    compiled = module()
    assert compiled is not None
    layout = DTYPES[output.dtype], tuple(output.shape), result.stride(), grad.stride(), output.stride()
    size = compiled.relu_backward_workspace(*layout) if sums is not None else 0
    workspace = torch.empty(size, dtype=torch.uint8, device=output.device)
    compiled.relu_backward(
        *layout,
        grad.data_ptr(),
        output.data_ptr(),
        result.data_ptr(),
        0 if sums is None else sums.data_ptr(),
        workspace.data_ptr(),
        output.device.index or 0,
        stream(output.device),
    )


def use_algorithm(name: str) -> None:
    """Compute with this kernel wherever it can: auto, general, or a tile's name (``tiles``). For tests and benchmarks."""
    global _algorithm
    _algorithm = name
    _numerics.record("algorithm on a GPU", name)


def tiles() -> list[str]:
    """Names of the tensor-core kernels of this build."""
    compiled = module()
    return [] if compiled is None else list(compiled.tiles())


@contextmanager
def use_twin(twin: ModuleType) -> Iterator[None]:
    """CPU tensors go through this file, to the module's twin for the host. For tests."""
    global _twin
    _twin = twin
    _numerics.record("twin", twin)
    try:
        yield
    finally:
        _twin = None
        _numerics.record("twin", None)
