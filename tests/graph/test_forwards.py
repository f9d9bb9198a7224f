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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _forwards_found
import _forwards_python
import _forwards_reads
import _forwards_refused
import _forwards_state
import _forwards_usual
import _forwards_world
import _forwards_writes
import numpy as np
import pytest
import torch
from _blocks import randomise
from _compared import apply, compare, differences, pair, quiet, seed, written
from _forwards import FORWARDS, WORLD, Parts
from torch import Tensor, nn

from fused_resnet.fusion import fuse_

__all__ = ["quiet"]  # a fixture

# Refused for a graph as a whole: the line is where it ends.
WITHOUT_LINE = {"NoGradBlock", "Noisy", "ReluOfInput", "ByMode"}
FILES = (
    *(_forwards_found, _forwards_refused, _forwards_reads, _forwards_python),
    *(_forwards_usual, _forwards_state, _forwards_world, _forwards_writes),
)


@pytest.mark.parametrize("name", sorted(FORWARDS))
def test_a_forward(name: str, capsys: Any) -> None:
    """Before any change."""
    original, converted, entry = pair(name)
    if FORWARDS[name].fuses is not None:
        assert entry.fused == FORWARDS[name].fuses, entry.reason
    assert not differences(written(converted), written(original))
    assert not compare(original, converted, capsys)


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
    seed()
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
    original, converted, entry = pair(name)
    if called:
        assert not compare(original, converted, capsys)
    apply(FORWARDS[name].changes[change], [original, converted], monkeypatch)
    assert not compare(original, converted, capsys)
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
    original, _, entry = pair(name)
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
        reason = pair(name)[2].reason
        assert "\n" not in reason
        assert len(reason) < 200, reason


def test_the_table(capsys: Any) -> None:
    """At least sixty forwards; the table, for those who want to see it (pytest -s)."""
    rows = []
    for name, case in FORWARDS.items():
        entry = pair(name)[2]
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
    seed()
    original = randomise(network()).double()
    converted = copy.deepcopy(original)
    report = fuse_(converted)
    assert len(report.fused) == 1
    assert report.stems == (("",) if network is Network else ())
    for after in (None, change):
        if after is not None:
            after(original), after(converted)
        assert not compare(original, converted, capsys)


# --- the comparison notices ---


def test_planted_faults(capsys: Any) -> None:
    """What conversion once did wrong: a context that is lost, a coin that is thrown once, a write that is forgotten, a read not watched."""

    class Unconditional(Parts):
        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.main(x) + x)

    more = ("OwnGenerator", "HooksAModule", "FreezesNorm", "CountsInCell", "TakesNext", "WrapperByMode")
    for name in ("NoGrad", "Coin", "KeepsFeature", "Counts", "CountsInBuffer", "Prints", "IntoInput", "WritesItem", "ByPartsMode", *more):
        original, twin, _ = pair(name)
        twin.__class__ = Unconditional
        assert compare(original, twin, capsys), name
    changes = {"ActAttribute": "silu", "DictEntry": "entry", "Hooked": "dropped", "Plain": "kind", "Heard": "compiled_otherwise"}
    for name, change in changes.items():
        original, _, _ = pair(name)
        twin = copy.deepcopy(original)
        apply(FORWARDS[name].changes[change], [original], pytest.MonkeyPatch())
        assert compare(original, twin, capsys), name
