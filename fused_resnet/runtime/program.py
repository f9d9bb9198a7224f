"""A segment as one native call (``csrc/cpu/program.h``): no gradient wanted, running statistics, every layer for our kernels.

``run`` gives None for everything else, which is then for ``executor.py``, node by node: the same function, and the same errors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _settings
from .._compat import nobody_listens
from .._extension import cpu
from ..ops.derived import find, is_dense
from ..ops.select import why_general_on_cpu, why_not_in_program
from ..ops.spec import SUSPICIOUS, ConvSpec, address, check_operands, dtype_name, geometry_of_call, spec_of
from ..ops.store import Entry, Place
from ..zero_pad import ZeroPad
from .bound import (
    EXTERNAL,
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
from .fold import sources_of, weight_and_bias
from .pooling import Window, mean_of, window_of
from .stages import run_in_ranges


class Operand(NamedTuple):
    """A convolution or a linear layer: the tensors that its weight and bias come from, what steers it, and where what is derived from them
    is kept."""

    sources: tuple[Tensor | None, ...]  # weight, bias; with a normalisation also its weight, bias, running mean and variance
    eps: float | None  # None: no normalisation
    stride: Any
    padding: Any
    dilation: Any
    groups: int
    relu: bool
    place: Place | None

    def key(self) -> tuple[Any, ...]:
        weight = self.sources[0]
        assert weight is not None
        return weight.stride(), weight.dtype, *[None if t is None else t.shape for t in self.sources], *self[1:7]


def operand_of(node: BoundConvolution | BoundLinear) -> Operand:
    """A linear layer is a convolution of a map of one pixel."""
    if isinstance(node, BoundLinear):
        return Operand((node.module.weight, node.module.bias), None, 1, 0, 1, 1, False, node.place)
    conv, norm = node.conv, node.norm
    sources = (conv.weight, conv.bias) if norm is None else sources_of(conv, norm)
    eps = None if norm is None else norm.eps
    return Operand(sources, eps, conv.stride, conv.padding, conv.dilation, conv.groups, node.relu, node.place)


class Packed(NamedTuple):
    """What the kernels read: the addresses, and the tensors that keep them alive. No buffer: see ``Convolution::pack``."""

    weight: int
    bias: int
    buffer: Tensor | None
    bias_tensor: Tensor | None


Packer = Callable[[Sequence[Operand]], Entry]


def run(
    plans: _settings.Plans,
    segment: Segment,
    x: Tensor,
    make_external: Callable[[Tensor], Tensor | None],
    names: dict[int, str] | None = None,
) -> Result | None:
    """The output of a segment without live normalisations, or None where it has to go node by node.

    make_external: makes the value ``EXTERNAL``, where a step reads it; not asked where it is known to be in vain. names: of modules, by id,
    for the profiler's ranges; None: it does not watch.
    """
    profiled = names is not None
    operands = [operand_of(node) for node in segment.layers]
    if not nobody_listens(x, *[t for operand in operands for t in operand.sources], but_for_profiler=profiled):
        return None
    others: list[Any] = [
        window_of(step.node.module) if isinstance(step.node, BoundMaxPool) else step.node.now()
        for step in segment.steps
        if isinstance(step.node, (BoundMaxPool, BoundZeroPad))
    ]
    if None in others or any([operand.groups != 1 for operand in operands]):  # groups are the library's
        return None
    external = make_external(x)
    if not nobody_listens(external, but_for_profiler=profiled):
        return None
    key = (
        x.shape,
        x.stride(),
        x.dtype,
        segment.number,
        None if external is None else (external.shape, external.stride(), external.dtype),
        tuple([operand.key() for operand in operands]),
        tuple(others),
        torch.get_num_threads(),
        _settings.number,
    )
    try:
        plan = plans.kept.get(key, _settings.UNKNOWN)
    except TypeError:  # a list among the settings: it may be changed in place, which nobody would see
        return None
    if plan is _settings.UNKNOWN:
        plan = plans.make(key, lambda: _plan(segment, operands, others, x, external))
    if plan is None:
        return None
    found: Plan = plan
    call = Call(found, operands, [pack(operands) for pack in found.packers])
    second = 0 if external is None else address(external, "shortcut")
    output = call(x, second) if names is None else call.in_ranges([_layer(step) for step in segment.steps], names, x, second)
    return Result(output, call, external)


class Plan:
    """Of a segment, for one layout of what it reads."""

    def __init__(self, network: Any, convolutions: int, x: Tensor, output: Tensor) -> None:
        """network: what the compiled module makes programs of. x, output: without memory. Of modules it keeps nothing: it may outlive them."""
        assert cpu is not None
        self.shape, self.strides = output.shape, output.stride()  # of four axes, or of two behind a head
        # Then torch.empty_like gives it, which has less to parse.
        self.as_input = is_dense(x) and x.stride() == self.strides and x.shape == self.shape
        arguments = network, _four(self.strides), dtype_name(x.dtype), torch.get_num_threads()
        strict = _settings.current.numerics == "strict"

        def make(algorithm: str) -> tuple[Any, list[Packer]]:
            assert cpu is not None
            program = cpu.Program(*arguments, algorithm, strict)
            return program, [_packer(program, i) for i in range(convolutions)]

        self.program, self.packers = make(_settings.current.algorithm)
        self.direct = functools.cache(lambda: make("direct"))  # for where a value on the way is not finite

    def empty(self, x: Tensor) -> Tensor:
        return torch.empty_like(x) if self.as_input else x.new_empty_strided(self.shape, self.strides)


class Call:
    """A plan with packed weights: repeats a call for an input of the same layout, and the address of the external shortcut."""

    def __init__(self, plan: Plan, operands: Sequence[Operand], entries: Sequence[Entry]) -> None:
        assert cpu is not None
        self.plan, self.operands = plan, operands
        self.entries = entries  # alive: the addresses are theirs, whatever a store drops meanwhile
        packed: list[Packed] = [entry.value for entry in entries]
        self.of_use = all([p.buffer is not None or p is JOINED for p in packed])  # else only direct convolution is right with these weights
        self.weights = cpu.Weights([p.weight for p in packed], [p.bias for p in packed])

    def __call__(self, x: Tensor, external: int = 0) -> Tensor:
        result = self.if_holds(None, x, external)
        assert result is not None
        return result

    def if_holds(self, guard: Any, x: Tensor, external: int = 0) -> Tensor | None:
        """The same, if a ``Guard`` of the weights' sources holds, which the threads look at together; else None. guard None: it does."""
        at = x.data_ptr()
        if at < SUSPICIOUS:
            check_operands(x)
        output = self.plan.empty(x)
        finite = False
        if self.of_use:
            finite = self.plan.program.run(self.weights, at, external, output.data_ptr(), guard)
            if finite is None:
                return None
        elif guard is not None and not guard.holds():
            return None
        if not finite:
            program, weights, kept = self._directly()
            program.run(weights, at, external, output.data_ptr())
            del kept
        return output

    def in_ranges(self, layers: Sequence[nn.Module | str | None], names: dict[int, str], x: Tensor, external: int = 0) -> Tensor:
        """The same for torch.profiler, stage by stage. layers: of the segment's steps (``_layer``). names: of modules, by id."""
        check_operands(x)
        output = self.plan.empty(x)
        addresses = x.data_ptr(), external, output.data_ptr()
        nodes = [layer for layer in layers if layer is not None]
        if not self.of_use or not run_in_ranges(self.plan.program, nodes, names, self.weights, *addresses):
            program, weights, kept = self._directly()
            run_in_ranges(program, nodes, names, weights, *addresses)
            del kept
        return output

    def _directly(self) -> tuple[Any, Any, list[Packed]]:
        """The program of direct convolutions, its weights and what keeps them alive."""
        assert cpu is not None
        program, packers = self.plan.direct()
        packed: list[Packed] = [pack(self.operands).value for pack in packers]
        return program, cpu.Weights([p.weight for p in packed], [p.bias for p in packed]), packed


def _layer(step: Step) -> nn.Module | str | None:
    """What computes a step: a module, or in words; None: it is no node of the native network."""
    if isinstance(step.node, BoundConvolution):
        return step.node.conv
    if isinstance(step.node, (BoundLinear, BoundMaxPool)):
        return step.node.module
    if isinstance(step.node, BoundFlatten):
        return None
    return "a zero-padded shortcut" if isinstance(step.node, BoundZeroPad) else "the mean of each channel"


def _four(numbers: Sequence[int]) -> tuple[int, ...]:
    """Of a matrix, shape or strides as of a map of one pixel."""
    return (*numbers, 1, 1)[:4]


def _like(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _spec(operand: Operand, h: Tensor, alone: bool) -> ConvSpec | None:
    """A convolution of the value ``h``; None if it is not for our kernels. alone: nothing that reads or makes it is in the program."""
    weight, bias = (None if t is None else _like(t) for t in operand.sources[:2])
    assert weight is not None
    try:
        geometry = geometry_of_call(weight, operand.stride, operand.padding, operand.dilation, operand.groups)
        spec = spec_of(h, weight, bias, None, geometry, operand.relu)
    except (TypeError, ValueError):
        return None  # node by node, it raises the same error
    return None if (why_general_on_cpu(spec) if alone else why_not_in_program(spec)) else spec


def _plan(segment: Segment, operands: Sequence[Operand], others: Sequence[Any], x: Tensor, external: Tensor | None) -> Plan | None:
    assert cpu is not None
    network = cpu.Network(x.shape[0] if x.dim() == 4 else 0)
    # Each value as PyTorch would lay it out, and its number in the program.
    values: dict[int, Tensor] = {INPUT: _like(x)}
    if external is not None:
        values[EXTERNAL] = _like(external)
    if any([value.dim() != 4 for value in values.values()]):
        return None
    numbers = {value: network.input(*like.shape[1:], like.stride()) for value, like in values.items()}
    remaining, remaining_others = iter(operands), iter(others)
    # In one section, each convolution is what it would be by itself; in a network what is between them is ours.
    alone = not any([step.begins for step in segment.steps[1:]])
    y: Tensor | None = None
    for number, step in enumerate(segment.steps, STEPS):
        h = values[step.value]
        if step.begins:
            network.section()
        if isinstance(step.node, BoundMaxPool):
            window: Window = next(remaining_others)
            y = window.output(h)
            if y is None:
                return None
            numbers[number] = network.max_pool(numbers[step.value], y.shape[2:], *window[:3])
        elif isinstance(step.node, BoundZeroPad):
            pad: ZeroPad = next(remaining_others)
            y = pad.output(h)
            numbers[number] = network.zero_pad(numbers[step.value], y.shape[1], pad.before, *pad.stride)
        elif isinstance(step.node, BoundMeanPool):
            y = mean_of(h)
            numbers[number] = network.mean_pool(numbers[step.value])
        elif isinstance(step.node, BoundFlatten):
            y = torch.flatten(h, 1)
            numbers[number] = numbers[step.value]
        elif isinstance(step.node, BoundLinear):
            operand = next(remaining)
            weight, bias = operand.sources
            assert weight is not None
            if not _is_linear(h, weight, bias):
                return None
            y = torch.empty((h.shape[0], weight.shape[0]), dtype=h.dtype, device="meta")
            described = _four(weight.shape), (1, 1), (1, 1), (0, 0), (1, 1), bias is not None, False
            numbers[number] = network.convolution(numbers[step.value], -1, *described)
        else:
            operand = next(remaining)
            spec = _spec(operand, h, alone)
            if spec is None:
                return None
            y = torch.empty_strided(*spec.output, dtype=x.dtype, device="meta")
            if step.shortcut is not None and not _adds(step, y, values[step.shortcut]):
                return None
            shortcut = -1 if step.shortcut is None else numbers[step.shortcut]
            numbers[number] = network.convolution(numbers[step.value], shortcut, *_described(operand, spec))
        values[number] = y
    assert y is not None
    return Plan(network, len(operands), values[INPUT], y)


def _is_linear(h: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether ``F.linear`` takes them, and there is something to compute."""
    fits = weight.shape[1:] == h.shape[1:] and weight.dtype == h.dtype and weight.shape[0] > 0
    return fits and (bias is None or (bias.shape == weight.shape[:1] and bias.dtype == weight.dtype))


def _adds(step: Step, y: Tensor, added: Tensor) -> bool:
    """Whether the sum is what PyTorch's would be: it has the left operand's dtype and memory format, and ours is the convolution's."""
    assert isinstance(step.node, BoundConvolution)
    return added.shape == y.shape and added.dtype == y.dtype and (step.node.main_is_left or added.stride() == y.stride())


def _described(operand: Operand, spec: ConvSpec) -> tuple[Any, ...]:
    """As the compiled module takes a network's convolution."""
    stride, padding, dilation, _ = spec.geometry
    has_bias = operand.eps is not None or spec.bias is not None
    return spec.weight.shape, spec.output.shape[2:], stride, (padding.top, padding.left), dilation, has_bias, spec.relu


JOINED = Packed(0, 0, None, None)  # of a projection: its weight is in another convolution's


def _packer(program: Any, index: int) -> Packer:
    """The packed weight and the bias of one of the program's convolutions, kept until a source changes."""
    if program.joined_to(index) >= 0:
        return lambda operands: Entry((), JOINED, None, True)
    kernel = program.convolution(index)
    size, pack, packing = kernel.packed_bytes, kernel.pack, kernel.packing
    projection = next((i for i in range(program.convolutions) if program.joined_to(i) == index), None)

    def packed(operands: Sequence[Operand]) -> Entry:
        operand = operands[index]
        sources, eps = operand.sources, operand.eps
        other = None if projection is None else operands[projection]
        if other is not None:
            sources = (*sources, *other.sources)

        def make(*held: Tensor | None) -> Packed:
            weight, bias = weight_and_bias(held[: len(operand.sources)], eps)
            more: tuple[Any, ...] = ()
            if other is not None:
                other_weight, other_bias = weight_and_bias(held[len(operand.sources) :], other.eps)
                more = other_weight.data_ptr(), other_weight.stride()
                bias = other_bias if bias is None else bias if other_bias is None else bias + other_bias
            bias = None if bias is None else bias.contiguous()
            buffer = torch.empty(size, dtype=torch.uint8)
            if not pack(weight.data_ptr(), _four(weight.stride()), buffer.data_ptr(), *more):
                return Packed(0, 0, None, None)
            return Packed(buffer.data_ptr(), 0 if bias is None else bias.data_ptr(), buffer, bias)

        return find(("packed", packing, eps, None if other is None else other.eps), sources, make, operand.place)

    return packed
