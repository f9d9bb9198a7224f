"""From a call to its plan. A plan is made once for each combination of layouts, parameters and settings, which is also when the arguments
are checked, and kept: a repeated call costs one look-up.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import _extension, _settings
from .backend import Backend, Plan
from .cpu import CpuBackend
from .cuda import CudaBackend, JoinedPlan, Weights
from .general import GeneralPlan
from .gradients import Gradient, gradient_plan, gradient_spec
from .spec import ConvSpec, Geometry, Operand, geometry_of_call, geometry_of_operator, spec_of

ToGeometry = Callable[..., Geometry]  # of the weight and the parameters of a call, without relu


class Backends:
    """Which kernels serve which tensors. Tests put others there (``using``)."""

    def __init__(self) -> None:
        self.cpu: Backend = CpuBackend(_extension.cpu, _extension.missing)
        self.cuda: Backend = CudaBackend()
        self.other = Backend()

    def of(self, t: Tensor) -> Backend:
        return self.cpu if t.is_cpu else self.cuda if t.is_cuda else self.other

    @contextmanager
    def using(self, **others: Backend) -> Iterator[None]:
        """Other backends by name ("cpu", "cuda") for a while."""
        before, number = {name: getattr(self, name) for name in others}, _settings.current.backends
        _settings.change(lambda: vars(self).update(others), backends=next(_numbers))
        try:
            yield
        finally:
            _settings.change(lambda: vars(self).update(before), backends=number)


_numbers = itertools.count(1)
backends = Backends()
_MOST = 4096  # calls that differ in what a plan depends on: beyond, start over, for a plan is cheap to make again
convolution_plans = _settings.Plans(_MOST)
gradient_plans = _settings.Plans(_MOST)
joined_plans = _settings.Plans(_MOST)


def find(
    geometry: ToGeometry, input: Tensor, weight: Tensor, bias: Tensor | None, shortcut: Tensor | None, *parameters: Any
) -> Plan:
    """The plan of one convolution.

    geometry: what reads the parameters (stride, padding, dilation, groups), ``geometry_of_call`` or ``geometry_of_operator``: the same
    ones may mean something else to the other. The last parameter is relu. They must be hashable, and equal ones must be alike (1 and
    True are not).

    Raises:
        TypeError, ValueError: for arguments that are not legal.
    """
    try:
        backend = backends.cpu if input.is_cpu else backends.cuda  # the dispatcher and ``nobody_listens`` let no others through
        key = (
            geometry,
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
            backend.state(input, weight, bias, shortcut) if backend.on_gpu else torch.get_num_threads(),  # its ``state``, without a call
            _settings.number,
        )
    except (AttributeError, RuntimeError):  # None, no tensor at all, a nested one, which has no shape: making the plan says so
        return _make(geometry, input, weight, bias, shortcut, *parameters)
    plan: Plan | None = convolution_plans.kept.get(key)
    if plan is None:
        plan = convolution_plans.make(key, lambda: _make(geometry, input, weight, bias, shortcut, *parameters))
    return plan


def _make(
    geometry: ToGeometry, input: Tensor, weight: Tensor, bias: Tensor | None, shortcut: Tensor | None, *parameters: Any
) -> Plan:
    *rest, relu = parameters
    spec = spec_of(input, weight, bias, shortcut, geometry(weight, *rest), bool(relu))
    return plan_of(spec, backends.of(input))


def plan_of(spec: ConvSpec, backend: Backend) -> Plan:
    """The plan of a convolution: a kernel's, or the general path."""
    return GeneralPlan(spec, backend) if backend.why_general(spec) else backend.kernel_plan(spec)


def find_gradient(
    operand: Operand,
    grad: Tensor,
    other: Tensor,
    size: tuple[int, ...],
    channels_last: bool,
    *geometry: Any,
    end: Tensor | None = None,
    masked: bool = False,
) -> Gradient:
    """The plan of the gradient of a convolution in ``operand``, which has this size, from its output's and the other operand.

    geometry: stride, padding, dilation and groups as the operator has them, hashable. end: what is added to an input's or, ``masked``, the
    output of the ReLU that it goes through.

    Raises:
        TypeError, ValueError: for arguments that are not legal.
    """
    backend = backends.of(grad)
    key = (
        *(operand, grad.shape, grad.stride(), grad.dtype, grad.is_cpu),
        *(other.shape, other.stride(), other.dtype, other.is_cpu),
        None if end is None else (end.shape, end.stride(), end.dtype, end.is_cpu, masked),
        *(size, channels_last, geometry, backend.state(grad, other), _settings.number),
    )
    plan: Gradient | None = gradient_plans.kept.get(key)
    if plan is None:

        def make() -> Gradient:
            memory_format = torch.channels_last if channels_last else torch.contiguous_format
            spec = gradient_spec(operand, grad, other, size, memory_format, geometry_of_operator(grad, *geometry), end)
            return gradient_plan(operand, spec, backend, masked)

        plan = gradient_plans.make(key, make)
    return plan


def joined(
    input: Tensor, layer: Weights, parameters: tuple[Any, ...], other: Tensor, projection: Weights, projection_stride: Any, relu: bool
) -> Tensor | None:
    """``relu(conv2d(input, *layer, *parameters) + conv2d(other, *projection, projection_stride))``: one sum on the tensor cores of a
    GPU, rounded once; or None where no kernel of this build and device computes it."""
    backend = backends.of(input)
    if not isinstance(backend, CudaBackend):
        return None
    key = (
        *[(t.shape, t.stride(), t.dtype) for t in (input, layer[0], other, projection[0])],
        *[None if b is None else (b.shape, b.dtype) for b in (layer[1], projection[1])],
        *(parameters, projection_stride, relu),
        backend.state(input, *layer, other, *projection),
        _settings.number,
    )
    try:
        plan = joined_plans.kept.get(key, _settings.UNKNOWN)
    except TypeError:  # a list among the parameters: it may be changed in place, which nobody would see
        return None
    if plan is _settings.UNKNOWN:
        plan = joined_plans.make(key, lambda: _make_joined(backend, input, layer, parameters, other, projection, projection_stride, relu))
    output: Tensor | None = None if plan is None else plan(input, layer, other, projection)
    return output


def _make_joined(
    backend: CudaBackend,
    input: Tensor,
    layer: Weights,
    parameters: tuple[Any, ...],
    other: Tensor,
    projection: Weights,
    projection_stride: Any,
    relu: bool,
) -> JoinedPlan | None:
    try:
        spec = spec_of(input, *layer, None, geometry_of_call(layer[0], *parameters), relu)
        projected = spec_of(other, *projection, None, geometry_of_call(projection[0], projection_stride), False)
    except (TypeError, ValueError):
        return None  # layer by layer, it raises the same error, or broadcasts
    return backend.joined_plan(spec, projected)
