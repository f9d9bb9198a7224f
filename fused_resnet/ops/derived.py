"""Values derived from tensors (packed, folded or cast weights): made once, kept, remade when a tensor changes.

Two kinds of owner, and nothing of what they keep is ever saved, copied or pickled:

- a block keeps the values of its own parameters in a ``Store`` of its own. They die with the block, with ``.to()`` and its like, and
  with ``clear``.
- a call of the operator has only a tensor: its values are kept beside the tensor's storage (``_entries``) and die with that, or where
  the tensor is no Parameter with the tensor itself. There is no weak reference to a Parameter, nor to what else ``torch.utils.swap_tensors``
  may exchange in a module: it refuses tensors that have one.

A change is seen by the tensor's version counter (every in-place operation, ``load_state_dict``, optimizers), its address and layout
(``.data = ...``) and a fingerprint of its bytes, which also sees writes through ``.data`` that leave the counter alone: all
the bytes up to 64 KiB, 64 words spread over the tensor above that. Inference tensors have no counter: all their bytes are
read on every call. What was taken through ``.data`` has a version counter of its own, which tells nothing of writes to the tensor that
it was taken from: such a tensor is new to a cache when it is another object, but of a Parameter only storage, state and bytes are known.
Bytes are read only where the tensor is now, at the address that was compared, and while somebody holds them.

Batch norm in training changes its statistics without raising their versions: the bytes tell, or its counter (``runtime.fold.folded``).

On a GPU no bytes are read, which would wait for it: a write through ``.data`` is not seen there, and nothing is kept for inference
tensors. A value is made on the current stream; another stream that needs it waits for that. While a CUDA graph is captured,
values are made inside the graph, so that a replay sees the parameters of its time; but those of frozen parameters
(``requires_grad_(False)``) become constants of the graph, as ``torch.compile``'s freezing has it, and live until ``clear``.
A replay of a captured training step changes parameters without a trace: once a process has captured one, nothing is kept for
parameters on a GPU that want a gradient.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .._compat import PLAIN, in_graph_trees
from .._extension import cpu
from .spec import check_allocated

T = TypeVar("T")
# What a change of a tensor's values or memory changes, unless it is a write through ``.data``: version, address, shape, strides, dtype.
State = tuple[int, int, tuple[int, ...], tuple[int, ...], torch.dtype]
_graphs_train = False  # a graph that was captured may write parameters when it is replayed
_for_graphs: dict[int, Any] = {}  # values whose addresses a captured graph may hold, by id
_ALL = 1 << 62  # fingerprint every byte
SOME = 1 << 16  # ... or at most this many
_MOST = 1024  # values beside one storage: beyond that many, start over

generation = 0  # how often ``clear`` was called


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


def state_of(t: Tensor) -> State:
    """A tensor's state without its bytes. The version of an inference tensor, which has none, is -1."""
    return (-1 if t.is_inference() else t._version, t.data_ptr(), t.shape, t.stride(), t.dtype)


class Source:
    """A tensor as it was when a value was derived from it.

    In a block's store it holds the tensor and the memory of that time. Beside a storage it holds neither, and ``gone`` is called when the
    storage or, unless it is a Parameter, the tensor dies.
    """

    __slots__ = ("guard", "held", "state", "storage", "strong", "weak")

    def __init__(self, t: Tensor, held: Tensor, gone: Callable[[Any], None] | None) -> None:
        self.state = state_of(held)
        self.guard = _guard(held, self.state)
        self.strong = t if gone is None else None
        self.held = held if gone is None else None
        self.storage = None if gone is None else weakref.ref(held.untyped_storage(), gone)
        self.weak = None if gone is None or isinstance(t, nn.Parameter) else weakref.ref(t, gone)

    def is_as_it_was(self, t: Tensor) -> bool:
        storage = t.untyped_storage()  # keeps the memory that the guard reads
        if self.storage is None:
            return t is self.strong and self.memory_is_as_it_was(t)
        same = self.storage() is storage and (self.weak is None or self.weak() is t)
        return same and self.memory_is_as_it_was(t)

    def memory_is_as_it_was(self, t: Tensor) -> bool:
        """The same, of a tensor that is known to be this one or its snapshot."""
        return state_of(t) == self.state and (self.guard is None or self.guard.holds())


def _guard(t: Tensor, state: State) -> Any:
    """What compares the bytes of a dense tensor, which are the ``nbytes`` from its first element on; None where they are not read."""
    if cpu is None or not t.is_cpu:
        return None
    return cpu.Guard(state[1], t.nbytes, _ALL if state[0] == -1 else SOME)


class Entry(NamedTuple):
    """A value, the sources that it was made from and, on a GPU, when. ``watched``: a change of any source would be seen."""

    sources: tuple[Source | None, ...]
    value: Any
    made: Made | None
    watched: bool

    def holds(self, sources: Sequence[Tensor | None]) -> bool:
        """Whether nothing has changed since."""
        return len(sources) == len(self.sources) and all(map(_holds, sources, self.sources))


def _holds(t: Tensor | None, source: Source | None) -> bool:
    return t is None if source is None else t is not None and source.is_as_it_was(t)


class Store:
    """The derived values of one module; and the calls that can be repeated with them (``runtime.cached.CachedCalls``), by segment.

    A tag begins with the place in the block of the first source: a value of a source that has changed is not kept beside those of the new one.
    """

    def __init__(self) -> None:
        self.entries: dict[tuple[Hashable, ...], Entry] = {}
        self.cached: dict[int, Any] = {}
        key, stores = id(self), _stores
        _stores[key] = weakref.ref(self, lambda _: stores.pop(key, None))

    def forget_changed(self, tag: tuple[Hashable, ...], source: Tensor) -> None:
        """Drop what was made from another first source in this place, or from this one before it changed."""
        for other, entry in [*self.entries.items()]:
            if other[0] == tag[0] and not _holds(source, entry.sources[0]):
                self.entries.pop(other, None)

    def clear(self) -> None:
        """Give everything back."""
        self.cached.clear()
        self.entries.clear()


class _Beside:
    """What is derived from tensors in one storage, by tag and the address of the first source."""

    def __init__(self, storage: Any) -> None:
        key, entries = id(storage), _entries  # a global may be gone when the interpreter ends

        def gone(reference: Any) -> None:
            found = entries.get(key)
            if found is not None and found.storage is reference:  # else another storage has come to live there
                entries.pop(key, None)

        self.storage = weakref.ref(storage, gone)
        self.entries: dict[Hashable, Entry] = {}


_stores: dict[int, weakref.ref[Store]] = {}  # all there are, by id
_entries: dict[int, _Beside] = {}  # by the storage's id


def is_dense(t: Tensor) -> bool:
    """Whether the tensor's elements fill its memory without holes or overlaps, in any order of the axes."""
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _beside(tag: Hashable, t: Tensor) -> Entry | None:
    """What is kept beside a tensor's storage under this tag, whether it still holds or not."""
    storage = t.untyped_storage()
    found = _entries.get(id(storage))
    return None if found is None or found.storage() is not storage else found.entries.get((tag, t.data_ptr()))


def unchanged(tag: Hashable, t: Tensor) -> Entry | None:
    """What was derived from ``t`` alone and is kept beside its storage, if ``t`` has not changed since: ``find``'s short way.

    tag: it says shape, strides and dtype of the source, which are then not compared again.
    """
    storage = t.untyped_storage()  # keeps the memory that the guard reads
    found = _entries.get(id(storage))
    if found is None or found.storage() is not storage:
        return None
    entry = found.entries.get((tag, t.data_ptr()))
    if entry is None:
        return None
    source = entry.sources[0]
    assert source is not None
    if source.weak is not None and source.weak() is not t:
        return None
    try:
        same = t._version == source.state[0]
    except RuntimeError:  # an inference tensor has none
        return None
    return entry if same and source.guard is not None and source.guard.holds() else None


def derive(tag: tuple[Hashable, ...], sources: Sequence[Tensor | None], make: Callable[..., T], store: Store | None = None) -> T:
    """``make(*sources)``, or what it returned before if no source has changed since: see ``find``."""
    value: T = find(tag, sources, make, store).value
    return value


def find(tag: tuple[Hashable, ...], sources: Sequence[Tensor | None], make: Callable[..., Any], store: Store | None = None) -> Entry:
    """The value ``make(*sources)``, made now or kept from before: in ``store``, or beside the first source's storage where there is no store or
    that source is no Parameter (``functional_call`` puts others in a block's place for a while).

    tag: everything that the value depends on besides the sources. Nothing is kept where a change could not be seen: for a source that is
    not dense or of another class than torch's own, and for an inference tensor without the compiled module.

    ``make`` gets snapshots: tensors that share the sources' memory and keep it, whatever another thread assigns to their
    ``.data`` meanwhile, even there and back. So the value belongs to the entry's states, though perhaps no longer to the sources.

    Raises:
        RuntimeError: for a source whose storage was freed.
    """
    owner = sources[0]
    assert owner is not None
    if not all([t is None or type(t) in PLAIN for t in sources]):  # a subclass may have no memory to look at
        return Entry((), _made(make, snapshots(sources)), None, False)
    if not isinstance(owner, nn.Parameter):
        store = None
    capturing = owner.is_cuda and (torch.cuda.is_current_stream_capturing() or in_graph_trees(owner.device))
    if (capturing or (_graphs_train and owner.is_cuda)) and any([t is not None and t.requires_grad for t in sources]):
        return _make(tag, sources, make, store)  # of a graph: a part of it, made anew at each replay
    kept = _beside(tag, owner) if store is None else store.entries.get(tag)
    if kept is not None and kept.holds(sources):
        if capturing:
            _for_graphs[id(kept.value)] = kept.value
        elif kept.made is not None:
            kept.made.await_on(owner.device, kept.value)
        return kept
    if store is not None:
        store.forget_changed(tag, owner)
    before = generation
    entry = _make(tag, sources, make, store)
    if entry.watched and not capturing and generation == before:
        if store is not None:
            store.entries[tag] = entry
        else:
            _keep_beside(owner, tag, entry)
    return entry


def _make(tag: tuple[Hashable, ...], sources: Sequence[Tensor | None], make: Callable[..., Any], store: Store | None) -> Entry:
    held = snapshots(sources)
    owner = held[0]
    assert owner is not None
    for t in held:
        if t is not None:
            check_allocated(t, "a parameter")
    gone = None if store is not None else _forget(owner, tag)
    watched = all([t is None or snap is None or _can_be_seen(t, snap) for t, snap in zip(sources, held, strict=True)])
    seen: tuple[Source | None, ...] = ()
    if watched:  # before making: a write meanwhile is then seen at the next call
        seen = tuple([None if t is None or snap is None else Source(t, snap, gone) for t, snap in zip(sources, held, strict=True)])
    value = _made(make, held)
    # Written meanwhile by another thread: whose bytes were read is not known.
    watched = watched and all([s is None or t is None or s.memory_is_as_it_was(t) for s, t in zip(seen, held, strict=True)])
    return Entry(seen, value, Made(owner.device) if owner.is_cuda else None, watched)


def _made(make: Callable[..., T], held: Sequence[Tensor | None]) -> T:
    # Normal tensors even under inference_mode: they outlive it, and their changes can be counted.
    with torch.inference_mode(False), torch.no_grad():
        return make(*held)


def snapshots(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The tensors with the memory that they have now, which stays alive and theirs; they share their version counters."""
    with torch.inference_mode(False), torch.no_grad():
        return tuple([None if t is None else t.detach() for t in tensors])


def _can_be_seen(t: Tensor, snap: Tensor) -> bool:
    """Whether a change would be seen. An inference tensor has no counter."""
    return is_dense(snap) and (not t.is_inference() or (cpu is not None and t.is_cpu))


def _keep_beside(owner: Tensor, tag: Hashable, entry: Entry) -> None:
    source = entry.sources[0]
    assert source is not None
    assert source.storage is not None
    storage = source.storage()
    if storage is None:  # replaced meanwhile
        return
    found = _entries.get(id(storage))
    if found is None or found.storage() is not storage:
        found = _entries[id(storage)] = _Beside(storage)
    if len(found.entries) >= _MOST:
        found.entries.clear()
    found.entries[tag, source.state[1]] = entry


def _forget(owner: Tensor, tag: Hashable) -> Callable[[Any], None]:
    """What drops the entry of an owner and a tag when one of its sources is gone."""
    key, place, entries = id(owner.untyped_storage()), (tag, owner.data_ptr()), _entries

    def gone(reference: Any) -> None:
        found = entries.get(key)
        entry = None if found is None else found.entries.get(place)
        if entry is not None and any([s is not None and (reference is s.weak or reference is s.storage) for s in entry.sources]):
            assert found is not None
            found.entries.pop(place, None)
            if not found.entries:
                entries.pop(key, None)

    return gone


def training_captured(t: Tensor) -> None:
    """To be told by whatever computes for a backward pass: if a graph is being captured, its replays may train."""
    global _graphs_train
    if t.is_cuda and not _graphs_train and torch.cuda.is_current_stream_capturing():
        _graphs_train = True


def clear() -> None:
    """Forget everything that is derived from tensors; each value is made again when it is next needed. Scratch memory is freed as well.

    CUDA graphs that were captured with frozen parameters must be captured again, not replayed: the memory that they read is given back.
    """
    global generation
    generation += 1  # what is being made meanwhile is not kept
    for reference in [*_stores.values()]:
        store = reference()
        if store is not None:
            store.clear()
    _entries.clear()
    _for_graphs.clear()
    if cpu is not None:
        cpu.release_workspaces()
