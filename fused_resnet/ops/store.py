"""Where derived values are kept: ``Store``, its entries, and what each was made from.

``derived.py`` says what is kept, and when it is made anew.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# What a change of a tensor's values or memory changes, unless it is a write through ``.data``: version, address, shape, strides, dtype.
State = tuple[int, int, tuple[int, ...], tuple[int, ...], torch.dtype]
# All packings of a weight that the CPU's kernels choose, for whatever inputs, take up to 6.8 times its bytes together. A weight of few output
# channels may take more, for panels are filled up: that is what ``LEAST`` is for.
MOST_COPIES = 8
LEAST = 4 << 20  # bytes
_MOST_PLACES = 1024  # of one store: beyond, start over (a tensor can be cut into any number of views)


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


def version_of(t: Tensor) -> int:
    """How often the tensor was changed in place; -1 where nothing counts that: of an inference tensor, before and after its ``.data`` was
    replaced by what is none, and of one whose ``.data`` was replaced by an inference tensor."""
    try:
        return -1 if t.is_inference() else t._version
    except RuntimeError:
        return -1


def state_of(t: Tensor) -> State:
    """A tensor's state without its bytes."""
    return (version_of(t), t.data_ptr(), t.shape, t.stride(), t.dtype)


class Source:
    """A tensor as it was when a value was derived from it.

    In a module's store it holds the tensor and the memory of that time. Beside a storage it holds neither, and ``gone`` is called when the
    storage or, unless it is a Parameter, the tensor dies.
    """

    __slots__ = ("guard", "held", "nbytes", "state", "storage", "strong", "weak")

    def __init__(self, t: Tensor, held: Tensor, guard: Any, gone: Callable[[Any], None] | None) -> None:
        """held: ``t`` with the memory of this time. guard: what compares the bytes; None where they are not read."""
        self.state = state_of(held)
        self.nbytes = held.nbytes
        self.guard = guard
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


class Entry:
    """A value, the sources that it was made from and, on a GPU, when.

    watched: a change of any source would be seen. kept: no store has dropped it. Some values are not of a store, and never dropped.
    """

    __slots__ = ("kept", "made", "sources", "value", "watched")

    def __init__(self, sources: tuple[Source | None, ...], value: Any, made: Made | None, watched: bool) -> None:
        self.sources, self.value, self.made, self.watched = sources, value, made, watched
        self.kept = True

    def holds(self, sources: Sequence[Tensor | None]) -> bool:
        """Whether nothing has changed since."""
        return len(sources) == len(self.sources) and all(map(_holds, sources, self.sources))

    @property
    def nbytes(self) -> int:
        """Of the value."""
        return sum([t.nbytes for t in _tensors(self.value)])

    @property
    def nbytes_of_sources(self) -> int:
        return sum([source.nbytes for source in self.sources if source is not None])


def _holds(t: Tensor | None, source: Source | None) -> bool:
    return t is None if source is None else t is not None and source.is_as_it_was(t)


class Store:
    """Values by place and tag. A place is for what is derived from one weight (the first source) and whatever goes with it: in a module's
    store the number of a layer, beside a storage an address.

    cached: in a module's, the calls that can be repeated with the values (``runtime.cached.CachedCalls``), by segment.
    """

    def __init__(self) -> None:
        self.places: dict[Hashable, dict[Hashable, Entry]] = {}
        self.cached: dict[int, Any] = {}
        key, others = id(self), stores  # a global may be gone when the interpreter ends
        others[key] = weakref.ref(self, lambda _: others.pop(key, None))

    def entries(self) -> list[Entry]:
        return [entry for entries in [*self.places.values()] for entry in [*entries.values()]]

    def get(self, place: Hashable, tag: Hashable) -> Entry | None:
        """What is kept, whether it still holds or not."""
        entries = self.places.get(place)
        return None if entries is None else entries.get(tag)

    def keep(self, place: Hashable, tag: Hashable, entry: Entry) -> None:
        """Keep an entry that was just made, and in its place no more bytes than allowed."""
        if len(self.places) >= _MOST_PLACES and place not in self.places:
            self._drop_all()
        entries = self.places.setdefault(place, {})
        self.drop(place, tag)
        entries[tag] = entry
        in_order = [*entries.items()]
        of = max([e.nbytes_of_sources for _, e in in_order])  # views of several sizes may begin at one address
        excess = sum([e.nbytes for _, e in in_order]) - max(LEAST, MOST_COPIES * of)
        for other, old in in_order[:-1]:
            if excess <= 0:
                break
            excess -= old.nbytes
            self.drop(place, other)

    def forget_changed(self, place: Hashable, owner: Tensor) -> None:
        """Drop what was made in this place from another first source, or from this one before it changed. Beside a storage, what lies otherwise
        is another tensor's."""
        for tag, entry in [*self.places.get(place, {}).items()]:
            source = entry.sources[0]
            assert source is not None
            if source.strong is None and (source.state[2:] != (owner.shape, owner.stride(), owner.dtype)):
                continue
            if not source.is_as_it_was(owner):
                self.drop(place, tag)

    def drop(self, place: Hashable, tag: Hashable) -> None:
        """Drop one entry, if it is there."""
        entries = self.places.get(place, {})
        entry = entries.pop(tag, None)
        if entry is not None:
            entry.kept = False

    def _drop_all(self) -> None:
        for entry in self.entries():
            entry.kept = False
        self.places.clear()

    def clear(self) -> None:
        """Give everything back."""
        self.cached.clear()
        self._drop_all()


class Place:
    """Where what is derived for one layer of a module is kept: a number in the module's store, as long as that lives."""

    __slots__ = ("number", "store")

    def __init__(self, store: Store, number: int) -> None:
        self.store, self.number = weakref.ref(store), number


stores: dict[int, weakref.ref[Store]] = {}  # all there are, by id
