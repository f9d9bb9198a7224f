"""Conversion refuses what it would change, with the reason; and after a conversion, what changes is noticed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _blocks import Base, ConvNormAct, Functional, Wrapped, assert_same, randomise
from _torchvision import import_timm
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm

from fused_resnet.fusion import FusionEntry, fuse_, unfuse_


def _entry(model: nn.Module) -> FusionEntry:
    (entry,) = fuse_(model).entries
    return entry


def _with(change: Callable[[Any], Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        block = Functional()
        change(block)
        return block

    return make


def _set(**attributes: Any) -> Callable[[], nn.Module]:
    return _with(lambda block: [setattr(block, name, value) for name, value in attributes.items()])


class OwnForward(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class SamePadding(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(F.pad(input, (0, 1, 0, 1)), weight, bias)


class NormAct(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc(x.mean((2, 3), keepdim=True)))


class TwoInputs(Base):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.relu(self.a(x) + y)


class Branch(Base):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return F.relu(self.a(x) + x)
        return x


class TwiceUsed(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return F.relu(self.b(y) + y)


class UsedTwice(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.na(self.a(x)))
        return F.relu(self.na(self.b(y)) + x)


class IntoInput(Base):
    def forward(self, x: Tensor) -> Tensor:
        x += self.b(self.act(self.na(self.a(x))))
        return F.relu(x)


class SeveralInputs(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.b(self.act(self.a(x))) + x) + self.na(x)


class Scaled(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(torch.add(self.b(self.act(self.a(x))), x, alpha=0.5))


class TrainsOtherwise(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.nb(self.b(self.act(self.na(self.a(x)))))
        return F.relu(F.dropout(y, 0.1, self.training) + x)


class Drops(Base):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.drop(self.b(self.act(self.a(x)))) + x)


class PreActivation(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.nb(self.a(self.act(self.na(x)))))) + x


class PreActivationThenReLU(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.b(self.act(self.nb(self.a(self.act(self.na(x)))))) + x)


class ReLUInside(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.relu(self.a(x)) + x)


class Broadcast(Base):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.b(self.act(self.a(x))) + x)


class Tuple(Base):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.relu(self.a(x) + x), x


class Unused(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.act(self.na(self.a(x))))
        F.relu(y, inplace=True)
        return F.relu(y + x)


class ModeFlag(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.na(self.a(x)) if self.training else self.nb(self.a(x))
        return F.relu(y + x)


def _instance_forward(block: Any) -> None:
    original = block.b.forward
    block.b.forward = lambda x: original(x) * 2


# name: (model, what the reason must contain)
REFUSALS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "forward hook": (
        _with(lambda b: b.na.register_forward_hook(lambda m, a, y: y * 2)),
        "na has a forward hook, which a fused block would not call",
    ),
    "pre-hook": (_with(lambda b: b.a.register_forward_pre_hook(lambda m, a: None)), "a has a forward pre-hook"),
    "backward hook": (_with(lambda b: b.b.register_full_backward_hook(lambda m, i, o: None)), "b has a backward hook"),
    "backward pre-hook": (
        _with(lambda b: b.nb.register_full_backward_pre_hook(lambda m, o: None)),
        "nb has a backward pre-hook",
    ),
    "spectral norm": (_with(lambda b: spectral_norm(b.a)), "a has a forward pre-hook"),
    "weight norm": (_with(lambda b: parametrizations.weight_norm(b.a)), "a has a parametrization"),
    "instance forward": (_with(_instance_forward), "the forward of b was replaced on the instance"),
    "own forward": (_set(a=OwnForward(8, 8, 3, padding=1)), "a (OwnForward) overrides how Conv2d computes"),
    "own padding": (_set(a=SamePadding(8, 8, 2)), "a (SamePadding) overrides how Conv2d computes"),
    "own norm": (_set(na=NormAct(8)), "na (NormAct) overrides how BatchNorm2d computes"),
    "padding mode": (
        _set(b=nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")),
        "b has padding_mode='reflect', not 'zeros'",
    ),
    "group norm": (_set(na=nn.GroupNorm(2, 8)), "na (GroupNorm) is not a convolution, a batch norm or a ReLU"),
    "silu": (_set(nb=nn.Sequential(nn.BatchNorm2d(8), nn.SiLU())), "nb.1 (SiLU) is not a convolution"),
    "gate": (_set(nb=nn.Sequential(nn.BatchNorm2d(8), Gate())), "mul in nb.1 (Gate) is not a convolution"),
    "upsampling": (_set(nb=nn.Upsample(scale_factor=1)), "nb (Upsample) is not a convolution"),
    "two inputs": (TwoInputs, ""),
    "branch": (Branch, "its branch depends on a value that only a call knows (line "),
    "twice used": (TwiceUsed, "the result of a (Conv2d) is used 2 times"),
    "used twice": (UsedTwice, "na (BatchNorm2d) is used twice in the block"),
    "into input": (IntoInput, "its addition writes into the shortcut, which may be the block's input"),
    "more behind": (SeveralInputs, "it has no ReLU after the addition"),
    "alpha": (Scaled, "its addition has other arguments than its two operands"),
    "trains otherwise": (TrainsOtherwise, "in training mode, dropout is not a convolution"),
    "dropout": (Drops, "drop (Dropout) is not a convolution"),
    "pre-activation": (PreActivation, "it has no ReLU after the addition"),
    "pre-activation, ReLU": (PreActivationThenReLU, "na (BatchNorm2d) does not follow a convolution"),
    "relu inside": (ReLUInside, "the main path has a ReLU before the addition"),
    "broadcast": (Broadcast, "its addition would broadcast: 1 channels in the shortcut, 8 in the main path"),
    "tuple": (Tuple, "its forward does not return one tensor"),
    "unused in-place": (Unused, "it does not use relu"),
    "mode": (ModeFlag, "its forward does something else in training mode than in eval mode"),
    "lazy": (_set(a=nn.LazyConv2d(8, 3, padding=1)), "a has a forward pre-hook"),
    "tied": (_with(lambda b: setattr(b, "b", b.a)), "a (Conv2d) is used twice in the block"),
}


@pytest.mark.smoke
@pytest.mark.parametrize("name", sorted(REFUSALS))
def test_refusals(name: str) -> None:
    make, reason = REFUSALS[name]
    model = make()
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    report = fuse_(nn.Sequential(model))
    assert not report.fused
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == keys
    if reason:
        (entry,) = report.refused
        assert reason in entry.reason
        assert entry.reason in str(report)
    else:
        assert not report.entries  # what takes two inputs is not taken for a residual block


def test_refused_activation_of_the_end() -> None:
    class Silu(Base):
        def forward(self, x: Tensor) -> Tensor:
            return F.silu(self.nb(self.b(self.act(self.na(self.a(x))))) + x)

    assert _entry(Silu()).reason.startswith("the activation after the addition is silu, not ReLU (line ")


def test_quantised_or_other_tensor_subclass() -> None:
    class Other(Tensor):
        pass

    block = Functional()
    block.a.weight = nn.Parameter(torch.randn(8, 8, 3, 3).as_subclass(Other))
    assert _entry(block).reason.startswith("the weight of a is a Other, not a plain tensor (line ")


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("seresnet50", {}, "mul in se (SEModule) is not a convolution, a batch norm or a ReLU"),
        ("resnetv2_50", {}, "it has no ReLU after the addition"),
        ("resnet18", {"drop_path_rate": 0.5}, "in training mode, "),
        ("resnet18", {"act_layer": nn.SiLU}, "the activation after the addition is act2 (SiLU), not ReLU"),
        ("resnetblur50", {}, "conv2d in aa (BlurPool2d) is not a convolution"),
    ],
)
def test_timm(name: str, arguments: dict[str, Any], reason: str) -> None:
    report = fuse_(import_timm().create_model(name, **arguments))
    assert report.refused
    assert all(reason in entry.reason for entry in report.refused), str(report)
    inside = {"resnetv2_50": "stages.", "seresnet50": "layer"}.get(name, "layer")
    assert all(entry.name.startswith(inside) for entry in report.entries)


# ---------------------------------------------------------------------------------------------------------------------
# Changes after the conversion
# ---------------------------------------------------------------------------------------------------------------------


def _hook(block: Any) -> None:
    block.nb.register_forward_hook(lambda m, a, y: y * 2)


def _replace_with_other(block: Any) -> None:
    block.nb = nn.GroupNorm(2, 8)


def _activation(block: Any) -> None:
    block.body[0].act = nn.SiLU()


def _padding_mode(block: Any) -> None:
    block.a.padding_mode = "circular"
    block.a._reversed_padding_repeated_twice = [1, 1, 1, 1]


class _Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def _parametrize(block: Any) -> None:
    parametrize.register_parametrization(block.a, "weight", _Double())


def _longer(block: Any) -> None:
    block.body.append(nn.Sigmoid())


UNFUSABLE = {
    "hook": (Functional, _hook),
    "group norm": (Functional, _replace_with_other),
    "activation": (Wrapped, _activation),
    "padding mode": (Functional, _padding_mode),
    "parametrization": (Functional, _parametrize),
    "longer": (Wrapped, _longer),
    "instance forward": (Functional, _instance_forward),
}


@pytest.mark.smoke
@pytest.mark.parametrize("name", sorted(UNFUSABLE))
@pytest.mark.parametrize("compiled", [False, True])
def test_changes_that_stop_the_fusion(name: str, compiled: bool) -> None:
    """The block runs as its author wrote it, with one warning, and fuse_ reports it."""
    make, change = UNFUSABLE[name]
    original = randomise(make()).eval()
    converted = copy.deepcopy(original)
    fuse_(converted)
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        converted(x)
        change(original), change(converted)
        torch._dynamo.reset()
        run = torch.compile(converted, backend="eager") if compiled else converted
        with pytest.warns(RuntimeWarning, match="runs unfused"):
            y = run(x)
        assert torch.equal(y, original(x))
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            assert torch.equal(run(x), y)
    assert "runs unfused now" in _entry(converted).reason
    assert type(unfuse_(converted)) is type(original)


def _other_convolution(block: Any) -> None:
    block.b = nn.Conv2d(8, 8, 1).requires_grad_(False)
    torch.nn.init.ones_(block.b.weight)
    torch.nn.init.ones_(block.b.bias)


def _no_norm(block: Any) -> None:
    block.nb = nn.Identity()


def _no_bias(block: Any) -> None:
    block.register_forward_hook(lambda m, a, y: None)
    del block.b.bias
    block.b.bias = None


def _wrapper(block: Any) -> None:
    torch.manual_seed(1)
    block.a = ConvNormAct(8, 8)
    block.eval()


@pytest.mark.parametrize("change", [_other_convolution, _no_norm, _no_bias, _wrapper])
def test_changes_that_keep_the_fusion(change: Callable[[nn.Module], None]) -> None:
    """The block is looked at again and stays fused (conv-norm-relu-norm, of the last, does not)."""
    original = randomise(Functional()).eval()
    converted = copy.deepcopy(original)
    fuse_(converted)
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        converted(x)
        change(original), change(converted)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if change is _wrapper else "error")
            assert_same(converted, original, x)
    assert _entry(converted).fused == (change is not _wrapper)


def test_plain_attributes_steer() -> None:
    class Optional(Base):
        def __init__(self) -> None:
            super().__init__()
            self.scale: float | None = None

        def forward(self, x: Tensor) -> Tensor:
            y = self.nb(self.b(self.act(self.na(self.a(x)))))
            return F.relu((y if self.scale is None else y * self.scale) + x)

    original = Optional().eval()
    converted = copy.deepcopy(original)
    assert _entry(converted).fused
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        assert_same(converted, original, x)
        original.scale = converted.scale = 3.0
        with pytest.warns(RuntimeWarning, match="mul is not a convolution"):
            assert torch.equal(converted(x), original(x))
        original.scale = converted.scale = None
        assert_same(converted, original, x)
        assert not torch.equal(original.a.weight, original.b.weight)


def test_a_removed_hook_lets_the_block_run_fused_again() -> None:
    converted = Functional().eval()
    fuse_(converted)
    handle = converted.na.register_forward_hook(lambda m, a, y: None)
    with pytest.warns(RuntimeWarning, match="na has a forward hook"):
        converted(torch.randn(1, 8, 6, 6))
    assert not _entry(converted).fused
    handle.remove()
    converted(torch.randn(1, 8, 6, 6))
    assert _entry(converted).fused


def test_conversion_under_a_mismatch_of_dtypes_raises_as_eager_does() -> None:
    """A float64 batch norm behind a float32 convolution is an error, folded or not."""
    block = randomise(Functional()).eval()
    block.na.double()
    fuse_(block)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises((TypeError, RuntimeError)):
            block(torch.randn(1, 8, 6, 6))
    block.na.float()
    block(torch.randn(1, 8, 6, 6))
