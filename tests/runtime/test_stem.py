"""The stem of a converted network, and calls that are repeated: every change between two calls is seen by the next one.

Always against the same network without conversion, to which the same is done.
"""

from __future__ import annotations

import copy
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import _blocks
import pytest
import torch
import torch.nn.functional as F
from _blocks import assert_close, assert_same, layers, truth_of
from torch import Tensor, nn

from fused_resnet import _plain, models, testing
from fused_resnet.fusion import fuse_, unfuse_
from fused_resnet.runtime import fused


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    fused._warned.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs unfused")
        yield


def randomise(model: nn.Module) -> nn.Module:
    """Without the variances below eps: over so many layers they amplify rounding errors until nothing else is seen."""
    for module in _blocks.randomise(model).modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_var is not None
            module.running_var.clamp_(min=0.5)
    return model


class Network(nn.Module):
    """A stem, blocks with every kind of shortcut, pooling in between, and a head. 16 channels in front of the projection: with fewer the
    library's own gradient is wrong (``ops.gradients._writes_beyond_its_buffer``)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        projection = nn.Sequential(nn.Conv2d(16, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
        pooled = nn.Sequential(nn.AvgPool2d(2, 2), nn.Conv2d(16, 24, 1, bias=False), nn.BatchNorm2d(24))
        self.layer1 = nn.Sequential(_plain.BasicBlock(16, 16), _plain.BasicBlock(16, 16))
        self.layer2 = nn.Sequential(
            _plain.BasicBlock(16, 16, 2, projection),
            _plain.BasicBlock(16, 24, 2, pooled),
            _plain.BasicBlock(24, 32, 2, _plain.PadShortcut(8, 2)),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(self.maxpool(x)))
        result: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return result


@pytest.fixture(params=["contiguous", "channels_last"])
def x(request: pytest.FixtureRequest) -> Tensor:
    torch.manual_seed(1)
    memory_format = torch.channels_last if request.param == "channels_last" else torch.contiguous_format
    return torch.randn(2, 3, 32, 32).contiguous(memory_format=memory_format)


def pair(x: Tensor) -> tuple[Any, Any]:
    """(original, converted), the converted one called often enough that its calls are repetitions."""
    torch.manual_seed(0)
    original = randomise(Network()).eval()
    converted: Any = copy.deepcopy(original)
    report = fuse_(converted)
    assert len(report.fused) == 5
    assert report.stems == ("",)
    assert "stem of the model" in str(report)
    assert report.to_dict()["stems"] == [""]
    assert report.pools == ("maxpool",)
    with torch.no_grad():
        for _ in range(3):
            assert_same(converted, original, x)
    (cached,) = converted._fused_resnet.current.bound.store.cached.values()
    assert len(cached.calls) == 1, "a call that is not repeated"
    return original, converted


def _write(t: Tensor) -> None:
    with torch.no_grad():
        t.mul_(-1.5).add_(0.1)


def _replace(m: Any, path: str, module: nn.Module) -> None:
    parent, name = m.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
    setattr(parent, name, module)


def _hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: output * 2)


CHANGES: dict[str, Callable[[Any], object]] = {
    "stem weight": lambda m: _write(m.conv1.weight),
    "stem weight, other memory": lambda m: setattr(m.conv1.weight, "data", m.conv1.weight.data * 2),
    "stem parameter replaced": lambda m: setattr(m.conv1, "weight", nn.Parameter(m.conv1.weight.detach() * -1)),
    "stem mean": lambda m: _write(m.bn1.running_mean),
    "stem eps": lambda m: setattr(m.bn1, "eps", 0.5),
    "stem padding": lambda m: setattr(m.conv1, "padding", (0, 0)),
    "stem stride": lambda m: setattr(m.conv1, "stride", (2, 2)),
    "stem convolution replaced": lambda m: _replace(m, "conv1", nn.Conv2d(3, 16, 5, padding=2)),
    "pooling replaced": lambda m: _replace(m, "maxpool", nn.AvgPool2d(2)),
    "pooling changed": lambda m: setattr(m.maxpool, "stride", 1),
    "head replaced": lambda m: _replace(m, "fc", nn.Identity()),
    "head bias": lambda m: _write(m.fc.bias),
    "hook on pooling": lambda m: _hook(m.maxpool),
    "hook on a layer": lambda m: _hook(m.layer1),
    "hook on a block": lambda m: _hook(m.layer1[1]),
    "hook on the network": _hook,
    "a block less": lambda m: m.layer1.__delitem__(0),
    "a block more": lambda m: m.layer1.append(nn.MaxPool2d(2)),
    "block weight": lambda m: _write(m.layer1[0].conv2.weight),
    "projection weight": lambda m: _write(m.layer2[0].downsample[0].weight),
    "projection variance": lambda m: _write(m.layer2[0].downsample[1].running_mean),
    "external shortcut's weight": lambda m: _write(m.layer2[1].downsample[1].weight),
    "external shortcut's mean": lambda m: _write(m.layer2[1].downsample[2].running_mean),
    "external shortcut's pooling": lambda m: setattr(m.layer2[1].downsample[0], "kernel_size", 1),
    "weight beside an external shortcut": lambda m: _write(m.layer2[1].conv1.weight),
    "weight beside a padded shortcut": lambda m: _write(m.layer2[2].conv2.weight),
    "mean beside a padded shortcut": lambda m: _write(m.layer2[2].bn2.running_mean),
    "loaded": lambda m: m.load_state_dict({k: v * 1.25 for k, v in m.state_dict().items()}),
}


@pytest.mark.smoke
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_value_is_given_back_when_nothing_reads_it_any_more(mode: str, x: Tensor) -> None:
    """Whichever way the network runs, and when a call is repeated: else it would need the memory of all its layers at once."""
    _, converted = pair(x)
    converted.train(mode == "train")
    made: list[weakref.ref[Tensor]] = []
    alive: list[list[bool]] = []
    converted.maxpool.register_forward_hook(lambda m, args, output: made.extend([weakref.ref(args[0]), weakref.ref(output)]))
    converted.layer2.register_forward_pre_hook(lambda m, args: alive.append([t() is not None for t in made]))
    with torch.no_grad():
        for _ in range(3):
            made.clear()
            converted(x)
    assert alive == [[False, False]] * 3


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_calls_is_seen(change: str, x: Tensor) -> None:
    original, converted = pair(x)
    with torch.no_grad():
        before = converted(x)
    for model in (original, converted):
        torch.manual_seed(2)
        CHANGES[change](model)
    with torch.no_grad():
        for _ in range(3):
            assert_same(converted, original, x)
        assert before.shape != converted(x).shape or not torch.equal(before, converted(x)), "the change changes nothing"


@pytest.mark.parametrize("path", ["conv1", "bn1", "relu"])
def test_a_hook_inside_the_stem_is_heard(path: str, x: Tensor) -> None:
    """The network then runs as its own forward says, with a warning; its blocks stay fused."""
    original, converted = pair(x)
    heard: list[int] = []
    for model in (original, converted):
        model.get_submodule(path).register_forward_hook(lambda module, args, output: heard.append(1))
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="runs unfused"):
        converted(x)
    with torch.no_grad():
        assert_same(converted, original, x)
    assert len(heard) == 4  # twice in the converted one, once in the original, once in its copy in float64


def test_other_sizes_and_a_live_norm(x: Tensor) -> None:
    original, converted = pair(x)
    with torch.no_grad():
        for size in ((48, 32), (16, 16), (32, 32)):
            assert_same(converted, original, torch.randn(1, 3, *size))
    for part in ("bn1", "layer2.1.downsample.2", "layer2.0.bn1"):
        for model in (original, converted):
            model.get_submodule(part).train()
        double = copy.deepcopy(original).double()
        with torch.no_grad():
            truth, magnitude = truth_of(original, x)
            double(x.double())
            assert_close(converted(x), original(x), truth, layers(original), magnitude)
        for name, value in converted.named_buffers():
            statistic, expected = original.get_buffer(name), double.get_buffer(name)
            if value.is_floating_point():
                assert_close(value, statistic, expected, layers(original))
            else:
                assert torch.equal(value, statistic), name
            statistic.copy_(value)


def test_training(x: Tensor) -> None:
    """Gradients, statistics and a step, after repeated calls without gradients."""
    original, converted = pair(x)
    double = copy.deepcopy(original).double()
    for model in (original, converted, double):
        model.train()
        model(x.to(model.fc.weight.dtype)).square().sum().backward()
    for name, parameter in converted.named_parameters():
        truth = double.get_parameter(name).grad
        ours, eager = ((p.double() - truth).norm() for p in (parameter.grad, original.get_parameter(name).grad))
        assert ours <= 4 * eager + 1e-5 * truth.norm(), name
    torch.optim.SGD(converted.parameters(), 1e-4).step()
    original.load_state_dict(converted.state_dict())
    original.eval(), converted.eval()
    with torch.no_grad():
        assert_same(converted, original, x)


@pytest.mark.smoke
def test_copies_and_back(x: Tensor) -> None:
    original, converted = pair(x)
    assert [*converted.state_dict()] == [*original.state_dict()]
    for twin in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        with torch.no_grad():
            _write(twin.conv1.weight)
            changed = copy.deepcopy(original)
            _write(changed.conv1.weight)
            assert_same(twin, changed, x)
            assert_same(converted, original, x)
    unfuse_(converted)
    assert type(converted) is Network
    assert not hasattr(converted, "_fused_resnet")
    with torch.no_grad():
        assert torch.equal(converted(x), original(x))


def test_compiles_whole(x: Tensor) -> None:
    original, converted = pair(x)
    torch.compiler.reset()
    compiled = torch.compile(converted, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_same(compiled, original, x)


class Nested(Network):
    """Its stem lies deeper: a change there would have to be looked for."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.ModuleDict({"conv": self.conv1, "norm": self.bn1, "act": self.relu})
        del self.conv1, self.bn1, self.relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem["act"](self.stem["norm"](self.stem["conv"](x)))
        x = self.layer2(self.layer1(self.maxpool(x)))
        result: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return result


def test_an_identity_behind_the_stem_is_heard(x: Tensor) -> None:
    """As those who want features do it."""
    network: Any = randomise(Network()).eval()
    network.fc = nn.Identity()
    assert fuse_(network).stems == ("",)
    heard: list[int] = []
    network.fc.register_forward_hook(lambda module, args, output: heard.append(output.shape[1]))
    with torch.no_grad():
        network(x), network(x)
    assert heard == [32, 32]


def test_converted_twice_within_another(x: Tensor) -> None:
    original = nn.Sequential(randomise(Network()).eval(), nn.Linear(10, 3))
    outer = Outer(copy.deepcopy(original[0]), copy.deepcopy(original[1]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = fuse_(outer), fuse_(outer)
    assert first.stems == second.stems == ("body",)
    with torch.no_grad():
        assert_same(outer, original, x)


class Outer(nn.Module):
    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.body(x))
        return result


@pytest.mark.parametrize("joined_first", [True, False])
def test_a_projection_without_a_norm_comes_and_goes(joined_first: bool) -> None:
    """It is a part of the last product, or is not there at all; the same weights serve both."""
    block: Any = _plain.Bottleneck(64, 16)
    for name in ("bn1", "bn2", "bn3"):
        setattr(block, name, nn.Identity())
    projection = nn.Conv2d(64, 64, 1)
    x = torch.randn(2, 64, 9, 9)
    original = copy.deepcopy(block).eval()
    holder: Any = nn.Sequential(block.eval())
    block.downsample = original.downsample = projection if joined_first else None
    assert len(fuse_(holder).fused) == 1
    with torch.no_grad():
        for there in (joined_first, not joined_first, joined_first):
            block.downsample = original.downsample = projection if there else None
            assert_same(block, original, x)


class TwoInputs(Network):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x) * scale


class NoNorm(Network):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.gelu(x))


@pytest.mark.parametrize("network", [TwoInputs, NoNorm, Nested])
def test_a_stem_of_another_kind_stays(network: type[nn.Module], x: Tensor) -> None:
    """The blocks are fused all the same."""
    original = randomise(network()).eval()
    converted = copy.deepcopy(original)
    report = fuse_(converted)
    assert len(report.fused) == 5
    assert report.stems == ()
    assert type(converted) is network
    with torch.no_grad():
        assert_same(converted, original, x)


@pytest.mark.parametrize("shortcut", ["A", "B", "C"])
def test_cifar(shortcut: Any) -> None:
    network = randomise(models.cifar_resnet(8, shortcut=shortcut)).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        once, again = network(x), network(x)
        truth = copy.deepcopy(network).double()(x.double())  # float64: direct convolution, another plan
    assert torch.equal(once, again)
    assert testing.norm_error(once, truth) <= 1e-5
