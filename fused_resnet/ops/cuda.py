"""Calls into the compiled CUDA module: plans, weights as the tensor cores read them, streams.

The tests put the module's twin for the host in its place (``CudaBackend(twin)``), which runs the general kernels on CPU tensors, thread
block by thread block: everything here but the launch itself is then what a GPU gets.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import _extension, _settings
from .._compat import cuda_stream, tf32
from . import select
from .backend import Backend, Plan
from .derived import derive
from .spec import ConvSpec, Layout, Operand, check_allocated, check_operands, dtype_name

ALIGNMENT = 16  # bytes: of every operand of a tensor-core kernel
Weights = tuple[Tensor, "Tensor | None"]  # of a layer: weight and bias


class CudaBackend(Backend):
    """The CUDA module's kernels. twin: a module that stands in for it, on whatever device the tensors are."""

    on_gpu = True

    def __init__(self, twin: ModuleType | None = None) -> None:
        self.twin = twin

    @property
    def module(self) -> ModuleType | None:
        return self.twin or _extension.cuda()

    def why_no_kernels(self, device: torch.device) -> str:
        return "" if self.twin is not None else _why_no_kernels(device.index or 0)

    def state(self, *tensors: Tensor | None) -> Hashable:
        return tf32(), *[None if t is None else t.device for t in tensors]

    def call_state(self, x: Tensor) -> Hashable:
        """With the stream: only one that has waited for the packed weights may repeat a call."""
        return tf32(), x.device, _stream(x.device)

    def why_general(self, spec: ConvSpec) -> list[str]:
        missing = self.why_no_kernels(spec.device)
        if missing:
            return [missing]
        return [] if _settings.current.cuda_algorithm != "auto" else select.why_general_on_cuda(spec, tf32())

    def convolution(self, spec: ConvSpec, algorithm: str, joined: tuple[Any, ...] | None = None) -> Any:
        """The compiled convolution. joined: of a projection whose result is added, channels, stride and the input's strides."""
        assert self.module is not None
        geometry = spec.geometry
        return self.module.Convolution(
            spec.dtype_name,
            spec.input.shape,
            spec.weight.shape,
            spec.output.shape,
            geometry.stride,
            (geometry.padding.top, geometry.padding.left),
            geometry.dilation,
            geometry.groups,
            spec.input.strides,
            spec.weight.strides,
            spec.output.strides,
            None if spec.shortcut is None else spec.shortcut.strides,
            spec.bias is not None,
            spec.relu,
            spec.device.index or 0,
            tf32(),
            algorithm,
            joined=joined,
            dependent=_settings.current.cuda_dependent,
        )

    def kernel_plan(self, spec: ConvSpec) -> Plan:
        if _settings.current.cuda_algorithm == "auto":
            inner = select.as_tensor_cores_read(spec)
            plan = None if inner is None else self.kernel_plan(inner)
            if inner is not None and plan is not None and plan.kernel.tensor_cores:
                return PaddedPlan(plan) if inner.weight != spec.weight else TurnedPlan(plan, spec.output)
        return CudaPlan(spec, self)

    def why_general_gradient(self, operand: Operand, spec: ConvSpec) -> list[str]:
        missing = self.why_no_kernels(spec.device)
        if missing or not _settings.current.cuda_gradients:
            return [missing or "our gradients on a GPU are turned off"]
        if _settings.current.cuda_algorithm != "auto":
            return ["a kernel is asked for by name, which need not be for the gradient"]
        return select.why_general_gradient_on_cuda(operand, spec, tf32())

    def gradient_plan(self, operand: Operand, spec: ConvSpec, masked: bool) -> CudaInputGradient:
        return CudaInputGradient(spec, self, masked)

    def joined_plan(self, spec: ConvSpec, other: ConvSpec) -> JoinedPlan | None:
        """``relu(conv(input) + conv(other))`` as one sum on the tensor cores, rounded once; ``other``'s is a projection. None where no
        kernel of this build and device computes it."""
        algorithm = _settings.current.cuda_algorithm
        if (algorithm != "auto" and " joined " not in algorithm) or spec.geometry.groups != 1 or self.why_no_kernels(spec.device):
            return None
        if spec.output.shape != other.output.shape or spec.dtype != other.dtype or not spec.output.is_channels_last:
            return None
        if spec.bias is None:
            spec = spec._replace(bias=other.bias)
        kernel = self.convolution(spec, algorithm, (other.input.shape[1], other.geometry.stride, other.input.strides))
        return JoinedPlan(spec, kernel) if kernel.tensor_cores else None

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
            _pointer(bias),
            _pointer(shortcut),
            output.data_ptr(),
            input.device.index or 0,
            _stream(input.device),
        )

    def run_relu_backward(self, grad: Tensor, output: Tensor, result: Tensor, sums: Tensor | None) -> None:
        assert self.module is not None
        shapes = dtype_name(output.dtype), tuple(output.shape), result.stride(), grad.stride(), output.stride()
        size = 0 if sums is None else self.module.relu_backward_workspace(*shapes)
        workspace = torch.empty(size, dtype=torch.uint8, device=output.device)
        self.module.relu_backward(
            *shapes,
            grad.data_ptr(),
            output.data_ptr(),
            result.data_ptr(),
            _pointer(sums),
            workspace.data_ptr(),
            output.device.index or 0,
            _stream(output.device),
        )


_devices: dict[int, str] = {}  # why our kernels cannot run on a device, by its index; "": they can


def _why_no_kernels(index: int) -> str:
    known = _devices.get(index)
    if known is not None:
        return known
    found = _extension.cuda()
    if found is None:
        return _extension.cuda_missing()
    try:
        why = select.too_old(found.capability(index), found.BUILD["architectures"].split(), torch.cuda.get_device_name(index))
        if not why:
            found.load(index)
    except RuntimeError as error:  # a driver older than the runtime that the module was built with; no memory: asked again
        return f"our CUDA module cannot use the device: {error}"
    _devices[index] = why
    return why


def _stream(device: torch.device) -> int:
    """The current stream, as an address; of the twin, none."""
    return cuda_stream(device) if device.type == "cuda" else 0


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


class CudaPlan:
    """A convolution by one kernel, and by the general one where operands are not aligned as the tensor cores want them."""

    def __init__(self, spec: ConvSpec, backend: CudaBackend) -> None:
        self.kernel = backend.convolution(spec, _settings.current.cuda_algorithm)
        self._run, self._tensor_cores = self.kernel.run, self.kernel.tensor_cores
        self._general = backend.convolution(spec, "general").run if self._tensor_cores else self._run
        self._shape, self._strides = spec.output
        self._dtype, self._device = spec.dtype, spec.device

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None, shortcut: Tensor | None) -> Tensor:
        check_operands(input, weight, bias, shortcut)
        output = torch.empty_strided(self._shape, self._strides, dtype=self._dtype, device=self._device)
        bias = None if bias is None else bias.contiguous()
        run = self._run
        if self._tensor_cores:
            packed = krsc(weight)
            if _aligned(input, packed, bias, shortcut):
                weight = packed
            else:  # a view that begins in the middle of 16 bytes
                run = self._general
        run(input.data_ptr(), weight.data_ptr(), _pointer(bias), _pointer(shortcut), output.data_ptr(), _stream(self._device))
        return output


class TurnedPlan:
    """For contiguous tensors and others: turned to channels_last on the way in, and the output back."""

    def __init__(self, plan: Plan, output: Layout) -> None:
        self.kernel, self._plan = plan.kernel, plan
        self._shape, self._strides = output

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None, shortcut: Tensor | None) -> Tensor:
        output = self._plan(_turn(input), weight, bias, None if shortcut is None else _turn(shortcut))
        if output.stride() == self._strides:
            return output
        return torch.empty_strided(self._shape, self._strides, dtype=output.dtype, device=output.device).copy_(output)


class PaddedPlan:
    """For a stem's channels, which are padded."""

    def __init__(self, plan: Plan) -> None:
        self.kernel, self._plan = plan.kernel, plan

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None, shortcut: Tensor | None) -> Tensor:
        return self._plan(_pad_channels(input), derive("padded channels", (weight,), _pad_channels), bias, shortcut)


class CudaInputGradient:
    """The gradient of a convolution with stride 1 in its input, by a forward kernel: plus what is added, or through a ReLU in a pass.

    A block on a GPU does not ask for either end yet: ``runtime.training`` is for CPU tensors."""

    def __init__(self, spec: ConvSpec, backend: CudaBackend, masked: bool) -> None:
        convolution = select.input_gradient_as_convolution(spec._replace(shortcut=None) if masked else spec)
        assert convolution is not None
        self._plan, self._backend, self._masked = backend.kernel_plan(convolution), backend, masked
        self.kernel = self._plan.kernel if self._plan.kernel.tensor_cores else None  # this build has none for the device

    def __call__(self, grad: Tensor, other: Tensor, end: Tensor | None) -> Tensor | None:
        """other: the weight."""
        if self.kernel is None:
            return None
        check_allocated(grad, "grad")
        check_allocated(other, "weight")
        found = self._plan(grad, rotated(other), None, None if self._masked else end)
        if not self._masked or end is None:
            return found
        masked, _ = self._backend.relu_backward(found, end, False)
        return masked if masked.stride() == found.stride() else torch.empty_like(found).copy_(masked)


class JoinedPlan:
    """A convolution and a projection as one kernel."""

    def __init__(self, spec: ConvSpec, kernel: Any) -> None:
        self.kernel = kernel
        self._shape, self._strides = spec.output
        self._dtype, self._device = spec.dtype, spec.device

    def __call__(self, input: Tensor, layer: Weights, other: Tensor, projection: Weights) -> Tensor | None:
        """The output, or None where operands are not aligned."""
        check_operands(input, *layer)
        check_operands(other, *projection)
        first, second, bias = krsc(layer[0]), krsc(projection[0]), _sum_of_biases(layer[1], projection[1])
        if not _aligned(input, other, first, second, bias):
            return None
        output = torch.empty_strided(self._shape, self._strides, dtype=self._dtype, device=self._device)
        self.kernel.run(
            input.data_ptr(),
            first.data_ptr(),
            _pointer(bias),
            0,
            output.data_ptr(),
            _stream(self._device),
            other.data_ptr(),
            second.data_ptr(),
        )
        return output


def _sum_of_biases(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        bias = second if first is None else first
        return None if bias is None else bias.contiguous()
    return derive("sum of biases", (first, second), sum_of)


def sum_of(first: Tensor, second: Tensor) -> Tensor:
    """Of two biases, rounded once."""
    return (first.float() + second.float()).to(first.dtype)


def _turn(t: Tensor) -> Tensor:
    """Channels_last in its strides too where they are ambiguous."""
    shape, strides = select.turned(t.shape)
    if t.is_contiguous(memory_format=torch.channels_last):
        return t.as_strided(shape, strides)
    return torch.empty_strided(shape, strides, dtype=t.dtype, device=t.device).copy_(t)


def _pad_channels(t: Tensor) -> Tensor:
    """[N, STEM_CHANNELS, H, W] in channels_last: ``t`` and zeros."""
    channels, (shape, strides) = t.shape[1], select.padded(t.shape)
    padded = torch.empty_strided(shape, strides, dtype=t.dtype, device=t.device)
    padded[:, :channels] = t
    padded[:, channels:] = 0
    return padded


def _aligned(*tensors: Tensor | None) -> bool:
    return not any([t is not None and t.data_ptr() % ALIGNMENT for t in tensors])


def krsc(weight: Tensor) -> Tensor:
    """The weight with its memory in the order [K, R, S, C], without gaps: itself if it is so, else a copy that is kept until it
    changes."""
    wanted = krsc_strides(weight.shape)
    if all([size == 1 or stride == want for size, stride, want in zip(weight.shape, weight.stride(), wanted, strict=True)]):
        return weight

    def make(held: Tensor) -> Tensor:
        return torch.empty_strided(held.shape, wanted, dtype=held.dtype, device=held.device).copy_(held)

    return derive("krsc", (weight,), make)


def krsc_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Of a weight [K, C, R, S] in the memory order [K, R, S, C]."""
    _, c, r, s = shape
    return r * s * c, 1, s * c, c


def rotated(weight: Tensor) -> Tensor:
    """The weight [K, C, R, S] rotated by half a turn and with its channels exchanged: [C, K, R, S], its memory in the order [C, R, S, K]. A
    copy that is not kept: a weight that is trained is another one in each step."""
    k, c, r, s = weight.shape
    turned = weight if r == s == 1 else weight.flip((2, 3))
    result = torch.empty_strided((c, k, r, s), krsc_strides((c, k, r, s)), dtype=weight.dtype, device=weight.device)
    return result.copy_(turned.transpose(0, 1))


def tiles() -> list[str]:
    """Names of the tensor-core kernels of this build."""
    compiled = _extension.cuda()
    return [] if compiled is None else list(compiled.tiles())
