"""The analysis of forwards by its parts: sources, and that nothing of the user's runs."""

from __future__ import annotations

import copy
import gc
import importlib.util
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from _blocks import Functional
from _forwards import Parts
from torch import Tensor, nn

from fused_resnet.fusion import fuse_
from fused_resnet.graph import source
from fused_resnet.graph.trace import Refused


def _module_from(path: Path, text: str) -> Any:
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


BLOCK = """
from torch import nn
import torch.nn.functional as F

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return F.relu(self.conv(x) + x)
"""


def test_a_source_that_changed(tmp_path: Path) -> None:
    """An editor saved the file after its import: what stands there is not what runs."""
    module = _module_from(tmp_path / "edited_block.py", BLOCK)
    (tmp_path / "edited_block.py").write_text(BLOCK.replace("+ x", "- x"))
    (entry,) = fuse_(module.Block()).entries
    assert not entry.fused
    assert "the source of Block.forward has changed since it was compiled" in entry.reason


def test_a_source_that_moved(tmp_path: Path) -> None:
    """Lines above were added: the same code, elsewhere."""
    module = _module_from(tmp_path / "moved_block.py", BLOCK)
    (tmp_path / "moved_block.py").write_text("\n\n" + BLOCK)
    (entry,) = fuse_(module.Block()).entries
    assert not entry.fused
    assert "has changed" in entry.reason


def test_no_source() -> None:
    scope: dict[str, Any] = {"__name__": "made"}
    exec(BLOCK, scope)
    (entry,) = fuse_(scope["Block"]()).entries
    assert not entry.fused
    assert entry.reason == "the source of Block.forward cannot be read"


@pytest.mark.smoke
def test_lambdas_of_one_line() -> None:
    pair: Any = (lambda x: x + 1), (lambda x: x + 2), (lambda x: x + 1)
    if sys.version_info < (3, 11):
        with pytest.raises(Refused, match="one of several on its line"):
            source.definition(pair[0])
        return
    columns = [source.definition(f).node.col_offset for f in pair]
    assert len(set(columns)) == 3
    assert columns == sorted(columns)


# --- the analysis ---


class Watched(Parts):
    """Everything through which code of the user's could run says so."""

    ran: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        Watched.ran.append(name)
        return super().__getattr__(name)

    def __bool__(self) -> bool:
        Watched.ran.append("bool")
        return True

    def forward(self, x: Tensor) -> Tensor:
        Watched.ran.append("forward")
        return self.relu(self.main(x) + x)


class Compared:
    def __eq__(self, other: object) -> bool:
        Watched.ran.append("eq")
        return True

    def __hash__(self) -> int:
        Watched.ran.append("hash")
        return 1

    def __bool__(self) -> bool:
        Watched.ran.append("bool")
        return True

    def __len__(self) -> int:
        Watched.ran.append("len")
        return 1


class UsesCompared(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.thing, self.other = Compared(), Compared()

    def forward(self, x: Tensor) -> Tensor:
        if self.thing == self.other:
            return self.relu(self.main(x) + x)
        return x


class TruthOfThing(UsesCompared):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.main(x) + x) if self.thing else x


class KeyThing(UsesCompared):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.main(x) + x) if {"a": 1}.get(self.thing) is None else x  # type: ignore[call-overload]


@pytest.mark.parametrize("block", [Watched, UsesCompared, TruthOfThing, KeyThing])
def test_nothing_of_the_users_runs(block: type[nn.Module]) -> None:
    model = block()
    Watched.ran.clear()
    (entry,) = fuse_(model).entries
    assert not entry.fused
    # Only what looks for the module's children: fuse_ itself, not the analysis.
    assert not [name for name in Watched.ran if name in ("forward", "bool", "eq", "hash", "len")]


class Recursive(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.forward(x) + x


class Yields(Parts):
    def forward(self, x: Tensor) -> Any:
        yield self.relu(self.main(x) + x)


class Endless(Parts):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(1_000_000_000_000):
            pass
        return self.relu(self.main(x) + x)


class Stranger(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.unregistered = [nn.Conv2d(8, 8, 1)]

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.unregistered[0](x) + x)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (Recursive, "its calls are nested too deeply"),
        (Yields, "a generator"),
        (Endless, "too long to be followed"),
        (Stranger, "none of its submodules"),
    ],
)
def test_what_cannot_be_followed(block: type[nn.Module], reason: str) -> None:
    (entry,) = fuse_(block()).entries
    assert not entry.fused
    assert reason in entry.reason


def test_a_converted_block_is_freed_at_once() -> None:
    """Its facts hold its parts, not itself: no collector has to come."""
    gc.collect()
    gc.disable()
    try:
        model = Functional().eval()
        assert fuse_(model).fused
        with torch.no_grad():
            model(torch.randn(1, 8, 6, 6))
        alive = weakref.ref(model)
        del model
        assert alive() is None
    finally:
        gc.enable()


def test_a_copy_has_facts_of_its_own() -> None:
    model: Any = Functional().eval()
    assert fuse_(model).fused
    twin = copy.deepcopy(model)
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(twin(x), expected)
        twin.nb.eps = 0.5
        twin.act = nn.SiLU()
        assert not torch.equal(twin(x), expected)
        assert torch.equal(model(x), expected)
    assert model._fused_resnet.current.holds(model)
    assert not model._fused_resnet.current.holds(twin)


class TwoNames(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.alias = self.conv1

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.alias(x))))) + x)


def test_two_names_after_compilation() -> None:
    """A module that is called by its second name stays what is called when the first becomes another."""
    original = TwoNames().eval()
    converted: Any = copy.deepcopy(original)
    assert fuse_(converted).fused
    torch.compiler.reset()
    compiled = torch.compile(converted, backend="eager")
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        before = compiled(x)
        converted.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        torch.testing.assert_close(compiled(x), before)
        torch.testing.assert_close(compiled(x), original(x))


class Strange(type):
    def __instancecheck__(cls, instance: object) -> bool:
        raise AssertionError("asked")

    @property
    def __mro__(cls) -> Any:  # type: ignore[override]
        raise AssertionError("read")


class Odd(metaclass=Strange):
    pass


class ReadsOdd(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.main(x) + x) if isinstance(x, Odd) else x


class CallsOdd(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.odd = Odd()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.odd(self.main(x)) + x)  # type: ignore[operator]


class Equal(type):
    def __eq__(cls, other: object) -> bool:
        return True

    __hash__ = type.__hash__


class PassesForRelu(metaclass=Equal):
    def __new__(cls, x: Tensor) -> Any:
        return x * 2


class CallsEqual(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = PassesForRelu(self.main(x) + x)
        return y


@pytest.mark.parametrize("block", [ReadsOdd, CallsOdd, CallsEqual])
def test_what_was_not_thought_of_is_refused(block: type[nn.Module]) -> None:
    (entry,) = fuse_(block()).entries
    assert not entry.fused
    assert "line " in entry.reason


class Ranges(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.main(x) + x) if len(range(100_000)) > 50_000 else x


def test_a_long_range_is_not_cut() -> None:
    (entry,) = fuse_(Ranges()).entries
    assert "too long to be followed" in entry.reason


class Register(Parts):
    """A class that keeps a register of its subclasses, and hears of every attribute that is set."""

    subclasses: list[type] = []  # noqa: RUF012
    names: list[str] = []  # noqa: RUF012

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Register.subclasses.append(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        Register.names.append(name)
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.main(x) + x)


def test_a_class_does_not_hear_of_its_conversion() -> None:
    model = Register()
    Register.names.clear()
    assert fuse_(model).fused
    assert type(model) is not Register
    from fused_resnet.fusion import unfuse_

    assert type(unfuse_(model)) is Register
    assert not Register.names
    assert not Register.subclasses


class Labelled(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.key = {"a": 1}, "a"

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.main(x) + x) if self.table[self.key] else x


@pytest.mark.filterwarnings("ignore:.*runs unfused")
def test_a_block_that_runs_unfused_is_freed_at_once() -> None:
    """What refused it holds no frame of the analysis, which would hold the block."""
    gc.collect()
    gc.disable()
    try:
        model = Labelled().eval()
        assert fuse_(model).fused
        model.key = "b"
        with pytest.raises(KeyError):
            model(torch.randn(1, 8, 6, 6))
        alive = weakref.ref(model)
        del model
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("damage", ["weight", "bias", "running_mean"])
def test_a_damaged_layer_is_refused(damage: str) -> None:
    model = Functional()
    part = model.na if damage == "running_mean" else model.b
    delattr(part, damage)
    (entry,) = fuse_(model).entries
    assert not entry.fused
    assert "is missing" in entry.reason


class Doubles(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        return result * 2 if func is torch.nn.functional.batch_norm else result


class SeesRelu(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return torch.sigmoid(args[0]) if func in (torch.relu, torch.nn.functional.relu) else func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:.*ran as its own forward says")
def test_who_listens_to_functions_hears_them() -> None:
    original = Functional().eval()
    converted = copy.deepcopy(original)
    assert fuse_(converted).fused
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        plain = converted(x)
        twice = x.as_subclass(Doubles)
        assert torch.equal(converted(twice).as_subclass(Tensor), original(twice).as_subclass(Tensor))
        with SeesRelu():
            assert torch.equal(converted(x), original(x))
            assert not torch.equal(converted(x), plain)
        with torch.device("cpu"):  # a mode that changes nothing here
            assert torch.equal(converted(x), plain)


@pytest.mark.filterwarnings("ignore:.*runs unfused")
@pytest.mark.parametrize("path", ["na.weight", "na.running_mean"])
def test_a_tensor_that_computes_otherwise_comes_later(path: str) -> None:
    original = Functional().eval()
    converted = copy.deepcopy(original)
    assert fuse_(converted).fused
    x = torch.randn(1, 8, 6, 6)
    where, name = path.split(".")
    with torch.no_grad():
        for _ in range(2):  # the second call repeats the first
            before = converted(x)
        for model in (original, converted):
            norm = model.get_submodule(where)
            place = norm._parameters if name in norm._parameters else norm._buffers
            place[name] = torch.ones(8).as_subclass(Doubles)
        assert torch.equal(*(model(x).as_subclass(Tensor) for model in (original, converted)))
        assert not torch.equal(converted(x).as_subclass(Tensor), before)


def test_two_tensors_of_one_name() -> None:
    """Of which nn.Module's own lookup finds one, by its own order."""
    original = Functional().eval()
    late = copy.deepcopy(original)
    assert fuse_(late).fused
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        late(x), late(x)
        for model in (original, late):
            model.na._parameters["running_mean"] = nn.Parameter(torch.ones(8))
        early = copy.deepcopy(original)
        assert not fuse_(early).fused
        with pytest.warns(RuntimeWarning, match="runs unfused"):
            assert torch.equal(late(x), original(x))


def test_parameters_in_another_dictionary() -> None:
    original = Functional().eval().double()
    converted = copy.deepcopy(original)
    assert fuse_(converted).fused
    x = torch.randn(1, 8, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(2):
            before = converted(x)
        for model in (original, converted):
            model.a._parameters = {"weight": nn.Parameter(torch.ones(8, 8, 3, 3, dtype=torch.float64)), "bias": None}
        y = converted(x)
        torch.testing.assert_close(y, original(x))
        assert not torch.allclose(y, before, rtol=1e-2)
