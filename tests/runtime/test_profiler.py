"""torch.profiler and FlopCounterMode over converted models: the same results, stages as named ranges, and the author's flops."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _blocks import assert_same
from _network import make, pair, quiet, x
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import fused_resnet
import fused_resnet.nn as fnn
from fused_resnet import _plain, _settings
from fused_resnet._extension import cpu
from fused_resnet.fusion import fuse_
from fused_resnet.runtime.stages import _joined

__all__ = ["quiet", "x"]  # fixtures

PREFIX = "fused_resnet: "
needs_kernels = pytest.mark.skipif(cpu is None, reason="a network is one native call only with the compiled module")


def recorded(call: Callable[[], Tensor]) -> tuple[Tensor, list[str]]:
    """The result of a call under the profiler, and the names of our ranges in the order in which they began."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        y = call()
    events = sorted([e for e in profiler.events() if e.name.startswith(PREFIX)], key=lambda e: e.time_range.start)
    for before, after in itertools.pairwise(events):
        assert before.time_range.end <= after.time_range.start, "ranges of one call overlap"
    return y, [e.name.removeprefix(PREFIX) for e in events]


def layers_in(names: list[str]) -> list[str]:
    """Each layer that is named, in order."""
    found = []
    for name in names:
        parent, bracket, inner = name.partition("(")
        found += [parent + one for one in inner.rstrip(")").split(", ")] if bracket else name.split(", ")
    return found


LAYERS = [
    *("conv1", "maxpool", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2"),
    *("layer2.0.downsample.0", "layer2.0.conv1", "layer2.0.conv2"),
    *("layer2.1.downsample.0", "layer2.1.conv1", "layer2.1.conv2", "layer2.1.conv3"),
    *("a zero-padded shortcut", "layer3.0.conv1", "layer3.0.conv2", "layer3.1.conv1", "layer3.1.conv2"),
    *("the mean of each channel", "fc"),
]


@needs_kernels
@pytest.mark.smoke
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2, 9])
def test_a_networks_stages_are_ranges(batch: int, threads: int) -> None:
    """Each layer is in one of them; the result is that of a call that nobody watches, bit for bit, before and after."""
    torch.set_num_threads(threads)
    converted = make()
    fuse_(converted)
    value = torch.randn(batch, 3, 32, 32)
    with torch.no_grad():
        watched_first, names = recorded(lambda: converted(value))
        expected = converted(value)
        again, same = recorded(lambda: converted(value))
    assert torch.equal(watched_first, expected)
    assert torch.equal(again, expected)
    assert names == same
    found = [layer.rpartition(".")[2] if "zero-padded" in layer else layer for layer in layers_in(names)]
    assert sorted(found) == sorted(LAYERS)
    if batch == 1:  # nothing goes depth first: a range is one layer, or one and the projection that was joined to it
        assert [layer for layer in found if "downsample" not in layer] == [layer for layer in LAYERS if "downsample" not in layer]


@needs_kernels
def test_a_block_by_itself(x: Tensor) -> None:
    _, converted = pair(x)
    value = torch.randn(2, 16, 9, 9)
    with torch.no_grad():
        expected = converted.layer1[0](value)
        y, names = recorded(lambda: converted.layer1[0](value))
    assert torch.equal(y, expected)
    assert layers_in(names) == ["conv1", "conv2"]


@needs_kernels
def test_a_stage_of_several_phases() -> None:
    """Winograd over one tile, on two threads: the whole map is transformed, then multiplied, within one range."""
    torch.set_num_threads(2)
    _settings.change(algorithm="winograd4")
    block: Any = fnn.BasicBlock(256, 256).eval()
    value = torch.randn(1, 256, 4, 4)
    with torch.no_grad():
        expected = block(value)
        y, names = recorded(lambda: block(value))
    (cached,) = block._fused_resnet.current.bound.store.cached.values()
    ((call, _),) = cached.calls.values()
    assert all("the input transformed first" in what for _, what in call.plan.program.stages())
    assert torch.equal(y, expected)
    assert layers_in(names) == ["conv1", "conv2"]


@needs_kernels
def test_where_a_value_is_not_finite(x: Tensor) -> None:
    """What Winograd cannot compute is computed directly, and seen: the layers until then, and all of them again."""
    _, converted = pair(x)
    value = x.clone()
    value[0, 0, 3, 3] = float("nan")
    with torch.no_grad():
        expected = converted(value)
        y, names = recorded(lambda: converted(value))
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(), expected.nan_to_num())
    assert set(layers_in(names)) >= {"conv1", "fc"}


@needs_kernels
def test_a_hook_splits_the_ranges(x: Tensor) -> None:
    """The block with a hook runs by itself, and its neighbours stay stages."""
    _, converted = pair(x)
    seen: list[int] = []
    converted.layer2[0].conv1.register_forward_hook(lambda *arguments: seen.append(1))
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="unfused"):
        y, names = recorded(lambda: converted(x))
    with torch.no_grad():
        assert torch.equal(y, converted(x))
    assert len(seen) == 2
    assert {"conv1", "maxpool", "layer1.0.conv1", "fc"} <= set(layers_in(names))
    assert not [layer for layer in layers_in(names) if layer.startswith("layer2.0.")]


@needs_kernels
def test_weights_that_change_under_the_profiler(x: Tensor) -> None:
    original, converted = pair(x)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]):
        for _ in range(3):
            for model in (original, converted):
                model.layer1[0].conv1.weight.mul_(-1)
            assert_same(converted, original, x)
    with torch.no_grad():
        assert_same(converted, original, x)


@needs_kernels
@pytest.mark.parametrize("how", ["native", "a gradient in the middle", "groups"])
def test_a_pooled_shortcut_is_made_once(how: str) -> None:
    """It is made before the native call, and not again where that is refused: for what can be known before."""
    original: Any = _plain.Bottleneck(16, 8, 2, nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32))).eval()
    if how == "groups":
        original.conv2 = nn.Conv2d(8, 8, 3, 2, 1, groups=2, bias=False)
    converted = copy.deepcopy(nn.Sequential(original))
    assert fuse_(converted).fused
    value = torch.randn(2, 16, 12, 12)
    if how == "a gradient in the middle":
        for model in (original, converted[0]):
            model.requires_grad_(False).conv2.weight.requires_grad_(True)
    with torch.set_grad_enabled(how == "a gradient in the middle"):
        for _ in range(2):
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                converted(value)
            assert [e.name for e in profiler.events()].count("aten::avg_pool2d") == 1
            assert any(e.name.startswith(PREFIX) for e in profiler.events()) == (how == "native")
    with torch.no_grad():
        assert_same(converted[0], original, value)


def test_gradients_under_the_profiler(x: Tensor) -> None:
    """Node by node, as without it."""
    _, converted = pair(x)
    plain = copy.deepcopy(converted)
    for model in (converted, plain):
        model.requires_grad_(True)
    y, _ = recorded(lambda: converted(x))
    y.sum().backward()
    plain(x).sum().backward()
    for p, q in zip(converted.parameters(), plain.parameters(), strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("training", [False, True])
def test_flops_are_the_authors(training: bool) -> None:
    """FlopCounterMode counts a converted network as what its author wrote, forward and backward."""
    original: Any = _plain.ResNet(_plain.Bottleneck, [1, 1, 1, 1], classes=10).train(training)
    converted = copy.deepcopy(original)
    fuse_(converted)
    value = torch.randn(2, 3, 64, 64)
    counts = []
    for model in (original, converted):
        with torch.set_grad_enabled(training), FlopCounterMode(display=False) as counter:
            y = model(value)
            forward = counter.get_total_flops()
            if training:
                y.sum().backward()
        counts.append((forward, counter.get_total_flops()))
    assert counts[0] == counts[1]
    assert counts[0][0] > 0


def test_names_of_several_layers() -> None:
    assert _joined(["conv1"]) == "conv1"
    assert _joined(["conv1", "fc"]) == "conv1, fc"
    assert _joined(["layer1.0.conv1", "layer1.0.conv2"]) == "layer1.0.(conv1, conv2)"
    assert _joined(["layer1.0.downsample.0", "layer1.0.conv2"]) == "layer1.0.(downsample.0, conv2)"
    assert _joined(["a zero-padded shortcut", "layer1.0.conv1"]) == "a zero-padded shortcut, layer1.0.conv1"
    assert _joined(["layer1.0.conv1", "layer2.0.conv1"]) == "layer1.0.conv1, layer2.0.conv1"


def test_errors_under_the_profiler() -> None:
    """Those of an unwatched call."""
    value, weight = torch.randn(1, 4, 5, 5), torch.randn(6, 3, 3, 3)
    with pytest.raises(ValueError, match="channels"), profile(activities=[ProfilerActivity.CPU]):
        fused_resnet.conv_bias_add_relu(value, weight)
