"""Conversion: converted models compute what they did before, in every mode and after every change, and stay themselves.

That the comparison notices a dropped bias, a wrong eps and a lost shortcut is seen in test_conversion_faults.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import _blocks as blocks
import pytest
import torch
from _blocks import assert_close, assert_same, randomise, truth_of
from _conversion import SPELLINGS, block_pair, quiet_and_seeded, small
from _torchvision import import_timm, import_torchvision
from torch import Tensor, nn

from fused_resnet.fusion import fuse_

__all__ = ["quiet_and_seeded"]  # a fixture

def _torchvision(name: str) -> Callable[[], nn.Module]:
    return lambda: import_torchvision().models.get_model(name, weights=None)


def _timm(name: str) -> Callable[[], nn.Module]:
    return lambda: import_timm().create_model(name)


# name: (model, blocks)
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "torchvision resnet18": (_torchvision("resnet18"), 8),
    "torchvision resnet34": (_torchvision("resnet34"), 16),
    "torchvision resnet50": (_torchvision("resnet50"), 16),
    "torchvision resnext": (lambda: small("Bottleneck", groups=32, width_per_group=4), 4),
    "torchvision wide": (lambda: small("Bottleneck", width_per_group=128), 4),
    "torchvision dilated": (lambda: small("Bottleneck", replace_stride_with_dilation=[False, True, True]), 4),
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
    original, converted = block_pair(kind, mode)
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
    original, converted = block_pair(kind)
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
    original, converted = block_pair(kind)
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
    original, converted = block_pair(kind, mode)
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
    original = randomise(small("BasicBlock")).eval()
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
    _, converted = block_pair("functional")
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        expected = converted(x)
    assert torch.equal(converted(x), expected)


@pytest.mark.smoke
def test_frozen_batch_norm_in_training() -> None:
    """model.train() with some norms in eval: each layer decides for itself."""
    for frozen in ("na", "nb"):
        original, converted = block_pair("functional", "train")
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
    original, converted = block_pair("functional")
    x = torch.randn(2, 8, 6, 6)
    with torch.set_grad_enabled(grad):
        before = converted(x)
        for model in (original, converted):
            change(model)
        assert not torch.equal(converted(x), before)
        assert_same(converted, original, x)


