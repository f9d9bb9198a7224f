"""A network of which every child can be looked through, beside its converted copy; for the tests of networks as native calls."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from _blocks import assert_same, randomise
from torch import Tensor, nn

from fused_resnet import _plain
from fused_resnet import nn as fnn
from fused_resnet.fusion import fuse_
from fused_resnet.runtime import fused
from fused_resnet.runtime.bound import BoundCall

HEAD = ("avgpool", "flatten", "fc")
WHOLE = ["conv1", "maxpool", "layer1", "layer2", "layer3", *HEAD]  # one native call


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    fused._warned.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs unfused")
        yield


class Network(nn.Module):
    """A stem, blocks with an identity, a projection (joined to the last convolution, and not) and a zero-padded shortcut, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(_plain.BasicBlock(16, 16), _plain.BasicBlock(16, 16))
        projections = [nn.Sequential(nn.Conv2d(c, 24, 1, stride, bias=False), nn.BatchNorm2d(24)) for c, stride in ((16, 2), (24, 1))]
        self.layer2 = nn.Sequential(_plain.BasicBlock(16, 24, 2, projections[0]), _plain.Bottleneck(24, 6, 1, projections[1]))
        self.layer3 = nn.Sequential(_plain.BasicBlock(24, 32, 2, fnn.ZeroPadShortcut(24, 32, 2)), _plain.BasicBlock(32, 32))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(self.maxpool(x))))
        result: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return result


def make(network: type[nn.Module] = Network) -> Any:
    torch.manual_seed(0)
    model = randomise(network()).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # tiny ones amplify rounding errors until nothing else is seen
            assert module.running_var is not None
            module.running_var.clamp_(min=0.5)
    return model


def pair(x: Tensor) -> tuple[Any, Any]:
    """(original, converted), the converted one called often enough that its calls are repetitions."""
    original = make()
    converted = copy.deepcopy(original)
    assert len(fuse_(converted).fused) == 6
    with torch.no_grad():
        for _ in range(3):
            assert_same(converted, original, x)
    assert native(converted) == [WHOLE]
    return original, converted


@pytest.fixture(params=["contiguous", "channels_last"])
def x(request: pytest.FixtureRequest) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 32, 32).contiguous(memory_format=getattr(torch, request.param.replace("contiguous", "contiguous_format")))


def parts(model: Any) -> Any:
    return model._fused_resnet.current.inlined.parts


def native(model: Any) -> list[list[str]]:
    """The children in each native call that is kept to be repeated."""
    names = {id(module): name for name, module in model.named_modules()}
    bound = model._fused_resnet.current.inlined
    found = []
    for part in bound.parts:
        if part.segment is not None and part.segment.number in bound.store.cached:
            called = [
                node.function if isinstance(node, BoundCall) else getattr(node, "conv", getattr(node, "module", None)) for node in part.nodes
            ]
            found.append([names.get(id(function)) or function.__name__ for function in called])
    return found


def hook(module: nn.Module) -> Any:
    return module.register_forward_hook(lambda module, args, output: output * 2)
