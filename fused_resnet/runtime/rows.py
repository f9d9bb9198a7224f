"""Convolutions in a row on a GPU: one native call that launches their kernels (``csrc/cuda/sequence.h``).

A value that only the row's own convolutions read lies in the arena, one piece of memory that is asked of PyTorch's allocator at each call.
What reads such a value, and what later writes over it, is behind it on the same stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._compat import cuda_stream
from ..ops.cuda import ALIGNMENT, krsc_strides, sum_of
from ..ops.derived import find
from ..ops.spec import Layout
from ..ops.store import Entry
from .bound import BoundConvolution
from .fold import sources_of, weight_and_bias

_APART = 256  # bytes: values in the arena begin at multiples of this, as PyTorch's own tensors do


class Launch(NamedTuple):
    """A convolution of a row. step: its number in the segment; kernel: the compiled convolution. x, shortcut, y: numbers of values.
    projection, projected: the step of the projection that is a part of it, and the value that this reads."""

    step: int
    kernel: Any
    x: int
    shortcut: int | None
    y: int
    projection: int | None = None
    projected: int | None = None

    @property
    def reads(self) -> list[int]:
        return [v for v in (self.x, self.shortcut, self.projected) if v is not None]


class Row:
    """Launches one after the other, of a segment's values by number: those that it reads, and those that it leaves."""

    def __init__(
        self, launches: Sequence[Launch], layouts: dict[int, Layout], left: Sequence[int], dtype: torch.dtype, module: Any
    ) -> None:
        """layouts: of all values. left: those it makes that something behind it reads. module: the compiled one."""
        self.launches, self.left, self.dtype = launches, left, dtype
        made = {launch.y for launch in launches}
        self.read = list(dict.fromkeys([v for launch in launches for v in launch.reads if v not in made]))
        self.left_layouts = [layouts[v] for v in left]
        given = {v: -1 - i for i, v in enumerate([*self.read, *left])}  # as the native sequence counts its caller's values
        places, self.arena_bytes = _places(launches, layouts, given, dtype.itemsize)
        steps = []
        for launch in launches:
            at = [None if v is None else places[v] for v in (launch.x, launch.shortcut, launch.y, launch.projected)]
            steps.append((launch.kernel, *at))
        self._sequence = module.Sequence(steps)

    def packed(self, nodes: Sequence[Any]) -> list[Entry]:
        """What each launch reads. nodes: of the segment's steps."""
        return [
            packed(nodes[launch.step], None if launch.projection is None else nodes[launch.projection]) for launch in self.launches
        ]

    def __call__(self, values: dict[int, Any], weights: Sequence[tuple[int, int, int]]) -> None:
        """values: by number; the row adds what it leaves. weights: addresses of what each launch reads (``Packed``)."""
        given = [values[v] for v in self.read]
        device = given[0].device
        made = [torch.empty_strided(*layout, dtype=self.dtype, device=device) for layout in self.left_layouts]
        arena = torch.empty(self.arena_bytes, dtype=torch.uint8, device=device)
        addresses = [t.data_ptr() for t in (*given, *made)]
        stream = cuda_stream(device) if device.type == "cuda" else 0
        self._sequence.run(addresses, arena.data_ptr(), weights, stream)
        values.update(zip(self.left, made, strict=True))


def _places(
    launches: Sequence[Launch], layouts: dict[int, Layout], given: dict[int, int], itemsize: int
) -> tuple[dict[int, int], int]:
    """Where each value lies, and the arena's size: the first gap that is large enough, until the last launch that reads it."""
    places, last = dict(given), {v: i for i, launch in enumerate(launches) for v in (launch.y, *launch.reads)}
    taken: list[tuple[int, int, int]] = []  # begin, end, value; sorted
    most = 0
    for i, launch in enumerate(launches):
        if launch.y not in given:
            size = -(-max(torch.Size(layouts[launch.y].shape).numel() * itemsize, 1) // _APART) * _APART
            begin = 0
            for other, end, _ in taken:
                if other - begin >= size:
                    break
                begin = end
            taken = sorted([*taken, (begin, begin + size, launch.y)])
            places[launch.y] = begin
            most = max(most, begin + size)
        taken = [place for place in taken if last[place[2]] > i]
    return places, most


class Packed(NamedTuple):
    """What a convolution's kernel reads: the weight as [K, R, S, C] without gaps, the bias, and the weight of a projection that is part of
    it."""

    weight: Tensor
    bias: Tensor | None
    projection: Tensor | None

    def addresses(self) -> tuple[int, int, int]:
        weight, bias, projection = [0 if t is None else t.data_ptr() for t in self]
        return weight, bias, projection


def packable_sources(node: BoundConvolution) -> tuple[Tensor | None, ...] | None:
    """What a convolution's weight and bias come from, and last, with a normalisation, its counter, without which a change of the running
    statistics would not be seen. None: it has none."""
    if node.norm is None:
        return node.conv.weight, node.conv.bias
    counter = node.norm.num_batches_tracked
    return None if counter is None else (*sources_of(node.conv, node.norm), counter)


def packed(node: BoundConvolution, projection: BoundConvolution | None = None) -> Entry:
    """A convolution's ``Packed``, kept in its module's store until a source changes."""
    nodes = [node] if projection is None else [node, projection]
    sources = [packable_sources(each) or () for each in nodes]
    eps = [None if each.norm is None else each.norm.eps for each in nodes]
    first = len(sources[0])

    def of(held: Sequence[Tensor | None], eps: float | None) -> tuple[Tensor, Tensor | None]:
        return weight_and_bias(held if eps is None else held[:-1], eps)

    def make(*held: Tensor | None) -> Packed:
        weight, bias = of(held[:first], eps[0])
        if projection is None:
            return Packed(_dense(weight), _aligned(bias), None)
        other, other_bias = of(held[first:], eps[1])
        if bias is not None and other_bias is not None:
            bias = sum_of(bias, other_bias)
        return Packed(_dense(weight), _aligned(other_bias if bias is None else bias), _dense(other))

    return find(("packed for a row", *eps), [t for found in sources for t in found], make, node.place)


def _dense(weight: Tensor) -> Tensor:
    strides = krsc_strides(weight.shape)
    if weight.stride() == strides and weight.data_ptr() % ALIGNMENT == 0:
        return weight
    return torch.empty_strided(weight.shape, strides, dtype=weight.dtype, device=weight.device).copy_(weight)


def _aligned(bias: Tensor | None) -> Tensor | None:
    if bias is None or (bias.is_contiguous() and bias.data_ptr() % ALIGNMENT == 0):
        return bias
    return bias.clone(memory_format=torch.contiguous_format)
