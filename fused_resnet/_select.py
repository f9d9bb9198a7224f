"""Which path a call takes, and why: the hot path (our kernels) or the general path (the library's convolution).

Selecting and explaining are one function, ``reasons``: an empty list is the hot path. ``_gpu.reasons`` is its part for CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _gpu
from ._arguments import Padding, Pair, is_channels_last
from ._extension import cpu, missing

# A stem (7x7 on 3 channels): runs of 21 values keep the FMA units at 60 % of their rate, the library's kernel at 70 %.
_FEW_CHANNELS, _LARGE_KERNEL = 4, 25
# As few outputs leave most of a register empty; a call on a small map is all overhead, and ours has less.
_LARGE_MAP = 512
# Contiguous, a 1x1 convolution is a product of matrices as they lie; ours turns input and output, which pays from here on.
_REGISTER, _FEW_OUTPUTS = 16, 24


def reasons(
    input: Tensor,
    weight: Tensor,
    shortcut: Tensor | None,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    shape: Sequence[int],
) -> list[str]:
    """Sentences that say why this convolution, with an output of ``shape``, takes the general path; none for the hot path."""
    if _gpu.serves(input):
        pixels = shape[0] * shape[2] * shape[3]
        return _gpu.reasons(input.device, input.dtype, tuple(weight.shape), pixels, groups)
    channels_last = is_channels_last(input)
    return cpu_reasons(input.device.type, input.dtype, input.shape, weight.shape, stride, padding, dilation, groups, channels_last)


def cpu_reasons(
    device: str,
    dtype: torch.dtype,
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    channels_last: bool,
) -> list[str]:
    """Sentences that say why this convolution takes the general path; none for the hot path."""
    why = []
    if device != "cpu":
        why.append(f"there are no kernels for {device} tensors in this build")
    elif cpu is None:
        why.append(missing)
    if groups != 1:
        why.append(f"groups = {groups}: our convolution is for groups = 1")
    channels, (height, width) = input_shape[1], weight_shape[2:]
    if channels <= _FEW_CHANNELS and height * width >= _LARGE_KERNEL and dtype == torch.float32:
        why.append(
            f"{channels} input channels under a {height}x{width} kernel: for a network's stem the library's convolution is faster"
        )
    outputs = weight_shape[0]
    large = input_shape[2] * input_shape[3] >= _LARGE_MAP
    if large and height * width == 1 and not channels_last and outputs <= _FEW_OUTPUTS and outputs % _REGISTER in range(1, 9):
        why.append(f"{outputs} output channels of a contiguous 1x1 convolution: too few to fill registers, the library's is faster")
    elif max(channels, outputs) <= _FEW_CHANNELS and height * width > 1 and groups == 1 and large:
        why.append(f"{channels} input and {outputs} output channels: too few to fill registers, the library's kernel is faster")
    return why
