"""A segment on a GPU: its convolutions in rows, each row one native call (``rows.py``), and what is no convolution by the library.

A network that is called from Python layer by layer is bound by Python where its layers are small. ``run`` gives None for what it is not for,
which then goes node by node (``executor.py``): by the same kernels on the same operands, so to the same bits. Its ``Call`` is repeated as
long as nothing has changed (``cached.py``).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _settings
from .._compat import nobody_listens
from ..ops.cuda import ALIGNMENT, CudaBackend, CudaPlan, krsc_strides
from ..ops.derived import find
from ..ops.plans import backends
from ..ops.schema import conv_bias_add_relu
from ..ops.spec import ConvSpec, Layout, check_operands, geometry_of_call, layout, spec_of
from ..ops.store import Entry
from .bound import (
    INPUT,
    STEPS,
    BoundConvolution,
    BoundFlatten,
    BoundLinear,
    BoundMaxPool,
    BoundMeanPool,
    BoundZeroPad,
    Segment,
    Step,
)
from .calls import Result
from .fold import folded
from .pooling import mean_of, window_of
from .rows import Launch, Row, packable_sources

Values = dict[int, Any]  # a segment's, by number


def may_run(plans: _settings.Plans, segment: Segment, x: Tensor) -> bool:
    """False where ``run`` would give None in vain, as far as that is told at once: also where it found nothing to put in a row for such an
    input before, without another look at the layers, for node by node is always right.

    A segment whose shortcut another module makes goes node by node: that module may have effects, and is to be called once."""
    backend = backends.of(x)
    if not isinstance(backend, CudaBackend) or x.dim() != 4 or backend.why_no_kernels(x.device) or segment.external:
        return False
    zero_padded = any([isinstance(step.node, BoundZeroPad) for step in segment.steps])
    if zero_padded or x.data_ptr() % ALIGNMENT or not nobody_listens(x):
        return False
    return plans.kept.get(_input_key(backend, segment, x)) is not _NOTHING


_NOTHING: Any = object()  # in a plan's place: there is no row of several launches


def _input_key(backend: CudaBackend, segment: Segment, x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.dtype, segment.number, backend.state(x), _settings.number


def run(plans: _settings.Plans, segment: Segment, x: Tensor) -> Result | None:
    """The output of a segment that ``may_run``, without live normalisations; None where it has to go node by node."""
    backend = backends.of(x)
    assert isinstance(backend, CudaBackend)
    found = [packable_sources(node) for node in segment.convolutions]
    if None in found:
        return None
    tensors = [t for each in found for t in each or ()]
    tensors += [t for node in segment.layers if isinstance(node, BoundLinear) for t in (node.module.weight, node.module.bias)]
    if not nobody_listens(x, *tensors) or any([t is not None and t.device != x.device for t in tensors]):
        return None
    key = (
        *(x.shape, x.stride(), x.dtype, segment.number),
        *[None if t is None else (t.shape, t.stride(), t.dtype) for t in tensors],
        *[_steering(step) for step in segment.steps],
        backend.state(x),
        _settings.number,
    )
    try:
        plan = plans.kept.get(key, _settings.UNKNOWN)
    except TypeError:  # a list among the settings: it may be changed in place, which nobody would see
        return None
    if plan is _settings.UNKNOWN:
        plan = plans.make(key, lambda: plan_of(segment, backend, x))
    if plan is _NOTHING:
        plans.make(_input_key(backend, segment, x), lambda: _NOTHING)
    if plan is None or plan is _NOTHING:
        return None
    call = Call(plan, segment)
    return Result(call(x), call, None)


def _steering(step: Step) -> Any:
    """What steers a step besides its tensors."""
    if isinstance(step.node, BoundConvolution):
        conv, norm = step.node.conv, step.node.norm
        return conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode, step.node.relu, None if norm is None else norm.eps
    return window_of(step.node.module) if isinstance(step.node, BoundMaxPool) else None


class Plan:
    """Of a segment, for one layout of what it reads. Of modules it keeps nothing: it may outlive them.

    pieces: rows, and numbers of steps that are in none. dead_after: for each, the values that nothing reads any more. output: its number.
    strides: of the values that rows read, as those were planned with.
    """

    def __init__(self, pieces: list[Row | int], dead_after: list[list[int]], output: int, layouts: dict[int, Layout]) -> None:
        self.pieces, self.dead_after, self.output = pieces, dead_after, output
        self.strides = {v: layouts[v].strides for piece in pieces if isinstance(piece, Row) for v in piece.read}


class Call:
    """A plan with packed weights: repeats a call for an input of the same layout."""

    def __init__(self, plan: Plan, segment: Segment) -> None:
        self.plan, self.steps = plan, segment.steps
        self.entries: list[Entry] = []  # alive: the addresses are theirs, whatever a store drops meanwhile
        self.weights: list[list[tuple[int, int, int]]] = []  # of each row
        nodes = [step.node for step in segment.steps]
        for piece in plan.pieces:
            entries = piece.packed(nodes) if isinstance(piece, Row) else _watched(nodes[piece])
            self.entries += entries
            self.weights.append([entry.value.addresses() for entry in entries] if isinstance(piece, Row) else [])

    def if_holds(self, guard: Any, x: Tensor) -> Tensor | None:
        """The output for ``x``, if a ``Guard`` of the weights' sources holds and ``x`` begins at a multiple of 16 bytes; else None."""
        return None if x.data_ptr() % ALIGNMENT or not guard.holds() else self(x)

    def __call__(self, x: Tensor, external: int = 0) -> Tensor:
        """external: there is none."""
        check_operands(x)
        values: Values = {INPUT: x}
        for piece, weights, dead in zip(self.plan.pieces, self.weights, self.plan.dead_after, strict=True):
            if isinstance(piece, Row):
                piece(values, weights)
            else:
                number, made = STEPS + piece, _by_itself(self.steps[piece], values)
                strides = self.plan.strides.get(number)
                if strides is not None and made.stride() != strides:  # not what the library's rule says
                    made = torch.empty_strided(made.shape, strides, dtype=made.dtype, device=made.device).copy_(made)
                values[number] = made
            for v in dead:
                del values[v]
        output: Tensor = values[self.plan.output]
        return output


def _watched(node: Any) -> list[Entry]:
    """Of a step that is in no row: nothing derived, but what its tensors were. It reads them itself at each call; whether a call can be
    repeated is asked of all tensors together."""
    if isinstance(node, BoundConvolution):
        sources = packable_sources(node)
        assert sources is not None
        return [find("as it was", sources, lambda *held: None, node.place)]
    if isinstance(node, BoundLinear):
        return [find("as it was", (node.module.weight, node.module.bias), lambda *held: None, node.place)]
    return []


def _by_itself(step: Step, values: Values) -> Tensor:
    """A step that is in no row."""
    h: Tensor = values[step.value]
    node = step.node
    if isinstance(node, BoundConvolution):
        conv = node.conv  # with the weight as it lies: the output's memory format follows it
        weight, bias = (conv.weight, conv.bias) if node.norm is None else folded(conv, node.norm, False, node.place)
        shortcut = None if step.shortcut is None else values[step.shortcut]
        geometry = geometry_of_call(weight, conv.stride, conv.padding, conv.dilation, conv.groups)
        output: Tensor = conv_bias_add_relu(h, weight, bias, shortcut, *geometry, node.relu)
        return output
    if isinstance(node, BoundMaxPool):
        pooled: Tensor = node.module(h)
        return pooled
    if isinstance(node, BoundMeanPool):
        return F.adaptive_avg_pool2d(h, 1)
    if isinstance(node, BoundFlatten):
        return torch.flatten(h, 1)
    assert isinstance(node, BoundLinear)
    return F.linear(h, node.module.weight, node.module.bias)


def plan_of(segment: Segment, backend: CudaBackend, x: Tensor) -> Plan | None:
    """None where a step's own call would raise, or add otherwise."""
    layouts = {INPUT: layout(x)}
    specs: dict[int, ConvSpec] = {}
    for number, step in enumerate(segment.steps):
        if isinstance(step.node, BoundConvolution):
            spec = _spec(step, layouts, x)
            if spec is None:
                return None
            specs[number] = spec
            made: Layout | None = spec.output
        else:
            made = _output(step, layouts[step.value].meta())
        if made is None:
            return None
        layouts[STEPS + number] = made
    parts = _parts(segment, backend, specs)
    if not any([isinstance(part, list) and len(part) > 1 for part in parts]):
        return _NOTHING  # type: ignore[no-any-return]
    return _plan(parts, segment, layouts, x.dtype, backend.module)


def _plan(parts: list[list[Launch] | int], segment: Segment, layouts: dict[int, Layout], dtype: torch.dtype, module: Any) -> Plan:
    output = STEPS + len(segment.steps) - 1
    reads, makes = [], []
    for part in parts:
        if isinstance(part, int):
            step = segment.steps[part]
            reads.append({v for v in (step.value, step.shortcut) if v is not None})
            makes.append([STEPS + part])
        else:
            reads.append({v for launch in part for v in launch.reads})
            makes.append([launch.y for launch in part])
    pieces: list[Row | int] = []
    dead_after: list[list[int]] = []
    held = [INPUT]
    for i, part in enumerate(parts):
        later = {output}.union(*reads[i + 1 :])
        left = [v for v in makes[i] if v in later]
        pieces.append(part if isinstance(part, int) else Row(part, layouts, left, dtype, module))
        held += left
        dead_after.append([v for v in held if v not in later])
        held = [v for v in held if v in later]
    return Plan(pieces, dead_after, output, layouts)


def _parts(segment: Segment, backend: CudaBackend, specs: dict[int, ConvSpec]) -> list[list[Launch] | int]:
    """The steps in order: launches in rows, numbers of others; a projection that is a part of another convolution is none."""
    joined = _joined(segment, backend, specs)
    parts: list[list[Launch] | int] = []
    for number, step in enumerate(segment.steps):
        if number in [launch.projection for launch in joined.values()]:
            continue
        launch = joined.get(number)
        if launch is None and number in specs and not backend.why_general(specs[number]):
            plan = backend.kernel_plan(specs[number])  # or of operands that are turned or padded first
            launch = Launch(number, plan.kernel, step.value, step.shortcut, STEPS + number) if isinstance(plan, CudaPlan) else None
        if launch is None:
            parts.append(number)
        elif parts and isinstance(parts[-1], list):
            parts[-1].append(launch)
        else:
            parts.append([launch])
    return parts


def _joined(segment: Segment, backend: CudaBackend, specs: dict[int, ConvSpec]) -> dict[int, Launch]:
    """The convolutions that have a projection as a part, by their steps: where nothing else reads it."""
    read = [v for step in segment.steps for v in (step.value, step.shortcut) if v is not None]
    found = {}
    for number, step in enumerate(segment.steps):
        other = -1 if step.shortcut is None else step.shortcut - STEPS
        if number not in specs or other not in specs or read.count(STEPS + other) != 1:
            continue
        added = segment.steps[other]
        assert isinstance(added.node, BoundConvolution)
        if not is_projection(added.node.conv) or added.node.relu or added.shortcut is not None:
            continue
        plan = backend.joined_plan(specs[number]._replace(shortcut=None), specs[other])
        if plan is not None:
            found[number] = Launch(number, plan.kernel, step.value, None, STEPS + number, other, added.value)
    return found


def is_projection(conv: nn.Conv2d) -> bool:
    """Whether a convolution can be a part of another one's kernel: 1x1, of all channels, without padding."""
    padding = conv.padding if isinstance(conv.padding, (tuple, list)) else (conv.padding,)
    padded = any([p not in (0, "same", "valid") for p in padding]) or conv.padding_mode != "zeros"
    return tuple(conv.weight.shape[2:]) == (1, 1) and conv.groups == 1 and not padded


def _spec(step: Step, layouts: dict[int, Layout], x: Tensor) -> ConvSpec | None:
    """A convolution of values by number, its weight as [K, R, S, C]; None where node by node it raises, or adds otherwise."""
    node = step.node
    assert isinstance(node, BoundConvolution)
    conv = node.conv
    if conv.padding_mode != "zeros" or conv.weight.dtype != x.dtype:
        return None
    h, weight, as_it_is = (
        torch.empty_strided(*found, dtype=x.dtype, device="meta")
        for found in (layouts[step.value], (conv.weight.shape, krsc_strides(conv.weight.shape)), layout(conv.weight))
    )
    bias: Tensor | None = torch.empty(weight.shape[0], dtype=x.dtype, device="meta")  # of a normalisation: checked where it is folded
    if node.norm is None:
        bias = None if conv.bias is None else torch.empty_strided(conv.bias.shape, conv.bias.stride(), dtype=conv.bias.dtype, device="meta")
    try:
        geometry = geometry_of_call(weight, conv.stride, conv.padding, conv.dilation, conv.groups)
        output = spec_of(h, as_it_is, bias, None, geometry, node.relu).output  # its memory format is that of PyTorch's own convolution
        spec = spec_of(h, weight, bias, None, geometry, node.relu)._replace(device=x.device, output=output)
    except (TypeError, ValueError):
        return None
    if step.shortcut is None:
        return spec
    added = layouts[step.shortcut]
    fits = added.shape == output.shape and (node.main_is_left or added.strides == output.strides)
    return spec._replace(shortcut=added) if fits else None


def _output(step: Step, h: Tensor) -> Layout | None:
    """The layout of what a step that is no convolution makes of ``h``, a tensor without memory; None where it raises."""
    if isinstance(step.node, BoundMaxPool):
        window = window_of(step.node.module)
        pooled = None if window is None else window.output(h)
        return None if pooled is None else layout(pooled)
    if isinstance(step.node, BoundMeanPool):
        return layout(mean_of(h))
    if isinstance(step.node, BoundFlatten):
        return layout(torch.flatten(h, 1))
    assert isinstance(step.node, BoundLinear)
    weight = step.node.module.weight
    return layout(torch.empty((h.shape[0], weight.shape[0]), device="meta")) if weight.shape[1:] == h.shape[1:] else None
