"""Values derived from tensors (packed, folded or cast weights): made once, kept beside the tensor, remade when it changes.

Nothing here is ever saved: the cache holds weak references, so it knows nothing of ``state_dict``, pickle or deepcopy, and an
entry dies with its tensor.

A change is seen by the tensor's version counter (every in-place operation, ``load_state_dict``, optimizers), its address
(``.data = ...``) and a fingerprint of its bytes, which also sees writes through ``.data`` that leave the counter alone: all
the bytes up to 64 KiB, 64 words spread over the tensor above that. Inference tensors have no counter: all their bytes are
read on every call.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ._extension import cpu

T = TypeVar("T")
_ALL = 1 << 62  # fingerprint every byte
SOME = 1 << 16  # ... or at most this many

# id(tensor) -> (weak reference to it, {tag: (stamps of the sources, value)})
_entries: dict[int, tuple[weakref.ref[Tensor], dict[object, tuple[tuple[Any, ...], Any]]]] = {}


def _identity(t: Tensor) -> tuple[Any, ...]:
    """What tells a tensor's state without reading its bytes. The layout is part of it."""
    return (-1 if t.is_inference() else t._version, t.data_ptr(), t.shape, t.stride())


def _fingerprint(t: Tensor, identity: tuple[Any, ...]) -> int:
    """A hash of the bytes; only of a dense tensor, whose bytes are the ``nbytes`` from its first element on."""
    if cpu is None or not t.is_cpu:
        return 0
    return int(cpu.fingerprint(identity[1], t.nbytes, _ALL if identity[0] == -1 else SOME))


def _unchanged(t: Tensor | None, stamp: Any) -> bool:
    if t is None or stamp is None:
        return t is stamp
    identity = _identity(t)
    return bool(stamp[2]() is t and identity == stamp[0] and _fingerprint(t, identity) == stamp[1])


def _stamp(t: Tensor | None) -> Any:
    if t is None:
        return None
    identity = _identity(t)
    return identity, _fingerprint(t, identity), weakref.ref(t)  # another tensor may come to live at the same address


def is_dense(t: Tensor) -> bool:
    """Whether the tensor's elements fill its memory without holes or overlaps, in any order of the axes."""
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def derive(tag: object, sources: tuple[Tensor | None, ...], make: Callable[[], T]) -> T:
    """``make()``, or what it returned before if no source has changed since. Kept as long as the first source lives.

    Made anew on every call where a change could not be seen: for a source that is not dense, and for an inference tensor
    without the compiled module.
    """
    owner = sources[0]
    assert owner is not None
    key = id(owner)
    entry = _entries.get(key)
    if entry is not None and entry[0]() is owner:
        kept = entry[1].get(tag)
        if kept is not None and all(map(_unchanged, sources, kept[0])):
            value: T = kept[1]
            return value
    if not all(t is None or (is_dense(t) and (cpu is not None or not t.is_inference())) for t in sources):
        return _make(make)
    stamps = tuple(map(_stamp, sources))  # before making: a write meanwhile is then seen at the next call
    value = _make(make)
    if not all(map(_unchanged, sources, stamps)):  # written meanwhile by another thread: whose bytes were read is not known
        return value
    if entry is None or entry[0]() is not owner:
        entry = (weakref.ref(owner, lambda _: _entries.pop(key, None)), {})
        _entries[key] = entry
    entry[1][tag] = (stamps, value)
    return value


def _make(make: Callable[[], T]) -> T:
    # Normal tensors even under inference_mode: they outlive it, and their changes can be counted.
    with torch.inference_mode(False), torch.no_grad():
        return make()


def clear() -> None:
    """Forget every derived value; each is made again when it is next needed."""
    _entries.clear()
