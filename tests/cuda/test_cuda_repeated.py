"""Calls that are repeated on a GPU as long as nothing has changed (``runtime.cached``), without a GPU.

What is trusted: the module's twin (``_cuda_twin``), and what goes node by node (``test_cuda_launches.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _cuda_rows import BLOCKS, Counter, Net, both, converted, counting, images
from torch import Tensor

import fused_resnet
from fused_resnet._compat import DLPACK, DLPACK_TYPES
from fused_resnet._extension import cpu
from fused_resnet.ops import cuda, derived
from fused_resnet.ops.store import state_of
from fused_resnet.runtime import executor, launches


@pytest.fixture(autouse=True)
def counter() -> Iterator[Counter]:
    with counting() as module:
        yield module


def test_repeated_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as nothing has changed, a call asks for no plan and packs nothing; another layout, stream or state has a call of its own."""
    torch.manual_seed(0)
    model, given = converted(Net()), [images(2, 3, 32, 32) for _ in range(3)]
    expected = [both(model, x, monkeypatch) for x in given]
    run, made = launches.run, []

    def counted(*arguments: Any) -> Any:
        made.append(arguments)
        return run(*arguments)

    monkeypatch.setattr(launches, "run", counted)

    def calls(x: Tensor, wanted: int) -> Tensor:
        made.clear()
        found: Tensor = model(x)
        assert len(made) == wanted
        return found

    assert torch.equal(calls(given[0], 0), expected[0])
    assert all(torch.equal(calls(x, 0), y) for x, y in zip(given, expected, strict=True))
    calls(given[0][:1], 1)
    calls(given[0][:1], 0)
    assert torch.equal(calls(given[1], 0), expected[1])  # the other layout's is kept
    stream = [0]
    monkeypatch.setattr(cuda, "_stream", lambda device: stream[0])
    for other in (1, 0):
        stream[0] = other
        assert torch.equal(calls(given[1], other), expected[1])
    model.layer1[0].conv1.weight.mul_(-1)  # type: ignore[index, union-attr, operator]
    changed = calls(given[1], 1)
    assert not torch.equal(changed, expected[1])
    assert torch.equal(calls(given[1], 0), changed)
    assert torch.equal(both(model, given[1], monkeypatch), changed)
    fused_resnet.clear_derived()
    assert torch.equal(calls(given[1], 1), changed)


def test_graphs_have_calls_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is packed while a graph is captured is the graph's: no call is repeated there, and none of there later. Nor is one where a replay
    may have written parameters."""
    block, x = converted(BLOCKS[1].eager()), images(2, 16, 8, 8)
    on_gpu: Any = SimpleNamespace(is_cuda=True, is_cpu=False, device=torch.device("cuda", 0))
    capturing = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    assert derived.may_repeat(on_gpu)
    with monkeypatch.context() as patch:
        patch.setattr(derived, "_graphs_train", True)
        assert not derived.may_repeat(on_gpu)
    with monkeypatch.context() as patch:
        patch.setattr(derived, "in_graph_trees", lambda device: True)
        assert not derived.may_repeat(on_gpu)
    capturing[0] = True
    assert not derived.may_repeat(on_gpu)
    assert derived.may_repeat(x)
    with monkeypatch.context() as patch:
        patch.setattr(executor, "may_repeat", lambda x: derived.may_repeat(on_gpu))
        block(x)
        cached = block._fused_resnet.current.bound.store.cached  # type: ignore[union-attr]
        assert not cached
        capturing[0] = False
        block(x)
    (calls,) = cached.values()
    capturing[0] = True
    assert calls.find(on_gpu) is None  # nor is anything else read of it
    assert calls.find(x) is not None


def test_where_tensors_are() -> None:
    """The native pass over what was packed knows tensors of a GPU from others (by DLPack's description, where torch has it)."""
    assert cpu is not None
    w, count = torch.randn(3, 2), torch.tensor(7)
    state = [(t, type(t), *state_of(t), DLPACK_TYPES[t.dtype]) for t in (w, count)]
    assert cpu.Watch(state, Tensor, DLPACK, False).first_changed(False) == -1
    assert cpu.Watch(state, Tensor, DLPACK, True).first_changed(False) == (-1 if DLPACK is None else 0)
    watch = cpu.Watch(state, Tensor, DLPACK, False)
    count.add_(1)
    assert watch.first_changed(False) == 1
