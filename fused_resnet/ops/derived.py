"""Values derived from tensors (packed, folded or cast weights): made once, kept, remade when a tensor changes.

Whatever is kept is in a ``Store``, and there are two kinds of them. Nothing of what they hold is ever saved, copied or pickled.

- A module has one for its own parameters (``Place``). It holds the tensors, and dies with the module, with ``.to()`` and its like, and
  with ``clear``.
- A call of the operator has only a tensor: the store is beside that tensor's storage (``_beside``) and dies with it; a value dies with each
  of its sources, by their storages, or where a source is no Parameter by the tensor itself. There is no weak reference to a Parameter:
  ``torch.utils.swap_tensors`` refuses tensors that have one. (A buffer gets one by ``functional_call`` with weights that are none.)

What is kept of one weight takes at most ``MOST_COPIES`` times its bytes (or ``LEAST``): beyond, what was made first goes. (The copy with
a norm folded in, which calls that go layer by layer use, is a weight of its own.) One step invalidates: before a value is made anew, all
that was made of that weight before it changed is dropped (``Store.forget_changed``).

A change is seen by the tensor's version counter (every in-place operation, ``load_state_dict``, optimizers), its address and layout
(``.data = ...``) and a fingerprint of its bytes, which also sees writes through ``.data`` that leave the counter alone: all
the bytes up to 64 KiB, 64 words spread over the tensor above that. Inference tensors have no counter: all their bytes are
read on every call. What was taken through ``.data`` has a version counter of its own, which tells nothing of writes to the tensor that
it was taken from: such a tensor is new to a store when it is another object, but of a Parameter only storage, state and bytes are known
beside a storage. Bytes are read only where the tensor is now, at the address that was compared, and while somebody holds them.

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
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._compat import PLAIN, in_graph_trees
from .._extension import cpu
from .spec import check_allocated
from .store import Entry, Made, Place, Source, Store, stores, version_of

T = TypeVar("T")
_ALL = 1 << 62  # fingerprint every byte
SOME = 1 << 16  # ... or at most this many
_graphs_train = False  # a graph that was captured may write parameters when it is replayed
_for_graphs: dict[int, Any] = {}  # values whose addresses a captured graph may hold, by id

generation = 0  # how often ``clear`` was called


class _StorageStore(Store):
    """What is derived from tensors in one storage."""

    def __init__(self, storage: Any) -> None:
        super().__init__()
        key, others = id(storage), _beside  # a global may be gone when the interpreter ends

        def gone(reference: Any) -> None:
            found = others.get(key)
            if found is not None and found.storage is reference:  # else another storage has come to live there
                others.pop(key, None)

        self.storage = weakref.ref(storage, gone)


_beside: dict[int, _StorageStore] = {}  # by the storage's id


def is_dense(t: Tensor) -> bool:
    """Whether the tensor's elements fill its memory without holes or overlaps, in any order of the axes."""
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _store_beside(storage: Any) -> _StorageStore | None:
    found = _beside.get(id(storage))
    return None if found is None or found.storage() is not storage else found


def unchanged(tag: Hashable, t: Tensor) -> Entry | None:
    """What was derived from ``t`` alone and is kept beside its storage, if ``t`` has not changed since: ``find``'s short way.

    tag: it says shape, strides and dtype of the source, which are then not compared again.
    """
    storage = t.untyped_storage()  # keeps the memory that the guard reads
    found = _beside.get(id(storage))
    if found is None or found.storage() is not storage:
        return None
    entries = found.places.get(t.data_ptr())
    entry = None if entries is None else entries.get(tag)
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


def derive(tag: Hashable, sources: Sequence[Tensor | None], make: Callable[..., T], place: Place | None = None) -> T:
    """``make(*sources)``, or what it returned before if no source has changed since: see ``find``."""
    value: T = find(tag, sources, make, place).value
    return value


def find(tag: Hashable, sources: Sequence[Tensor | None], make: Callable[..., Any], place: Place | None = None) -> Entry:
    """The value ``make(*sources)``, made now or kept from before: in a module's ``place``, or beside the first source's storage where there is
    none or that source is no Parameter (``functional_call`` puts others in a module's place for a while).

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
    module = None if place is None or not isinstance(owner, nn.Parameter) else place.store()
    number = owner.data_ptr() if module is None or place is None else place.number
    store = _store_beside(owner.untyped_storage()) if module is None else module
    capturing = owner.is_cuda and (torch.cuda.is_current_stream_capturing() or in_graph_trees(owner.device))
    if (capturing or (_graphs_train and owner.is_cuda)) and any([t is not None and t.requires_grad for t in sources]):
        return _make(tag, sources, make, module)  # of a graph: a part of it, made anew at each replay
    kept = None if store is None else store.get(number, tag)
    if kept is not None and kept.holds(sources):
        if capturing:
            _for_graphs[id(kept.value)] = kept.value
        elif kept.made is not None:
            kept.made.await_on(owner.device, kept.value)
        return kept
    if store is not None:  # what has changed is given back before the new is made
        store.forget_changed(number, owner)
        store.drop(number, tag)
    del kept
    before = generation
    entry = _make(tag, sources, make, module)
    if entry.watched and not capturing and generation == before:
        _keep(number, tag, entry, module)
    return entry


def _keep(number: Hashable, tag: Hashable, entry: Entry, module: Store | None) -> None:
    """In a module's store, or beside the first source's storage, as that was when the value was made."""
    if module is not None:
        module.keep(number, tag, entry)
        return
    source = entry.sources[0]
    assert source is not None
    assert source.storage is not None
    storage = source.storage()
    if storage is None:  # replaced meanwhile
        return
    store = _store_beside(storage)
    if store is None:
        store = _beside[id(storage)] = _StorageStore(storage)
    store.keep(source.state[1], tag, entry)


def _make(tag: Hashable, sources: Sequence[Tensor | None], make: Callable[..., Any], module: Store | None) -> Entry:
    held = snapshots(sources)
    owner = held[0]
    assert owner is not None
    for t in held:
        if t is not None:
            check_allocated(t, "a parameter")
    gone = None if module is not None else _forget(owner, tag)
    watched = all([t is None or snap is None or _can_be_seen(t, snap) for t, snap in zip(sources, held, strict=True)])
    seen: tuple[Source | None, ...] = ()
    if watched:  # before making: a write meanwhile is then seen at the next call
        pairs = zip(sources, held, strict=True)
        seen = tuple([None if t is None or snap is None else Source(t, snap, _guard(snap), gone) for t, snap in pairs])
    value = _made(make, held)
    # Written meanwhile by another thread: whose bytes were read is not known.
    watched = watched and all([s is None or t is None or s.memory_is_as_it_was(t) for s, t in zip(seen, held, strict=True)])
    return Entry(seen, value, Made(owner.device) if owner.is_cuda else None, watched)


def _guard(t: Tensor) -> Any:
    """What compares the bytes of a dense tensor, which are the ``nbytes`` from its first element on; None where they are not read."""
    if cpu is None or not t.is_cpu:
        return None
    return cpu.Guard(t.data_ptr(), t.nbytes, _ALL if version_of(t) < 0 else SOME)


def _made(make: Callable[..., T], held: Sequence[Tensor | None]) -> T:
    # Normal tensors even under inference_mode: they outlive it, and their changes can be counted.
    with torch.inference_mode(False), torch.no_grad():
        return make(*held)


def snapshots(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The tensors with the memory that they have now, which stays alive and theirs; they share their version counters."""
    with torch.inference_mode(False), torch.no_grad():
        return tuple([None if t is None else t.detach() for t in tensors])


def _can_be_seen(t: Tensor, snap: Tensor) -> bool:
    """Whether a change would be seen."""
    return is_dense(snap) and (version_of(t) >= 0 or (cpu is not None and t.is_cpu))


def _forget(owner: Tensor, tag: Hashable) -> Callable[[Any], None]:
    """What drops the entry of an owner and a tag beside a storage when one of its sources is gone."""
    key, address, others = id(owner.untyped_storage()), owner.data_ptr(), _beside

    def gone(reference: Any) -> None:
        store = others.get(key)
        entry = None if store is None else store.get(address, tag)
        if entry is not None and any([s is not None and (reference is s.weak or reference is s.storage) for s in entry.sources]):
            assert store is not None
            store.drop(address, tag)
            if not store.places.get(address):
                store.places.pop(address, None)
            if not store.places:
                others.pop(key, None)

    return gone


def may_repeat(t: Tensor) -> bool:
    """Whether values that ``find`` gave before may be used again for a call with ``t`` without asking it, if no source has changed: not while
    a graph is captured, which has values of its own."""
    return not t.is_cuda or not (torch.cuda.is_current_stream_capturing() or in_graph_trees(t.device))


def graphs_train(t: Tensor) -> bool:
    """Whether replays of graphs may write what wants a gradient where ``t`` is, without a trace."""
    return _graphs_train and t.is_cuda


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
    for reference in [*stores.values()]:
        store = reference()
        if store is not None:
            store.clear()
    _beside.clear()
    _for_graphs.clear()
    if cpu is not None:
        cpu.release_workspaces()
