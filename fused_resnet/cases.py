"""The layer table: every distinct convolution and residual block of ResNet-18, ResNet-50 (v1.5) and CIFAR ResNet-20.

Tests, ``fused-resnet bench`` and the suites in ``bench/`` all take their shapes from here. The blocks are written down; the
convolutions are taken out of the blocks, so the two tables cannot disagree. Sizes are for 224x224 images (32x32 for CIFAR).

``AWKWARD`` holds small convolutions at the edges of what a kernel handles; it is for tests, not for timing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from . import _plain
from .ops.spec import Pair, output_size

__all__ = ["AWKWARD", "BLOCKS", "CONVS", "NETWORKS", "BlockCase", "ConvCase", "Operands", "find"]

NETWORKS = {"resnet18": (224, _plain.resnet18), "resnet50": (224, _plain.resnet50), "cifar20": (32, _plain.cifar_resnet20)}


class Operands(NamedTuple):
    """The four tensors of one call of ``conv_bias_add_relu``."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    shortcut: Tensor | None


@dataclass(frozen=True)
class ConvCase:
    """One convolution with its end: bias, shortcut, ReLU. ``size`` is the input's height and width."""

    channels: int
    outputs: int
    size: Pair
    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair | str = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    bias: bool = True
    shortcut: bool = False
    relu: bool = True
    batch: int = 1

    @property
    def name(self) -> str:
        parts = [f"{self.kernel[0]}x{self.kernel[1]} {self.channels}->{self.outputs} @ {self.size[0]}x{self.size[1]}"]
        if self.stride != (1, 1):
            parts.append(f"/{self.stride[0]}" if self.stride[0] == self.stride[1] else f"/{self.stride[0]},{self.stride[1]}")
        usual = "same" if isinstance(self.padding, str) else tuple((k - 1) // 2 for k in self.kernel)
        if self.padding != usual or isinstance(self.padding, str):
            parts.append(f"pad {self.padding}" if isinstance(self.padding, str) else "pad {},{}".format(*self.padding))
        if self.dilation != (1, 1):
            parts.append("dilation {},{}".format(*self.dilation))
        if self.groups != 1:
            parts.append(f"groups {self.groups}")
        if self.batch != 1:
            parts.append(f"N={self.batch}")
        end = [word for word, on in (("bias", not self.bias), ("relu", not self.relu)) if on]
        return " ".join(parts) + (" + shortcut" if self.shortcut else "") + "".join(f" no {word}" for word in end)

    @property
    def parameters(self) -> dict[str, Any]:
        """The keyword arguments of ``conv_bias_add_relu`` after the tensors."""
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "relu": self.relu,
        }

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.channels, *self.size

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.outputs, self.channels // self.groups, *self.kernel

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        if self.padding == "same":
            return self.batch, self.outputs, *self.size
        pads = (0, 0) if isinstance(self.padding, str) else self.padding
        p, q = (
            output_size(size, k, s, pad, pad, d)
            for size, k, s, pad, d in zip(self.size, self.kernel, self.stride, pads, self.dilation, strict=True)
        )
        return self.batch, self.outputs, p, q

    @property
    def reduction(self) -> int:
        """Terms in the sum that makes one output."""
        return math.prod(self.weight_shape[1:])

    def at(self, batch: int) -> ConvCase:
        return replace(self, batch=batch)

    def flops(self, batch: int | None = None) -> int:
        """Two for each multiply-add of the convolution (the end of the block is not counted)."""
        case = self if batch is None else self.at(batch)
        return 2 * math.prod(case.output_shape) * case.reduction

    def bytes(self, batch: int | None = None, dtype: torch.dtype = torch.float32) -> int:
        """Least traffic with memory: every operand read once, the output written once."""
        case = self if batch is None else self.at(batch)
        elements = math.prod(case.input_shape) + math.prod(case.weight_shape) + math.prod(case.output_shape)
        elements += case.outputs * case.bias + math.prod(case.output_shape) * case.shortcut
        return elements * dtype.itemsize

    def make(
        self,
        batch: int | None = None,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
        generator: torch.Generator | None = None,
    ) -> Operands:
        """Float operands: standard normal input and shortcut, weights scaled so that the output has unit variance."""
        case = self if batch is None else self.at(batch)
        weight = _normal(case.weight_shape, generator) * max(case.reduction, 1) ** -0.5
        tensors = [_normal(case.input_shape, generator), weight, None, None]
        if case.bias:
            tensors[2] = _normal((case.outputs,), generator)
        if case.shortcut:
            tensors[3] = _normal(case.output_shape, generator)
        return Operands(*(_as(t, dtype, memory_format) for t in tensors))  # type: ignore[arg-type]


@dataclass(frozen=True)
class BlockCase:
    """One residual block. ``size`` is the input's height and width; ``shortcut`` is identity, projection or pad."""

    kind: str
    inplanes: int
    planes: int
    size: Pair
    stride: int = 1
    shortcut: str = "identity"
    network: str = ""

    @property
    def outputs(self) -> int:
        return self.planes * (4 if self.kind == "bottleneck" else 1)

    @property
    def name(self) -> str:
        width = str(self.outputs) if self.inplanes == self.outputs else f"{self.inplanes}->{self.outputs}"
        stride = "" if self.stride == 1 else f" /{self.stride}"
        return f"{self.kind} {width}{stride} @ {self.size[0]}x{self.size[1]}"

    def convs(self) -> tuple[ConvCase, ...]:
        """The block's convolutions with batch norm folded, in order of execution, the projection last but one."""
        strided = (self.stride, self.stride)
        inner = (self.size[0] // self.stride, self.size[1] // self.stride)
        adds = True  # the last convolution adds the shortcut
        if self.kind == "basic":
            first = ConvCase(self.inplanes, self.planes, self.size, (3, 3), strided, (1, 1))
            last = ConvCase(self.planes, self.planes, inner, (3, 3), (1, 1), (1, 1), shortcut=adds)
            middle: tuple[ConvCase, ...] = (first,)
        else:
            first = ConvCase(self.inplanes, self.planes, self.size, (1, 1))
            second = ConvCase(self.planes, self.planes, self.size, (3, 3), strided, (1, 1))
            last = ConvCase(self.planes, self.outputs, inner, (1, 1), shortcut=adds)
            middle = (first, second)
        if self.shortcut == "projection":
            middle += (ConvCase(self.inplanes, self.outputs, self.size, (1, 1), strided, relu=False),)
        return *middle, last

    def flops(self, batch: int = 1) -> int:
        return sum(conv.flops(batch) for conv in self.convs())

    def bytes(self, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """Least traffic with memory if nothing between input and output leaves the cache."""
        elements = batch * self.inplanes * math.prod(self.size) + math.prod(self.convs()[-1].at(batch).output_shape)
        elements += sum(math.prod(conv.weight_shape) + conv.outputs for conv in self.convs())
        return elements * dtype.itemsize

    def make(
        self,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The block's input: standard normal, then ReLU, as every block in a network sees it."""
        shape = (batch, self.inplanes, *self.size)
        return torch.relu(_normal(shape, generator)).to(dtype).contiguous(memory_format=memory_format)

    def eager(self, generator: torch.Generator | None = None) -> nn.Module:
        """The block as torchvision writes it, in plain PyTorch, with random weights and statistics, in eval mode."""
        block = _plain.BasicBlock if self.kind == "basic" else _plain.Bottleneck
        shortcut: nn.Module | None = None
        if self.shortcut == "projection":
            shortcut = _plain.projection(self.inplanes, self.outputs, self.stride)
        elif self.shortcut == "pad":
            shortcut = _plain.PadShortcut(self.outputs - self.inplanes, self.stride)
        module = block(self.inplanes, self.planes, self.stride, shortcut)
        return _plain.randomise(module, generator or torch.Generator().manual_seed(0)).eval()


def _normal(shape: Iterable[int], generator: torch.Generator | None) -> Tensor:
    return torch.randn(tuple(shape), generator=generator)


def _as(t: Tensor | None, dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor | None:
    if t is None:
        return None
    return t.to(dtype).contiguous(memory_format=memory_format) if t.dim() == 4 else t.to(dtype)


def _imagenet(kind: str, network: str) -> Iterable[BlockCase]:
    """The first block of each stage (strided from stage 2 on, projected where the width changes) and the others."""
    inplanes, size = 64, 56
    for stage, planes in enumerate((64, 128, 256, 512)):
        outputs = planes * (4 if kind == "bottleneck" else 1)
        stride = 1 if stage == 0 else 2
        if stride != 1 or inplanes != outputs:
            yield BlockCase(kind, inplanes, planes, (size, size), stride, "projection", network)
        size //= stride
        yield BlockCase(kind, outputs, planes, (size, size), network=network)
        inplanes = outputs


def _cifar() -> Iterable[BlockCase]:
    yield BlockCase("basic", 16, 16, (32, 32), network="cifar20")
    yield BlockCase("basic", 16, 32, (32, 32), 2, "pad", "cifar20")
    yield BlockCase("basic", 32, 32, (16, 16), network="cifar20")
    yield BlockCase("basic", 32, 64, (16, 16), 2, "pad", "cifar20")
    yield BlockCase("basic", 64, 64, (8, 8), network="cifar20")


BLOCKS: tuple[BlockCase, ...] = (*_imagenet("basic", "resnet18"), *_imagenet("bottleneck", "resnet50"), *_cifar())

STEMS = (
    ConvCase(3, 64, (224, 224), (7, 7), (2, 2), (3, 3)),
    ConvCase(3, 16, (32, 32), (3, 3), (1, 1), (1, 1)),
)

# dict.fromkeys: distinct, in order of first use.
CONVS: tuple[ConvCase, ...] = tuple(dict.fromkeys((*STEMS, *(conv for block in BLOCKS for conv in block.convs()))))


def _awkward() -> Iterable[ConvCase]:
    # Kernel sizes, odd and even, with the padding that keeps the size where there is one.
    for k in range(1, 8):
        yield ConvCase(5, 6, (9, 11), (k, k), padding="same", shortcut=True)
        yield ConvCase(5, 6, (9, 11), (k, k), padding="valid")
    yield ConvCase(5, 6, (9, 8), (2, 5), padding="same", dilation=(3, 1))
    yield ConvCase(5, 6, (9, 11), (1, 3), padding=(0, 1), shortcut=True)
    yield ConvCase(5, 6, (9, 11), (3, 1), padding=(1, 0))
    # Strides that do and do not divide the size, and non-square everything.
    for stride in ((1, 2), (2, 1), (2, 2), (3, 3), (3, 1), (2, 3)):
        yield ConvCase(4, 8, (11, 13), (3, 3), stride, (1, 1), shortcut=True)
        yield ConvCase(4, 8, (10, 7), (1, 1), stride)
    yield ConvCase(4, 8, (11, 13), (3, 5), (2, 3), (0, 2), shortcut=True)
    # More padding than kernel: whole outputs read zeros only.
    yield ConvCase(4, 8, (5, 5), (3, 3), padding=(4, 5), shortcut=True)
    yield ConvCase(4, 8, (5, 5), (1, 1), padding=(2, 1), shortcut=True)
    # Dilation, also with taps that never meet the map.
    for dilation in ((2, 2), (3, 1), (1, 4), (5, 5)):
        yield ConvCase(3, 5, (12, 9), (3, 3), padding=dilation, dilation=dilation, shortcut=True)
    # Channel counts around the vector widths, in and out.
    for c in (1, 3, 8, 15, 16, 17, 31, 33, 48, 64, 65):
        yield ConvCase(c, c, (6, 7), (3, 3), padding=(1, 1), shortcut=True)
        yield ConvCase(c, 17, (5, 5), (1, 1))
        yield ConvCase(16, c, (5, 5), (1, 1), relu=False, bias=False, shortcut=True)
        yield ConvCase(17, c, (4, 3), (3, 3), (2, 2), (1, 1))
    # Map sizes 1 to 31 (rows shorter and longer than any tile), square and as a single row or column.
    for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 14, 15, 16, 17, 28, 29, 30, 31):
        yield ConvCase(3, 9, (n, n), (3, 3), padding=(1, 1), shortcut=True)
        yield ConvCase(2, 3, (1, n), (3, 3), (2, 2), (1, 1))
        yield ConvCase(8, 16, (n, 1), (1, 1), shortcut=True)
    # The kernel covers the padded input exactly: one output.
    yield ConvCase(16, 16, (5, 6), (7, 8), padding=(1, 1), shortcut=True)
    # Each part of the end on and off.
    for bias in (False, True):
        for shortcut in (False, True):
            for relu in (False, True):
                yield ConvCase(7, 9, (5, 6), (3, 3), padding=(1, 1), bias=bias, shortcut=shortcut, relu=relu)
    # Batches: none, and more than one image with an odd number of pixels.
    yield ConvCase(8, 8, (5, 5), (3, 3), padding=(1, 1), shortcut=True, batch=0)
    yield ConvCase(8, 8, (5, 5), (1, 1), batch=0)
    yield ConvCase(8, 8, (5, 5), (3, 3), padding=(1, 1), shortcut=True, batch=5)
    yield ConvCase(8, 8, (5, 3), (1, 1), (2, 2), shortcut=True, batch=3)
    # The strides say nothing about the memory format: one channel, one pixel.
    yield ConvCase(1, 1, (1, 1), (1, 1), shortcut=True)
    yield ConvCase(1, 1, (5, 5), (3, 3), padding=(1, 1), shortcut=True, batch=2)
    yield ConvCase(8, 8, (1, 1), (1, 1), shortcut=True, batch=2)
    # Groups: the general path.
    for groups, c, k in ((2, 8, 6), (4, 16, 16), (8, 8, 8), (3, 9, 6)):
        yield ConvCase(c, k, (7, 6), (3, 3), padding=(1, 1), groups=groups, shortcut=True)
        yield ConvCase(c, k, (7, 6), (4, 4), padding="same", groups=groups)


AWKWARD: tuple[ConvCase, ...] = tuple(dict.fromkeys(_awkward()))


Named = TypeVar("Named", "ConvCase", "BlockCase", Any)


def find(name: str, cases: Sequence[Named]) -> list[Named]:
    """The cases with this name, or else those whose name contains it; empty when there are none."""
    exact = [case for case in cases if case.name == name]
    return exact or [case for case in cases if name in case.name]
