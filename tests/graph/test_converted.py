"""Converted models among PyTorch's other tools: checkpoints, copies and pickles, torch.compile and export, hooks, wrong calls, threads."""

from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import _blocks as blocks
import pytest
import torch
from _blocks import assert_close, assert_same, randomise, truth_of
from _conversion import SPELLINGS, block_pair, quiet_and_seeded, small
from torch import Tensor, nn

import fused_resnet.nn
from fused_resnet.fusion import FusionReport, fuse_, unfuse_
from fused_resnet.runtime import fused

__all__ = ["quiet_and_seeded"]  # a fixture


@pytest.mark.parametrize("direction", ["from converted", "into converted"])
def test_checkpoints(direction: str) -> None:
    """A converted model's checkpoint is the unconverted model's, byte for byte in its tensors."""
    source, target = small("Bottleneck").eval(), small("Bottleneck").eval()
    randomise(source)
    fuse_(source if direction == "from converted" else target)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        source(x), target(x)
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file, weights_only=True), strict=True)
        plain, converted = (target, source) if direction == "from converted" else (source, target)
        assert_same(converted, plain, x)


# --- copies ---


@pytest.mark.parametrize("kind", [k for k in SPELLINGS if k != "option A"])  # whose lambda does not pickle
def test_deepcopy_and_pickle(kind: str) -> None:
    original, converted = block_pair(kind)
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        expected = converted(x)
        for twin in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
            assert type(twin) is type(converted)
            assert isinstance(twin, type(original))
            assert torch.equal(twin(x), expected)
            next(iter(twin.parameters())).add_(1)
            assert not torch.equal(twin(x), expected)  # it runs on its own parameters
            assert type(unfuse_(twin)) is type(original)
        assert torch.equal(converted(x), expected)


def test_pickle_into_a_new_process(tmp_path: Any) -> None:
    """torch.load alone must be enough to run a saved model."""
    model = nn.Sequential(fused_resnet.nn.Bottleneck(8, 2), nn.Sequential(nn.Conv2d(8, 8, 1)))
    plain = _plain_bottleneck()
    fuse_(plain)
    model.append(plain).eval()
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        torch.save({"model": model, "x": x, "y": model(x)}, tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "d = torch.load(sys.argv[1], weights_only=False)\n"
        "with torch.no_grad():  # as y was made: a projection that joins the last product adds in another order\n"
        "    assert torch.equal(d['model'](d['x']), d['y'])\n"
        "print(type(d['model'][2]).__name__)"
    )
    folders = [p for p in sys.path if p]
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            f"import sys; sys.path[:0] = {folders!r}\n{code}",
            str(tmp_path / "model.pt"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "FusedWrapped"


def _plain_bottleneck() -> nn.Module:
    block = blocks.Wrapped()
    return randomise(block)


# --- compile, export ---


@pytest.mark.parametrize("kind", ["functional", "pooled", "option A"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_compile(kind: str, mode: str) -> None:
    original, converted = block_pair(kind, mode)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(converted), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 8, 6, 6)
    truth, magnitude = truth_of(original, x)
    assert_close(compiled(x).detach(), copy.deepcopy(original)(x).detach(), truth, 3, magnitude)
    compiled(x).sum().backward()
    if mode == "eval":
        with torch.no_grad():
            assert_same(compiled, original, x)
            _first_parameter(compiled).add_(1)
            _first_parameter(original).add_(1)
            assert_same(compiled, original, x)  # nothing was folded into the graph


def _first_parameter(model: nn.Module) -> Tensor:
    return next(iter(model.parameters()))


@pytest.mark.parametrize("kind", ["functional", "wrapped"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_export(kind: str, mode: str) -> None:
    original, converted = block_pair(kind, mode)
    x = torch.randn(2, 8, 6, 6)
    program = torch.export.export(nn.Sequential(converted), (x,))
    targets = [str(node.target) for node in program.graph.nodes]
    assert any("fused_resnet" in target for target in targets)
    assert {f"0.{name}" for name in original.state_dict()} == set(program.state_dict)
    truth, magnitude = truth_of(original, x)
    assert_close(program.module()(x).detach(), original(x).detach(), truth, blocks.layers(original), magnitude)


def test_symbolic_trace_sees_the_original() -> None:
    original, converted = block_pair("functional")
    graph = torch.fx.symbolic_trace(converted)
    assert sum(node.op == "call_module" for node in graph.graph.nodes) == 4
    x = torch.randn(1, 8, 6, 6)
    assert torch.equal(graph(x), original(x))


# --- what stays as it was ---


@pytest.mark.smoke
def test_hooks_on_the_block() -> None:
    original, converted = block_pair("functional")
    calls: list[str] = []
    converted.register_forward_pre_hook(lambda m, args: calls.append("pre"))
    converted.register_forward_hook(lambda m, args, output: output + 1)
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        difference = (converted(x) - original(x) - 1).abs().max().item()
    assert difference <= 8 * torch.finfo(torch.float32).eps * original(x).abs().max().item()
    assert calls == ["pre"]


def test_input_by_name_and_wrong_calls() -> None:
    original, converted = block_pair("methods")
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        assert torch.equal(converted(inputs=x), converted(x))
    calls: list[Callable[[nn.Module], Any]] = [lambda m: m(), lambda m: m(x, x), lambda m: m(other=x)]
    for call in calls:
        with pytest.raises(TypeError) as ours:
            call(converted)
        with pytest.raises(TypeError) as eager:
            call(original)
        assert str(ours.value) == str(eager.value)
    with torch.no_grad():
        assert_same(converted, original, x)


def test_calls_that_need_the_original() -> None:
    """Forward-mode gradients, torch.func and other inputs run as the block's author wrote it, with a warning."""
    original, converted = block_pair("bias only")
    x = torch.randn(2, 8, 6, 6)
    with pytest.warns(RuntimeWarning, match="as its own forward says"):
        assert torch.equal(converted(x[0]), original(x[0]))
    for f in (torch.func.vmap, torch.func.jacrev):
        batch = x[:1, :, :2, :2] if f is torch.func.jacrev else x[:, None]
        fused._warned.clear()
        with pytest.warns(RuntimeWarning, match="torch.func transforms"):
            assert torch.equal(f(converted)(batch), f(original)(batch))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        tangents = [torch.autograd.forward_ad.unpack_dual(m(dual)).tangent for m in (converted, original)]
    assert torch.equal(*tangents)
    parameters = dict(converted.named_parameters())
    other = {name: p * 2 for name, p in parameters.items()}
    ours = torch.func.functional_call(converted, other, (x,))
    eager = torch.func.functional_call(original, other, (x,))
    double = {name: p.double() for name, p in other.items()}
    assert_close(ours.detach(), eager.detach(), torch.func.functional_call(original, double, (x.double(),)).detach(), 3)


def test_fake_tensors_leave_nothing_behind() -> None:
    """A folded weight made under FakeTensorMode must not be met by a real call."""
    original, converted = block_pair("functional")
    converted.requires_grad_(False)
    x = torch.randn(1, 8, 6, 6)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert converted(mode.from_tensor(x)).shape == x.shape
    with torch.no_grad():
        assert_same(converted, original, x)
    meta = copy.deepcopy(converted).to("meta")
    assert meta(x.to("meta")).shape == x.shape


def test_global_hooks() -> None:
    _, converted = block_pair("functional")
    seen: list[str] = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, a, o: seen.append(type(m).__name__))
    try:
        with pytest.warns(RuntimeWarning, match="global module hook"):
            converted(torch.randn(1, 8, 6, 6))
    finally:
        handle.remove()
    assert seen.count("Conv2d") == 2


@pytest.mark.smoke
def test_unfuse() -> None:
    model = randomise(small("BasicBlock")).eval()
    classes = [type(m) for m in model.modules()]
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = model(x)
        fuse_(model)
        model(x)
        assert [type(m) for m in model.modules()] != classes
        assert all(isinstance(m, cls) for m, cls in zip(model.modules(), classes, strict=True))
        unfuse_(model)
        assert [type(m) for m in model.modules()] == classes
        assert not any("_fused_resnet" in m.__dict__ for m in model.modules())
        assert torch.equal(model(x), before)
        unfuse_(model)
        assert len(fuse_(model).fused) == 4


@pytest.mark.smoke
def test_filter_and_report() -> None:
    model = small("BasicBlock")
    seen: list[str] = []

    def accept(name: str, module: nn.Module) -> bool:
        assert module is model.get_submodule(name)
        seen.append(name)
        return name.startswith("layer2")

    report = fuse_(model, accept)
    assert isinstance(report, FusionReport)
    assert seen == ["layer1.0", "layer2.0", "layer3.0", "layer4.0"]
    assert [entry.name for entry in report.fused] == ["layer2.0"]
    assert report.fused[0].became == "2 convolutions, projection shortcut"
    assert {entry.reason for entry in report.refused} == {"left out by filter_fn"}
    assert json.loads(json.dumps(report.to_dict()))["fused"] == 1
    again = fuse_(model)
    assert [entry.became.split(":")[0] == "already fused" for entry in again.entries] == [False, True, False, False]
    assert len(again.fused) == 4
    lines = str(again).splitlines()
    assert lines[0].split()[:3] == ["block", "class", "fused"]
    assert "4 fused, 0 refused" in lines
    assert str(fuse_(nn.Linear(2, 2))) == "no residual block found"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1,), "model must be a torch.nn.Module, got int"),
        ((nn.ReLU(), 1), "filter_fn must be callable or None, got int"),
    ],
)
def test_bad_arguments(arguments: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        fuse_(*arguments)


def test_a_block_alone_and_a_shared_block() -> None:
    block = blocks.Functional()
    assert [entry.name for entry in fuse_(block).fused] == [""]
    shared = blocks.Functional()
    model = nn.Sequential(shared, shared)
    assert [entry.name for entry in fuse_(model).fused] == ["0"]
    assert type(model[1]).__name__ == "FusedFunctional"


def test_first_calls_from_several_threads() -> None:
    """Looking at a block patches nothing global: other threads run models meanwhile."""
    model = randomise(nn.Sequential(*(fused_resnet.nn.BasicBlock(8, 8) for _ in range(8)))).eval()
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
    outputs: list[Tensor] = []

    def call() -> None:
        with torch.no_grad():
            outputs.append(model(x))

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) == 8
    assert all(torch.equal(output, expected) for output in outputs)
