"""Whose memory it is: what a network's native calls keep, share and give back, and calls from several threads and processes."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _blocks import assert_same, randomise
from _network import WHOLE, hook, make, native, pair, parts, quiet, x
from torch import Tensor

import fused_resnet
from fused_resnet import _plain
from fused_resnet._extension import cpu
from fused_resnet.fusion import fuse_
from fused_resnet.runtime import cached, fused, program
from fused_resnet.runtime.program import Packed

__all__ = ["quiet", "x"]  # fixtures

pytestmark = pytest.mark.skipif(cpu is None, reason="a network is one native call only with the compiled module")


def test_a_network_and_its_blocks_share_packed_weights(x: Tensor) -> None:
    """And so do calls of other sizes: nothing is packed twice."""
    _, converted = pair(x)
    stores = [b._fused_resnet.current.bound.store for b in converted.modules() if isinstance(b, fused.FusedModule)]
    entries = [len(store.entries()) for store in stores]
    with torch.no_grad():
        h = converted.maxpool(converted.relu(converted.bn1(converted.conv1(x))))
        for layer in (converted.layer1, converted.layer2, converted.layer3):
            h = layer(h)
    assert [len(store.entries()) for store in stores] == entries
    with torch.no_grad():
        converted(torch.cat([x, x]))
        converted(x[:1])
    (cached,) = converted._fused_resnet.current.bound.store.cached.values()
    assert len(cached.calls) == 3
    kept = {entry.value.weight for store in stores for entry in store.entries() if isinstance(entry.value, Packed)}
    for call, _ in cached.calls.values():
        assert {entry.value.weight for entry in call.entries if entry.value.weight} <= kept


DATA: dict[str, Callable[[Any], tuple[Tensor, Tensor]]] = {
    "a mean of two axes": lambda m: (m.bn1.running_mean, m.bn1.running_mean.data.view(4, 4)),
    "a mean of integers": lambda m: (m.layer1[0].bn2.running_mean, m.layer1[0].bn2.running_mean.data.view(torch.int32)),
    "a bias of two axes": lambda m: (m.fc.bias, m.fc.bias.data.view(2, 5)),
    "a weight of other axes": lambda m: (m.layer1[0].conv1.weight, m.layer1[0].conv1.weight.data.view(16, 16, 9, 1)),
    "a kernel turned": lambda m: (m.layer1[0].conv1.weight, m.layer1[0].conv1.weight.data.transpose(2, 3)),
    "a bias elsewhere": lambda m: (m.fc.bias, m.fc.bias.data + 1),
    "a bias cut": lambda m: (m.fc.bias, m.fc.bias.data[:4]),
}


@pytest.mark.parametrize("described", [True, False], ids=["by DLPack", "by attributes"])
@pytest.mark.parametrize("data", DATA)
def test_data_is_replaced(data: str, described: bool, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most at the same address and of the same length: an error where it is one in PyTorch, and no repeated result."""
    if not described:  # as before torch 2.10
        monkeypatch.setattr(cached, "DLPACK", None)
    original, converted = pair(x)
    (before,) = converted._fused_resnet.current.inlined.store.cached.values()
    with torch.no_grad():
        for model in (original, converted):
            tensor, other = DATA[data](model)
            tensor.requires_grad_(False)
            tensor.data = other
        outcomes = []
        for model in (original, converted):
            try:
                outcomes.append(model(x))
            except (RuntimeError, ValueError, TypeError) as error:
                outcomes.append(error)
    if isinstance(outcomes[0], Tensor):
        assert_same(converted, original, x)
        (after,) = converted._fused_resnet.current.inlined.store.cached.values()
        assert after is not before  # some changes are smaller than what rounding may do
    else:
        assert not isinstance(outcomes[1], Tensor), f"a result where PyTorch raises {outcomes[0]}"


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("whole", [True, False], ids=["network", "block"])  # whose bytes the threads look at together; that one looks at
def test_bytes_that_change_in_any_tensor_are_seen(x: Tensor, threads: int, whole: bool) -> None:
    torch.set_num_threads(threads)
    original, converted = pair(x)
    ours, plain, value = (converted, original, x) if whole else (converted.layer1[1], original.layer1[1], torch.randn(2, 16, 9, 9))
    store = (ours._fused_resnet.current.inlined if whole else ours._fused_resnet.current.bound).store
    tensors = [(t, u) for t, u in zip([*ours.parameters(), *ours.buffers()], [*plain.parameters(), *plain.buffers()], strict=True)]
    with torch.no_grad():
        ours(value)
        for t, u in tensors:
            if not t.is_floating_point():
                continue
            (before,) = store.cached.values()
            t.data.flatten()[-1:] += 0.25  # a view of the memory: no version counts it
            u.data.flatten()[-1:] += 0.25
            assert_same(ours, plain, value)
            (after,) = store.cached.values()
            assert after is not before
            assert_same(ours, plain, value)
            assert [*store.cached.values()] == [after]


def test_a_weight_of_two_layers_that_is_written_between_them(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another thread, when it was packed for the first and not yet for the second: the call is not one to be repeated."""
    original, converted = make(), make()
    for model in (original, converted):
        model.layer1[1].conv2.weight = model.layer1[0].conv1.weight
    fuse_(converted)
    find, found = program.find, []

    def find_and_write(tag: Any, sources: Any, make: Any, store: Any) -> Any:
        entry = find(tag, sources, make, store)
        if sources[0] is converted.layer1[0].conv1.weight:
            found.append(entry)
            if len(found) == 1:
                sources[0].mul_(-1)
        return entry

    monkeypatch.setattr(program, "find", find_and_write)
    with torch.no_grad():
        converted(x)
        assert len(found) == 2
        monkeypatch.undo()
        original.layer1[0].conv1.weight.mul_(-1)
        for _ in range(3):
            assert_same(converted, original, x)


def test_a_decision_that_is_made_anew(x: Tensor) -> None:
    """By a call of the block itself, while its network was not called: the network goes on with what the block keeps then."""
    original, converted = pair(x)
    block = converted.layer1[0]
    h = torch.randn(2, 16, 16, 16)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        handle = hook(block.conv1)
        block(h)
        handle.remove()
        block(h)
        assert_same(converted, original, x)
    nodes = [step.node for part in parts(converted) for step in part.segment.steps]
    (place,) = [node.place for node in nodes if getattr(node, "conv", None) is block.conv1]
    assert place.store() is block._fused_resnet.current.bound.store


def test_a_value_is_given_back_when_nothing_reads_it_any_more(x: Tensor) -> None:
    """What the first native call makes, while the layers behind it run."""
    _, converted = pair(x)
    made: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []
    converted.layer2.register_forward_pre_hook(lambda module, args: made.append(weakref.ref(args[0])))
    converted.layer3.register_forward_pre_hook(lambda module, args: alive.append(made[-1]() is not None))
    with torch.no_grad():
        for _ in range(3):
            converted(x)
    assert native(converted) == [["conv1", "maxpool", "layer1"]]
    assert alive == [False] * 3


def test_shapes_in_turn(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is planned once while there are few; of a thousand, few are kept."""
    _, converted = pair(x)
    bound = converted._fused_resnet.current.inlined
    (cached,) = bound.store.cached.values()
    made: list[int] = []
    run = program.run
    monkeypatch.setattr(program, "run", lambda *a: made.append(1) or run(*a))
    with torch.no_grad():
        for _ in range(5):
            for size in (32, 24, 16, 40):
                converted(torch.randn(1, 3, size, size))
        assert sum(made) == 4
        before = len(bound.plans.kept)
        for i in range(1000):
            converted(torch.randn(1, 3, 16 + i % 40, 16 + i // 40))
    (cached,) = bound.store.cached.values()
    assert len(cached.calls) <= 8
    assert before < len(bound.plans.kept) <= bound.plans.most


def test_shapes_and_weights_in_turn(x: Tensor) -> None:
    """A weight changes between calls of two sizes: neither is repeated with the old one."""
    original, converted = pair(x)
    y = torch.randn(1, 3, 24, 40)
    with torch.no_grad():
        for i in range(6):
            for model in (original, converted):
                model.layer2[0].conv1.weight.mul_(-1)
                model.layer3[1].bn2.running_mean.add_(0.1 * i)
            for some in (x, y, x, y)[: 1 + i % 4]:
                assert_same(converted, original, some)


@pytest.mark.parametrize("what", ["conv1.weight", "bn2.running_var", "bn1.bias"])
def test_layouts_in_turn_that_pack_a_weight_in_two_ways(what: str) -> None:
    """What changes between their calls is seen by both, also where it is not the weight itself."""
    block = randomise(_plain.BasicBlock(64, 64)).eval()
    converted = torch.nn.Sequential(copy.deepcopy(block))
    fuse_(converted)
    inputs = torch.randn(1, 64, 2, 2), torch.randn(2, 64, 28, 28)  # direct convolution, and Winograd
    packings: dict[int, set[object]] = {}
    with torch.no_grad():
        for i in range(8):
            for model in (block, converted[0]):
                model.state_dict(keep_vars=True)[what].mul_(1.5 if i % 2 else 0.5)
            for some in (inputs, inputs[::-1], inputs[:1], inputs[1:])[i % 4]:
                assert_same(converted[0], block, some)
                for number, entries in converted[0]._fused_resnet.current.bound.store.places.items():
                    packings.setdefault(number, set()).update(entries)
    assert [len(found) for found in packings.values()] == [2, 2]


@pytest.mark.parametrize("what", ["conv1.weight", "bn2.running_var"])
def test_a_weight_that_changes_while_another_layout_is_packed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another thread may: the calls of the first layout are of the old weight, and go."""
    block = randomise(_plain.BasicBlock(64, 64)).eval()
    converted = torch.nn.Sequential(copy.deepcopy(block))
    fuse_(converted)
    first, second = torch.randn(1, 64, 8, 8), torch.randn(2, 64, 28, 28)
    pack = program.run

    def change_and_pack(*arguments: Any) -> Any:
        for model in (block, converted[0]):
            model.state_dict(keep_vars=True)[what].mul_(1.5)
        return pack(*arguments)

    with torch.no_grad():
        for some in (first, first):
            assert_same(converted[0], block, some)
        with monkeypatch.context() as patch:
            patch.setattr(program, "run", change_and_pack)
            converted[0](second)
        for some in (first, second, first):
            assert_same(converted[0], block, some)


def test_two_networks_with_the_same_blocks(x: Tensor) -> None:
    """Each is what it is by itself; what is written to a weight is seen by both; the blocks outlive either."""
    original, converted = pair(x)
    other, other_converted = make(), make()
    other.load_state_dict(original.state_dict())
    other.layer2, other_converted.layer2 = original.layer2, converted.layer2
    other_converted.load_state_dict(original.state_dict())
    fuse_(other_converted)
    with torch.no_grad():
        for _ in range(2):
            assert_same(converted, original, x)
            assert_same(other_converted, other, x)
        for model in (original, converted):
            model.layer2[0].conv1.weight.mul_(-1)
        for _ in range(2):
            assert_same(converted, original, x)
            assert_same(other_converted, other, x)
        gone = weakref.ref(converted.layer1)
        del converted, model
        gc.collect()
        assert gone() is None
        assert_same(other_converted, other, x)


def test_a_block_that_is_used_twice(x: Tensor) -> None:
    original, converted = pair(x)
    for model in (original, converted):
        model.layer1[1] = model.layer1[0]
    with torch.no_grad():
        for _ in range(3):
            assert_same(converted, original, x)
    assert native(converted) == [WHOLE]


def test_a_deleted_network_gives_everything_back(x: Tensor) -> None:
    """Without the garbage collector, as a network without conversion does."""
    _, converted = pair(x)
    buffers = [
        weakref.ref(entry.value.buffer)
        for cached in converted._fused_resnet.current.bound.store.cached.values()
        for call, _ in cached.calls.values()
        for entry in call.entries
        if entry.value.buffer is not None
    ]
    assert len(buffers) >= 10
    gc.collect()
    gc.disable()
    try:
        del converted
        assert not any(b() is not None for b in buffers)
    finally:
        gc.enable()


@pytest.mark.parametrize("watched", [False, True], ids=["", "under the profiler"])
def test_a_replaced_block_is_given_back(x: Tensor, watched: bool) -> None:
    """Also by the plans, which may outlive the layers that they were made for."""
    original, converted = pair(x)
    gone: list[weakref.ref[Any]] = []
    with torch.no_grad(), torch.profiler.profile() if watched else contextlib.nullcontext():
        for _ in range(4):
            gone.append(weakref.ref(converted.layer1[1].conv1.weight.untyped_storage()))
            for model in (original, converted):
                model.layer1[1] = copy.deepcopy(original.layer1[1])
            fuse_(converted.layer1)
            for _ in range(2):
                assert_same(converted, original, x)
    gc.collect()
    assert [reference() for reference in gone] == [None] * 4


def test_to_and_clear_give_back_what_a_network_keeps(x: Tensor) -> None:
    original, converted = pair(x)
    store = converted._fused_resnet.current.bound.store
    for forget in (fused_resnet.clear_derived, lambda: converted.to(torch.float32)):
        assert store.cached
        forget()
        assert not store.cached
        assert not store.entries()
        with torch.no_grad():
            for _ in range(2):
                assert_same(converted, original, x)


def test_eight_threads_call_one_network(x: Tensor) -> None:
    _, converted = pair(x)
    inputs = [torch.randn(1 + i % 3, 3, 32, 32) for i in range(8)]
    with torch.no_grad():
        expected = [converted(i) for i in inputs]
    wrong: list[int] = []

    def call(i: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(converted(inputs[i]), expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_two_threads_call_and_change_one_network(x: Tensor) -> None:
    """Each call sees one of the states, or some weights of both, as in PyTorch; afterwards none sees the old one."""
    original, converted = pair(x)
    states = [{k: v * s for k, v in original.state_dict().items()} for s in (1, 0.75)]
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            for state in states:
                converted.load_state_dict(state)
                handle = hook(converted.layer2[1])
                handle.remove()

    thread = threading.Thread(target=change)
    thread.start()
    with torch.no_grad():
        for _ in range(60):
            assert converted(x).shape == (2, 10)
        stop.set()
        thread.join()
        original.load_state_dict(states[1])
        for _ in range(2):
            assert_same(converted, original, x)


def test_a_network_is_dropped_while_it_runs(x: Tensor) -> None:
    _, converted = pair(x)
    with torch.no_grad():
        expected = converted(x)
    models_: list[Any] = [copy.deepcopy(converted) for _ in range(4)]
    outputs: list[Tensor] = []

    def call(model: Any) -> None:
        with torch.no_grad():
            for _ in range(10):
                outputs.append(model(x))

    threads = [threading.Thread(target=call, args=(model,)) for model in models_]
    for thread in threads:
        thread.start()
    models_.clear()
    del converted
    gc.collect()
    for thread in threads:
        thread.join()
    assert len(outputs) == 40
    assert all(torch.equal(y, expected) for y in outputs)


PROCESS = """
import os, sys, copy, torch
from fused_resnet import models, fuse_
torch.manual_seed(0)
torch.set_num_threads(int(sys.argv[1]))
model = models.cifar_resnet(20, width=64).eval()
fuse_(model)
x = torch.randn(3, 3, 32, 32)
with torch.no_grad():
    for _ in range(3):
        y = model(x)
if sys.argv[2] == "fork":
    torch.set_num_threads(1)  # a child of a process that used OpenMP may only run on the thread that it has: PyTorch's own rule
    pid = os.fork()
    if pid == 0:
        with torch.no_grad():
            os._exit(0 if torch.equal(model(x), y) else 1)
    assert os.waitpid(pid, 0)[1] == 0
print(y.double().sum().item(), y.abs().max().item())
"""


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_teams_of_any_size(threads: int) -> None:
    """Smaller than asked (OpenMP's own limit), larger than the machine, and in a child of a process that has used them: the same bits."""

    def output(*arguments: str, **environment: str) -> str:
        command = [sys.executable, "-c", PROCESS, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env={**os.environ, **environment})
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    expected = output("1", "")
    assert output(str(threads), "") == expected
    assert output(str(threads), "", OMP_THREAD_LIMIT=str(max(threads // 2, 1))) == expected
    assert output(str(threads), "fork") == expected
