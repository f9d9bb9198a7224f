"""Residual networks written the ordinary way, in plain PyTorch: what the demo converts and the benchmarks compare with.

Modules, attribute names, ``state_dict`` keys and arithmetic are torchvision's (``resnet18``, ``resnet50`` v1.5: the stride is on
the 3x3 convolution), so that nothing here needs torchvision to be installed. ``cifar_resnet20`` is the network of He et al. 2015,
section 4.2, with option A shortcuts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        result: Tensor = self.relu(out)
        return result


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 to four times the width, and a shortcut."""

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        result: Tensor = self.relu(out)
        return result


class PadShortcut(nn.Module):
    """Option A of He et al. 2015: every second pixel, and zeros for the channels that are new. No parameters."""

    def __init__(self, extra: int, stride: int) -> None:
        super().__init__()
        self.extra = extra
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))


def projection(inplanes: int, outputs: int, stride: int) -> nn.Sequential:
    """Option B: a 1x1 convolution and its batch norm."""
    return nn.Sequential(nn.Conv2d(inplanes, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """torchvision's ``ResNet``: stem, four stages of blocks, global average pooling, a linear layer."""

    def __init__(self, block: type[BasicBlock] | type[Bottleneck], layers: Sequence[int], classes: int = 1000) -> None:
        super().__init__()
        self.inplanes = 64
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = self._make_layer(block, 64, layers[0], 1)
        self.layer2 = self._make_layer(block, 128, layers[1], 2)
        self.layer3 = self._make_layer(block, 256, layers[2], 2)
        self.layer4 = self._make_layer(block, 512, layers[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, classes)

    def _make_layer(self, block: type[BasicBlock] | type[Bottleneck], planes: int, count: int, stride: int) -> nn.Sequential:
        outputs = planes * block.expansion
        downsample = None
        if stride != 1 or self.inplanes != outputs:
            downsample = projection(self.inplanes, outputs, stride)
        blocks = [block(self.inplanes, planes, stride, downsample)]
        self.inplanes = outputs
        blocks += [block(outputs, planes) for _ in range(1, count)]
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        result: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return result


class CifarResNet(nn.Module):
    """Stem of 16 channels, three stages of ``count`` blocks of 16, 32 and 64 channels; depth 6 * count + 2."""

    def __init__(self, count: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(*(BasicBlock(16, 16) for _ in range(count)))
        self.layer2 = nn.Sequential(BasicBlock(16, 32, 2, PadShortcut(16, 2)), *(BasicBlock(32, 32) for _ in range(count - 1)))
        self.layer3 = nn.Sequential(BasicBlock(32, 64, 2, PadShortcut(32, 2)), *(BasicBlock(64, 64) for _ in range(count - 1)))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        result: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return result


def resnet18() -> ResNet:
    return ResNet(BasicBlock, (2, 2, 2, 2))


def resnet50() -> ResNet:
    return ResNet(Bottleneck, (3, 4, 6, 3))


def cifar_resnet20() -> CifarResNet:
    return CifarResNet(3)


def randomise(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Fill every parameter and batch-norm statistic from ``generator``; returns the model.

    A fresh batch norm is nearly the identity, and folding it wrongly would not show. Here gamma is in ±[0.5, 1.5] with one
    channel in eight negative, the variance in [0.5, 1.5], beta and the mean are of the order of 0.1.
    """
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                # He initialisation by fan-out, as torchvision does.
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
            elif isinstance(module, nn.BatchNorm2d):
                sign = torch.rand(module.num_features, generator=generator).lt(1 / 8).mul(-2).add(1)
                module.weight.uniform_(0.5, 1.5, generator=generator).mul_(sign)
                module.bias.normal_(0, 0.1, generator=generator)
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
            elif isinstance(module, nn.Linear):
                module.weight.normal_(0, module.in_features**-0.5, generator=generator)
                module.bias.zero_()
    return model
