"""Conversion: converted models compute what they did before, in every mode and after every change, and stay themselves.

The planted faults at the end show that the comparison notices a dropped bias, a wrong eps and a lost shortcut.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import _blocks as blocks
import pytest
import torch
from _blocks import assert_close, assert_same, randomise, truth_of
from _torchvision import import_timm, import_torchvision
from torch import Tensor, nn

import fused_resnet.nn
from fused_resnet.fusion import FusionReport, fuse_, unfuse_
from fused_resnet.runtime import bound, executor, fused, program

SPELLINGS = sorted(blocks.SPELLINGS)


@pytest.fixture(autouse=True)
def _quiet_and_seeded() -> Any:
    """A fused block that runs unfused says so; here that is an error unless a test expects it."""
    torch.manual_seed(0)
    fused._warned.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs unfused")
        yield


def _block(kind: str, mode: str = "eval") -> tuple[nn.Module, nn.Module]:
    """(original, converted copy) of one spelling with random statistics."""
    original = randomise(blocks.SPELLINGS[kind]()).train(mode == "train")
    converted = copy.deepcopy(original)
    report = fuse_(converted)
    assert len(report.fused) == 1, str(report)
    return original, converted


def _small(kind: str, **kwargs: Any) -> nn.Module:
    resnet = import_torchvision().models.resnet
    model: nn.Module = resnet.ResNet(getattr(resnet, kind), [1, 1, 1, 1], num_classes=10, **kwargs)
    return model


def _torchvision(name: str) -> Callable[[], nn.Module]:
    return lambda: import_torchvision().models.get_model(name, weights=None)


def _timm(name: str) -> Callable[[], nn.Module]:
    return lambda: import_timm().create_model(name)


# name: (model, blocks)
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "torchvision resnet18": (_torchvision("resnet18"), 8),
    "torchvision resnet34": (_torchvision("resnet34"), 16),
    "torchvision resnet50": (_torchvision("resnet50"), 16),
    "torchvision resnext": (lambda: _small("Bottleneck", groups=32, width_per_group=4), 4),
    "torchvision wide": (lambda: _small("Bottleneck", width_per_group=128), 4),
    "torchvision dilated": (lambda: _small("Bottleneck", replace_stride_with_dilation=[False, True, True]), 4),
    "timm resnet18": (_timm("resnet18"), 8),
    "timm resnet18d": (_timm("resnet18d"), 8),
    "timm resnet26d": (_timm("resnet26d"), 8),
    "timm resnext50_32x4d": (_timm("resnext50_32x4d"), 16),
}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_models(name: str) -> None:
    make, count = MODELS[name]
    original = randomise(make()).eval()
    before = blocks.stats(original)
    converted = copy.deepcopy(original)
    report = fuse_(converted)
    assert len(report.fused) == count
    assert not report.refused
    assert "resnext" not in name or {entry.path for entry in report.fused} == {"general"}
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert_same(converted, original, x)
        assert_same(converted, original, x.contiguous(memory_format=torch.channels_last))
    after = converted.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("kind", SPELLINGS)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_spellings(kind: str, mode: str) -> None:
    """Values, gradients in input and parameters, and running statistics, in both modes."""
    original, converted = _block(kind, mode)
    double = copy.deepcopy(original).double()
    x = torch.randn(3, 8, 6, 6)
    gradients: list[dict[str, Tensor]] = []
    outputs = []
    for model, dtype in ((converted, torch.float32), (original, torch.float32), (double, torch.float64)):
        leaf = x.detach().clone().to(dtype).requires_grad_()
        output = model(leaf)
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        assert leaf.grad is not None
        outputs.append(output.detach())
        gradients.append({"input": leaf.grad, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}})
    depth = blocks.layers(original)
    assert_close(*outputs, depth)
    assert list(gradients[0]) == list(gradients[1])
    for name, ours in gradients[0].items():
        # A gradient passes each layer's folded weight and each ReLU's mask: as many roundings again as forward.
        assert_close(ours.contiguous(), gradients[1][name].contiguous(), gradients[2][name], 2 * depth)
    for (name, ours), (_, eager) in zip(converted.named_buffers(), original.named_buffers(), strict=True):
        assert torch.equal(ours, eager), name  # training updates them with the library's own batch norm


@pytest.mark.parametrize("kind", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(kind: str, dtype: torch.dtype) -> None:
    original, converted = _block(kind)
    original, converted = original.to(dtype), converted.to(dtype)
    x = torch.randn(2, 8, 6, 6, dtype=dtype)
    with torch.no_grad():
        assert_same(converted, original, x)
        assert_same(converted, original, x[:0])


@pytest.mark.parametrize("kind", SPELLINGS)
@pytest.mark.parametrize("x_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("weight_format", [torch.contiguous_format, torch.channels_last])
def test_memory_formats(kind: str, x_format: torch.memory_format, weight_format: torch.memory_format) -> None:
    """assert_close compares the output's memory format with the unconverted block's."""
    original, converted = _block(kind)
    original, converted = original.to(memory_format=weight_format), converted.to(memory_format=weight_format)
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=x_format)
    with torch.no_grad():
        assert_same(converted, original, x)
        assert_same(converted, original, x.expand(2, 8, 6, 6)[:, :, 1:])
    assert_same(converted, original, x)
    assert_same(converted.train(), copy.deepcopy(original).train(), x)


@pytest.mark.parametrize("kind", SPELLINGS)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_autocast(kind: str, mode: str) -> None:
    """The dtype that eager gives (an in-place addition keeps its left operand's) and its closeness, bfloat16's here."""
    original, converted = _block(kind, mode)
    x = torch.randn(2, 8, 6, 6)
    truth, magnitude = truth_of(original, x)
    for grad in (False, True):
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
            eager = copy.deepcopy(original)(x).detach()
            ours = copy.deepcopy(converted)(x).detach()
        assert ours.dtype == eager.dtype
        # Where the addition promotes to float32, the operands are still rounded to bfloat16.
        assert_close(ours.bfloat16(), eager.bfloat16(), truth, blocks.layers(original), magnitude)


def test_train_step_between() -> None:
    """eval -> a training step -> eval -> another: the converted model takes the original's steps."""
    original = randomise(_small("BasicBlock")).eval()
    converted = copy.deepcopy(original)
    fuse_(converted)
    double = copy.deepcopy(original).double()
    x = torch.randn(4, 3, 32, 32)
    for _ in range(2):
        with torch.no_grad():
            assert_same(converted.eval(), original.eval(), x)
        for model in (converted, original, double):
            model.train()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            model(x.to(next(model.parameters()).dtype)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        exact = double.state_dict()
        for name, ours in converted.state_dict().items():
            if ours.is_floating_point():
                assert_close(ours, original.state_dict()[name], exact[name], 2 * blocks.layers(original))
        original.load_state_dict(converted.state_dict())  # so that the next step starts from the same place
        double.load_state_dict(converted.state_dict())


def test_folding_with_and_without_gradients_is_the_same() -> None:
    _, converted = _block("functional")
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        expected = converted(x)
    assert torch.equal(converted(x), expected)


@pytest.mark.smoke
def test_frozen_batch_norm_in_training() -> None:
    """model.train() with some norms in eval: each layer decides for itself."""
    for frozen in ("na", "nb"):
        original, converted = _block("functional", "train")
        for model in (original, converted):
            model.get_submodule(frozen).eval()
        x = torch.randn(2, 8, 6, 6)
        assert_same(copy.deepcopy(converted), copy.deepcopy(original), x)
        with torch.no_grad():
            assert_same(converted, original, x)


@pytest.mark.parametrize(
    "arguments",
    [
        {"affine": False},
        {"momentum": None},
        {"track_running_stats": False},
        {"eps": 0.1},
        {"affine": False, "track_running_stats": False},
    ],
)
def test_batch_norm_variants(arguments: dict[str, Any]) -> None:
    original = blocks.Functional()
    original.na, original.nb = nn.BatchNorm2d(8, **arguments), nn.BatchNorm2d(8, **arguments)
    randomise(original)
    converted = copy.deepcopy(original)
    assert fuse_(converted).fused
    x = torch.randn(2, 8, 6, 6)
    for mode in (True, False):
        assert_same(converted.train(mode), original.train(mode), x)
        with torch.no_grad():
            assert_same(converted, original, x)


def test_sync_batch_norm() -> None:
    original = nn.SyncBatchNorm.convert_sync_batchnorm(randomise(blocks.Functional()).eval())
    converted = copy.deepcopy(original)
    assert fuse_(converted).fused
    with torch.no_grad():
        assert_same(converted, original, torch.randn(2, 8, 6, 6))


# --- changes of parameters ---


def _in_place(model: nn.Module) -> None:
    with torch.no_grad():
        model.a.weight.mul_(-2)  # type: ignore[union-attr, operator]
        model.nb.running_mean.add_(1)  # type: ignore[union-attr, operator]


def _load(model: nn.Module) -> None:
    model.load_state_dict({name: t + 1 if t.is_floating_point() else t for name, t in model.state_dict().items()})


def _data(model: nn.Module) -> None:
    model.na.weight.data = torch.full((8,), -0.5)  # type: ignore[union-attr]
    model.b.weight.data = model.b.weight.data.flip(0).clone()  # type: ignore[union-attr, operator, index]


def _replace(model: nn.Module) -> None:
    model.nb.running_var = torch.full((8,), 3.0)
    model.b.bias = nn.Parameter(torch.ones(8))


def _eps(model: nn.Module) -> None:
    model.na.eps = 0.5


def _remove_bias(model: nn.Module) -> None:
    model.b.bias = None


def _to(model: nn.Module) -> None:
    model.double().to(torch.float32).to(memory_format=torch.channels_last)
    _in_place(model)


@pytest.mark.smoke
@pytest.mark.parametrize("change", [_in_place, _load, _data, _replace, _eps, _remove_bias, _to])
@pytest.mark.parametrize("grad", [False, True])
def test_parameter_changes(change: Callable[[nn.Module], None], grad: bool) -> None:
    original, converted = _block("functional")
    x = torch.randn(2, 8, 6, 6)
    with torch.set_grad_enabled(grad):
        before = converted(x)
        for model in (original, converted):
            change(model)
        assert not torch.equal(converted(x), before)
        assert_same(converted, original, x)


@pytest.mark.parametrize("direction", ["from converted", "into converted"])
def test_checkpoints(direction: str) -> None:
    """A converted model's checkpoint is the unconverted model's, byte for byte in its tensors."""
    source, target = _small("Bottleneck").eval(), _small("Bottleneck").eval()
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
    original, converted = _block(kind)
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
    original, converted = _block(kind, mode)
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
    original, converted = _block(kind, mode)
    x = torch.randn(2, 8, 6, 6)
    program = torch.export.export(nn.Sequential(converted), (x,))
    targets = [str(node.target) for node in program.graph.nodes]
    assert any("fused_resnet" in target for target in targets)
    assert {f"0.{name}" for name in original.state_dict()} == set(program.state_dict)
    truth, magnitude = truth_of(original, x)
    assert_close(program.module()(x).detach(), original(x).detach(), truth, blocks.layers(original), magnitude)


def test_symbolic_trace_sees_the_original() -> None:
    original, converted = _block("functional")
    graph = torch.fx.symbolic_trace(converted)
    assert sum(node.op == "call_module" for node in graph.graph.nodes) == 4
    x = torch.randn(1, 8, 6, 6)
    assert torch.equal(graph(x), original(x))


# --- what stays as it was ---


@pytest.mark.smoke
def test_hooks_on_the_block() -> None:
    original, converted = _block("functional")
    calls: list[str] = []
    converted.register_forward_pre_hook(lambda m, args: calls.append("pre"))
    converted.register_forward_hook(lambda m, args, output: output + 1)
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        difference = (converted(x) - original(x) - 1).abs().max().item()
    assert difference <= 8 * torch.finfo(torch.float32).eps * original(x).abs().max().item()
    assert calls == ["pre"]


def test_input_by_name_and_wrong_calls() -> None:
    original, converted = _block("methods")
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
    original, converted = _block("bias only")
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
    original, converted = _block("functional")
    converted.requires_grad_(False)
    x = torch.randn(1, 8, 6, 6)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert converted(mode.from_tensor(x)).shape == x.shape
    with torch.no_grad():
        assert_same(converted, original, x)
    meta = copy.deepcopy(converted).to("meta")
    assert meta(x.to("meta")).shape == x.shape


def test_global_hooks() -> None:
    _, converted = _block("functional")
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
    model = randomise(_small("BasicBlock")).eval()
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
    model = _small("BasicBlock")
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


# --- the comparison notices ---


def _drop_bias(x: Tensor, w: Tensor, b: Any, *rest: Any) -> Tensor:
    return _operator(x, w, None, *rest)


def _drop_shortcut(x: Tensor, w: Tensor, b: Any, s: Any, *rest: Any) -> Tensor:
    return _operator(x, w, b, None, *rest)


def _drop_relu(*arguments: Any) -> Tensor:
    return _operator(*arguments[:-1], False)


_operator = executor.conv_bias_add_relu


@pytest.mark.parametrize("fault", [_drop_bias, _drop_shortcut, _drop_relu])
@pytest.mark.parametrize("kind", SPELLINGS)
def test_planted_faults(monkeypatch: pytest.MonkeyPatch, fault: Callable[..., Tensor], kind: str) -> None:
    """Layer by layer."""
    original, converted = _block(kind)
    monkeypatch.setattr(executor, "_run_native", lambda graph, segment, held: None)
    monkeypatch.setattr(executor, "conv_bias_add_relu", fault)
    with torch.no_grad(), pytest.raises(AssertionError, match="bound"):
        assert_same(converted, original, torch.randn(2, 8, 6, 6))


_native_run = program.run
_operand_of = program.operand_of


def _without_bias(node: bound.BoundConvolution) -> program.Operand:
    operand = _operand_of(node)
    weight, _, *norm = operand.sources
    if not norm:
        return operand._replace(sources=(weight, None))
    gamma, _, mean, variance = norm
    return operand._replace(sources=(weight, None, gamma, None, torch.zeros_like(mean), variance))  # type: ignore[arg-type]


def _without_relu(node: bound.BoundConvolution) -> program.Operand:
    return _operand_of(node)._replace(relu=False)


def _without_shortcut(segment: bound.Segment) -> bound.Segment:
    return segment._replace(steps=tuple([step._replace(shortcut=None) for step in segment.steps]))


@pytest.mark.parametrize("fault", [None, _without_bias, _without_shortcut, _without_relu])
@pytest.mark.parametrize("kind", [kind for kind in SPELLINGS if kind != "pooled"])
def test_planted_faults_in_whole_blocks(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[..., Any] | None, kind: str, kernels: object
) -> None:
    """As one call, which all spellings are but the one that pools in the middle."""
    original, converted = _block(kind)
    runs: list[Any] = []

    def run(plans: Any, segment: bound.Segment, x: Tensor, external: Tensor | None) -> Any:
        runs.append(_native_run(plans, _without_shortcut(segment) if fault is _without_shortcut else segment, x, external))
        return runs[-1]

    monkeypatch.setattr(program, "run", run)
    if fault is not None and fault is not _without_shortcut:
        monkeypatch.setattr(program, "operand_of", fault)
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        if fault is None:
            assert_same(converted, original, x)
        else:
            with pytest.raises(AssertionError, match="bound"):
                assert_same(converted, original, x)
    assert len(runs) == 1
    assert runs[0] is not None, "it went layer by layer"


def test_planted_eps() -> None:
    """Frozen batch norm without eps, a fault of other packages: seen in the channel of tiny variance."""
    original, converted = _block("functional")
    converted.na.eps = converted.nb.eps = 0.0
    with torch.no_grad(), pytest.raises(AssertionError, match="bound"):
        assert_same(converted, original, torch.randn(2, 8, 6, 6))
