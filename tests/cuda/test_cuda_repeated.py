"""Calls that are repeated on a GPU as long as nothing has changed (``runtime.cached``), without a GPU.

What is trusted: the module's twin (``_cuda_twin``), and what goes node by node (``test_cuda_launches.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _cuda_rows import BLOCKS, Counter, Net, both, converted, counting, images
from torch import Tensor

import fused_resnet
from fused_resnet import testing
from fused_resnet._compat import DLPACK, DLPACK_TYPES
from fused_resnet._extension import cpu
from fused_resnet.ops import cuda, derived, select
from fused_resnet.ops.store import state_of
from fused_resnet.runtime import cached as cached_calls
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
    """What is packed while a graph is captured is the graph's: no call is repeated there, and none of there later."""
    block, x = converted(BLOCKS[1].eager()), images(2, 16, 8, 8)
    on_gpu: Any = SimpleNamespace(is_cuda=True, is_cpu=False, device=torch.device("cuda", 0))
    capturing = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    assert derived.may_repeat(on_gpu)
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
    monkeypatch.setattr(cached_calls, "is_in_memory", lambda x: pytest.fail("it goes on"))
    assert calls.find(on_gpu) is None
    capturing[0] = False
    with pytest.raises(pytest.fail.Exception, match="it goes on"):
        calls.find(on_gpu)


def test_after_a_graph_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its replays may write what wants a gradient, without a trace: nothing is repeated but where all is frozen."""
    on_gpu: Any = SimpleNamespace(is_cuda=True)
    assert not derived.graphs_train(on_gpu)
    with monkeypatch.context() as patch:
        patch.setattr(derived, "_graphs_train", True)
        assert derived.graphs_train(on_gpu)
        assert not derived.graphs_train(torch.empty(1))
    block, x = converted(BLOCKS[1].eager()), images(2, 16, 8, 8)
    block(x)
    cached = block._fused_resnet.current.bound.store.cached  # type: ignore[union-attr]
    (calls,) = cached.values()
    assert calls.find(x) is not None
    monkeypatch.setattr(derived, "graphs_train", lambda t: True)
    assert calls.find(x) is None
    cached.clear()
    block(x)
    assert not cached
    block.requires_grad_(False)
    assert calls.find(x) is not None
    block(x)
    (calls,) = cached.values()
    assert calls.find(x) is not None


def test_what_torch_is_told_during_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread that allows TF32 while a call is made: no call is kept for either."""
    monkeypatch.setattr(select, "SMALL_ON_CUDA", 0)
    block, x = converted(BLOCKS[1].eager(), torch.float32), images(2, 16, 8, 8, dtype=torch.float32)
    run = launches.run

    def disturbed(*arguments: Any) -> Any:
        other.enter_context(testing.library(tf32=True))
        made.append(run(*arguments))
        return made[-1]

    made: list[Any] = []
    with testing.library(tf32=False):
        with monkeypatch.context() as patch, ExitStack() as other:
            patch.setattr(launches, "run", disturbed)
            block(x)
        assert len(made) == 1
        assert made[0] is not None
        assert not block._fused_resnet.current.bound.store.cached  # type: ignore[union-attr]
    with testing.library(tf32=True):
        block(x)
        assert block._fused_resnet.current.bound.store.cached  # type: ignore[union-attr]


def test_what_the_sources_memory_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes that leave no trace but the bytes, where bytes are read; memory that was given back."""
    block, x = converted(BLOCKS[0].eager()), images(2, 16, 8, 8)
    before = both(block, x, monkeypatch)
    both(block, x, monkeypatch)
    block.conv1.weight.data.mul_(-1)  # type: ignore[union-attr, operator]
    assert not torch.equal(both(block, x, monkeypatch), before)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"freed|storage"):
        block(x)


def test_devices_and_streams_have_calls_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_stream", lambda device: streams[device.index])
    streams = [0, 0]
    places: list[Any] = [SimpleNamespace(device=torch.device("cuda", i)) for i in range(2)]
    backend = cuda.CudaBackend()
    first = backend.call_state(places[0])
    assert first != backend.call_state(places[1])
    streams[0] = 7
    assert first != backend.call_state(places[0])


def test_what_may_not_run_prepares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shortcut that another module makes, a misaligned input, a profiler, layers that had no plan: no facts are collected for a call that
    cannot be kept."""
    wide, image = converted(BLOCKS[0].eager(), torch.float32), images(2, 16, 8, 8, dtype=torch.float32)
    monkeypatch.setattr(select, "SMALL_ON_CUDA", 0)
    with testing.library(tf32=False):
        wide(image)  # by the library
    pooled = BLOCKS[1].eager()
    pooled.downsample = torch.nn.Sequential(torch.nn.AvgPool2d(2), torch.nn.Conv2d(16, 24, 1, bias=False), torch.nn.BatchNorm2d(24))
    block, x = converted(pooled), images(2, 16, 8, 8)
    monkeypatch.setattr(executor, "CachedCalls", lambda *arguments: pytest.fail("facts are collected"))
    block(x)
    with testing.library(tf32=False):
        wide(image)
    with testing.library(tf32=True), pytest.raises(pytest.fail.Exception, match="facts are collected"):
        wide(image)
    plain = converted(BLOCKS[0].eager())
    skewed = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].as_strided(x.shape, x.stride()).copy_(x)
    plain(skewed)
    with torch.profiler.profile():
        plain(x)
    with pytest.raises(pytest.fail.Exception, match="facts are collected"):
        plain(x)


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
