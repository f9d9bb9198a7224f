"""Fused layers and residual blocks, with torchvision's constructor arguments and ``state_dict`` keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from .ops.api import conv_bias_add_relu
from .runtime.fused import FusedModule, State
from .zero_pad import ZeroPadShortcut

__all__ = ["BasicBlock", "Bottleneck", "ConvBiasAddReLU2d", "PlainBlock", "PlainBottleneck", "ZeroPadShortcut"]

NormLayer = Callable[[int], nn.Module]


class ConvBiasAddReLU2d(nn.Conv2d):
    """``relu(conv2d(input) + shortcut)`` as one kernel: ``nn.Conv2d`` with two more things in its last pass.

    Takes ``nn.Conv2d``'s arguments and ``relu`` (False leaves the ReLU out); has ``nn.Conv2d``'s ``state_dict``.

    Raises:
        ValueError: if ``padding_mode`` is not "zeros".
    """

    def __init__(self, *args: Any, relu: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.padding_mode != "zeros":
            raise ValueError(f"padding_mode must be 'zeros', got {self.padding_mode!r}")
        self.relu = relu

    def forward(self, input: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """input [N, C, H, W], shortcut [N, K, P, Q] or None -> [N, K, P, Q]."""
        return conv_bias_add_relu(
            input, self.weight, self.bias, shortcut, self.stride, self.padding, self.dilation, self.groups, self.relu
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, relu={self.relu}"  # type: ignore[no-untyped-call]


def _conv(inplanes: int, planes: int, kernel: int, norm: nn.Module, **kwargs: Any) -> nn.Conv2d:
    """A 'same' convolution; it carries a bias exactly where no normalisation follows to supply one."""
    padding = kernel // 2 * kwargs.get("dilation", 1)
    return nn.Conv2d(inplanes, planes, kernel, padding=padding, bias=isinstance(norm, nn.Identity), **kwargs)


class BasicBlock(FusedModule, nn.Module):
    """The block of two 3x3 layers: torchvision's ``BasicBlock``, fused.

    norm_layer: ``nn.Identity`` makes the block without normalisation, whose convolutions have biases.
    downsample: None (identity), a projection such as ``Sequential(conv1x1, norm)``, ``ZeroPadShortcut``, or any module.

    Shapes: x [N, inplanes, H, W] -> [N, planes, ceil(H / stride), ceil(W / stride)].

    Raises:
        ValueError: for groups other than 1, base_width other than 64 or dilation above 1.
    """

    expansion: ClassVar[int] = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        for name, value, rule in (("groups", groups, 1), ("base_width", base_width, 64), ("dilation", dilation, 1)):
            if value != rule:
                raise ValueError(f"{name} must be {rule} in a BasicBlock (Bottleneck takes others), got {value}")
        norm_layer = norm_layer or nn.BatchNorm2d
        norm1, norm2 = norm_layer(planes), norm_layer(planes)
        self.conv1 = _conv(inplanes, planes, 3, norm1, stride=stride)
        self.bn1 = norm1
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv(planes, planes, 3, norm2)
        self.bn2 = norm2
        self.downsample = downsample
        self.stride = stride
        self._fused_resnet = State()

    def _plain_forward(self, x: Tensor) -> Tensor:
        """The definition, from which the fused form is derived by tracing."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)  # type: ignore[no-any-return]


class PlainBlock(BasicBlock):
    """A ``BasicBlock`` without its shortcut: two layers of a plain network, for comparison."""

    _needs_shortcut: ClassVar[bool] = False

    def _plain_forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)))  # type: ignore[no-any-return]


class Bottleneck(FusedModule, nn.Module):
    """The block of three layers, 1x1, 3x3 (which has the stride: v1.5) and 1x1: torchvision's ``Bottleneck``, fused.

    ``groups`` and ``base_width`` make ResNeXt and wide ResNets. ``norm_layer`` and ``downsample`` as in ``BasicBlock``.

    Shapes: x [N, inplanes, H, W] -> [N, 4 planes, ceil(H / stride), ceil(W / stride)].
    """

    expansion: ClassVar[int] = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        outputs = planes * self.expansion
        norm1, norm2, norm3 = norm_layer(width), norm_layer(width), norm_layer(outputs)
        self.conv1 = _conv(inplanes, width, 1, norm1)
        self.bn1 = norm1
        self.conv2 = _conv(width, width, 3, norm2, stride=stride, groups=groups, dilation=dilation)
        self.bn2 = norm2
        self.conv3 = _conv(width, outputs, 1, norm3)
        self.bn3 = norm3
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride
        self._fused_resnet = State()

    def _plain_forward(self, x: Tensor) -> Tensor:
        """The definition, from which the fused form is derived by tracing."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)  # type: ignore[no-any-return]


class PlainBottleneck(Bottleneck):
    """A ``Bottleneck`` without its shortcut: three layers of a plain network, for comparison."""

    _needs_shortcut: ClassVar[bool] = False

    def _plain_forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)))  # type: ignore[no-any-return]
