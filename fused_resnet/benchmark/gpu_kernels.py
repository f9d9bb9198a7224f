"""Each tensor-core kernel by itself: convolutions that ask one feature more of it than those before, so that the first that is wrong names
the cause. Integers, on which every correct convolution gives the same bits, against the reference on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _settings, reference, testing
from ..cases import ConvCase, Operands
from ..ops.cuda import CudaBackend, JoinedPlan, Weights
from ..ops.plans import backends
from ..ops.spec import geometry_of_call, spec_of
from .gpu_contest import planned
from .gpu_peers import Left

MANY = "more tiles than multiprocessors"
FORMS = ("matrix", "image", "few", "joined", "plain")  # csrc/cuda/config.h


@dataclass(frozen=True)
class Feature:
    """What is asked: ``name`` says what is new. projected: of the form "joined", the channels and the stride of the projection that the
    same kernel adds; expanded: whether its input has a stride of 0 along the axes of pixels that the output has one of."""

    name: str
    case: ConvCase
    projected: tuple[int, int] = (0, 1)
    expanded: bool = False


_MATRIX = (
    Feature("one tile", ConvCase(64, 64, (8, 8), (1, 1), bias=False, relu=False, batch=2)),
    Feature("bias, ReLU", ConvCase(64, 64, (8, 8), (1, 1), batch=2)),
    Feature("shortcut", ConvCase(64, 64, (8, 8), (1, 1), shortcut=True, batch=2)),
    Feature("several steps", ConvCase(256, 64, (8, 8), (1, 1), shortcut=True, batch=2)),
    Feature("tail of the reduction", ConvCase(72, 64, (8, 8), (1, 1), shortcut=True, batch=2)),
    Feature("tail of the channels", ConvCase(64, 264, (8, 8), (1, 1), shortcut=True, batch=2)),
    Feature("tail of the pixels", ConvCase(64, 64, (9, 11), (1, 1), shortcut=True, batch=3)),
    Feature("8 channels", ConvCase(8, 8, (3, 3), (1, 1))),
    Feature(MANY, ConvCase(64, 256, (56, 56), (1, 1), shortcut=True, batch=16)),
)
_IMAGE = (
    *_MATRIX[:3],
    Feature("3x3", ConvCase(64, 64, (10, 10), (3, 3), bias=False, relu=False, batch=2)),
    Feature("padding", ConvCase(64, 64, (8, 8), (3, 3), padding=(1, 1), shortcut=True, batch=2)),
    Feature("images across tiles", ConvCase(64, 64, (7, 7), (3, 3), padding=(1, 1), shortcut=True, batch=9)),
    Feature("tail of the reduction in a tap", ConvCase(72, 64, (9, 9), (3, 3), padding=(1, 1), shortcut=True, batch=2)),
    Feature("tail of the channels", ConvCase(64, 264, (9, 9), (3, 3), padding=(1, 1), shortcut=True, batch=2)),
    Feature("stride", ConvCase(64, 128, (13, 14), (3, 3), (2, 2), (1, 1), batch=3)),
    Feature("stride of a 1x1", ConvCase(64, 128, (10, 13), (1, 1), (2, 2), relu=False, batch=2)),
    Feature("dilation", ConvCase(64, 64, (12, 11), (3, 3), padding=(2, 3), dilation=(2, 3), shortcut=True, batch=2)),
    Feature("more padding than kernel", ConvCase(64, 64, (6, 5), (3, 3), padding=(4, 5), shortcut=True, batch=2)),
    Feature("8 channels", ConvCase(8, 8, (5, 5), (3, 3), padding=(1, 1))),
    Feature(MANY, ConvCase(64, 64, (56, 56), (3, 3), padding=(1, 1), shortcut=True, batch=8)),
)
_FEW = (
    Feature("a stem", ConvCase(4, 64, (32, 32), (7, 7), (2, 2), (3, 3), batch=4)),
    Feature("tails", ConvCase(4, 72, (33, 30), (7, 7), (2, 2), (3, 3), bias=False, batch=3)),
    Feature("3x3, shortcut, no ReLU", ConvCase(4, 64, (17, 15), (3, 3), padding=(1, 1), shortcut=True, relu=False, batch=2)),
    Feature(MANY, ConvCase(4, 64, (112, 112), (7, 7), (2, 2), (3, 3), batch=16)),
)
_JOINED = (
    Feature("two 1x1", ConvCase(64, 64, (8, 8), (1, 1), relu=False, batch=2), (64, 1)),
    Feature("bias, ReLU, several steps", ConvCase(64, 64, (8, 8), (1, 1), batch=2), (256, 1)),
    Feature("stride of the projection", ConvCase(64, 256, (8, 8), (1, 1), batch=2), (128, 2)),
    Feature("tails of both reductions", ConvCase(72, 64, (9, 7), (1, 1), batch=2), (40, 2)),
    Feature("tails of channels and pixels", ConvCase(64, 264, (9, 11), (1, 1), batch=3), (64, 2)),
    Feature("3x3", ConvCase(64, 128, (8, 8), (3, 3), padding=(1, 1), batch=2), (64, 2)),
    Feature("images across tiles", ConvCase(64, 64, (7, 7), (3, 3), padding=(1, 1), batch=9), (128, 2)),
    Feature("3x3 with a stride", ConvCase(64, 64, (13, 14), (3, 3), (2, 2), (1, 1), batch=2), (64, 3)),
    Feature("one column, expanded", ConvCase(64, 64, (6, 1), (3, 3), padding=(1, 1), batch=2), (64, 2), True),
    Feature("one row, expanded", ConvCase(64, 64, (1, 6), (3, 3), padding=(1, 1)), (64, 2), True),
    Feature(MANY, ConvCase(64, 256, (56, 56), (1, 1), batch=16), (64, 1)),
)
_FEATURES = dict(zip(FORMS, (_MATRIX, _IMAGE, _FEW, _JOINED, _IMAGE), strict=True))


def form_of(tile: str) -> str:
    """matrix, image, few, joined or plain, of a tile's name (``ops.cuda.tiles``)."""
    form = tile.split()[2]
    assert form in FORMS, tile
    return form


def dtype_of(tile: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, tile.split()[1])
    return dtype


def suits(tile: str, capability: tuple[int, int]) -> bool:
    """Whether a device of this compute capability runs the tile: Hopper's run there alone, and Ampere's anywhere else."""
    architecture = tile.split()[0]
    return architecture == "any" or architecture == ("sm90" if capability[0] == 9 else "sm80")


def features(tile: str) -> tuple[Feature, ...]:
    """What to ask of a kernel, from simple to hard."""
    return _FEATURES[form_of(tile)]


def tiles(device: torch.device) -> list[str]:
    """The kernels of the module that serves a device."""
    return list(module_of(device).tiles())


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a device; of the module's twin, that of the GPU it stands for."""
    major, minor = module_of(device).capability(device.index or 0)
    return major, minor


def module_of(device: torch.device) -> Any:
    """The compiled module that serves a device. Raises RuntimeError where there is none."""
    backend = backends.cpu if device.type == "cpu" else backends.cuda
    assert isinstance(backend, CudaBackend)
    if backend.module is None:
        raise RuntimeError(backend.why_no_kernels(device))
    return backend.module


class Trial:
    """One feature of one kernel: its operands on a device, the plan, and what is right.

    Raises:
        gpu_peers.Left: where the kernel is not for this device, or the feature not for the kernel.
    """

    def __init__(self, tile: str, feature: Feature, device: torch.device, generator: torch.Generator) -> None:
        case, dtype = feature.case, dtype_of(tile)
        given = _channels_last(testing.integer_operands(case, dtype, generator))
        other = projection = None
        if form_of(tile) == "joined":
            other, projection = _projection(feature, dtype, generator)
        self.expected = _expected(case, given, other, projection, feature.projected[1]).to(dtype)
        moved = testing.moved(device, *given)
        if other is None or projection is None:
            plan = planned(case, Operands(*moved), tile)
            self.call: Callable[[], Tensor] = lambda: plan(*moved)
        else:
            other, projection = testing.moved(device, other, projection)
            self.call = _joined(case, Operands(*moved), other, projection, feature.projected[1], tile)

    def wrong(self) -> dict[str, Any]:
        """How the kernel's output differs from what it has to be; empty where it does not. Also where it is not the same twice."""
        first = self.call()
        again = [self.call() for _ in range(3)]
        found: dict[str, Any] = _difference(first.cpu(), self.expected)
        if not found and any(not torch.equal(first, other) for other in again):
            found["differs between calls"] = True
        return found


def wrong_in_a_row(
    tile: str, device: torch.device, generator: torch.Generator, calls: int = 20, size: int = 56, batch: int = 8
) -> dict[str, Any] | None:
    """How the last of several calls is wrong, each of which reads what the one before it wrote and may start while that ends
    (``_settings.cuda_dependent``); empty where it is not, None where the kernel never starts so, or no such chain is of its form.

    Calls of two kinds in turn, both of which add a bias of 1 or -1. A matrix' or image's first one permutes the channels, the other has that
    output as its shortcut. A joined one's first permutes by the convolution, the other by the projection.
    """
    form, dtype, channels = form_of(tile), dtype_of(tile), 64
    if form == "few":
        return None  # it makes more channels than it reads
    joined, kernel = form == "joined", 1 if form in ("matrix", "joined") else 3
    case = ConvCase(channels, channels, (size, size), (kernel, kernel), padding=(kernel // 2,) * 2, batch=batch)
    order = torch.randperm(channels, generator=generator)
    weight = torch.zeros(case.weight_shape)
    weight[torch.arange(channels), order, kernel // 2, kernel // 2] = 1
    x = torch.randint(2, 9, case.input_shape, generator=generator)
    given = _channels_last(Operands(x.to(dtype), weight.to(dtype), torch.ones(channels, dtype=dtype), None))
    y, permuting, up = testing.moved(device, *given)[:3]
    nothing, down = torch.zeros_like(permuting), -up
    with _settings.using(cuda_dependent=True):
        if joined:
            plan: Any = _joined_plan(case, Operands(y, permuting, up, None), y, permuting, 1, tile)
        else:
            plan = planned(case, Operands(y, permuting, up, None), tile)
            add = planned(replace(case, shortcut=True), Operands(y, nothing, up, y), tile)
    if not plan.kernel.dependent:
        return None
    for i in range(calls):
        bias, other = (down, up) if i % 2 else (up, down)
        if joined:
            y = _called(plan, y, (permuting, bias), y, (nothing, None))
            y = _called(plan, y, (nothing, other), y, (permuting, None))
            x = x[:, order][:, order]
        else:
            y = plan(y, permuting, bias, None)
            y = add(y, nothing, other, y)
            x = x[:, order]
    return _difference(y.cpu(), x.to(dtype))


def _channels_last(given: Operands) -> Operands:
    return Operands(*[t if t is None or t.dim() == 1 else t.contiguous(memory_format=torch.channels_last) for t in given])  # type: ignore[arg-type]


def _projection(feature: Feature, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The joined convolution's input and weight: a weight so sparse that all sums stay integers that float32 holds."""
    channels, stride = feature.projected
    n, k, p, q = feature.case.output_shape
    shape = n, channels, (p - 1) * stride + 1, (q - 1) * stride + 1
    input = torch.randint(-2, 3, shape, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
    if feature.expanded:
        last = input.stride()
        input = input.as_strided(shape, (last[0], 1, 0 if p == 1 else last[2], 0 if q == 1 else last[3]))
    weight = torch.randint(-1, 2, (k, channels, 1, 1), generator=generator) * (torch.rand(k, channels, 1, 1, generator=generator) < 0.06)
    return input, weight.to(dtype).contiguous(memory_format=torch.channels_last)


def _expected(case: ConvCase, given: Operands, other: Tensor | None, projection: Tensor | None, stride: int) -> Tensor:
    wide = Operands(*[None if t is None else t.float() for t in given])  # type: ignore[arg-type]
    if other is None or projection is None:
        return reference.conv_bias_add_relu(*wide, **case.parameters)
    sums = F.conv2d(other.float(), projection.float(), stride=stride)
    return reference.conv_bias_add_relu(wide.input, wide.weight, wide.bias, sums, **case.parameters)


def _joined(case: ConvCase, given: Operands, other: Tensor, projection: Tensor, stride: int, tile: str) -> Callable[[], Tensor]:
    plan = _joined_plan(case, given, other, projection, stride, tile)
    return lambda: _called(plan, given.input, (given.weight, given.bias), other, (projection, None))


def _joined_plan(case: ConvCase, given: Operands, other: Tensor, projection: Tensor, stride: int, tile: str) -> JoinedPlan:
    backend = backends.of(given.input)
    assert isinstance(backend, CudaBackend)
    geometry = geometry_of_call(given.weight, case.stride, case.padding)
    spec = spec_of(given.input, given.weight, given.bias, None, geometry, case.relu)
    projected = spec_of(other, projection, None, None, geometry_of_call(projection, stride), False)
    try:
        with _settings.using(cuda_algorithm=tile):
            plan = backend.joined_plan(spec, projected)
    except ValueError as refusal:
        raise Left(str(refusal)) from None
    if plan is None:
        raise Left("no kernel of this build and device joins these")
    return plan


def _called(plan: JoinedPlan, input: Tensor, weights: Weights, other: Tensor, projection: Weights) -> Tensor:
    output = plan(input, weights, other, projection)
    if output is None:
        raise Left("operands do not begin at 16 bytes")
    return output


def _difference(got: Tensor, wanted: Tensor) -> dict[str, Any]:
    """Where two tensors [N, K, P, Q] differ, for who has to find out why."""
    bad = (got != wanted) | got.isnan()
    if not bad.any():
        return {}
    where = bad.nonzero()
    first = tuple(where[0].tolist())
    return {
        "elements": len(where),
        "of": bad.numel(),
        "nan": int(got.isnan().sum()),
        "first": list(first),
        "last": where[-1].tolist(),
        "got": str(float(got[first])),
        "wanted": float(wanted[first]),
        "images": where[:, 0].unique()[:16].tolist(),
        "channels": where[:, 1].unique()[:16].tolist(),
        "rows": where[:, 2].unique()[:16].tolist(),
        "columns": where[:, 3].unique()[:16].tolist(),
    }
