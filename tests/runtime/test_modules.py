"""The modules of fused_resnet.nn and the networks of fused_resnet.models: torchvision's interface, the paper's sizes."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _blocks import assert_close, layers, randomise, truth_of
from _torchvision import import_torchvision
from torch import Tensor, nn

import fused_resnet
import fused_resnet.nn as fnn
from fused_resnet import models
from fused_resnet.fusion import fuse_, unfuse_


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _projection(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


BLOCKS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "basic": ("BasicBlock", (16, 16), {}),
    "basic stride": ("BasicBlock", (8, 16, 2, _projection(8, 16, 2)), {}),
    "bottleneck": ("Bottleneck", (16, 4), {}),
    "bottleneck stride": ("Bottleneck", (16, 8, 2, _projection(16, 32, 2)), {}),
    "bottleneck groups": ("Bottleneck", (64, 16), {"groups": 4, "base_width": 32}),
    "bottleneck dilation": ("Bottleneck", (16, 4), {"dilation": 2}),
}


@pytest.mark.parametrize("name", sorted(BLOCKS))
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_blocks_are_torchvisions(name: str, mode: str) -> None:
    """Constructor, attributes, state_dict, values and running statistics."""
    kind, args, kwargs = BLOCKS[name]
    theirs = getattr(import_torchvision().models.resnet, kind)(*copy.deepcopy(args), **kwargs)
    ours = getattr(fnn, kind)(*copy.deepcopy(args), **kwargs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_children()] == [n for n, _ in theirs.named_children()]
    assert (ours.stride, ours.expansion) == (theirs.stride, theirs.expansion)
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    ours, theirs = ours.train(mode == "train"), theirs.train(mode == "train")
    x = torch.randn(2, args[0], 8, 8)
    truth, magnitude = truth_of(theirs, x)
    assert_close(ours(x).detach(), theirs(x).detach(), truth, layers(theirs), magnitude)
    for key, t in theirs.state_dict().items():
        # Statistics are of a convolution's outputs, of which Winograd's transforms round each by 8.2 u sqrt(144) < 1e-5 of its size, 1.
        tolerance = 1e-5 if key.endswith(("running_mean", "running_var")) else 0
        torch.testing.assert_close(ours.state_dict()[key], t, rtol=tolerance, atol=tolerance, msg=key)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": 2}, "groups must be 1 in a BasicBlock"),
        ({"base_width": 128}, "base_width must be 64 in a BasicBlock"),
        ({"dilation": 2}, "dilation must be 1 in a BasicBlock"),
    ],
)
def test_basic_block_refuses(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fnn.BasicBlock(8, 8, **arguments)
    fnn.BasicBlock(8, 8)


@pytest.mark.parametrize("make", [lambda n: fnn.BasicBlock(8, 8, norm_layer=n), lambda n: fnn.Bottleneck(8, 2, norm_layer=n)])
def test_bias_only_identity(make: Any) -> None:
    """With a last layer of zeros the block hands a non-negative input through, bit for bit: the lesson's first fact."""
    block = make(nn.Identity)
    last = [m for m in block.modules() if isinstance(m, nn.Conv2d)][-1]
    assert all(m.bias is not None for m in block.modules() if isinstance(m, nn.Conv2d))
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    x = torch.rand(2, 8, 7, 5)
    assert torch.equal(block(x), x)
    with torch.no_grad():
        assert torch.equal(block(x.double().float()), x)
        assert block(x) is not x
    nn.init.ones_(last.bias)
    assert torch.equal(block(x), x + 1)


@pytest.mark.parametrize("pad", ["end", "both"])
@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize("outputs", [4, 7, 8])
def test_zero_pad_shortcut(pad: str, size: int, outputs: int) -> None:
    x = torch.randn(2, 4, size, size, requires_grad=True)
    y = fnn.ZeroPadShortcut(4, outputs, 2, pad)(x)
    before = (outputs - 4) // 2 if pad == "both" else 0
    assert y.shape == F.conv2d(x, torch.zeros(outputs, 4, 3, 3), stride=2, padding=1).shape
    assert torch.equal(y[:, before : before + 4], x[:, :, ::2, ::2])
    assert y.detach().abs().sum() == x[:, :, ::2, ::2].detach().abs().sum() or torch.allclose(
        y.detach().abs().sum(), x[:, :, ::2, ::2].detach().abs().sum(), rtol=torch.finfo(x.dtype).eps * x.numel()
    )
    y.sum().backward()
    block = fnn.BasicBlock(4, outputs, 2, fnn.ZeroPadShortcut(4, outputs, 2, pad)).eval()
    with torch.no_grad():
        truth, magnitude = _plain_truth(block, x.detach())
        assert_close(block(x.detach()), block._plain_forward(x.detach()), truth, 2, magnitude)


def _plain_truth(block: Any, x: Tensor) -> tuple[Tensor, float]:
    truth = copy.deepcopy(block).double()._plain_forward(x.double())
    return truth, truth.abs().max().item()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((8, 4), "out_channels must be at least in_channels = 8, got 4"),
        ((8, 8, 0), "stride must be at least 1, got 0"),
        ((8, 8, 1, "left"), "pad must be 'end' or 'both', got 'left'"),
    ],
)
def test_zero_pad_refuses(args: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fnn.ZeroPadShortcut(*args)


def test_same_without_change_is_the_identity() -> None:
    x = torch.randn(1, 4, 3, 3)
    assert fnn.ZeroPadShortcut(4, 4)(x) is x


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (1, 3), "padding": "same", "relu": False},
        {"kernel_size": 3, "stride": 2, "padding": (1, 2), "groups": 2, "bias": False},
        {"kernel_size": 3, "padding": 2, "dilation": 2, "dtype": torch.float64},
    ],
)
def test_conv_bias_add_relu_2d(arguments: dict[str, Any]) -> None:
    layer = fnn.ConvBiasAddReLU2d(4, 6, **arguments)
    x = torch.randn(2, 4, 8, 8, dtype=layer.weight.dtype)
    parameters = layer.weight, layer.bias
    geometry = layer.stride, layer.padding, layer.dilation, layer.groups, layer.relu
    skip = torch.randn_like(F.conv2d(x, *parameters, *geometry[:4]))
    for shortcut in (None, skip):
        eager = fused_resnet.reference.conv_bias_add_relu(x, *parameters, shortcut, *geometry).detach()
        wide = [None if t is None else t.double() for t in (x, *parameters, shortcut)]
        truth = fused_resnet.reference.conv_bias_add_relu(*wide, *geometry).detach()  # type: ignore[arg-type]
        assert_close(layer(x, shortcut).detach(), eager, truth, 1)
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x, shortcut), layer(x, shortcut))
    assert list(layer.state_dict()) == [n for n, p in zip(("weight", "bias"), parameters, strict=True) if p is not None]
    assert f"relu={layer.relu}" in repr(layer)


def test_conv_refuses_padding_modes() -> None:
    with pytest.raises(ValueError, match="padding_mode must be 'zeros', got 'reflect'"):
        fnn.ConvBiasAddReLU2d(4, 4, 3, padding=1, padding_mode="reflect")


def test_other_norms_run_unfused_and_say_so() -> None:
    block = fnn.BasicBlock(8, 8, norm_layer=lambda c: nn.GroupNorm(2, c))
    x = torch.randn(1, 8, 4, 4)
    with pytest.warns(RuntimeWarning, match="bn1 \\(GroupNorm\\) is not a convolution"):
        y = block(x)
    assert torch.equal(y, block._plain_forward(x))


def test_copies_and_compilation() -> None:
    """Also when the first call of a block is a compiled one."""
    block = randomise(fnn.Bottleneck(8, 2)).eval()
    x = torch.randn(1, 8, 6, 6)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend="eager")(x).detach()
    exported = torch.export.export(copy.deepcopy(block), (x,)).module()(x).detach()
    truth, magnitude = truth_of(_unfused(copy.deepcopy(block)), x)
    for y in (compiled, exported, copy.deepcopy(block)(x).detach(), pickle.loads(pickle.dumps(block))(x).detach()):
        assert_close(y, block._plain_forward(x).detach(), truth, 3, magnitude)


# ---------------------------------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "zero_init"), [("resnet18", False), ("resnet18", True), ("resnet34", False), ("resnet50", True)]
)
def test_networks_are_torchvisions(name: str, zero_init: bool) -> None:
    """The same seed gives the same parameters, bit for bit; the same parameters the same function."""
    torch.manual_seed(3)
    ours = getattr(models, name)(num_classes=10, zero_init_residual=zero_init)
    torch.manual_seed(3)
    theirs = getattr(import_torchvision().models, name)(num_classes=10, zero_init_residual=zero_init)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    assert all(torch.equal(mine[key], other[key]) for key in mine)
    assert [type(m).__name__ for m in ours.modules()] == [type(m).__name__ for m in theirs.modules()]
    randomise(theirs).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 64)
    truth, magnitude = truth_of(theirs, x)
    with torch.no_grad():
        assert_close(ours.eval()(x), theirs(x), truth, layers(theirs), magnitude)
    report = fuse_(ours)
    assert len(report.fused) == sum(isinstance(m, (fnn.BasicBlock, fnn.Bottleneck)) for m in ours.modules())
    assert all(entry.became.startswith("already fused: ") for entry in report.fused)
    unfuse_(ours)
    assert any(isinstance(m, (fnn.BasicBlock, fnn.Bottleneck)) for m in ours.modules())


@pytest.mark.parametrize(("name", "count"), [("resnet101", 44_549_160), ("resnet152", 60_192_808)])
def test_deep_networks_have_torchvisions_size(name: str, count: int) -> None:
    with torch.device("meta"):
        model = getattr(models, name)()
    assert sum(p.numel() for p in model.parameters()) == count


# He et al. 2015, table 6, exact: option A, batch norm, 10 classes.
CIFAR_SIZES = {20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018, 110: 1_727_962}


@pytest.mark.parametrize("depth", sorted(CIFAR_SIZES))
def test_cifar_sizes(depth: int) -> None:
    with torch.device("meta"):
        model = models.cifar_resnet(depth)
        plain = models.cifar_resnet(depth, plain=True)
    assert sum(p.numel() for p in model.parameters()) == CIFAR_SIZES[depth]
    assert list(plain.state_dict()) == list(model.state_dict())
    weighted = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(weighted) == depth


@pytest.mark.smoke
@pytest.mark.parametrize("norm", [None, nn.Identity])
@pytest.mark.parametrize("option", ["A", "B", "C", "plain"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_cifar_networks(norm: Any, option: str, mode: str) -> None:
    """Against the same network run through the blocks' plain definitions, on one channel of 8x8 pixels."""
    arguments = {"plain": True} if option == "plain" else {"shortcut": option}
    model = models.cifar_resnet(14, norm_layer=norm, in_channels=1, width=8, **arguments)
    model = randomise(model).train(mode == "train")  # type: ignore[assignment]
    x = torch.randn(4, 1, 8, 8)
    plain = _unfused(copy.deepcopy(model))
    truth, magnitude = truth_of(plain, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        ours = model(x)
    assert ours.shape == (4, 10)
    assert_close(ours.detach(), plain(x).detach(), truth, 14, magnitude)
    ours.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    projections = sum(getattr(m, "downsample", None) is not None for m in model.modules())
    assert projections == {"A": 2, "B": 2, "C": 6, "plain": 0}[option]
    assert any(isinstance(m, fnn.ZeroPadShortcut) for m in model.modules()) == (option == "A")


def _unfused(model: nn.Module) -> nn.Module:
    for m in model.modules():
        if isinstance(m, (fnn.BasicBlock, fnn.Bottleneck)):
            m.forward = m._plain_forward  # type: ignore[method-assign]
    return model


def test_zero_init_makes_every_block_its_shortcut() -> None:
    for norm in (None, nn.Identity):
        model = models.cifar_resnet(8, norm_layer=norm, zero_init_residual=True).eval()
        x = torch.rand(1, 16, 6, 6)
        assert torch.equal(model.layer1(x), x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 18}, "depth must be 6n \\+ 2 with n at least 1 .*, got 18"),
        ({"depth": 2}, "depth must be 6n \\+ 2 with n at least 1 .*, got 2"),
        ({"depth": 20, "shortcut": "D"}, "shortcut must be 'A', 'B' or 'C', got 'D'"),
    ],
)
def test_cifar_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.cifar_resnet(**arguments)


@pytest.mark.parametrize("norm_layer", [None, nn.Identity], ids=["batch norm", "biases only"])
@pytest.mark.parametrize("shortcut", ["A", "B", "C"])
def test_a_zero_start_leaves_no_channel_dead(shortcut: str, norm_layer: Any) -> None:
    """Every channel of a last layer gets a gradient at the start, also the new ones behind a zero-padded shortcut (A). Behind a
    projection (B, C) a channel may happen to be negative for all of a batch; there all blocks start as their shortcuts."""
    model = models.cifar_resnet(14, shortcut, norm_layer=norm_layer, zero_init_residual=True)
    model(torch.randn(16, 3, 32, 32)).square().sum().backward()
    zero = 0
    for block in model.modules():
        if isinstance(block, fused_resnet.nn.BasicBlock):
            last = block.conv2.weight if norm_layer is not None else block.bn2.weight
            zero += int(not last.any())
            gradient = last.grad.reshape(len(last), -1).abs().sum(1)
            dead = int((gradient == 0).sum())
            assert dead == 0 or (shortcut != "A" and dead < len(last) // 4), f"{dead} of {len(last)} channels get no gradient"
    assert zero == {"A": 4, "B": 6, "C": 6}[shortcut]
