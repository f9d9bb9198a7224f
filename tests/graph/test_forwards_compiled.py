"""Changes after torch.compile: what is compiled again without conversion is compiled again with it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import _forwards_reads
import pytest
import torch
from _blocks import randomise
from _compared import apply, differences, quiet, seed
from _forwards import FORWARDS, Once, Parts
from torch import Tensor, nn

from fused_resnet.fusion import fuse_

__all__ = ["quiet"]  # a fixture


def _doubled(x: Tensor) -> Tensor:
    return x * 2


def _closed_over() -> tuple[Callable[[], Any], Callable[[Any], None]]:
    inside: Any = None

    def read() -> Any:
        return inside

    def write(value: Any) -> None:
        nonlocal inside
        inside = value

    return read, write


_read, _write = _closed_over()


_OPTIONS = {"triple": False}


def _scaled(x: Tensor, scale: float = 1, options: dict[str, bool] = _OPTIONS, *, more: float = 1) -> Tensor:
    if scale != 1 or more != 1:
        x = x * scale * more
    return x * 3 if options["triple"] else x


class Same(Parts):
    def same(self, x: Tensor, times: int = 1) -> Tensor:
        return x if times == 1 else x * times


class Steered(Same):
    def __init__(self) -> None:
        super().__init__()
        self.flag, self.act, self.options = False, torch.relu, {"double": False}
        self.body = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.list, self.several = nn.ModuleList([nn.ReLU()]), [0]

    @property
    def halved(self) -> bool:
        return False

    def forward(self, x: Tensor) -> Tensor:
        y = self.same(_scaled(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))))
        if self.halved:
            y = y / 2
        if self.flag or self.options["double"] or _forwards_reads.DOUBLE or hasattr(self, "late") or _read():
            y = y * 2
        if self.options.get("more") or 1 in self.several or len(self.list) > 1:
            y = y * 3
        return self.list[0](self.body(x) + x) if self.options is None else self.relu(y + x)


COMPILED: dict[str, Any] = {
    "flag": lambda m: setattr(m, "flag", True),
    "function": lambda m: setattr(m, "act", torch.sigmoid),
    "module": lambda m: setattr(m, "relu", nn.SiLU()),
    "class": lambda m: setattr(m.relu, "__class__", nn.SiLU),
    "entry": lambda m: m.options.update(double=True),
    "late": lambda m: setattr(m, "late", 1),
    "padding": FORWARDS["Plain"].changes["padding"],
    "eps": lambda m: setattr(m.bn1, "eps", 0.5),
    "norm": lambda m: setattr(m, "bn2", nn.Identity()),
    "more": lambda m: m.options.update(more=True),
    "item": lambda m: m.several.append(1),
    "list": lambda m: m.list.append(nn.ReLU()),
    "closure": Once(lambda patch: _write(True)),
    "default": Once(lambda patch: patch.setattr(_scaled, "__defaults__", (2, _OPTIONS))),
    "item of a default": Once(lambda patch: patch.setitem(_OPTIONS, "triple", True)),
    "keyword default": Once(lambda patch: patch.setattr(_scaled, "__kwdefaults__", {"more": 2})),
    "default of a method": Once(lambda patch: patch.setattr(Same.same, "__defaults__", (2,))),
    "method of the instance": lambda m: setattr(m, "same", _doubled),
    "property": Once(lambda patch: patch.setattr(Steered, "halved", property(lambda self: True))),
    "global": Once(lambda patch: patch.setattr(_forwards_reads, "DOUBLE", True)),
}


@pytest.mark.parametrize("change", COMPILED)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_change_after_compilation(change: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled again without conversion is compiled again with it."""
    seed()
    _write(None)
    original = randomise(Steered()).double().eval()
    converted = copy.deepcopy(original)
    assert fuse_(converted).fused
    torch.compiler.reset()
    models = [torch.compile(model, backend=backend, fullgraph=True) for model in (original, converted)]
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        assert not differences(models[1](x), models[0](x))
        before = models[0](x)
        apply(COMPILED[change], [original, converted], monkeypatch)
        theirs, ours = models[0](x), models[1](x)
    assert not differences(theirs, original(x).detach()), "the twin was not compiled again"
    assert not torch.equal(theirs, before)
    assert not differences(ours, theirs)


class ByMode(Parts):
    """Reads a property that only training has."""

    @property
    def factor(self) -> float:
        return 1.0 if self.training else self.not_there

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.factor != 1.0:
            x = x * 2
        return self.relu(self.main(x) + x)


def test_a_property_that_only_training_has() -> None:
    """A property is guarded, and not run where the forward does not read it."""
    original = ByMode().double().eval()
    converted = copy.deepcopy(original)
    assert fuse_(converted).fused
    torch.compiler.reset()
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        assert not differences(torch.compile(converted, backend="eager", fullgraph=True)(x), original(x))
        assert not differences(torch.export.export(converted, (x,)).module()(x), original(x))


class Chained(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.list = nn.ModuleList([nn.Conv2d(8, 8, 1), nn.ReLU()])
        self.last = nn.ModuleDict({"act": nn.ReLU()})

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.list:
            y = layer(y)
        return self.last["act"](self.body(y) + x)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.body.__setitem__(1, nn.SiLU()),
        lambda m: m.body.append(nn.Sigmoid()),
        lambda m: m.list.__setitem__(1, nn.SiLU()),
        lambda m: m.list.append(nn.Sigmoid()),
        lambda m: m.list.__delitem__(1),
        lambda m: m.last.update({"act": nn.SiLU()}),
    ],
)
def test_a_container_changed_after_compilation(change: Callable[[Any], Any]) -> None:
    seed()
    original = Chained().double().eval()
    converted = copy.deepcopy(original)
    assert fuse_(converted).fused
    torch.compiler.reset()
    models = [torch.compile(model, backend="eager", fullgraph=True) for model in (original, converted)]
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        before = models[0](x)
        assert not differences(models[1](x), before)
        change(original), change(converted)
        theirs, ours = models[0](x), models[1](x)
    assert not torch.equal(theirs, before)
    assert not differences(ours, theirs)


class NamedAsOurs(Parts):
    def forward(self, state: Tensor) -> Tensor:
        return self.relu(self.main(state) + state)


def test_an_input_named_as_a_variable_of_ours() -> None:
    original = NamedAsOurs().eval()
    converted = copy.deepcopy(original)
    assert fuse_(converted).fused
    torch.compiler.reset()
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        for model in (converted, torch.compile(converted, backend="eager", fullgraph=True)):
            torch.testing.assert_close(model(state=x), original(x))
