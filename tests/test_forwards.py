"""Hand-written forwards, by kind: converted, each does what its unconverted twin does, before and after changes.

Values, gradients, buffers, what a forward writes, prints and draws, all in float64, where no rounding decides a ReLU or a coin.
"""

from __future__ import annotations

import ast
import copy
import inspect
import os
import random
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import _forwards_found
import _forwards_python
import _forwards_reads
import _forwards_refused
import _forwards_state
import _forwards_usual
import _forwards_world
import numpy as np
import pytest
import torch
from _blocks import randomise
from _forwards import FORWARDS, WORLD, Once, Parts
from torch import Tensor, nn

from fused_resnet.fusion import FusionEntry, fuse_
from fused_resnet.runtime import fused

# Two convolutions of 72 products, each sum rounded as often, folding with three roundings more: some 2**8 half units. Statistics of unit
# size amplify little: measured, at most 2e-15.
BOUND = 1e-12
MODES = ("eval", "train", "mixed")
# Refused for a graph as a whole: the line is where it ends.
WITHOUT_LINE = {"NoGradBlock", "Noisy", "ReluOfInput", "ByMode"}
FILES = (_forwards_found, _forwards_refused, _forwards_reads, _forwards_python, _forwards_usual, _forwards_state, _forwards_world)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Changed blocks may run as they are written, and say so."""
    fused._warned.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*runs unfused")
        warnings.filterwarnings("ignore", message=".*ran as its own forward says")
        warnings.filterwarnings("ignore", message=".*does not have any parameters with require")
        yield


def _seed() -> None:
    torch.manual_seed(3), random.seed(3), np.random.seed(3)


def _pair(name: str) -> tuple[Any, Any, FusionEntry]:
    """(original, converted, its entry) with statistics of unit size."""
    _seed()
    original = randomise(FORWARDS[name].make()).double()
    for module in original.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_var is not None
            module.running_var.clamp_(min=0.5)
    holder = nn.Sequential(copy.deepcopy(original))
    (entry,) = fuse_(holder).entries
    return original, holder[0], entry


def _written(model: nn.Module) -> dict[str, Any]:
    """Everything that a forward may have written into its modules."""
    found: dict[str, Any] = dict(model.state_dict(keep_vars=True).items())
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            if name not in ("_fused_resnet", "_modules", "_parameters", "_buffers", "training") and "_hooks" not in name:
                found[f"{path}:{name}"] = value
    return found


def _run(model: nn.Module, mode: str, grad: bool, capsys: Any) -> dict[str, Any]:
    """All that can be seen of two calls."""
    model.train(mode != "eval")
    if mode == "mixed":
        for part in ("relu", "bn2", "drop"):
            getattr(model, part, nn.Identity()).eval()
    _seed()
    before = WORLD["calls"], _forwards_refused.CALLS
    seen: dict[str, Any] = {}
    for call in range(2):
        x = torch.randn(3, 8, 6, 6, dtype=torch.float64)
        with torch.set_grad_enabled(grad):
            leaf = x.clone().requires_grad_(grad)
            model.zero_grad(set_to_none=True)
            try:
                y = model(leaf)
                if grad and y.requires_grad:
                    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
                seen[f"output {call}"], seen[f"requires_grad {call}"] = y.detach(), y.requires_grad
            except Exception as error:
                seen[f"error {call}"] = type(error)
        seen[f"input {call}"], seen[f"input's gradient {call}"] = leaf.detach(), leaf.grad
        seen |= {f"gradient {call} of {name}": p.grad for name, p in model.named_parameters()}
    seen["coins"] = torch.get_rng_state(), repr(random.getstate()), repr(np.random.get_state())
    seen["world"] = WORLD["calls"] - before[0], _forwards_refused.CALLS - before[1]
    seen["printed"] = capsys.readouterr().out
    return seen | _written(model)


def _differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two findings differ."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype or a.requires_grad != b.requires_grad:
            return [where]
        if not a.is_floating_point():
            return [] if torch.equal(a, b) else [where]
        scale = max(1.0, float(b.detach().abs().max())) if b.numel() else 1.0
        same = torch.equal(a.isnan(), b.isnan()) and bool(((a - b).detach().abs().nan_to_num() <= BOUND * scale).all())
        return [] if same else [where]
    if isinstance(a, dict) and isinstance(b, dict):
        if [*a] != [*b]:
            return [f"{where}: names {sorted(a.keys() ^ b.keys())}"]
        return [d for key in a for d in _differences(a[key], b[key], f"{where} {key}")]
    if isinstance(a, (list, tuple)) and type(a) is type(b) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in _differences(x, y, f"{where} {i}")]
    if isinstance(a, torch.Generator) and isinstance(b, torch.Generator):
        return [] if torch.equal(a.get_state(), b.get_state()) else [where]
    plain = (bool, int, float, str, type, type(None))
    if isinstance(a, plain) or isinstance(b, plain):
        return [] if type(a) is type(b) and a == b else [where]
    return [] if type(a) is type(b) else [where]  # functions, modules: copies of one another


def _compare(original: nn.Module, converted: nn.Module, capsys: Any) -> list[str]:
    found: list[str] = []
    for mode in MODES:
        for grad in (False, True):
            theirs, ours = (_run(model, mode, grad, capsys) for model in (original, converted))
            found += [f"{mode}, grad {grad}:{where}" for where in _differences(ours, theirs)]
    return found


def _apply(change: Any, models: list[nn.Module], patch: pytest.MonkeyPatch) -> None:
    if isinstance(change, Once):
        change.change(patch)
        return
    for model in models:
        torch.manual_seed(5)
        change(model)


@pytest.mark.parametrize("name", sorted(FORWARDS))
def test_a_forward(name: str, capsys: Any) -> None:
    """Before any change."""
    original, converted, entry = _pair(name)
    if FORWARDS[name].fuses is not None:
        assert entry.fused == FORWARDS[name].fuses, entry.reason
    assert not _differences(_written(converted), _written(original))
    assert not _compare(original, converted, capsys)


def _items(value: Any) -> list[int]:
    return [id(v) for v in (value.values() if isinstance(value, dict) else value)] if isinstance(value, (dict, list, set)) else []


def _snapshot(model: nn.Module) -> dict[str, Any]:
    """Bit for bit what a model is, and the world around it."""
    found: dict[str, Any] = {"keys": [*model.state_dict()]}
    for path, module in model.named_modules():
        attributes = {n: (id(v), _items(v)) for n, v in module.__dict__.items() if n != "_fused_resnet"}
        found[f"{path}: attributes"] = attributes
        found[f"{path}: class"] = getattr(type(module), "_fused_original", None) or type(module)
        for cls in found[f"{path}: class"].__mro__:
            found[f"class {cls}"] = {n: (id(v), _items(v)) for n, v in vars(cls).items()}
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        found[name] = id(t), t._version, t.data_ptr(), t.requires_grad, t.grad, t.detach().numpy().tobytes()
    for file in FILES:
        found[file.__name__] = {n: (id(v), _items(v)) for n, v in vars(file).items()}
    found["coins"] = torch.get_rng_state().numpy().tobytes(), random.getstate(), repr(np.random.get_state())
    found["world"] = torch.is_grad_enabled(), torch.get_default_dtype(), dict(os.environ), dict(WORLD)
    return found


def _traces(name: str, convert: Callable[[nn.Module], Any], capsys: Any) -> list[str]:
    """What ``convert`` leaves behind, apart from what it keeps in a converted module under its own name."""
    _seed()
    model = nn.Sequential(randomise(FORWARDS[name].make()).double())
    before = _snapshot(model)
    capsys.readouterr()
    convert(model)
    after = _snapshot(model)
    printed = capsys.readouterr()
    return [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)] + ["printed"] * any(printed)


@pytest.mark.smoke
@pytest.mark.parametrize("name", sorted(FORWARDS))
def test_fuse_leaves_no_trace(name: str, capsys: Any) -> None:
    assert not _traces(name, fuse_, capsys)


TRACES: dict[str, Callable[[Any], Any]] = {
    "coin": lambda m: torch.rand(1),
    "python's coin": lambda m: random.random(),
    "numpy's coin": lambda m: np.random.rand(),
    "bits": lambda m: m[0].conv1.weight.data.mul_(1 + 1e-15),
    "version": lambda m: m[0].conv1.weight.detach().add_(0),
    "gradient": lambda m: setattr(m[0].conv1.weight, "grad", torch.zeros_like(m[0].conv1.weight)),
    "attribute": lambda m: setattr(m[0].bn1, "seen", True),
    "mode": lambda m: m[0].bn1.eval(),
    "hook": lambda m: m[0].bn1.register_forward_hook(lambda module, args, output: None),
    "entry": lambda m: m[0].seen.append(1),
    "global": lambda m: WORLD.update(calls=WORLD["calls"] + 1),
    "print": lambda m: print("fused"),
    "order": lambda m: m[0]._modules.update(conv1=m[0]._modules.pop("conv1")),
}


@pytest.mark.smoke
@pytest.mark.parametrize("trace", TRACES)
def test_a_planted_trace_is_found(trace: str, capsys: Any) -> None:
    assert _traces("Appends", lambda model: (fuse_(model), TRACES[trace](model)), capsys)


@pytest.mark.parametrize(("name", "change"), [(n, c) for n in sorted(FORWARDS) for c in FORWARDS[n].changes])
@pytest.mark.parametrize("called", [False, True])
def test_a_change(name: str, change: str, called: bool, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a change; ``called``: with calls before it."""
    original, converted, entry = _pair(name)
    if called:
        assert not _compare(original, converted, capsys)
    _apply(FORWARDS[name].changes[change], [original, converted], monkeypatch)
    assert not _compare(original, converted, capsys)
    if entry.fused and change in FORWARDS[name].keeps:
        assert converted._fused_resnet.current.bound is not None, converted._fused_resnet.current.refusal


def _reachable(model: nn.Module) -> set[tuple[str, int]]:
    """(file, line) of a model's own classes and of all that they name."""
    spans: dict[tuple[str, str], tuple[int, int, str]] = {}
    for path in Path(__file__).parent.glob("_forwards*.py"):
        lines = path.read_text().splitlines()
        for node in ast.parse("\n".join(lines)).body:
            names = [t.id for t in node.targets if isinstance(t, ast.Name)] if isinstance(node, ast.Assign) else []
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                names = [node.name]
            assert node.end_lineno is not None
            first = min([node.lineno, *[d.lineno for d in getattr(node, "decorator_list", [])]])
            spans |= {(path.name, n): (first, node.end_lineno, "\n".join(lines[first - 1 : node.end_lineno])) for n in names}
    own = {cls for module in model.modules() for cls in type(module).__mro__ if cls.__module__.startswith("_forwards")}
    todo, found = [(f"{cls.__module__}.py", cls.__name__) for cls in own], set()
    while todo:
        key = todo.pop()
        if key in spans and key not in found:
            found.add(key)
            todo += [(key[0], word) for word in re.findall(r"\w+", spans[key][2])]
    return {(file, line) for file, name in found for line in range(spans[file, name][0], spans[file, name][1] + 1)}


@pytest.mark.parametrize("name", [n for n in sorted(FORWARDS) if not FORWARDS[n].fuses])
def test_a_refusal_names_its_line(name: str) -> None:
    """A line of the block's classes or of what they call; where it is marked, that one."""
    original, _, entry = _pair(name)
    if entry.fused:
        return
    found = re.search(r" \(line (\d+) of (\S+\.py)\)$", entry.reason)
    assert found, entry.reason
    assert (found[2], int(found[1])) in _reachable(original), entry.reason
    if name not in WITHOUT_LINE and FORWARDS[name].fuses is False:
        line = (Path(__file__).parent / found[2]).read_text().splitlines()[int(found[1]) - 1]
        assert line.endswith(" here"), (entry.reason, line)


def test_a_fresh_sentence_is_short() -> None:
    """A sentence is one line, and not the source again."""
    for name in FORWARDS:
        reason = _pair(name)[2].reason
        assert "\n" not in reason
        assert len(reason) < 200, reason


def test_the_table(capsys: Any) -> None:
    """At least sixty forwards; the table, for those who want to see it (pytest -s)."""
    rows = []
    for name, case in FORWARDS.items():
        entry = _pair(name)[2]
        rows.append(f"{case.kind:<20} {name:<22} {'fused' if entry.fused else 'refused':<8} {entry.reason}")
    with capsys.disabled():
        print("\n" + "\n".join(rows))
    assert len(rows) >= 60
    assert all(any(inspect.getmodule(case.make) is file for file in FILES) for case in FORWARDS.values())


# --- stems ---


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.layer = nn.Sequential(_forwards_usual.Torchvision())
        self.scale: Any = None
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv(x)))
        if self.scale is not None:
            x = x * self.scale
        return self.layer(x)


class FrozenStem(Network):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.relu(self.norm(self.conv(x)))
        return self.layer(x)


class CountedStem(Network):
    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv(x)))
        self.seen += 1
        return self.layer(x)


class ThrownStem(Network):
    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv(x)))
        if self.training and torch.rand(1) < 0.5:
            return x
        return self.layer(x)


class DirectStem(Network):
    """Calls a forward past the hooks of its module."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv(x)))
        return self.layer.forward(x)


@pytest.mark.parametrize("network", [Network, FrozenStem, CountedStem, ThrownStem, DirectStem])
@pytest.mark.parametrize(
    "change",
    [
        None,
        lambda m: setattr(m, "scale", 2.0),
        lambda m: setattr(m.relu, "__class__", nn.SiLU),
        lambda m: m.layer.register_forward_hook(lambda module, args, output: output * 2),
    ],
)
def test_a_stem(network: type[nn.Module], change: Any, capsys: Any) -> None:
    _seed()
    original = randomise(network()).double()
    converted = copy.deepcopy(original)
    report = fuse_(converted)
    assert len(report.fused) == 1
    assert report.stems == (("",) if network is Network else ())
    for after in (None, change):
        if after is not None:
            after(original), after(converted)
        assert not _compare(original, converted, capsys)


# --- torch.compile ---


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
    _seed()
    _write(None)
    original = randomise(Steered()).double().eval()
    converted = copy.deepcopy(original)
    assert fuse_(converted).fused
    torch.compiler.reset()
    models = [torch.compile(model, backend=backend, fullgraph=True) for model in (original, converted)]
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        assert not _differences(models[1](x), models[0](x))
        before = models[0](x)
        _apply(COMPILED[change], [original, converted], monkeypatch)
        theirs, ours = models[0](x), models[1](x)
    assert not _differences(theirs, original(x).detach()), "the twin was not compiled again"
    assert not torch.equal(theirs, before)
    assert not _differences(ours, theirs)


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
        assert not _differences(torch.compile(converted, backend="eager", fullgraph=True)(x), original(x))
        assert not _differences(torch.export.export(converted, (x,)).module()(x), original(x))


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
    _seed()
    original = Chained().double().eval()
    converted = copy.deepcopy(original)
    assert fuse_(converted).fused
    torch.compiler.reset()
    models = [torch.compile(model, backend="eager", fullgraph=True) for model in (original, converted)]
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        before = models[0](x)
        assert not _differences(models[1](x), before)
        change(original), change(converted)
        theirs, ours = models[0](x), models[1](x)
    assert not torch.equal(theirs, before)
    assert not _differences(ours, theirs)


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


# --- the comparison notices ---


def test_planted_faults(capsys: Any) -> None:
    """What conversion once did wrong: a context that is lost, a coin that is thrown once, a write that is forgotten, a read not watched."""

    class Unconditional(Parts):
        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.main(x) + x)

    more = ("OwnGenerator", "HooksAModule", "FreezesNorm", "CountsInCell", "TakesNext", "WrapperByMode")
    for name in ("NoGrad", "Coin", "KeepsFeature", "Counts", "CountsInBuffer", "Prints", "IntoInput", "WritesItem", "ByPartsMode", *more):
        original, twin, _ = _pair(name)
        twin.__class__ = Unconditional
        assert _compare(original, twin, capsys), name
    changes = {"ActAttribute": "silu", "DictEntry": "entry", "Hooked": "dropped", "Plain": "kind", "Heard": "compiled_otherwise"}
    for name, change in changes.items():
        original, _, _ = _pair(name)
        twin = copy.deepcopy(original)
        _apply(FORWARDS[name].changes[change], [original], pytest.MonkeyPatch())
        assert _compare(original, twin, capsys), name
