"""A network's blocks as one native call: what is looked through, what is heard all the same, and what one model's memory is shared with.

The changes that each block and the stem must see are in test_stem.py; here every child can be looked through, so that all of the network
is one call.
"""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from _blocks import assert_same, randomise
from torch import Tensor, nn

import fused_resnet
from fused_resnet import _plain, models
from fused_resnet import nn as fnn
from fused_resnet._extension import cpu
from fused_resnet.fusion import fuse_
from fused_resnet.runtime import fused
from fused_resnet.runtime.bound import BoundCall, BoundZeroPad
from fused_resnet.runtime.program import Packed

pytestmark = pytest.mark.skipif(cpu is None, reason="a network is one native call only with the compiled module")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    fused._warned.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs unfused")
        yield


class Network(nn.Module):
    """A stem, blocks with an identity, a projection (joined to the last convolution, and not) and a zero-padded shortcut, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(_plain.BasicBlock(16, 16), _plain.BasicBlock(16, 16))
        projections = [nn.Sequential(nn.Conv2d(c, 24, 1, stride, bias=False), nn.BatchNorm2d(24)) for c, stride in ((16, 2), (24, 1))]
        self.layer2 = nn.Sequential(_plain.BasicBlock(16, 24, 2, projections[0]), _plain.Bottleneck(24, 6, 1, projections[1]))
        self.layer3 = nn.Sequential(_plain.BasicBlock(24, 32, 2, fnn.ZeroPadShortcut(24, 32, 2)), _plain.BasicBlock(32, 32))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(self.maxpool(x))))
        result: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return result


def make(network: type[nn.Module] = Network) -> Any:
    torch.manual_seed(0)
    model = randomise(network()).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # tiny ones amplify rounding errors until nothing else is seen
            assert module.running_var is not None
            module.running_var.clamp_(min=0.5)
    return model


def pair(x: Tensor) -> tuple[Any, Any]:
    """(original, converted), the converted one called often enough that its calls are repetitions."""
    original = make()
    converted = copy.deepcopy(original)
    assert len(fuse_(converted).fused) == 6
    with torch.no_grad():
        for _ in range(3):
            assert_same(converted, original, x)
    assert native(converted) == [["conv1", "maxpool", "layer1", "layer2", "layer3", *HEAD]]
    return original, converted


@pytest.fixture(params=["contiguous", "channels_last"])
def x(request: pytest.FixtureRequest) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 32, 32).contiguous(memory_format=getattr(torch, request.param.replace("contiguous", "contiguous_format")))


def parts(model: Any) -> Any:
    return model._fused_resnet.current.inlined.parts


def native(model: Any) -> list[list[str]]:
    """The children in each native call that is kept to be repeated."""
    names = {id(module): name for name, module in model.named_modules()}
    bound = model._fused_resnet.current.inlined
    found = []
    for part in bound.parts:
        if part.segment is not None and part.segment.number in bound.store.cached:
            called = [
                node.function if isinstance(node, BoundCall) else getattr(node, "conv", getattr(node, "module", None)) for node in part.nodes
            ]
            found.append([names.get(id(function)) or function.__name__ for function in called])
    return found


HEAD = ("avgpool", "flatten", "fc")


def hook(module: nn.Module) -> Any:
    return module.register_forward_hook(lambda module, args, output: output * 2)


# ---------------------------------------------------------------------------------------------------------------------
# The same values
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_network_gives_what_its_blocks_give(dtype: torch.dtype, threads: int, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, whatever lies between them. (The head, to which somebody listens here, rounds otherwise: it adds in another order.)"""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole, by_blocks = make().to(dtype), make().to(dtype)
        fuse_(whole), fuse_(by_blocks)
        for model in (whole, by_blocks):
            model.avgpool.register_forward_hook(lambda module, args, output: None)
        monkeypatch.setattr(fused, "may_inline", lambda bound: False)
        by_blocks._fused_resnet.current.network = False
        for batch in (1, 2, 5):
            some = torch.cat([x, x, x])[:batch].to(dtype)
            with torch.no_grad():
                assert torch.equal(whole(some), by_blocks(some))
        assert native(whole) == [["conv1", "maxpool", "layer1", "layer2", "layer3"]]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38])
def test_values_that_are_not_finite(value: float, x: Tensor) -> None:
    """Winograd's differences of them are NaN where the definition has a number: everything is then computed directly."""
    original, converted = pair(x)
    x = x.clone()
    x[0, 1, 5, 7] = value
    with torch.no_grad():
        for _ in range(2):
            ours, eager = converted(x), original(x)
            assert torch.equal(ours.isfinite(), eager.isfinite())
            assert torch.equal(ours[1].isnan(), eager[1].isnan())
            torch.testing.assert_close(ours[1], eager[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("batch", [0, 1, 7])
def test_batches(batch: int, x: Tensor) -> None:
    original, converted = pair(x)
    some = torch.cat([x] * 4)[:batch]
    with torch.no_grad():
        for _ in range(2):
            assert_same(converted, original, some)


def test_errors_are_the_modules(x: Tensor) -> None:
    """Of a network that cannot be one call, the layers raise what they raise."""
    _, converted = pair(x)
    with torch.no_grad():
        for wrong in (torch.randn(2, 4, 32, 32), torch.randn(2, 3, 0, 32)):
            with pytest.raises((ValueError, RuntimeError)):
                converted(wrong)
        converted.layer2[0].conv1 = nn.Conv2d(5, 24, 3, 2, 1)
        with pytest.raises((ValueError, RuntimeError)):
            converted(x)


# ---------------------------------------------------------------------------------------------------------------------
# Who listens is heard; the others stay one call
# ---------------------------------------------------------------------------------------------------------------------


def test_a_hook_comes_and_goes(x: Tensor) -> None:
    """On a block, on what holds blocks, inside of a block: what it is on is called, the others are one call as before."""
    original, converted = pair(x)
    whole = [["conv1", "maxpool", "layer1", "layer2", "layer3", *HEAD]]
    for path, left in {
        "layer2": [["conv1", "maxpool", "layer1"], ["layer3", *HEAD]],
        "layer2.1": [["conv1", "maxpool", "layer1"], ["layer3", *HEAD]],
        "layer3.0.bn2": [["conv1", "maxpool", "layer1", "layer2"]],
        "layer1.0": [["layer2", "layer3", *HEAD]],
    }.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a hook inside of a block
            handles = [hook(model.get_submodule(path)) for model in (original, converted)]
            with torch.no_grad():
                for _ in range(3):
                    assert_same(converted, original, x)
            assert native(converted) == left, path
            for handle in handles:
                handle.remove()
            with torch.no_grad():
                for _ in range(2):
                    assert_same(converted, original, x)
            assert native(converted) == whole, path


def _negative(self: Any, x: Tensor) -> Tensor:
    result: Tensor = -type(self).forward(self, x)
    return result


def _backwards(self: Any, x: Tensor) -> Tensor:
    result: Tensor = self[0](x)
    return result


CHANGES: dict[str, Callable[[Any], object]] = {
    "a block's forward on the instance": lambda m: setattr(m.layer2[0], "forward", types.MethodType(_negative, m.layer2[0])),
    "a container's forward": lambda m: setattr(m.layer3, "forward", types.MethodType(_backwards, m.layer3)),
    "a block in training": lambda m: m.layer2[1].train(),
    "a norm in training": lambda m: m.layer3[1].bn1.train(),
    "a block replaced": lambda m: m.layer1.__setitem__(1, nn.ReLU()),
    "a container replaced": lambda m: setattr(m, "layer2", nn.Conv2d(16, 24, 3, 2)),
    "blocks in another order": lambda m: setattr(m, "layer1", nn.Sequential(m.layer1[1], m.layer1[0])),
    "a layer between": lambda m: m.layer1.insert(1, nn.Tanh()),
    "the stride of a zero-padded shortcut": lambda m: [
        setattr(m.layer3[0].downsample, "stride", 1),
        setattr(m.layer3[0].conv1, "stride", (1, 1)),
    ],
    "the channels before": lambda m: [setattr(m.layer3[0].downsample, name, 4) for name in ("before", "after")],
    "the forward of a zero-padded shortcut": lambda m: setattr(m.layer3[0].downsample, "forward", lambda x: torch.zeros(2, 32, 4, 4)),
    "an identity for a projection": lambda m: [setattr(m.layer2[1], "downsample", None)],
    "another network's block": lambda m: m.layer1.__setitem__(0, _changed(m.layer1[0])),
    "the mean's size": lambda m: [setattr(m.avgpool, "output_size", 2), setattr(m, "fc", nn.Identity())],
    "the head's weight": lambda m: m.fc.weight.data.mul_(-1),
    "the head's bias": lambda m: m.fc.bias.data.add_(1),
    "the head's bias is gone": lambda m: setattr(m.fc, "bias", None),
    "the head cut": lambda m: [setattr(m.fc.weight, "data", m.fc.weight.data[:4]), setattr(m.fc.bias, "data", m.fc.bias.data[:4])],
    "the head's weight turned": lambda m: setattr(m.fc.weight, "data", m.fc.weight.data.t().contiguous().t().mul(2)),
    "another head": lambda m: setattr(m, "fc", nn.Linear(32, 3, bias=False)),
    "two linear layers": lambda m: setattr(m, "fc", nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 2))),
    "no head": lambda m: setattr(m, "fc", nn.Identity()) or m.layer1[0].conv1.weight.data.mul_(2),
    "a hook on the mean": lambda m: hook(m.avgpool),
    "a hook on the head": lambda m: hook(m.fc),
    "a weight that is no Parameter": lambda m: _as_buffer(m.layer2[0].conv2),
}


def _changed(block: nn.Module) -> nn.Module:
    other = copy.deepcopy(block)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-0.5)
    return other


def _as_buffer(conv: Any) -> None:
    weight = -conv.weight.detach()
    del conv.weight
    conv.register_buffer("weight", weight)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_inside_is_seen(change: str, x: Tensor) -> None:
    original, converted = pair(x)
    with torch.no_grad():
        before = converted(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model in (original, converted):
            torch.manual_seed(2)
            CHANGES[change](model)
        for _ in range(3):
            state = copy.deepcopy(original.state_dict())
            with torch.no_grad():
                assert_same(converted, original, x)
            original.load_state_dict(state), converted.load_state_dict(state)  # a live norm has moved
        with torch.no_grad():
            after = converted(x)
    assert before.shape != after.shape or not torch.equal(before, after), "the change changes nothing"


class Meddling(nn.Module):
    """Does something to the network that it is a part of, in the middle of a call."""

    def __init__(self) -> None:
        super().__init__()
        self.deeds: list[Callable[[], object]] = []

    def forward(self, x: Tensor) -> Tensor:
        while self.deeds:
            self.deeds.pop()()
        return x + 1


class Meddled(Network):
    def __init__(self) -> None:
        super().__init__()
        self.meddling = Meddling()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer1(self.maxpool(x))
        x = self.layer3(self.layer2(self.meddling(x)))
        result: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return result


DEEDS: dict[str, Callable[[Any], object]] = {
    "a hook on a container": lambda m: hook(m.layer2),
    "a hook on a block": lambda m: hook(m.layer3[1]),
    "a hook inside a block": lambda m: hook(m.layer2[1].conv2),
    "a block replaced": lambda m: m.layer3.__setitem__(1, nn.Tanh()),
    "a weight": lambda m: m.layer2[0].conv1.weight.mul_(-1),
    "a global hook": lambda m: torch.nn.modules.module.register_module_forward_hook(_double_the_second_block),
    "a norm in training": lambda m: m.layer3[0].bn1.train(),
}


def _double_the_second_block(module: nn.Module, args: Any, output: Any) -> Any:
    return output * 2 if isinstance(module, _plain.Bottleneck) else None


@pytest.mark.parametrize("deed", DEEDS)
def test_what_a_child_does_during_the_call(deed: str, x: Tensor) -> None:
    """The children behind it are called as they are then, as in the network's own forward."""
    original = make(Meddled)
    converted = copy.deepcopy(original)
    fuse_(converted)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            assert_same(converted, original, x)
        assert native(converted) == [["conv1", "maxpool", "layer1"], ["layer2", "layer3", *HEAD]]
        outputs = []
        for model in (converted, original):
            handles: list[Any] = []
            model.meddling.deeds.append(lambda model=model, handles=handles: handles.append(DEEDS[deed](model)))
            outputs.append(model(x))
            if deed == "a global hook":
                handles[0].remove()
        torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)
        if deed != "a global hook":
            for _ in range(2):
                torch.testing.assert_close(converted(x), original(x), rtol=1e-3, atol=1e-4)


def test_module_compile_of_a_block(x: Tensor) -> None:
    """It is called, for it is compiled by itself."""
    original, converted = pair(x)
    torch.compiler.reset()
    converted.layer2[0].compile(backend="eager")
    with torch.no_grad():
        for _ in range(2):
            assert_same(converted, original, x)
    assert native(converted) == [["conv1", "maxpool", "layer1"], ["layer3", *HEAD]]


class Inside(nn.Module):
    """A network inside itself, as far as its own blocks go: the container holds itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()
        self.layer1 = nn.Sequential(_plain.BasicBlock(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer1(self.relu(self.bn1(self.conv1(x))))
        return result


def test_recursion(x: Tensor) -> None:
    """What cannot end is PyTorch's RecursionError, not ours."""
    converted = make(Inside)
    fuse_(converted)
    with torch.no_grad():
        converted(x)
        converted.layer1._modules["1"] = converted.layer1
        with pytest.raises(RecursionError):
            converted(x)
        del converted.layer1._modules["1"]
        assert torch.equal(converted(x), converted(x))


def test_zero_padded_shortcuts_as_people_write_them() -> None:
    """An index and F.pad, or one of them: a part of the native call as ``ZeroPadShortcut`` is."""
    x = torch.randn(2, 16, 9, 10)
    for block in (_plain.BasicBlock(16, 32, 2, _plain.PadShortcut(16, 2)), fnn.BasicBlock(16, 21, 2, fnn.ZeroPadShortcut(16, 21, 2, "both"))):
        original: Any = randomise(copy.deepcopy(block)).eval()
        converted = nn.Sequential(copy.deepcopy(original))
        fuse_(converted)
        with torch.no_grad():
            for _ in range(3):
                twin = original if isinstance(original, _plain.BasicBlock) else _unfused(original)
                assert_same(converted[0], twin, x)
        (part,) = converted[0]._fused_resnet.current.bound.parts
        assert any(isinstance(step.node, BoundZeroPad) for step in part.segment.steps)


def _unfused(block: Any) -> nn.Module:
    twin: Any = copy.deepcopy(block)
    twin.forward = twin._plain_forward
    return twin  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------------------------------------
# Whose memory it is
# ---------------------------------------------------------------------------------------------------------------------


def test_a_network_and_its_blocks_share_packed_weights(x: Tensor) -> None:
    """And so do calls of other sizes: nothing is packed twice."""
    _, converted = pair(x)
    stores = [b._fused_resnet.current.bound.store for b in converted.modules() if isinstance(b, fused.FusedModule)]
    entries = [len(store.entries) for store in stores]
    with torch.no_grad():
        h = converted.maxpool(converted.relu(converted.bn1(converted.conv1(x))))
        for layer in (converted.layer1, converted.layer2, converted.layer3):
            h = layer(h)
    assert [len(store.entries) for store in stores] == entries
    with torch.no_grad():
        converted(torch.cat([x, x]))
        converted(x[:1])
    (cached,) = converted._fused_resnet.current.bound.store.cached.values()
    assert len(cached.calls) == 3
    kept = {entry.value.weight for store in stores for entry in store.entries.values() if isinstance(entry.value, Packed)}
    for call, _ in cached.calls.values():
        assert {p.weight for p in call.packed if p.weight} <= kept


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
    stores = [node.store for node in nodes if getattr(node, "conv", None) is block.conv1]
    assert stores == [block._fused_resnet.current.bound.store]


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
    program = fused.execute.__globals__["program"]
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
    assert native(converted) == [["conv1", "maxpool", "layer1", "layer2", "layer3", *HEAD]]


def test_a_deleted_network_gives_everything_back(x: Tensor) -> None:
    """Without the garbage collector, as a network without conversion does."""
    _, converted = pair(x)
    buffers = [
        weakref.ref(p.buffer)
        for store in converted._fused_resnet.current.bound.store.cached.values()
        for call, _ in store.calls.values()
        for p in call.packed
        if p.buffer is not None
    ]
    assert len(buffers) >= 10
    gc.collect()
    gc.disable()
    try:
        del converted
        assert not any(b() is not None for b in buffers)
    finally:
        gc.enable()


def test_to_and_clear_give_back_what_a_network_keeps(x: Tensor) -> None:
    original, converted = pair(x)
    store = converted._fused_resnet.current.bound.store
    for forget in (fused_resnet.clear_derived, lambda: converted.to(torch.float32)):
        assert store.cached
        forget()
        assert not store.cached
        assert not store.entries
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


@pytest.mark.parametrize("depth", [20])
@pytest.mark.parametrize("shortcut", ["A", "B", "C"])
def test_cifar_networks_are_one_call(shortcut: str, depth: int) -> None:
    model: Any = models.cifar_resnet(depth, shortcut=shortcut).eval()
    fuse_(model)
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert native(model) == [["conv1", "layer1", "layer2", "layer3", *HEAD]]


class Doubled(fnn.BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_a_block_with_a_forward_of_its_own_is_called(x: Tensor) -> None:
    model = make()
    block = randomise(Doubled(16, 16)).eval()
    model.layer1[1] = block
    fuse_(model)
    with torch.no_grad():
        model(x)
    assert native(model) == [["layer2", "layer3", *HEAD]]


def test_a_patched_sequential_is_heard(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    original, converted = pair(x)
    before = nn.Sequential.forward
    monkeypatch.setattr(nn.Sequential, "forward", lambda self, input: before(self, input) * 1.5)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of blocks whose projections it changes
        assert_same(converted, original, x)


@pytest.mark.parametrize("where", ["attribute", "parameters"])
def test_a_head_whose_weight_is_elsewhere(where: str, x: Tensor) -> None:
    original, converted = pair(x)
    other = nn.Linear(32, 10)
    for model in (original, converted):
        if where == "attribute":
            object.__setattr__(model.fc, "weight", other.weight.detach())
        else:
            model.fc.__dict__.update(copy.deepcopy(other).__dict__)
    with torch.no_grad():
        torch.testing.assert_close(converted(x), original(x), rtol=1e-3, atol=1e-3)


def test_a_head_of_no_outputs(x: Tensor) -> None:
    _, converted = pair(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted.fc = nn.Linear(32, 0)
    with torch.no_grad():
        assert converted(x).shape == (2, 0)
