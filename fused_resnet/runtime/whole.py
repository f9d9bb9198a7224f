"""A whole residual block as one call into the compiled module: no gradient wanted, running statistics, all layers hot.

``run`` gives None for everything else, which is then for ``executor.py``, node by node: the same function, and the same
errors.
"""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _settings
from .._compat import is_in_memory, is_quiet, nobody_listens
from .._extension import cpu
from ..ops import derived
from ..ops.derived import Entry, Source, Store, find
from ..ops.select import why_general_on_cpu
from ..ops.spec import SUSPICIOUS, ConvSpec, address, check_operands, dtype_name, geometry_of_call, spec_of
from .fold import library_fold

_NO_STRIDES = (0, 0, 0, 0)


class Operand(NamedTuple):
    """A layer: the tensors that its weight and bias come from, and what steers the convolution."""

    sources: tuple[Tensor | None, ...]  # weight, bias; with a normalisation also its weight, bias, running mean and variance
    eps: float | None  # None: no normalisation
    stride: Any
    padding: Any
    dilation: Any
    groups: int
    relu: bool

    def key(self) -> tuple[Any, ...]:
        weight = self.sources[0]
        assert weight is not None
        return weight.stride(), weight.dtype, *[None if t is None else t.shape for t in self.sources], *self[1:]


def _folded(sources: Sequence[Tensor | None], eps: float | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer from its ``sources``."""
    if eps is None:
        weight, bias = sources
        assert weight is not None
        return weight, None if bias is None else bias.contiguous()
    return library_fold(*sources, eps)  # type: ignore[arg-type, call-arg]


class Packed(NamedTuple):
    """What the kernels read: the addresses, and the tensors that keep them alive. No buffer: see ``Convolution::pack``."""

    weight: int
    bias: int
    buffer: Tensor | None
    bias_tensor: Tensor | None


Repeat = Callable[..., Tensor]  # of the input and, if there is an external shortcut, its address
Packer = Callable[[Sequence["Operand"], "Store | None"], Entry]


class Result(NamedTuple):
    """A block's output, what repeats the call, and what was derived from parameters for it."""

    output: Tensor
    repeat: Repeat
    entries: list[Entry]


def run(
    plans: _settings.Plans,
    store: Store | None,
    layers: Sequence[Operand],
    x: Tensor,
    shortcut: Tensor | None,
    kind: str,
    main_is_left: bool,
) -> Result | None:
    """The block's output, or None where it has to go layer by layer.

    layers: the main path's, and the projection's behind them where ``kind`` is "projection". kind: "none", "identity",
    "external" (``shortcut`` is the tensor to add) or "projection".
    """
    if not nobody_listens(x, shortcut, *[t for layer in layers for t in layer.sources]):
        return None
    key = (
        x.shape,
        x.stride(),
        x.dtype,
        kind,
        None if shortcut is None else (shortcut.shape, shortcut.stride(), shortcut.dtype),
        tuple([layer.key() for layer in layers]),
        torch.get_num_threads(),
        _settings.number,
    )
    plan = plans.kept.get(key, _settings.UNKNOWN)
    if plan is _settings.UNKNOWN:
        plan = plans.make(key, lambda: _plan(layers, x, shortcut, kind, main_is_left))
    if plan is None:
        return None
    found: Result = plan(store, layers, x, shortcut)
    return found


def _like(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _spec(layer: Operand, h: Tensor) -> ConvSpec | None:
    """A layer of the input ``h``; None if it is not for our kernels."""
    weight, bias = (None if t is None else _like(t) for t in layer.sources[:2])
    assert weight is not None
    try:
        geometry = geometry_of_call(weight, layer.stride, layer.padding, layer.dilation, layer.groups)
        spec = spec_of(h, weight, bias, None, geometry, layer.relu)
    except (TypeError, ValueError):
        return None  # layer by layer, it raises the same error
    return None if why_general_on_cpu(spec) else spec


def _described(layer: Operand, spec: ConvSpec) -> tuple[Any, ...]:
    """As the compiled module takes a block's layer."""
    stride, padding, dilation, _ = spec.geometry
    has_bias = layer.eps is not None or spec.bias is not None
    return spec.weight.shape, spec.output.shape, stride, (padding.top, padding.left), dilation, has_bias, spec.relu


def _plan(
    layers: Sequence[Operand], x: Tensor, shortcut: Tensor | None, kind: str, main_is_left: bool
) -> Callable[..., Result] | None:
    assert cpu is not None
    described: list[Any] = []
    h = _like(x)
    main = len(layers) - (kind == "projection")
    added = x if kind == "identity" else shortcut
    for i, layer in enumerate(layers):
        spec = _spec(layer, h if i < main else _like(x))
        if spec is None:
            return None
        described.append(_described(layer, spec))
        output = torch.empty_strided(*spec.output, dtype=x.dtype, device="meta")
        if i < main:
            h = output
        else:
            added = output
    if added is not None and (
        added.shape != h.shape or added.dtype != h.dtype or not (main_is_left or added.stride() == h.stride())
    ):
        return None
    arguments = (
        dtype_name(x.dtype),
        tuple(x.shape),
        x.stride(),
        described[:main],
        described[main] if kind == "projection" else None,
        kind,
        _NO_STRIDES if shortcut is None else shortcut.stride(),
        h.stride(),
        torch.get_num_threads(),
    )
    strict = _settings.current.numerics == "strict"

    def make(algorithm: str) -> tuple[Any, list[Packer]]:
        block = cpu.Block(*arguments, algorithm, strict)
        return block, [_packer(block, i, main) for i in range(block.convolutions)]

    block, packers = make(_settings.current.algorithm)
    direct = functools.cache(lambda: make("direct"))
    shape, strides = h.shape, h.stride()
    as_input = torch.empty_like(_like(x)).stride() == strides and x.shape == shape  # then there is less to parse

    def call(store: Store | None, layers: Sequence[Operand], x: Tensor, shortcut: Tensor | None) -> Result:
        entries = [pack(layers, store) for pack in packers]
        packed = [entry.value for entry in entries]
        of_use = all([p.buffer is not None for p in packed])  # else only direct convolution is right with these weights
        run, weights, biases = block.run, [p.weight for p in packed], [p.bias for p in packed]

        own = None if store is None else weakref.ref(store)  # which will hold what repeats the call

        def repeat(x: Tensor, shortcut: int = 0) -> Tensor:
            at = x.data_ptr()
            if at < SUSPICIOUS:
                check_operands(x)
            output = torch.empty_like(x) if as_input else x.new_empty_strided(shape, strides)
            if not of_use or not run(at, weights, biases, shortcut, output.data_ptr()):
                directly, packers = direct()
                now = [pack(layers, None if own is None else own()).value for pack in packers]
                directly.run(at, [p.weight for p in now], [p.bias for p in now], shortcut, output.data_ptr())
            return output

        repeat.keeps = packed  # type: ignore[attr-defined]  # alive: the addresses are theirs, whatever the store drops meanwhile
        return Result(repeat(x, 0 if shortcut is None else address(shortcut, "shortcut")), repeat, entries)

    call.block = block  # type: ignore[attr-defined]  # what tests ask
    return call


def _packer(block: Any, index: int, main: int) -> Packer:
    """The packed weight and the bias of one of the block's convolutions, kept until a source changes."""
    kernel = block.convolution(index)
    size, pack, packing = kernel.packed_bytes, kernel.pack, kernel.packing
    joined = block.joined and index == main - 1

    def packed(layers: Sequence[Operand], store: Store | None) -> Entry:
        layer = layers[index]
        sources, eps = layer.sources, layer.eps
        other = layers[main] if joined else None
        if other is not None:
            sources = (*sources, *other.sources)

        def make(*held: Tensor | None) -> Packed:
            weight, bias = _folded(held[: len(layer.sources)], eps)
            more: tuple[Any, ...] = ()
            if other is not None:
                other_weight, other_bias = _folded(held[len(layer.sources) :], other.eps)
                more = other_weight.data_ptr(), other_weight.stride()
                bias = other_bias if bias is None else bias if other_bias is None else bias + other_bias
            buffer = torch.empty(size, dtype=torch.uint8)
            if not pack(weight.data_ptr(), weight.stride(), buffer.data_ptr(), *more):
                return Packed(0, 0, None, None)
            return Packed(buffer.data_ptr(), 0 if bias is None else bias.data_ptr(), buffer, bias)

        return find((index, "whole", packing, joined, eps, other and other.eps), sources, make, store)

    return packed


_version = operator.attrgetter("_version")
_data_ptr, _numel, _is_contiguous = Tensor.data_ptr, Tensor.numel, Tensor.is_contiguous


class Ready:
    """A block's last call, which is repeated in a few microseconds as long as nothing has changed that it depends on."""

    def __init__(
        self,
        places: Sequence[tuple[dict[str, Any], str]],
        settings: Sequence[tuple[dict[str, Any], Callable[[Any], Any]]],
        x: Tensor,
        shortcut: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """To be made before the call that it is to repeat, so that a change meanwhile is seen; ``accept`` is for after it.

        places: where the modules keep the source tensors. settings: what reads the numbers that steer the modules.
        shortcut: what makes the tensor to add from the input, where that is neither the input nor one of the layers' work.
        """
        self.places = places
        self.tensors = [d[name] for d, name in places]
        self.settings = [(d, get, get(d)) for d, get in settings]
        self.shape, self.strides, self.dtype = x.shape, x.stride(), x.dtype
        self.environment = torch.get_num_threads(), _settings.number, derived.generation
        self.shortcut = shortcut
        self.added: Any = None  # the shortcut's layout

    def accept(self, result: Result, shortcut: Tensor | None) -> bool:
        """Whether the call can be repeated: a change of every tensor that it depends on would be seen.

        What the tensors are compared with is what the values were derived from, not what the tensors are now: another thread may have
        replaced one meanwhile, and put it back.
        """
        assert cpu is not None
        sources: dict[int, Source] = {}
        for entry in result.entries:
            if not entry.watched:
                return False
            sources.update({id(source.strong): source for source in entry.sources if source is not None})
        self.there = [t for t in self.tensors if t is not None]
        seen = [sources.get(id(t)) for t in self.there]
        states = [source.state for source in seen if source is not None]
        if len(states) < len(seen) or any([state[0] < 0 for state in states]):
            return False
        self.versions, self.addresses = [state[0] for state in states], [state[1] for state in states]
        # Vectors are many, and there is less to compare.
        self.vectors = [t for t in self.there if t.dim() == 1]
        self.lengths = [state[2][0] for state in states if len(state[2]) == 1]
        self.others = [t for t in self.there if t.dim() != 1]
        self.layouts = [state[2:] for state in states if len(state[2]) != 1]
        self.guard = cpu.Guard([source.guard for source in seen if source is not None])
        self.sources = seen  # they hold the memory that the guard reads
        self.added = None if shortcut is None else (shortcut.shape, shortcut.stride(), shortcut.dtype)
        self.repeat = result.repeat
        return True

    def __call__(self, x: Tensor) -> Tensor | None:
        """The output for ``x``, a plain tensor outside of torch.compile; or None if something has changed."""
        now = torch.get_num_threads(), _settings.number, derived.generation
        if now != self.environment or not is_quiet():  # before anything is read of x: torch.jit.trace would record that
            return None
        try:
            if not x.is_cpu or not is_in_memory(x) or x.shape != self.shape or x.stride() != self.strides or x.dtype is not self.dtype:
                return None
        except RuntimeError:  # sparse and nested tensors have no strides
            return None
        grad = torch.is_grad_enabled()
        if grad and x.requires_grad:
            return None
        try:
            for d, get, value in self.settings:
                if get(d) != value:
                    return None
            tensors = [d[name] for d, name in self.places]
        except KeyError:
            return None
        there = self.there
        if not all(map(operator.is_, tensors, self.tensors)) or [*map(_version, there)] != self.versions:
            return None
        if [*map(_data_ptr, there)] != self.addresses or [(t.shape, t.stride(), t.dtype) for t in self.others] != self.layouts:
            return None
        if [*map(_numel, self.vectors)] != self.lengths or not all(map(_is_contiguous, self.vectors)):
            return None
        if grad and any([t.requires_grad for t in there]):
            return None
        if not self.guard.holds():
            return None
        if self.shortcut is None:
            return self.repeat(x)
        shortcut = self.shortcut(x)
        if (shortcut.shape, shortcut.stride(), shortcut.dtype) != self.added or not nobody_listens(shortcut):
            return None
        return self.repeat(x, address(shortcut, "shortcut"))
