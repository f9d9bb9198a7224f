"""Calls of a segment that are repeated, in a few microseconds, as long as nothing has changed that they depend on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _settings, zero_pad
from .._compat import DLPACK, DLPACK_TYPES, PLAIN, is_in_memory, is_quiet, nobody_listens
from .._extension import cpu
from ..graph.facts import ABSENT, ITEM, LOOKUP, MISSING, Row
from ..ops import derived
from ..ops.plans import backends
from ..ops.spec import address
from ..ops.store import Source
from ..zero_pad import ZeroPadShortcut
from . import pooling
from .bound import BoundConvolution, BoundLinear, BoundMaxPool, BoundZeroPad, Segment
from .calls import Call, Result

_MOST = 8  # layouts in turn whose calls are kept: beyond, the oldest is made again
_MOST_ON_GPU = 64  # ... each on each of some streams; they share their packed weights
_CONV_SETTINGS = ("stride", "padding", "dilation", "groups")
_NORM_SETTINGS = ("training", "eps")

Key = tuple[Any, ...]
External = tuple[Any, ...] | None  # the layout of an external shortcut


def external_layout(t: Tensor | None) -> External:
    return None if t is None else (t.shape, t.stride(), t.dtype)


class CachedCalls:
    """The calls of one segment, by the layout of the input, and the state of the world that they belong to: the modules' settings, and
    the tensors that the packed weights were derived from.

    ``calls`` belongs to ``watch``, ``guard`` and ``facts``: it is only added to what was made in that state. A module's store holds it.
    """

    def __init__(self, segment: Segment, on_gpu: bool) -> None:
        """To be made before the call that is to be repeated, so that a change meanwhile is seen; ``accept`` is for after it."""
        self.on_gpu = on_gpu
        self.calls: dict[Key, tuple[Call, External]] = {}
        self.places: list[tuple[dict[str, Any], str]] = []
        self.rows: list[Row] = []
        self.usual = True  # the tensors are kept where modules keep them
        for step in segment.steps:
            if isinstance(step.node, BoundMaxPool):
                self._read(step.node.module.__dict__, pooling.SETTINGS)
            elif isinstance(step.node, BoundZeroPad):
                for module in [call.function for call in step.node.calls if isinstance(call.function, ZeroPadShortcut)]:
                    self._read(module.__dict__, (*zero_pad.SETTINGS, "forward"))
                    self.rows.append((ITEM, F.__dict__, "pad", zero_pad.PAD))
                    self.rows.append((LOOKUP, type(module), "forward", ZeroPadShortcut.forward))
            elif isinstance(step.node, BoundLinear):
                self.places += [(step.node.module._parameters, "weight"), (step.node.module._parameters, "bias")]
            elif isinstance(step.node, BoundConvolution):
                self._read_convolution(step.node, True)
        # An external shortcut is made anew each time; of its convolutions it matters only whether a norm is live.
        for node in segment.external:
            if isinstance(node, BoundConvolution):
                self._read_convolution(node, False)
        self.usual = all([name in place for place, name in self.places])
        self.tensors = [place.get(name) for place, name in self.places]
        self.rows += [(ITEM, place, name, t) for (place, name), t in zip(self.places, self.tensors, strict=True)]
        self.environment = _settings.number, derived.generation

    def _read(self, place: dict[str, Any], names: tuple[str, ...]) -> None:
        self.rows += [(ITEM if name in place else ABSENT, place, name, place.get(name, MISSING)) for name in names]

    def _read_convolution(self, node: BoundConvolution, with_tensors: bool) -> None:
        conv, norm = node.conv, node.norm
        if with_tensors:
            self._read(conv.__dict__, _CONV_SETTINGS)
            self.places += [(conv._parameters, "weight"), (conv._parameters, "bias")]
        if norm is not None:
            self._read(norm.__dict__, _NORM_SETTINGS)
            if with_tensors:
                self.places += [(norm._parameters, "weight"), (norm._parameters, "bias")]
                statistics = ["running_mean", "running_var", *(["num_batches_tracked"] if self.on_gpu else [])]  # see rows.packable_sources
                self.places += [(norm._buffers, name) for name in statistics]

    def accept(self, key: Key, result: Result, external: External, before: CachedCalls | None) -> bool:
        """Whether the call can be repeated: a change of every tensor that it depends on would be seen. before: calls of other layouts, which
        are taken over where nothing has changed since.

        What the tensors are compared with is what the values were derived from, not what the tensors are now: another thread may have
        replaced one meanwhile, and put it back.
        """
        assert cpu is not None
        entries = result.call.entries
        if not all([entry.watched for entry in entries]):
            return False
        # All of them: two values that were derived from one tensor may have found it in two states.
        self.sources: list[Source] = [source for entry in entries for source in entry.sources if source is not None]
        if any([type(source.strong) not in PLAIN or source.state[0] < 0 for source in self.sources]):
            return False
        states = {id(source.strong): source.state for source in self.sources}
        self.states = [states.get(id(t)) for t in self.tensors]
        if any([t is not None and state is None for t, state in zip(self.tensors, self.states, strict=True)]):
            return False
        first = self.sources[0].strong
        assert first is not None
        if derived.graphs_train(first) and any([source.strong.requires_grad for source in self.sources if source.strong is not None]):
            return False
        # Alive: the native passes compare with these objects, and the guard reads the sources' memory.
        self.watched = [(s.strong, type(s.strong), *s.state, DLPACK_TYPES.get(s.state[4], (0, 0))) for s in self.sources]
        self.watch = cpu.Watch(self.watched, Tensor, DLPACK, first.is_cuda)
        self.facts = cpu.Facts(self.rows, MISSING)
        self.guard = cpu.Guard([source.guard for source in self.sources if source.guard is not None])
        if before is not None and self._is_same_world(before):
            # A call of which a store has dropped something goes as well: it would keep that alive.
            kept = [(k, found) for k, found in before.calls.items() if k != key and all([entry.kept for entry in found[0].entries])]
            self.calls.update(kept[1 - (_MOST_ON_GPU if self.on_gpu else _MOST) :])
        self.calls[key] = result.call, external
        return True

    def _is_same_world(self, other: CachedCalls) -> bool:
        return (
            self.environment == other.environment
            and self.states == other.states
            and all([a is b for a, b in zip(self.tensors, other.tensors, strict=True)])
            and self.facts.broken({}) < 0
            and other.facts.broken({}) < 0
            and self.guard.holds()
            and other.guard.holds()
        )

    def holds(self) -> bool:
        """Whether nothing has changed that the calls depend on."""
        return (
            (_settings.number, derived.generation) == self.environment
            and self.facts.broken({}) < 0
            and self.watch.first_changed(False) < 0
            and bool(self.guard.holds())
        )

    def run(self, x: Tensor, make_external: Callable[[Tensor], Tensor | None]) -> Tensor | None:
        """What the segment gives for ``x``, a plain tensor outside of torch.compile; None where there is no call for it or something has
        changed. make_external: makes the external shortcut, where there is one. It may not be without effects, so all is looked at before."""
        found = self.find(x)
        if found is None:
            return None
        call, external = found
        if external is None:
            # ``sources`` hold the memory, whatever is assigned to ``.data`` meanwhile. Only a thread that frees the storage itself
            # (``resize_(0)``) takes it away, as it would under PyTorch's own convolution.
            return call.if_holds(self.guard, x)
        if not self.guard.holds():
            return None
        shortcut = make_external(x)
        if shortcut is None or external_layout(shortcut) != external or not nobody_listens(shortcut):
            return None
        return call(x, address(shortcut, "shortcut"))

    def find(self, x: Tensor) -> tuple[Call, External] | None:
        """The call for ``x``, where nothing has changed but perhaps the bytes of the tensors."""
        # Before anything is read of x, which torch.jit.trace would record.
        if (_settings.number, derived.generation) != self.environment or not is_quiet():
            return None
        try:
            if not (x.is_cpu or (x.is_cuda and derived.may_repeat(x))) or not is_in_memory(x):
                return None
            found = self.calls.get(key_of(x))
        except RuntimeError:  # sparse and nested tensors have no strides
            return None
        if found is None:
            return None
        grad = torch.is_grad_enabled()
        if grad and x.requires_grad:
            return None
        if self.facts.broken({}) >= 0 or self.watch.first_changed(grad or derived.graphs_train(x)) >= 0:
            return None
        return found


def key_of(x: Tensor) -> Key:
    return x.shape, x.stride(), x.dtype, backends.of(x).call_state(x)
