"""Values derived from tensors (packed, folded or cast weights): made once, kept beside the tensor, remade when it changes.

Nothing here is ever saved: the cache holds weak references, so it knows nothing of ``state_dict``, pickle or deepcopy, and an
entry dies with its tensor.

A change is seen by the tensor's version counter (every in-place operation, ``load_state_dict``, optimizers), its address
(``.data = ...``) and a fingerprint of its bytes, which also sees writes through ``.data`` that leave the counter alone: all
the bytes up to 64 KiB, 64 words spread over the tensor above that. Inference tensors have no counter: all their bytes are
read on every call.

On a GPU no bytes are read, which would wait for it: a write through ``.data`` is not seen there, and nothing is kept for inference
tensors. A value is made on the current stream; another stream that needs it waits for that. While a CUDA graph is captured,
values are made inside the graph, so that a replay sees the parameters of its time; but those of frozen parameters
(``requires_grad_(False)``) become constants of the graph, as ``torch.compile``'s freezing has it, and live until ``clear``.
A replay of a captured training step changes parameters without a trace: once a process has captured one, nothing is kept for
parameters on a GPU that want a gradient.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ._extension import cpu

T = TypeVar("T")
State = tuple[int, int] | None  # version and address
_graphs_train = False  # a graph that was captured may write parameters when it is replayed
_for_graphs: dict[int, Any] = {}  # values whose addresses a captured graph may hold, by id
_ALL = 1 << 62  # fingerprint every byte
SOME = 1 << 16  # ... or at most this many

# id(tensor) -> (weak reference to it, {tag: (stamps of the sources, value, when it was made)})
_entries: dict[int, tuple[weakref.ref[Tensor], dict[object, tuple[tuple[Any, ...], Any, Made | None]]]] = {}


class Made:
    """Where on the GPU a value was made: the stream, and the moment at which it is there."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.current_stream(device)
        self.event = torch.cuda.Event()
        self.event.record(self.stream)

    def await_on(self, device: torch.device, value: Any) -> None:
        """The current stream will find the value there, and its memory will not be given away before that stream is done."""
        current = torch.cuda.current_stream(device)
        if current != self.stream:
            current.wait_event(self.event)
            for t in _tensors(value):
                t.record_stream(current)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for t in value if isinstance(t, Tensor)] if isinstance(value, tuple) else []


def _identity(t: Tensor) -> tuple[Any, ...]:
    """What tells a tensor's state without reading its bytes: first ``state_of``. The layout is part of it."""
    return (-1 if t.is_inference() else t._version, t.data_ptr(), t.shape, t.stride())


def _fingerprint(t: Tensor, identity: tuple[Any, ...]) -> int:
    """A hash of the bytes; only of a dense tensor, whose bytes are the ``nbytes`` from its first element on."""
    if cpu is None or not t.is_cpu:
        return 0
    return int(cpu.fingerprint(identity[1], t.nbytes, _ALL if identity[0] == -1 else SOME))


def state_of(t: Tensor | None) -> State:
    """What a change of a tensor's values or memory changes, unless it is a write through ``.data``."""
    return None if t is None else (-1 if t.is_inference() else t._version, t.data_ptr())


def snapshots(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The tensors with the memory that they have now, which stays alive and theirs."""
    with torch.inference_mode(False), torch.no_grad():
        return tuple([None if t is None else t.detach() for t in tensors])


def _unchanged(t: Tensor | None, stamp: Any, held: Tensor | None = None) -> bool:
    """Whether the tensor is as it was; of a snapshot (``held``) itself, whether the memory is."""
    if t is None or stamp is None:
        return t is stamp
    identity = _identity(t)
    return bool((held is not None or stamp[2]() is t) and identity == stamp[0] and _fingerprint(t, identity) == stamp[1])


def _stamp(t: Tensor | None, held: Tensor | None) -> Any:
    if t is None or held is None:
        return None
    identity = _identity(held)
    return identity, _fingerprint(held, identity), weakref.ref(t)  # another tensor may come to live at the same address


def is_dense(t: Tensor) -> bool:
    """Whether the tensor's elements fill its memory without holes or overlaps, in any order of the axes."""
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def derive(tag: object, sources: Sequence[Tensor | None], make: Callable[..., T]) -> T:
    """``make(*sources)``, or what it returned before if no source has changed since. Kept as long as the first source lives.

    Made anew on every call where a change could not be seen: for a source that is not dense, and for an inference tensor
    without the compiled module.
    """
    return find(tag, sources, make)[1]


def find(tag: object, sources: Sequence[Tensor | None], make: Callable[..., T]) -> tuple[tuple[State, ...], T]:
    """As ``derive``, and before the value the states of the sources that it was made from.

    ``make`` gets snapshots: tensors that share the sources' memory and keep it, whatever another thread assigns to their
    ``.data`` meanwhile, even there and back. So the value belongs to the states, though perhaps no longer to the sources.
    """
    owner = sources[0]
    assert owner is not None
    capturing = owner.is_cuda and (torch.cuda.is_current_stream_capturing() or _in_graph_trees(owner.device))
    if (capturing or (_graphs_train and owner.is_cuda)) and any([t is not None and t.requires_grad for t in sources]):
        held = snapshots(sources)
        return tuple(map(state_of, held)), _make(make, held)  # of a graph: a part of it, made anew at each replay
    key = id(owner)
    entry = _entries.get(key)
    if entry is not None and entry[0]() is owner:
        kept = entry[1].get(tag)
        if kept is not None and len(kept[0]) == len(sources) and all(map(_unchanged, sources, kept[0])):
            value: T = kept[1]
            if capturing:
                _for_graphs[id(value)] = value
            elif kept[2] is not None:
                kept[2].await_on(owner.device, value)
            return tuple([None if stamp is None else stamp[0][:2] for stamp in kept[0]]), value
    held = snapshots(sources)
    states = tuple(map(state_of, held))
    if capturing or not all(t is None or (is_dense(t) and _can_be_seen(t)) for t in held):
        return states, _make(make, held)
    stamps = tuple(map(_stamp, sources, held))  # before making: a write meanwhile is then seen at the next call
    value = _make(make, held)
    if not all(map(_unchanged, held, stamps, held)):  # written meanwhile by another thread: whose bytes were read is not known
        return states, value
    if entry is None or entry[0]() is not owner:
        entry = (weakref.ref(owner, lambda _: _entries.pop(key, None)), {})
        _entries[key] = entry
    entry[1][tag] = (stamps, value, Made(owner.device) if owner.is_cuda else None)
    return states, value


def _in_graph_trees(device: torch.device) -> bool:
    """Whether Inductor warms up or records a graph of its own (mode="reduce-overhead"): what is allocated then is the graph's."""
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    manager = None if trees is None else trees.get_manager(device.index, create_if_none_exists=False)
    return manager is not None and bool(manager.in_warmup or manager.in_recording)


def _can_be_seen(t: Tensor) -> bool:
    """Whether a change of an inference tensor, which has no counter, would be seen."""
    return not t.is_inference() or (cpu is not None and t.is_cpu)


def _make(make: Callable[..., T], held: Sequence[Tensor | None]) -> T:
    # Normal tensors even under inference_mode: they outlive it, and their changes can be counted.
    with torch.inference_mode(False), torch.no_grad():
        return make(*held)


def training_captured(t: Tensor) -> None:
    """To be told by whatever computes for a backward pass: if a graph is being captured, its replays may train."""
    global _graphs_train
    if t.is_cuda and not _graphs_train and torch.cuda.is_current_stream_capturing():
        _graphs_train = True


def clear() -> None:
    """Forget every derived value; each is made again when it is next needed. CUDA graphs that were captured with frozen parameters
    must be captured again, not replayed: the memory that they read is given back."""
    _entries.clear()
    _for_graphs.clear()
