"""What the tests of convolutions in a row share: networks, the twin that counts, and node by node beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import _cuda_twin
import pytest
import torch
from _blocks import randomise
from torch import Tensor, nn

import fused_resnet
from fused_resnet.cases import BlockCase
from fused_resnet.ops import cuda, plans
from fused_resnet.runtime import executor, launches

LAST = torch.channels_last
BF16 = torch.bfloat16
BLOCKS = [
    BlockCase(kind, planes, inner, (8, 8), stride, shortcut)
    for kind, planes, inner, stride, shortcut in (
        ("basic", 16, 16, 1, "identity"),
        ("basic", 16, 24, 2, "projection"),
        ("bottleneck", 32, 8, 1, "identity"),
        ("bottleneck", 16, 8, 2, "projection"),
    )
]


class Counter:
    """The twin, and of each call of a sequence how many launches it made, by which kernels, and how many of its values were its caller's."""

    def __init__(self, twin: ModuleType) -> None:
        self.twin = twin
        self.rows: list[int] = []
        self.kernels: list[set[str]] = []
        self.given: list[int] = []

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self.twin, attribute)

    def Sequence(self, steps: list[Any]) -> Any:
        sequence, counter = self.twin.Sequence(steps), self
        kernels = {kernel.algorithm for kernel, *_ in steps}

        class Counted:
            def run(self, addresses: list[int], *arguments: Any) -> None:
                counter.rows.append(len(steps))
                counter.kernels.append(kernels)
                counter.given.append(len(addresses))
                sequence.run(addresses, *arguments)

        return Counted()


@contextmanager
def counting() -> Iterator[Counter]:
    """The twin, counted, for CPU tensors that want no gradient."""
    module = Counter(_cuda_twin.build())
    with plans.backends.using(cpu=cuda.CudaBackend(module)), torch.no_grad():  # type: ignore[arg-type]
        yield module


@contextmanager
def node_by_node(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(launches, "run", lambda *arguments: None)
        patch.setattr(executor, "_repeat", lambda *arguments: None)
        yield


def both(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """A converted model's output, which is the same node by node, to the bit and in its strides."""
    found: Tensor = model(x)
    with node_by_node(monkeypatch):
        expected: Tensor = model(x)
    assert found.stride() == expected.stride()
    assert torch.equal(found, expected)
    return found


def converted(module: nn.Module, dtype: torch.dtype = BF16, form: torch.memory_format = LAST) -> nn.Module:
    module = randomise(module).eval().to(dtype).to(memory_format=form)  # type: ignore[call-overload]
    assert fused_resnet.fuse_(module).fused
    return module


def images(*shape: int, dtype: torch.dtype = BF16, form: torch.memory_format = LAST) -> Tensor:
    return torch.randn(shape).relu_().to(dtype).contiguous(memory_format=form)


class Net(nn.Module):
    """A stem, blocks of both kinds, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(*(case.eager() for case in (BLOCKS[1], BlockCase("basic", 24, 24, (4, 4)))))
        self.layer2 = nn.Sequential(BlockCase("bottleneck", 24, 8, (4, 4), 2, "projection").eager())
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.avgpool(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(x, 1))  # type: ignore[no-any-return]
