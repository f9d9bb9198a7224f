"""The general path: the library's convolution, for what no kernel of ours computes or the library computes faster."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from .backend import Backend
from .select import SMALL_ON_CUDA
from .spec import LOW_PRECISION, NO_PADDING, ConvSpec, Geometry, check_operands, output_format

_SMALL = 1 << 16  # elements: a pass less saves less than our call costs more


class GeneralPlan:
    """The library's convolution, then addition and ReLU in place: our one pass, or where a map is small the library's two."""

    kernel = None

    def __init__(self, spec: ConvSpec, backend: Backend) -> None:
        self.geometry, self.relu, self.dtype, self.backend = spec.geometry, spec.relu, spec.dtype, backend
        # float32, so that the sum is rounded once. Not of a large one on a GPU, where the library's 16-bit convolutions are several times as
        # fast: there the convolution's output is rounded, and after bias and shortcut the sum.
        narrow = backend.on_gpu and spec.macs > SMALL_ON_CUDA
        self.wide = not narrow and spec.dtype in LOW_PRECISION and (spec.bias is not None or spec.shortcut is not None)
        self.adds_bias = not backend.on_gpu and spec.dtype not in LOW_PRECISION  # the library's convolution does
        self.small = self.adds_bias and math.prod(spec.output.shape) < _SMALL

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None, shortcut: Tensor | None) -> Tensor:
        check_operands(input, weight, bias, shortcut)
        if self.wide:
            input, weight = input.float(), weight.float()
        output = _convolution(input, weight, bias if self.adds_bias else None, self.geometry)
        if self.backend.on_gpu:  # some of the library's convolutions give other strides than its rule says
            output = output.contiguous(memory_format=output_format(input, weight, output.shape))
        if self.adds_bias:
            bias = None
        if shortcut is not None and self.small:
            output.add_(shortcut)
            return output.relu_() if self.relu else output
        if shortcut is None and bias is None and output.dtype == self.dtype:
            return output.relu_() if self.relu else output
        return self.backend.bias_add_relu(output, bias, shortcut, self.relu, self.dtype, owned=True)


def _convolution(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The library's convolution; it pads both sides alike, so padding='same' with an even kernel pads first."""
    stride, padding, dilation, groups = geometry
    if not padding.is_symmetric:
        input = F.pad(input, (padding.left, padding.right, padding.top, padding.bottom))
        padding = NO_PADDING
    return F.conv2d(input, weight, bias, stride, (padding.top, padding.left), dilation, groups)
