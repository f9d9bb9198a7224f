"""Blocks that train: whose norms take their statistics from the batch, so that nothing is folded into a convolution.

What is trusted: the unconverted block in eager mode, and in float64; ``benchmark/contest.py``, which knows what rounding may do to
gradients that pass ReLUs.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from _calls import FORMATS, PASS, Calls, name, nodes, plan_of
from torch import Tensor, nn

import fused_resnet
import fused_resnet.nn as fnn
from fused_resnet import _extension, _settings, testing
from fused_resnet.benchmark import contest as contests
from fused_resnet.benchmark.torch_contenders import convert
from fused_resnet.cases import AWKWARD, BLOCKS, BlockCase, ConvCase, Operands
from fused_resnet.ops import derived
from fused_resnet.ops.cpu import CpuBackend, CpuPlan
from fused_resnet.ops.functions import add_relu_
from fused_resnet.ops.select import how_to_train
from fused_resnet.ops.spec import Layout, geometry_of_call, spec_of
from fused_resnet.runtime import executor

NODE = "ConvBiasAddReLUBackward"


def called(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights of our convolutions from now on that are used once."""
    once, weights = CpuPlan.once, []

    def noted(self: CpuPlan, *operands: Any) -> Tensor:
        weights.append(operands[1])
        return once(self, *operands)

    monkeypatch.setattr(CpuPlan, "once", noted)
    return weights


def block(channels: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return fnn.BasicBlock(channels, channels).train().to(dtype)


@pytest.mark.parametrize(
    ("channels", "size", "dtype", "ours"),
    [
        (16, 16, torch.float32, 2),
        (16, 4, torch.float32, 2),
        (8, 2, torch.float32, 0),  # few products
        (16, 16, torch.float64, 0),
        (16, 16, torch.bfloat16, 0),
        (64, 16, torch.bfloat16, 2),
        (4, 16, torch.float32, 0),
    ],
)
def test_whose_convolutions(kernels: object, channels: int, size: int, dtype: torch.dtype, ours: int) -> None:
    x = torch.randn(4, channels, size, size, dtype=dtype)
    found = nodes(block(channels, dtype)(x))
    assert found.count(NODE) == ours
    assert found.count("ConvolutionBackward0") == 2 - ours


@pytest.mark.parametrize(("memory_format", "ours"), [(torch.contiguous_format, 1), (torch.channels_last, 3)], ids=name)
def test_whose_gradients(
    kernels: object, monkeypatch: pytest.MonkeyPatch, memory_format: torch.memory_format, ours: int
) -> None:
    """In channels_last those of 1x1 convolutions too, whose forward stays the library's."""
    forward = called(monkeypatch)
    b = fnn.Bottleneck(256, 64).train().to(memory_format=memory_format)  # type: ignore[call-overload]
    x = torch.randn(4, 256, 16, 16).contiguous(memory_format=memory_format)
    found = nodes(b(x))
    assert found.count(NODE) == ours
    assert found.count("ConvolutionBackward0") == 3 - ours
    assert [w.shape for w in forward] == [b.conv2.weight.shape]  # type: ignore[union-attr]


def test_how_to_train() -> None:
    """Winograd's convolutions are ours; of the direct ones the gradients, in channels_last and float32, where there is enough to do."""
    nchw, last = ((1 << 16, 1 << 10, 32, 1), (1 << 16, 1, 1 << 11, 1 << 6))  # of [_, 64, 32, 32]

    def by(strides: tuple[int, ...] = last, kernel: int = 1, dtype: torch.dtype = torch.float32, **other: Any) -> str:
        channels, outputs, batch = (other.pop(name, default) for name, default in (("channels", 64), ("outputs", 64), ("batch", 8)))
        stride, dilation, groups = (other.pop(name, default) for name, default in (("stride", (1, 1)), ("dilation", (1, 1)), ("groups", 1)))
        assert not other
        laid = Layout((batch, channels, 32, 32), strides)
        return how_to_train(laid, (outputs, channels, kernel, kernel), stride, dilation, groups, dtype)

    assert (by(), by(nchw), by(kernel=3), by(nchw, 3)) == ("our gradients", "library", "ours", "ours")
    assert (by(kernel=3, stride=(2, 2)), by(nchw, 3, stride=(2, 2)), by(stride=(2, 2))) == ("our gradients", "library", "our gradients")
    assert (by(kernel=5), by(kernel=3, dilation=(2, 2)), by(kernel=3, groups=2), by(channels=4)) == ("library",) * 4
    assert (by(outputs=15), by(channels=15, outputs=600), by(outputs=16)) == ("library", "library", "our gradients")
    assert (by(batch=1, outputs=63), by(batch=1)) == ("library", "our gradients")
    assert (by(dtype=torch.bfloat16), by(kernel=3, dtype=torch.bfloat16)) == ("library", "ours")
    assert (by(dtype=torch.float64), by(kernel=3, dtype=torch.float64)) == ("library", "library")


@pytest.mark.parametrize("in_place", [True, False])
def test_the_end_of_a_block(kernels: object, in_place: bool) -> None:
    """The sum is written where the author writes it: over the norm's output, where ``out += identity`` does. Of four channels the convolution
    is the library's, so that everything is the same to the bit."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
            self.relu = nn.ReLU(inplace=in_place)

        def forward(self, x: Tensor) -> Tensor:
            out = self.norm(self.conv(x))
            if in_place:
                out += x
            else:
                out = out + x
            return self.relu(out)  # type: ignore[no-any-return]

    fused = nn.Sequential(Block())
    eager = copy.deepcopy(fused)
    assert "Block" in str(fused_resnet.fuse_(fused))
    x, grad = torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8)
    found = []
    for module in (fused, eager):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        if module is fused:
            assert ("AddReLUInPlaceBackward" in nodes(y), "BiasAddReLUBackward" in nodes(y)) == (in_place, not in_place)
        found.append([y.detach(), *torch.autograd.grad(y, [leaf, *module.parameters()], grad)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


@pytest.mark.parametrize("relu", [True, False])
def test_add_relu_in_place(kernels: object, relu: bool) -> None:
    """As eager's, differentiated once and twice; who writes over the result is told, and a mode that listens gets the same."""
    x, s = (torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mine = [t.detach().requires_grad_() for t in (x, s)]

    def function(a: Tensor, b: Tensor) -> Tensor:
        return add_relu_(a * 1, b, relu)

    assert torch.autograd.gradcheck(function, mine)
    assert torch.autograd.gradgradcheck(function, mine)
    before = x * 1
    y = add_relu_(before, s, relu)
    assert y is before
    assert torch.equal(y, torch.relu(x + s) if relu else x + s)
    with Calls() as calls:
        z = add_relu_(x * 1, s, relu)
    assert torch.equal(y, z)
    assert len(calls.of(PASS)) == 1
    for turned in (x.detach().transpose(2, 3), x.detach()[:, :, ::2]):  # gaps, another order
        again = turned * 1
        add_relu_(again, again.clone(), relu)
        assert torch.equal(again, torch.relu(2 * turned) if relu else 2 * turned)
    if relu:
        y.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_under_autocast(kernels: object) -> None:
    """In its dtype; the gradients arrive in the parameters'."""
    b = block(64)
    x = torch.randn(4, 64, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = b(x)
    assert nodes(y).count(NODE) == 2
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in b.parameters())


def test_compiled(kernels: object) -> None:
    """The compiler sees the author's convolution."""
    graphs: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    x = torch.randn(4, 16, 16, 16)
    torch.compile(block(16), backend=keep, fullgraph=True)(x)
    torch._dynamo.reset()
    assert not any("fused_resnet.conv" in str(node.target) for graph in graphs for node in graph.graph.nodes)


TRAINED = [case for case in BLOCKS if case.network != "resnet50"] + [BlockCase("bottleneck", 256, 64, (16, 16))]


@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("case", TRAINED, ids=name)
def test_a_step(case: BlockCase, memory_format: torch.memory_format, kernels: object) -> None:
    """Output and all gradients, within what rounding explains."""
    small = BlockCase(case.kind, case.inplanes, case.planes, (16, 16), case.stride, case.shortcut)
    contest = contests.prepare(small, 4, torch.float32, "train", seed=0)
    module = convert(copy.deepcopy(contest.task.module).train()).to(memory_format=memory_format)  # type: ignore[call-overload]
    inputs = tuple(t.contiguous(memory_format=memory_format) for t in contest.task.inputs)
    errors = contest.errors(contests.step(module, inputs, contest.task.grad.contiguous(memory_format=memory_format), "train"))
    assert contest.ok(errors), (errors, contest.allowed)


def test_a_bias_before_a_live_norm(kernels: object) -> None:
    """The norm takes it away again, but for its running mean; with a gradient and without."""
    means, quiet = [], []
    for shift in (0.0, 3.0):
        b = block(16)
        conv = nn.Conv2d(16, 16, 3, padding=1)
        torch.nn.init.constant_(conv.bias, shift)  # type: ignore[arg-type]
        conv.weight = b.conv1.weight  # type: ignore[assignment]
        b.conv1 = conv
        y = b(torch.ones(4, 16, 16, 16))
        assert nodes(y).count(NODE) == 2
        means.append(b.bn1.running_mean.clone())  # type: ignore[union-attr, operator]
        b.bn1.reset_running_stats()  # type: ignore[union-attr, operator]
        with torch.no_grad():
            b(torch.ones(4, 16, 16, 16))
        quiet.append(b.bn1.running_mean)  # type: ignore[union-attr]
    momentum = 0.1
    for found in (means, quiet):
        assert torch.allclose(found[1] - found[0], torch.full((16,), 3.0 * momentum), atol=1e-5)


def test_statistics_change_once(kernels: object) -> None:
    ours, theirs = (copy.deepcopy(block(16)) for _ in range(2))
    fused_resnet.unfuse_(nn.Sequential(theirs))
    x = torch.randn(4, 16, 16, 16)
    for _ in range(3):
        ours(x).sum().backward()
        fnn.BasicBlock._plain_forward(theirs, x).sum().backward()  # type: ignore[arg-type]
    for key, t in theirs.state_dict().items():
        mine = ours.state_dict()[key]
        assert torch.equal(mine, t) if t.dtype == torch.int64 else torch.allclose(mine, t, rtol=1e-4, atol=1e-4), key
    assert ours.bn1.num_batches_tracked == 3  # type: ignore[union-attr]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(kernels: object, reentrant: bool) -> None:
    """What is recomputed is what was computed: the same gradients, to the bit."""
    found = []
    for again in (False, True):
        b, x = block(16), torch.randn(4, 16, 16, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = torch.utils.checkpoint.checkpoint(b, x, use_reentrant=reentrant) if again else b(x)
        y.square().sum().backward()
        found.append([x.grad, *(p.grad for p in b.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))  # type: ignore[arg-type]


def test_a_value_inside_a_block_is_given_back(kernels: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as nothing reads it any more, where a block goes layer by layer: else it would need the memory of all its layers at once."""
    made: list[weakref.ref[Tensor]] = []
    alive: list[list[bool]] = []
    run = executor._run

    def watched(*arguments: Any) -> Tensor:
        alive.append([value() is not None for value in made])
        y = run(*arguments)
        made.append(weakref.ref(y))
        return y

    monkeypatch.setattr(executor, "_run", watched)
    with torch.no_grad():
        fnn.Bottleneck(64, 16).train()(torch.randn(2, 64, 8, 8))
    assert alive == [[], [True], [False, True]]


def test_nothing_of_a_trained_weight_is_kept(kernels: object, no_garbage_collector: None) -> None:
    """Packed weights of a step are the step's: neither beside the weight nor in the module's store."""
    b = block(16)
    optimizer = torch.optim.SGD(b.parameters(), lr=0.01)
    x = torch.randn(4, 16, 16, 16)
    before = len(derived._beside)
    for _ in range(3):
        optimizer.zero_grad()
        b(x).sum().backward()
        optimizer.step()
    assert len(derived._beside) == before
    w = torch.randn(16, 16, 3, 3, requires_grad=True)
    for _ in range(3):
        fused_resnet.conv_bias_add_relu(x, w, padding=1).sum().backward()
    assert len(derived._beside) == before
    with torch.no_grad():
        fused_resnet.conv_bias_add_relu(x, w, padding=1)
    assert len(derived._beside) == before + 1


def test_a_weight_that_is_cast_for_autocast_is_used_once(kernels: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is another tensor at each call, whether the call is seen by somebody else or not."""
    weights = called(monkeypatch)
    b, x = block(64), torch.randn(4, 64, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        b(x)
        assert [w.dtype for w in weights] == [torch.bfloat16] * 2
        with torch.no_grad():
            b(x)
    assert len(weights) == 2  # a call that trains nothing keeps what it packs


def test_training_and_calls_in_turn(kernels: object) -> None:
    """Each step's weight is the one that is used, and each call's, in any order, also where a write is not counted."""
    b = block(16)
    x = torch.randn(4, 16, 16, 16)
    optimizer = torch.optim.SGD(b.parameters(), lr=0.1)
    for step in range(6):
        b.train(step % 2 == 0)
        if b.training:
            b(x).square().mean().backward()
            optimizer.step()
        else:
            b.conv1.weight.data.numpy()[:] *= 1.5  # type: ignore[union-attr, operator]
        plain = copy.deepcopy(b)
        with torch.no_grad():
            for mode in (True, False):
                ours, theirs = b.train(mode)(x), fnn.BasicBlock._plain_forward(plain.train(mode), x)  # type: ignore[arg-type]
                assert testing.norm_error(ours, theirs.double()) < 1e-4, (step, mode)


UNGROUPED = [case for case in AWKWARD if case.groups == 1 and case.batch]
LARGE = [
    ConvCase(64, 64, (28, 28), (3, 3), padding=(1, 1), shortcut=True),
    ConvCase(300, 70, (7, 7), (3, 3), padding=(1, 1), batch=3),
    ConvCase(130, 520, (9, 8), (1, 1), shortcut=True, batch=2),
    # One panel, so that the weight is packed, and so many channels that the input is transformed first: both are in the workspace.
    ConvCase(900, 16, (24, 24), (3, 3), padding=(1, 1)),
]


@pytest.mark.parametrize("algorithm", ["auto", "direct", "winograd2", "winograd4"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=name)
def test_once(isa: str, algorithm: str, dtype: torch.dtype) -> None:
    """A convolution with a weight that is used once gives the bits of one with a weight that is packed and kept, whatever the threads."""
    for case in (*UNGROUPED[::3], *LARGE):
        operands = testing.float_operands(case, dtype, torch.Generator().manual_seed(0))
        for number, memory_format in enumerate(FORMATS):
            laid = Operands(*(t.contiguous(memory_format=memory_format) if t is not None and t.dim() == 4 else t for t in operands))  # type: ignore[arg-type]
            torch.set_num_threads(1)
            kept = plan_of(laid, **case.parameters)(*laid)
            for threads in (1, 2, 5) if case in LARGE else (1 + number,):
                torch.set_num_threads(threads)
                assert torch.equal(plan_of(laid, **case.parameters).once(*laid), kept), (case.name, threads)


@pytest.mark.parametrize("special", ["nan", "inf", "max"])
def test_once_with_special_values(isa: str, special: str) -> None:
    """As with a weight that is kept: where Winograd's sums are not finite, direct ones."""
    case = LARGE[0]
    operands = testing.float_operands(case, torch.float32, torch.Generator().manual_seed(0))
    value = {"nan": float("nan"), "inf": float("inf"), "max": torch.finfo(torch.float32).max}[special]
    for field in ("input", "weight"):
        changed = getattr(operands, field).clone()
        changed.view(-1)[777] = value
        changed = operands._replace(**{field: changed})
        plan = plan_of(changed, **case.parameters)
        result = testing.compare_exact(plan.once(*changed), plan(*changed))
        assert result, result.reason


def test_the_workspace_of_once(kernels: object) -> None:
    """The workspace of a weight that is used once is counted: its packed form is in it."""
    case = ConvCase(512, 512, (20, 20), (1, 1))
    operands = testing.float_operands(case, torch.float32, torch.Generator().manual_seed(0))
    kernel = plan_of(operands, **case.parameters).kernel
    backend = CpuBackend(_extension.cpu, "")
    fresh = backend.fresh_convolution(spec_of(*operands, geometry_of_call(operands.weight), True), _settings.current.algorithm)
    assert fresh.workspace_bytes >= kernel.workspace_bytes + kernel.packed_bytes
