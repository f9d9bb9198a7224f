"""Residual networks of fused blocks: torchvision's ImageNet layout, and He et al. 2015 section 4.2 for small images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .nn import BasicBlock, Bottleneck, NormLayer, PlainBlock, PlainBottleneck, ZeroPadShortcut

__all__ = ["CifarResNet", "ResNet", "cifar_resnet", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]

Block = type[BasicBlock] | type[Bottleneck]


def _initialise(model: nn.Module, zero_init_residual: bool) -> None:
    """He initialisation as torchvision's; biases of convolutions (blocks without normalisation) start at zero."""
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, (nn.BatchNorm2d, nn.GroupNorm)) and m.weight is not None:
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)
    if zero_init_residual:
        # Each block starts as its shortcut: the last scale is zero, or the last weight where there is no normalisation. Not so the
        # blocks whose shortcut adds channels of zeros: those channels would start at exactly 0, where the ReLU passes no gradient,
        # and stay there.
        for m in model.modules():
            if isinstance(m, (BasicBlock, Bottleneck)) and not isinstance(m, (PlainBlock, PlainBottleneck)):
                if isinstance(m.downsample, ZeroPadShortcut) and m.downsample.out_channels > m.downsample.in_channels:
                    continue
                conv, norm = (m.conv3, m.bn3) if isinstance(m, Bottleneck) else (m.conv2, m.bn2)
                weight = getattr(norm, "weight", None)
                nn.init.zeros_(conv.weight if weight is None else weight)


def _projection(inputs: int, outputs: int, stride: int, norm_layer: NormLayer) -> nn.Sequential:
    norm = norm_layer(outputs)
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=isinstance(norm, nn.Identity)), norm)


class ResNet(nn.Module):
    """torchvision's ``ResNet`` with fused blocks: the same modules, ``state_dict`` keys and initial values.

    Shapes: x [N, 3, H, W] -> [N, num_classes].
    """

    def __init__(
        self,
        block: Block,
        layers: tuple[int, int, int, int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        self._arguments = groups, width_per_group
        self.inplanes = 64
        norm = norm_layer(64)
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=isinstance(norm, nn.Identity))
        self.bn1 = norm
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._stage(block, 64, layers[0], 1, norm_layer)
        self.layer2 = self._stage(block, 128, layers[1], 2, norm_layer)
        self.layer3 = self._stage(block, 256, layers[2], 2, norm_layer)
        self.layer4 = self._stage(block, 512, layers[3], 2, norm_layer)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        _initialise(self, zero_init_residual)

    def _stage(self, block: Block, planes: int, count: int, stride: int, norm_layer: NormLayer) -> nn.Sequential:
        outputs = planes * block.expansion
        downsample = None
        if stride != 1 or self.inplanes != outputs:
            downsample = _projection(self.inplanes, outputs, stride, norm_layer)
        groups, width = self._arguments
        blocks = [block(self.inplanes, planes, stride, downsample, groups, width, 1, norm_layer)]
        self.inplanes = outputs
        blocks += [block(outputs, planes, 1, None, groups, width, 1, norm_layer) for _ in range(count - 1)]
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))  # type: ignore[no-any-return]


def resnet18(num_classes: int = 1000, norm_layer: NormLayer | None = None, zero_init_residual: bool = False) -> ResNet:
    """ResNet-18, 8 blocks of two layers. ``norm_layer=nn.Identity``: without normalisation, with biases."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, zero_init_residual, norm_layer=norm_layer)


def resnet34(num_classes: int = 1000, norm_layer: NormLayer | None = None, zero_init_residual: bool = False) -> ResNet:
    """ResNet-34, 16 blocks of two layers."""
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes, zero_init_residual, norm_layer=norm_layer)


def resnet50(
    num_classes: int = 1000, norm_layer: NormLayer | None = None, zero_init_residual: bool = False, **kwargs: Any
) -> ResNet:
    """ResNet-50, 16 blocks of three layers. ``groups``, ``width_per_group``: ResNeXt and wide ResNets."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, zero_init_residual, norm_layer=norm_layer, **kwargs)


def resnet101(
    num_classes: int = 1000, norm_layer: NormLayer | None = None, zero_init_residual: bool = False, **kwargs: Any
) -> ResNet:
    """ResNet-101, 33 blocks of three layers."""
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes, zero_init_residual, norm_layer=norm_layer, **kwargs)


def resnet152(
    num_classes: int = 1000, norm_layer: NormLayer | None = None, zero_init_residual: bool = False, **kwargs: Any
) -> ResNet:
    """ResNet-152, 50 blocks of three layers."""
    return ResNet(Bottleneck, (3, 8, 36, 3), num_classes, zero_init_residual, norm_layer=norm_layer, **kwargs)


class CifarResNet(nn.Module):
    """The network of He et al. 2015, section 4.2: 3x3 stem, three stages of n blocks, average pooling, linear layer.

    Shapes: x [N, in_channels, H, W] -> [N, num_classes]; the maps of the stages are H, H / 2 and H / 4 high.
    """

    def __init__(
        self,
        depth: int,
        shortcut: str = "A",
        plain: bool = False,
        norm_layer: NormLayer | None = None,
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = 16,
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6n + 2 with n at least 1 (8, 14, 20, ...), got {depth}")
        if shortcut not in ("A", "B", "C"):
            raise ValueError(f"shortcut must be 'A', 'B' or 'C', got {shortcut!r}")
        norm_layer = norm_layer or nn.BatchNorm2d
        norm = norm_layer(width)
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=isinstance(norm, nn.Identity))
        self.bn1 = norm
        self.relu = nn.ReLU(inplace=True)
        stages = []
        inputs = width
        for stage in range(3):
            outputs = width << stage
            blocks = []
            for index in range((depth - 2) // 6):
                stride = 2 if stage and not index else 1
                block = PlainBlock if plain else BasicBlock
                skip = None if plain else _cifar_shortcut(shortcut, inputs, outputs, stride, norm_layer)
                blocks.append(block(inputs, outputs, stride, skip, norm_layer=norm_layer))
                inputs = outputs
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inputs, num_classes)
        _initialise(self, zero_init_residual)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))  # type: ignore[no-any-return]


def _cifar_shortcut(option: str, inputs: int, outputs: int, stride: int, norm_layer: NormLayer) -> nn.Module | None:
    """The paper's options A and B: zero-padding or projection where the shape changes; C: projections everywhere."""
    if option == "C" or (option == "B" and (stride != 1 or inputs != outputs)):
        return _projection(inputs, outputs, stride, norm_layer)
    return ZeroPadShortcut(inputs, outputs, stride) if stride != 1 or inputs != outputs else None


def cifar_resnet(
    depth: int,
    shortcut: str = "A",
    plain: bool = False,
    norm_layer: NormLayer | None = None,
    num_classes: int = 10,
    in_channels: int = 3,
    width: int = 16,
    zero_init_residual: bool = False,
) -> CifarResNet:
    """The CIFAR network of ``depth`` = 6n + 2 layers (20, 32, 44, 56, 110 in the paper).

    Args:
        shortcut: "A" zero-padding, "B" projection where the shape changes, "C" projections everywhere.
        plain: the same layers without shortcuts.
        norm_layer: None is batch norm; ``nn.Identity`` is no normalisation, with biases.
        width: channels of the first stage; the others have twice and four times as many.
        zero_init_residual: every block starts as its shortcut, which trains deep networks without normalisation; but for blocks
            that widen by zero-padding (option A), whose new channels would never get a gradient.

    Raises:
        ValueError: for another depth or shortcut.
    """
    return CifarResNet(depth, shortcut, plain, norm_layer, num_classes, in_channels, width, zero_init_residual)
