"""Values derived from tensors (packed, folded or cast weights): made once, kept beside the tensor, remade when it changes.

Nothing here is ever saved: the cache holds weak references, so it knows nothing of ``state_dict``, pickle or deepcopy, and an
entry dies with its tensor.

A change is seen by the tensor's version counter (every in-place operation, ``load_state_dict``, optimizers), its address
(``.data = ...``) and a fingerprint of its bytes, which also sees writes through ``.data`` that leave the counter alone: all
the bytes up to 64 KiB, 256 words spread over the tensor above that. Inference tensors have no counter; all their bytes are read.
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
_SOME = 1 << 16  # ... or at most this many

# id(tensor) -> (weak reference to it, {tag: (stamp, value)})
_entries: dict[int, tuple[weakref.ref[Tensor], dict[object, tuple[object, Any]]]] = {}


def _stamp(t: Tensor | None) -> object:
    """What changes when the tensor's values do."""
    if t is None:
        return None
    pointer = t.data_ptr()
    inference = t.is_inference()
    print_ = cpu.fingerprint(pointer, t.nbytes, _ALL if inference else _SOME) if cpu is not None and t.is_cpu else 0
    return (-1 if inference else t._version, pointer, print_, t.shape, t.stride())


def is_dense(t: Tensor) -> bool:
    """Whether the tensor's elements fill its memory without holes or overlaps, in any order of the axes."""
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def derive(tag: object, sources: tuple[Tensor | None, ...], make: Callable[[], T]) -> T:
    """``make()``, or what it returned before if no source has changed since. Kept as long as the first source lives."""
    owner = sources[0]
    assert owner is not None
    if not all(t is None or is_dense(t) for t in sources) or (cpu is None and owner.is_inference()):
        return _make(make)
    key = id(owner)
    entry = _entries.get(key)
    if entry is None or entry[0]() is not owner:
        entry = (weakref.ref(owner, lambda _: _entries.pop(key, None)), {})
        _entries[key] = entry
    stamp = tuple(_stamp(t) for t in sources)
    kept = entry[1].get(tag)
    if kept is not None and kept[0] == stamp:
        value: T = kept[1]
        return value
    value = _make(make)
    entry[1][tag] = (stamp, value)
    return value


def _make(make: Callable[[], T]) -> T:
    # Normal tensors even under inference_mode: they outlive it, and their changes can be counted.
    with torch.inference_mode(False), torch.no_grad():
        return make()


def clear() -> None:
    """Forget every derived value; each is made again when it is next needed."""
    _entries.clear()
