"""The gradient of max pooling by our kernel against PyTorch's, value for value: on integers no order of additions rounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _calls import Calls, nodes
from _pooling import SHAPES, WINDOWS
from torch import Tensor, nn

from fused_resnet import _plain, fuse_, testing
from fused_resnet._settings import Plans
from fused_resnet.ops.role import Rectified
from fused_resnet.runtime import pooling
from fused_resnet.runtime.training import Training

LAST = torch.channels_last


@pytest.fixture(autouse=True)
def _of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our kernel's, however small: small maps have more edges."""
    monkeypatch.setattr(pooling, "FEW_CHANNELS_LAST", 0)


def pooled(module: nn.MaxPool2d, x: Tensor, rectified: Rectified | None = None) -> Tensor | None:
    return pooling.max_pool(Plans(9), module, x, True, rectified)


def values(shape: tuple[int, ...], dtype: torch.dtype, rectified: bool) -> Tensor:
    """Of which many are equal, with NaN, infinities and zeros of both signs among them."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-4, 5, shape, generator=generator).to(dtype)
    for i, value in enumerate((float("nan"), float("inf"), float("-inf"), -0.0)):
        x[torch.randint(0, 40, shape, generator=generator) == i] = value
    return (x.relu() if rectified else x).contiguous(memory_format=LAST)


def expected_gradient(module: nn.MaxPool2d, x: Tensor, grad: Tensor, rectified: bool) -> Tensor:
    leaf = x.detach().requires_grad_()
    (found,) = torch.autograd.grad(module(leaf), leaf, grad)
    return torch.where(x <= 0, 0, found) if rectified else found


@pytest.mark.smoke
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rectified", [True, False])
def test_as_pytorchs(isa: str, dtype: torch.dtype, window: str, rectified: bool) -> None:
    """Of equal elements the first has the gradient, of several NaNs the last; and none passes where the ReLU in front gave 0."""
    module = nn.MaxPool2d(**WINDOWS[window])
    ran = 0
    for shape in SHAPES:
        x = values(shape, dtype, rectified).requires_grad_()
        try:
            expected = module(x)
        except RuntimeError:  # the map is smaller than the window
            assert pooled(module, x) is None
            continue
        if expected.stride(1) != 1 or not x.is_contiguous(memory_format=LAST):  # of one channel, one column
            continue
        ran += 1
        relu = Rectified() if rectified else None
        y = pooled(module, x, relu)
        assert y is not None
        assert relu is None or relu.reader_masks
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
        grad = torch.randint(-8, 9, y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        for g in (grad.contiguous(memory_format=LAST), grad, grad[:1, :1, :1, :1].expand(y.shape)):
            (found,) = torch.autograd.grad(y, x, g, retain_graph=True)
            assert torch.equal(found, expected_gradient(module, x, g, rectified)), shape
            assert found.stride() == x.stride()
    assert ran >= 3


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_any_number_of_threads(kernels: Any, threads: int) -> None:
    """One image's channels are cut among them."""
    module = nn.MaxPool2d(3, 2, 1)
    for shape in ((1, 70, 57, 41), (2, 33, 56, 56), (3, 64, 30, 31)):
        x = values(shape, torch.float32, True).requires_grad_()
        torch.set_num_threads(threads)
        y = pooled(module, x, Rectified())
        assert y is not None
        grad = torch.randint(-8, 9, y.shape, generator=torch.Generator().manual_seed(1)).float()
        assert torch.equal(torch.autograd.grad(y, x, grad)[0], expected_gradient(module, x, grad, True))


@pytest.mark.parametrize("rectified", [True, False])
def test_differentiated_further(kernels: Any, rectified: bool) -> None:
    """By PyTorch's functions, as PyTorch's; and a change of what is saved is seen."""
    module = nn.MaxPool2d(3, 2, 1)
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=LAST)
    if rectified:  # of a third of the windows nothing passes
        x = (x - 1.2).relu()
    x.requires_grad_()

    def ours(t: Tensor) -> Tensor:
        y = pooled(module, t, Rectified() if rectified else None)
        assert y is not None
        return y

    def both(function: Any, masked: bool) -> list[Tensor]:
        (first,) = torch.autograd.grad((function(x) + 1).square().sum(), x, create_graph=True)
        first = torch.where(x <= 0, 0, first) if masked else first
        (second,) = torch.autograd.grad(first.square().sum(), x)
        return [first.detach(), torch.where(x <= 0, 0, second) if masked else second]

    torch.testing.assert_close(both(ours, False), both(module, rectified), rtol=2**-50, atol=0)
    moved = x * 1
    y = ours(moved)
    moved.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_one_module_in_two_places(kernels: Any) -> None:
    """Plans are kept: behind a ReLU and elsewhere they are two, and so they are for gradients that lie otherwise."""
    plans, module = Plans(9), nn.MaxPool2d(3, 2, 1)
    x = values((2, 8, 9, 9), torch.float32, True).requires_grad_()
    grad = torch.randint(-8, 9, module(x).shape, generator=torch.Generator().manual_seed(1)).float()
    for rectified in (False, True, False):
        y = pooling.max_pool(plans, module, x, True, Rectified() if rectified else None)
        assert y is not None
        assert torch.equal(torch.autograd.grad(y, x, grad)[0], expected_gradient(module, x, grad, rectified))
    module.padding = 0
    y = pooling.max_pool(plans, module, x, True)
    assert y is not None
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected_gradient(module, x, torch.ones_like(y), False))


def test_one_channel(kernels: Any) -> None:
    """Its maps are both contiguous and channels_last, whatever their strides say; so is the gradient."""
    module = nn.MaxPool2d(3, 2, 1)
    x = torch.empty(2, 1, 9, 8, memory_format=LAST).copy_(values((2, 1, 9, 8), torch.float32, True)).requires_grad_()
    assert x.stride(1) == 1
    y = pooled(module, x, Rectified())
    assert y is not None
    grad = torch.randint(-8, 9, y.shape, generator=torch.Generator().manual_seed(1)).float()
    for g in (grad, grad.expand(y.shape), torch.empty(y.shape, memory_format=LAST).copy_(grad), grad[:, :, :1].expand(y.shape)):
        (found,) = torch.autograd.grad(y, x, g, retain_graph=True)
        assert torch.equal(found, expected_gradient(module, x, g, True))


def test_what_is_left_to_the_module(kernels: Any) -> None:
    module = nn.MaxPool2d(3, 2, 1)
    x = torch.randn(2, 8, 9, 9)
    for other in (x, x.to(torch.bfloat16).contiguous(memory_format=LAST), x.contiguous(memory_format=LAST)[:, :5]):
        assert pooled(module, other.requires_grad_()) is None
    assert pooled(module, x.contiguous(memory_format=LAST).requires_grad_()) is not None
    for other in (x.to_sparse().requires_grad_(), x.tolist(), None):
        assert pooled(module, other) is None
    assert pooling.max_pool(Plans(9), module, x.contiguous(memory_format=LAST).requires_grad_()) is None  # not a step's node


@pytest.mark.parametrize("live", [True, False])
def test_in_a_network(kernels: Any, monkeypatch: pytest.MonkeyPatch, live: bool) -> None:
    """In channels_last, with the gradient through the stem's ReLU; what it does for that changes no bit."""
    torch.manual_seed(0)
    ours: Any = _plain.resnet18().train(live)
    fuse_(ours)
    x = torch.randn(2, 3, 64, 64)
    assert "PoolInTrainingBackward" not in nodes(ours(x))
    ours, x = ours.to(memory_format=LAST), x.contiguous(memory_format=LAST)
    relus: list[Rectified | None] = []
    pool = pooling.max_pool

    def noted(plans: Plans, module: nn.MaxPool2d, x: Tensor, trained: bool, reads: Rectified | None) -> Tensor | None:
        relus.append(reads)
        return pool(plans, module, x, trained, reads)

    monkeypatch.setattr("fused_resnet.runtime.executor.max_pool", noted)
    y = ours(x)
    assert nodes(y).count("PoolInTrainingBackward") == 1
    assert relus[0] is not None
    assert relus[0].reader_masks
    found = torch.autograd.grad(y.sum(), list(ours.parameters()))
    monkeypatch.undo()
    monkeypatch.setattr(Training, "reads", lambda self: None)
    for mine, alone in zip(found, torch.autograd.grad(ours(x).sum(), list(ours.parameters())), strict=True):
        assert torch.equal(mine, alone)
    monkeypatch.setattr("fused_resnet.runtime.executor.max_pool", lambda *arguments: None)
    plain = torch.autograd.grad(ours(x).sum(), list(ours.parameters()))
    # Of the layers behind it to the bit. In front of it four gradients at most are added in another order: three roundings a term, of sums over
    # 2048 pixels whose terms have either sign, and twice that for the norm in between.
    lost = 2 * 3 * 2**-24 * 2048**0.5
    for (key, _), mine, theirs in zip(ours.named_parameters(), found, plain, strict=True):
        behind = key.startswith(("layer", "fc"))
        assert torch.equal(mine, theirs) if behind else testing.norm_error(mine, theirs.double()) < lost, key


def test_who_listens_sees_pytorchs(kernels: Any) -> None:
    ours: Any = _plain.resnet18().train().to(memory_format=LAST)
    fuse_(ours)
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=LAST)
    with Calls() as calls:
        y = ours(x)
    assert len(calls.of(torch.ops.aten.max_pool2d_with_indices.default)) == 1
    assert "PoolInTrainingBackward" not in nodes(y)


def test_a_hook_on_the_pooling_is_heard(kernels: Any) -> None:
    ours: Any = _plain.resnet18().train().to(memory_format=LAST)
    fuse_(ours)
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=LAST)
    heard: list[Any] = []
    ours(x)
    ours.maxpool.register_full_backward_hook(lambda module, grads, outputs: heard.append(grads))
    ours(x).sum().backward()
    assert len(heard) == 1
