"""A network as one native call: it gives what its blocks give, and whoever listens to a child is heard.

The changes that each block and the stem must see are in test_stem.py, whose memory it is in test_network_memory.py.
"""

from __future__ import annotations

import copy
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _blocks import assert_same, randomise
from _network import HEAD, WHOLE, Network, hook, make, native, pair, quiet, x
from torch import Tensor, nn

from fused_resnet import _plain, models
from fused_resnet import nn as fnn
from fused_resnet._extension import cpu
from fused_resnet.fusion import fuse_
from fused_resnet.runtime import fused
from fused_resnet.runtime.bound import BoundZeroPad

__all__ = ["quiet", "x"]  # fixtures

pytestmark = pytest.mark.skipif(cpu is None, reason="a network is one native call only with the compiled module")


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


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30])
def test_values_that_are_not_finite(value: float, x: Tensor) -> None:
    """Winograd's differences of them are NaN where the definition has a number: everything is then computed directly."""
    original, converted = pair(x)
    x = x.clone()
    x[0, 1, 5, 7] = value
    with torch.no_grad():
        for _ in range(2):
            ours, eager = converted(x), original(x)
            assert torch.equal(ours.isfinite(), eager.isfinite())
            # The other image is what it always is: rounding differs by 1e-6, a value from the first image by more than any bound.
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
    whole = [WHOLE]
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
    "a container's modules in another order": lambda m: setattr(m.layer1, "_modules", dict(reversed(m.layer1._modules.items()))),
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
    "a head's weight that computes otherwise": lambda m: setattr(m.fc.weight, "__class__", DoubledWeight),
    "another head": lambda m: setattr(m, "fc", nn.Linear(32, 3, bias=False)),
    "two linear layers": lambda m: setattr(m, "fc", nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 2))),
    "no head": lambda m: setattr(m, "fc", nn.Identity()) or m.layer1[0].conv1.weight.data.mul_(2),
    "a hook on the mean": lambda m: hook(m.avgpool),
    "a hook on the head": lambda m: hook(m.fc),
    "a weight that is no Parameter": lambda m: _as_buffer(m.layer2[0].conv2),
}


class DoubledWeight(nn.Parameter):
    """A weight whose linear layer gives twice what others do."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return result * 2 if func is F.linear else result


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


def test_settings_that_are_lists(x: Tensor) -> None:
    """As PyTorch's convolutions take them; and changed in place, which leaves no trace."""
    original, converted = pair(x)
    with torch.no_grad():
        for model in (original, converted):
            model.layer1[0].conv1.padding, model.layer1[0].conv1.dilation = [1, 1], [1, 1]
        for _ in range(3):
            assert_same(converted, original, x)
        for model in (original, converted):
            model.layer1[0].conv1.padding[:] = model.layer1[0].conv1.dilation[:] = [2, 2]
        for _ in range(3):
            assert_same(converted, original, x)


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
        # Each deed changes values by half of them and more, rounding by 1e-6; the twin in float64 has no such deeds.
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
        # With the old weight it would be another vector; rounding differs by 1e-6.
        torch.testing.assert_close(converted(x), original(x), rtol=1e-3, atol=1e-3)


def test_a_head_of_no_outputs(x: Tensor) -> None:
    _, converted = pair(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted.fc = nn.Linear(32, 0)
    with torch.no_grad():
        assert converted(x).shape == (2, 0)


def test_a_child_that_is_none(x: Tensor) -> None:
    """PyTorch's own error."""
    _, converted = pair(x)
    converted.layer1.register_module("nothing", None)
    with torch.no_grad(), pytest.raises(TypeError, match="not callable"):
        converted(x)


@pytest.mark.parametrize("name", ["pad", "linear", "adaptive_avg_pool2d", "max_pool2d"])
def test_patched_functions_are_heard(name: str, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer's own forward would call: patched, the layer is called."""
    original, converted = pair(x)
    before = getattr(F, name)
    monkeypatch.setattr(F, name, lambda *args, **kwargs: before(*args, **kwargs) + 1)
    with torch.no_grad():
        for _ in range(2):
            assert_same(converted, original, x)


def test_a_patched_flatten_is_heard(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    original = make(FlattenedByModule)
    converted = copy.deepcopy(original)
    fuse_(converted)
    with torch.no_grad():
        for _ in range(2):
            assert_same(converted, original, x)
        assert native(converted) == [["conv1", "maxpool", "layer1", "layer2", "layer3", "avgpool", "flatten", "fc"]]
        before = Tensor.flatten
        monkeypatch.setattr(Tensor, "flatten", lambda self, *args: before(self, *args) * 2)
        assert_same(converted, original, x)


class FlattenedByModule(Network):
    def __init__(self) -> None:
        super().__init__()
        self.flatten = nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(self.maxpool(x))))
        result: Tensor = self.fc(self.flatten(self.avgpool(x)))
        return result


def test_the_warning_names_the_caller(x: Tensor) -> None:
    """Whichever way leads to the block that runs unfused."""
    _, converted = pair(x)
    for call in (lambda: converted(x), lambda: converted.layer1(torch.randn(1, 16, 8, 8))):
        block = converted.layer1[0]
        block._fused_resnet.warned = False
        handle = hook(block.bn1)
        with torch.no_grad(), pytest.warns(RuntimeWarning, match="runs unfused") as found:
            call()
        handle.remove()
        with torch.no_grad():
            call()
        assert [warning.filename for warning in found] == [__file__]


def test_grouped_blocks_are_called(x: Tensor) -> None:
    """They are the library's: a network's native calls end before them, once and for all."""
    original = make()
    original.layer2[0].conv1 = nn.Conv2d(16, 24, 3, 2, 1, groups=8, bias=False)
    converted = copy.deepcopy(original)
    fuse_(converted)
    with torch.no_grad():
        for _ in range(2):
            assert_same(converted, original, x)
    assert native(converted) == [["conv1", "maxpool", "layer1"], ["layer3", *HEAD]]
