"""What the convolutions of a block do for one another in a step of training: the gradient through a ReLU is the end of the next one's input
gradient, and so is the sum of the gradients of an input with two readers.

What is trusted: the same convolutions, each of which does its own work only; no bit may differ.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _calls import CONV, FORMATS, INPUT_GRADIENT, Calls, backward_nodes, name
from torch import Tensor, nn

import fused_resnet
import fused_resnet.nn as fnn
from fused_resnet import _extension, _plain, testing, why_not
from fused_resnet.graph.ir import Addition
from fused_resnet.ops.cpu import CpuBackend
from fused_resnet.ops.functions import convolution_in_block, gradient, relu_
from fused_resnet.ops.role import Rectified, Role
from fused_resnet.ops.select import how_to_train
from fused_resnet.ops.spec import Geometry, Padding
from fused_resnet.runtime import executor
from fused_resnet.runtime.bound import BoundCall, BoundConvolution, _part
from fused_resnet.runtime.training import Training


def block(channels: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return fnn.BasicBlock(channels, channels).train().to(dtype)


def gradients(module: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    wanted = [leaf, *(p for p in module.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y, wanted, grad)]


def without_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each convolution's backward for itself, as of the operator."""
    monkeypatch.setattr(Training, "role", lambda self, x, relu, by_library: Role(by_library))


class Roles(list[Role]):
    """What the convolutions of the calls that follow do for their neighbours."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        role = Training.role

        def kept(training: Training, x: Tensor, relu: bool, by_library: bool) -> Role:
            self.append(role(training, x, relu, by_library))
            return self[-1]

        monkeypatch.setattr(Training, "role", kept)

    @property
    def told(self) -> list[tuple[bool, bool]]:
        """Of each: whether its gradient goes through the ReLU in front, and whether another's is added to it."""
        return [(role.reads is not None, role.forks) for role in self]


@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("kind", [fnn.BasicBlock, fnn.Bottleneck])
@pytest.mark.parametrize("stride", [1, 2])
def test_neighbours(
    kernels: object,
    monkeypatch: pytest.MonkeyPatch,
    kind: Callable[..., nn.Module],
    live: bool,
    memory_format: torch.memory_format,
    stride: int,
) -> None:
    """What a convolution's gradient does for the ReLU in front of it and for the input's other reader changes no bit, of a call with
    whatever gradients are wanted."""
    torch.manual_seed(0)
    channels = 128 if kind is fnn.Bottleneck else 32
    b = kind(channels, 32, stride, nn.Conv2d(channels, channels, 1, stride, bias=False) if stride > 1 else None).train(live)
    b = b.to(memory_format=memory_format)  # type: ignore[call-overload]
    x = torch.randn(4, channels, 36, 36).contiguous(memory_format=memory_format)
    grad = torch.randn_like(b(x))
    roles = Roles(monkeypatch)
    found = gradients(b, x, grad)
    frozen = copy.deepcopy(b).requires_grad_(False)
    of_input = gradients(frozen, x, grad)
    monkeypatch.undo()
    without_neighbours(monkeypatch)
    assert all(torch.equal(ours, alone) for ours, alone in zip(found, gradients(b, x, grad), strict=True))
    assert all(torch.equal(ours, alone) for ours, alone in zip(of_input, gradients(frozen, x, grad), strict=True))
    by_library = live and memory_format == FORMATS[0]  # all but 3x3 kernels with stride 1
    assert any(reads for reads, _ in roles.told) or (by_library and kind is fnn.Bottleneck and stride > 1)
    assert any(forks for _, forks in roles.told) or (by_library and (kind is fnn.Bottleneck or stride > 1))


def test_who_reads_what() -> None:
    """Which of a part's convolutions alone read their input, and whose input is read again, by whom it is left as it is."""

    def layer(addition: Addition | None = None) -> BoundConvolution:
        return BoundConvolution(nn.Conv2d(1, 1, 1), None, True, addition, None)

    kept, written = (Addition(0, left, True) for left in ("main", "shortcut"))
    inner, own = Addition(1, "main", False), Addition(0, "main", False)
    call = BoundCall(nn.Identity(), (), {})
    for nodes, reads, sole, forks in (
        ((layer(), layer(kept)), ((0,), (1, 0)), {1}, {0}),
        ((layer(), layer(written)), ((0,), (1, 0)), {1}, set()),
        ((layer(), layer(inner)), ((0,), (1, 1)), {0}, set()),
        ((layer(own),), ((0, 0),), set(), set()),
        ((layer(), layer(), layer(inner)), ((0,), (1,), (2, 1)), {0, 2}, {1}),
        ((layer(own), layer(kept)), ((0, 0), (1, 0)), {1}, set()),
        ((layer(), call, layer(Addition(2, "main", False))), ((0,), (0,), (1, 2)), {2}, set()),
    ):
        part = _part(nodes, tuple([values[0] for values in reads]), reads)
        assert (part.sole, part.forks) == (sole, forks), reads


def test_which_neighbours(kernels: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second convolution masks, the first one adds; nothing is added where the input wants no gradient."""
    b = block(32)
    roles = Roles(monkeypatch)
    b(torch.randn(4, 32, 16, 16).requires_grad_())
    assert roles.told == [(False, True), (True, False)]
    assert roles[1].reads is not None
    assert roles[1].reads.reader_masks
    del roles[:]
    b(torch.randn(4, 32, 16, 16))
    assert roles.told == [(False, False), (True, False)]
    with torch.no_grad():
        b(torch.randn(4, 32, 16, 16))
    assert len(roles) == 2
    del roles[:]
    b.eval()(torch.randn(4, 32, 16, 16))
    assert roles[0].makes is roles[1].reads is not None
    assert roles[0].makes.reader_masks
    assert roles[1].makes is not None
    assert not roles[1].makes.reader_masks


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("kind", [fnn.BasicBlock, fnn.Bottleneck])
def test_one_pass_is_left(kernels: object, monkeypatch: pytest.MonkeyPatch, kind: Callable[..., nn.Module], live: bool) -> None:
    """Of a block with two or three ReLUs: the last one's."""
    b = kind(128, 32).train(live).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if kind is fnn.BasicBlock:
        b = kind(128, 128).train(live).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(4, 128, 36, 36, requires_grad=True).contiguous(memory_format=torch.channels_last)
    passes, run = [], CpuBackend.run_relu_backward

    def counted(self: CpuBackend, *operands: Any) -> None:
        passes.append(operands)
        run(self, *operands)

    monkeypatch.setattr(CpuBackend, "run_relu_backward", counted)
    b(x).sum().backward()
    assert len(passes) == 1


@pytest.mark.parametrize("live", [True, False])
def test_under_autocast(kernels: object, monkeypatch: pytest.MonkeyPatch, live: bool) -> None:
    """What is cast is another value than the block's input, which others read as it is; the results have eager's dtypes."""
    torch.manual_seed(0)
    b = fnn.BasicBlock(64, 64).train(live)
    b.conv1 = nn.Conv2d(64, 64, 3, padding=1)
    roles = Roles(monkeypatch)
    for x in (torch.randn(4, 64, 16, 16), torch.randn(4, 64, 16, 16).to(torch.bfloat16)):
        found = []
        for run in (b, lambda t: fnn.BasicBlock._plain_forward(b, t)):  # type: ignore[arg-type]
            leaf = x.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                y = run(leaf)
            found.append([y, *torch.autograd.grad(y.float().sum(), [leaf, *b.parameters()])])
        assert [t.dtype for t in found[0]] == [t.dtype for t in found[1]]
    assert roles.told == ([(False, False), (True, False), (False, True), (True, False)] if live else [])


def test_who_listens_sees_operators(kernels: object) -> None:
    b = block(32)
    with Calls() as calls:
        b(torch.randn(4, 32, 16, 16)).sum().backward()
    assert len(calls.of(CONV)) == 2
    assert len(calls.of(INPUT_GRADIENT)) == 1


@pytest.mark.parametrize("live", [True, False])
def test_nothing_is_left_to_add(kernels: object, live: bool) -> None:
    """The input has one reader in the graph: the first convolution, to which the other's gradient goes."""
    x = torch.randn(4, 32, 16, 16, requires_grad=True)
    y = block(32).train(live)(x)
    readers = [node.name() for node in backward_nodes(y) for following, _ in node.next_functions if getattr(following, "variable", None) is x]
    assert readers == ["ConvBiasAddReLUBackward"]


class ProjectionFirst(nn.Module):
    """The projection is written in front of the first layer, and the sum over the projection."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.conv2, self.bn2 = nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.conv3, self.bn3 = nn.Conv2d(64, 64, 1, bias=False), nn.BatchNorm2d(64)

    def forward(self, x: Tensor) -> Tensor:
        total = self.bn3(self.conv3(x))
        total += self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(total)


@pytest.mark.parametrize("live", [True, False])
def test_a_projection_that_is_written_first(kernels: object, monkeypatch: pytest.MonkeyPatch, live: bool) -> None:
    torch.manual_seed(0)
    fused = nn.Sequential(nn.Conv2d(3, 64, 1), ProjectionFirst()).train(live).to(memory_format=torch.channels_last)
    fused_resnet.fuse_(fused)
    x, grad = (torch.randn(4, channels, 20, 20).contiguous(memory_format=torch.channels_last) for channels in (3, 64))
    roles = Roles(monkeypatch)
    found = gradients(fused, x, grad)
    assert sorted(roles.told) == [(False, False), (False, True), (True, False)]
    monkeypatch.undo()
    without_neighbours(monkeypatch)
    assert all(torch.equal(ours, alone) for ours, alone in zip(found, gradients(fused, x, grad), strict=True))


@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("network", ["resnet18", "resnet50"])
def test_networks(
    kernels: object, monkeypatch: pytest.MonkeyPatch, network: str, live: bool, memory_format: torch.memory_format
) -> None:
    """All gradients of whole networks in float64, ours behind live norms too, as of PyTorch alone. Some 10^4 roundings are lost on the way
    through fifty norms (measured: 1.5e-12); a ReLU that decided otherwise would move one gradient by 1e-4."""
    eager = _plain.randomise(getattr(_plain, network)(), torch.Generator().manual_seed(0))
    eager = eager.double().train(live).to(memory_format=memory_format)
    ours = copy.deepcopy(eager)
    fused_resnet.fuse_(ours)
    monkeypatch.setattr(executor, "how_to_train", lambda *arguments: how_to_train(*arguments[:-1], torch.float32))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=memory_format)
    grad = torch.randn(2, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for mine, theirs in zip(gradients(ours, x, grad), gradients(eager, x, grad), strict=True):
        assert testing.norm_error(mine, theirs) < 1e-10


@pytest.mark.parametrize("live", [True, False])
def test_differentiated_further(kernels: object, monkeypatch: pytest.MonkeyPatch, live: bool) -> None:
    """Second derivatives of everything in everything, as PyTorch's but for what some thousands of roundings lose. Not to the bit: sums of more
    than two gradients come in another order."""
    b = block(16, torch.float64).train(live)
    parameters = list(b.parameters())
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(executor, "how_to_train", lambda *arguments: "ours")  # float64 behind a live norm is the library's otherwise

    def second(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        first = torch.autograd.grad(run(leaf).square().sum(), [leaf, *parameters], create_graph=True)
        found = [torch.autograd.grad(t.square().sum(), [leaf, *parameters], retain_graph=True, allow_unused=True) for t in first]
        return [*(t.detach() for t in first), *(t for each in found for t in each if t is not None)]

    roles = Roles(monkeypatch)
    found = second(b)
    assert roles.told == [(False, True), (True, False)]
    expected = second(lambda leaf: fnn.BasicBlock._plain_forward(b, leaf))  # type: ignore[arg-type]
    assert len(found) == len(expected) > 50
    for ours, theirs in zip(found, expected, strict=True):
        assert testing.norm_error(ours, theirs) < 2**-53 * 1e4


def test_a_graph_of_neighbours(kernels: object) -> None:
    """Kept, it gives the same again, whichever gradients are wanted; with only the input's other reader, that one's; in another thread."""
    b, x = block(32), torch.randn(4, 32, 16, 16, requires_grad=True)
    y = b(x)
    grad = torch.randn_like(y)
    everything = torch.autograd.grad(y, [x, *b.parameters()], grad, retain_graph=True)
    (of_input,) = torch.autograd.grad(y, [x], grad, retain_graph=True)
    of_weights = torch.autograd.grad(y, [b.conv1.weight, b.conv2.weight], grad, retain_graph=True)  # type: ignore[union-attr]
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(torch.autograd.grad(y, [x, *b.parameters()], grad, retain_graph=True)))
    thread.start()
    thread.join()
    assert all(torch.equal(a, c) for a, c in zip(everything, found, strict=True))
    assert torch.equal(of_input, everything[0])
    assert all(torch.equal(a, c) for a, c in zip(of_weights, (everything[1], everything[4]), strict=True))

    role = Role(forks=True)
    weight = torch.randn(32, 32, 3, 3, requires_grad=True)
    parameters = ((1, 1), (1, 1, 1, 1), (1, 1), 1, False)
    z, again = convolution_in_block(role, x, weight, None, None, *parameters)
    assert torch.equal(again, x)
    (alone,) = torch.autograd.grad(again, x, grad, retain_graph=True)
    assert torch.equal(alone, grad)
    without = torch.autograd.grad(z, [x, weight], torch.ones_like(z), retain_graph=True)
    both = torch.autograd.grad([z, again], [x, weight], [torch.ones_like(z), grad])
    assert torch.equal(both[0], without[0] + grad)
    assert torch.equal(both[1], without[1])


def test_one_input_many_ends(kernels: object) -> None:
    """Plans are kept: the same tensors with another end are another plan."""
    grad, weight = torch.randint(-3, 4, (1, 5, 6, 7)).double(), torch.randint(-1, 2, (5, 8, 3, 3)).double()
    assert not why_not(torch.zeros(1, 8, 6, 7).double(), weight, padding=1, gradient="input")
    geometry = Geometry((1, 1), Padding(1, 1, 1, 1))
    size = torch.Size((1, 8, 6, 7))
    alone = gradient("input", grad, weight, size, False, geometry)
    end = torch.randn(size, dtype=torch.float64)
    for laid in (end, end.contiguous(memory_format=torch.channels_last)):
        for masked in (True, False, True):
            found = gradient("input", grad, weight, size, False, geometry, laid, masked)
            assert torch.equal(found, torch.where(end <= 0, 0, alone) if masked else alone + end)


def test_relu_in_place(kernels: object) -> None:
    """As PyTorch's, differentiated once and twice, where nobody masks for it; who writes over the result is told."""
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)

    def function(a: Tensor) -> Tensor:
        return relu_(a * 1, Rectified())

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)
    before = x * 1
    y = relu_(before, Rectified())
    assert y is before
    assert torch.equal(y, torch.relu(x))
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_bias_gradient_does_not_depend_on_the_threads(kernels: object) -> None:
    """In either memory format, and of a gradient that is expanded; PyTorch's own depends on them where one channel has many pixels."""
    for shape in ((8, 1, 128, 128), (2, 3, 61, 67), (2, 17, 61, 67), (2, 64, 61, 67)):
        for memory_format in FORMATS:
            grad = torch.randn(shape).contiguous(memory_format=memory_format)
            for g in (grad, grad[:1, :, :1, :1].expand(shape)):
                backend = CpuBackend(_extension.cpu, "")
                found = []
                for threads in (1, 2, 5):
                    torch.set_num_threads(threads)
                    found.append(backend.bias_gradient(g))
                assert all(torch.equal(sums, found[0]) for sums in found)
                lost = g[0, 0].numel() * 2**-24 * g.double().abs().sum((0, 2, 3))  # by as many additions as a plane has pixels, at most
                assert ((found[0].double() - g.double().sum((0, 2, 3))).abs() <= lost).all()
