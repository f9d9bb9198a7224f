"""Which way a convolution takes, and why: the hot path (our kernels) or the general path (the library's convolution, then our pass).

The only place where one of the two is preferred; the backends ask here, and add what is known of their modules (``why_general``). Calls,
``why_not``, the report of ``fuse_`` and ``env --explain`` get the same answer. Each function is pure, of the call and of what was read from
the machine; the sentences that it returns are the choice, and none of them is the hot path.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch

from .spec import ConvSpec, Layout, Operand, Padding, dtype_name

TrainedBy = Literal["ours", "our gradients", "library"]  # "our gradients": forward by the library

# A stem (7x7 on 3 channels): runs of 21 values keep the FMA units at 60 % of their rate, the library's kernel at 70 %.
_FEW_CHANNELS, _LARGE_KERNEL = 4, 25
# As few outputs leave most of a register empty; a call on a small map is all overhead, and ours has less.
_LARGE_MAP = 512
# Contiguous, a 1x1 convolution is a product of matrices as they lie; ours turns input and output, which pays from here on.
_REGISTER, _FEW_OUTPUTS = 16, 24

# An input gradient is a convolution for each residue of row and column modulo the stride.
_LARGEST_STRIDE = 2
# Measured on a Zen 5, float32 and bfloat16, batch 1 and 8. Strided pixels of a contiguous map are written one by one, from here on at a loss;
# and the weights are packed in each call, so many of them for these few pixels at a loss.
_LARGE_STRIDED_MAP = 2048
_FEW_PIXELS, _FEW_PIXELS_OF_WINOGRAD, _MANY_WEIGHTS = 256, 128, 1 << 17

# A weight's gradient without Winograd's transforms: taps, output channels and pixels from which on, or up to which, the library's is faster.
# Measured on a Zen 5, float32, random shapes, batch 1 to 32.
_MOST_TAPS, _FEW_DILATED_OUTPUTS, _MANY_PIXELS = 9, 64, 4096

# From here on a 3x3 convolution trains faster by our kernels. Measured on a Zen 5, batch 1, 8 and 32, one and two threads.
_TRAINED_PRODUCTS = 1 << 13
_TRAINED_DIRECTLY = 1 << 22
_TRAINED_PIXELS_BF16, _TRAINED_MAP_BF16, _TRAINED_PRODUCTS_BF16, _TRAINED_CHANNELS_BF16 = 1024, 196, 1 << 25, 64

# Multiply-adds up to which a call on a GPU is taken to be all launches, so that one kernel without tensor cores beats the library's
# several. Not measured yet, as little as what follows from it: bench/gpu_report.py will tell.
SMALL_ON_CUDA = 1 << 24
STEM_CHANNELS = 4  # to which a stem's 1 to 3 are padded on a GPU: csrc/cuda/config.h holds the same number


def why_groups(groups: int) -> list[str]:
    return [] if groups == 1 else [f"groups = {groups}: our fast kernels are for groups = 1"]


def why_general_on_cpu(spec: ConvSpec) -> list[str]:
    """Why the compiled module for the CPU leaves this convolution to the library."""
    why = why_groups(spec.geometry.groups)
    outputs, _, height, width = spec.weight.shape
    channels = spec.input.shape[1]
    if channels <= _FEW_CHANNELS and height * width >= _LARGE_KERNEL and spec.dtype == torch.float32:
        why.append(
            f"{channels} input channels under a {height}x{width} kernel: for a network's stem the library's convolution is faster"
        )
    large = spec.input.shape[2] * spec.input.shape[3] >= _LARGE_MAP
    if large and height * width == 1 and _leaves_registers_empty(outputs) and not spec.input.is_channels_last:
        why.append(f"{outputs} output channels of a contiguous 1x1 convolution: too few to fill registers, the library's is faster")
    elif large and height * width > 1 and max(channels, outputs) <= _FEW_CHANNELS and spec.geometry.groups == 1:
        why.append(f"{channels} input and {outputs} output channels: too few to fill registers, the library's kernel is faster")
    return why


def why_general_gradient_on_cpu(operand: Operand, spec: ConvSpec) -> list[str]:
    """Why the library makes this convolution's gradient in its input or in its weight."""
    why = why_groups(spec.geometry.groups)
    channels = spec.input.shape[1]
    if channels <= _FEW_CHANNELS:
        why.append(f"{channels} input channels: too few to fill registers, the library's gradient is faster")
    if operand == "weight":
        return why or _why_general_weight_gradient(spec)
    return why or _why_general_input_gradient(spec)


def _why_general_input_gradient(spec: ConvSpec) -> list[str]:
    stride = max(spec.geometry.stride)
    if stride > _LARGEST_STRIDE:
        return [f"stride {stride}: a convolution for each of so many residues of row and column would be more work"]
    outputs, _, *kernel = spec.weight.shape
    channels, height, width = spec.input.shape[1:]
    area, pixels = math.prod(kernel), height * width
    why = []
    contiguous = not spec.output.is_channels_last
    if contiguous and area == 1 and stride == 1 and spec.dtype == torch.float32:
        why.append("a contiguous 1x1 convolution: its gradient is a product of matrices as they lie, the library's is faster")
    elif contiguous and area > 1 and stride > 1 and pixels >= _LARGE_STRIDED_MAP:
        why.append(f"a contiguous {height}x{width} map with stride {stride}: written pixel by pixel")
    met = spec.input.shape[0] * pixels // math.prod(spec.geometry.stride)  # pixels for which the same weights are packed
    least = _FEW_PIXELS_OF_WINOGRAD if area == 9 and stride == 1 else _FEW_PIXELS
    if met < least and outputs * channels * area >= _MANY_WEIGHTS:
        why.append(f"{met} pixels for {outputs * channels * area} weights: packing these takes longer than is saved")
    return why


def _why_general_weight_gradient(spec: ConvSpec) -> list[str]:
    outputs, channels, *kernel = spec.weight.shape
    n, _, height, width = spec.input.shape
    area, stride, dilation = math.prod(kernel), max(spec.geometry.stride), max(spec.geometry.dilation)
    if kernel == [3, 3] and stride == dilation == 1:
        return []  # by Winograd's transforms
    if spec.dtype == torch.bfloat16:
        return ["bfloat16 without Winograd's transforms: the library multiplies pairs, and its gradient is faster"]
    if area > _MOST_TAPS:
        return [f"a {kernel[0]}x{kernel[1]} kernel: for each tap the input would be copied, the library's gradient is faster"]
    if area > 1 and stride > 1 and not spec.input.is_channels_last:
        return [f"a contiguous map with stride {stride}: copied pixel by pixel, the library's gradient is faster"]
    if area > 1 and dilation > 1 and not spec.input.is_channels_last:
        return ["a contiguous map under a dilated kernel: turned for each tap, the library's gradient is faster"]
    if area > 1 and dilation > 1 and outputs < _FEW_DILATED_OUTPUTS:
        return [f"{outputs} output channels of a dilated kernel: too few for what copying the input costs, the library's gradient is faster"]
    if area == stride == 1 and min(channels, outputs) < _REGISTER and n * height * width >= _MANY_PIXELS and spec.input.is_channels_last:
        return [f"{min(channels, outputs)} channels of a 1x1 convolution: too few to fill a register, the library's gradient is faster"]
    return []


def how_to_train(
    input: Layout, weight: Sequence[int], stride: Sequence[int], dilation: Sequence[int], groups: int, dtype: torch.dtype
) -> TrainedBy:
    """By whose kernels a convolution that nothing follows but a norm that takes its statistics from the batch trains faster on a CPU. By ours
    where they are Winograd's. Direct convolution by itself is no faster than the library's; its gradients are, in channels_last, and
    spare the passes at their ends."""
    n, channels, h, w = input.shape
    outputs, _, *kernel = weight
    if tuple(dilation) != (1, 1) or groups != 1 or channels <= _FEW_CHANNELS:
        return "library"
    products = n * h * w * channels * outputs
    if kernel != [3, 3] or tuple(stride) != (1, 1):
        known = kernel == [1, 1] or kernel == [3, 3]
        large = products >= _TRAINED_DIRECTLY and min(channels, outputs) >= _REGISTER
        return "our gradients" if known and large and dtype == torch.float32 and input.is_channels_last else "library"
    if dtype == torch.float32:
        return "ours" if products >= _TRAINED_PRODUCTS else "library"
    few = min(channels, outputs) < _TRAINED_CHANNELS_BF16 or n * h * w < _TRAINED_PIXELS_BF16
    if dtype != torch.bfloat16 or few or (h * w < _TRAINED_MAP_BF16 and products < _TRAINED_PRODUCTS_BF16):
        return "library"
    return "ours"


def why_not_in_program(spec: ConvSpec) -> list[str]:
    """The same inside a native program of several sections. A stem is ours there: what the library saves on its convolution, another pass
    over the largest map of the network and its way into the program's memory format cost again, and more. What is said of contiguous maps does
    not count: whatever the user's format, all that lies between the sections is channels_last."""
    outputs, channels = spec.weight.shape[0], spec.input.shape[1]
    why = why_groups(spec.geometry.groups)
    if spec.weight.shape[2] * spec.weight.shape[3] > 1 and max(channels, outputs) <= _FEW_CHANNELS and not why:
        why.append(f"{channels} input and {outputs} output channels: too few to fill registers")
    return why


def _leaves_registers_empty(outputs: int) -> bool:
    return outputs <= _FEW_OUTPUTS and 1 <= outputs % _REGISTER <= _REGISTER // 2


def why_general_on_cuda(spec: ConvSpec, tf32: bool) -> list[str]:
    """The same of the CUDA module. tf32: whether float32 may be rounded to TF32."""
    why = why_groups(spec.geometry.groups)
    if why or spec.macs <= SMALL_ON_CUDA or spec.dtype == torch.float64:
        return why  # none: the kernel without tensor cores serves, if need be
    if spec.dtype == torch.float32 and not tf32:
        return ["float32 without TF32 (torch.backends.cudnn.allow_tf32): no tensor-core kernel can, and the library serves large ones"]
    outputs, channels = spec.weight.shape[:2]
    vector = 16 // spec.dtype.itemsize
    if (channels % vector and not is_stem_on_cuda(spec)) or outputs % vector:
        name = dtype_name(spec.dtype)
        return [f"{channels} input and {outputs} output channels: the tensor cores want multiples of {vector} in {name}"]
    return []


def why_general_gradient_on_cuda(operand: Operand, spec: ConvSpec, tf32: bool) -> list[str]:
    """Why the library makes this convolution's gradient on a GPU. Its gradient in the input is a convolution of the output's gradient, and
    ours is the tensor cores'."""
    if operand == "weight":
        return ["there are no kernels for the gradient of a weight on a GPU"]
    if max(spec.geometry.stride) > 1:
        return [f"stride {max(spec.geometry.stride)}: a convolution for each residue of row and column, the library's gradient is one"]
    if spec.dtype == torch.float64 or spec.macs <= SMALL_ON_CUDA:
        return [f"{'float64' if spec.dtype == torch.float64 else 'a small convolution'}: no tensor-core kernel is for it"]
    forward = input_gradient_as_convolution(spec)
    if forward is None:
        return ["more padding than kernel: the gradient is no convolution of all of the output's gradient"]
    return why_general_on_cuda(forward, tf32)


def input_gradient_as_convolution(spec: ConvSpec) -> ConvSpec | None:
    """The convolution with stride 1 whose output is the gradient of another one with stride 1 in its input: of the output's gradient, by the
    weight rotated and with its channels exchanged, [C, K, R, S] in the memory order [C, R, S, K]; plus what it ends with. None where that
    would take negative padding."""
    outputs, channels, r, s = spec.weight.shape
    top, bottom, left, right = spec.geometry.padding
    reach_h, reach_w = (r - 1) * spec.geometry.dilation[0], (s - 1) * spec.geometry.dilation[1]
    padding = Padding(reach_h - top, reach_h - bottom, reach_w - left, reach_w - right)
    if min(padding) < 0:
        return None
    weight = Layout((channels, outputs, r, s), (r * s * outputs, 1, s * outputs, outputs))
    geometry = spec.geometry._replace(padding=padding)
    return spec._replace(input=spec.output, weight=weight, output=spec.input, bias=None, geometry=geometry, relu=False)


def is_stem_on_cuda(spec: ConvSpec) -> bool:
    """Whether a tensor-core kernel for a network's stem is for as few channels."""
    return spec.weight.shape[1] <= STEM_CHANNELS and spec.dtype.itemsize == 2


def as_tensor_cores_read(spec: ConvSpec) -> ConvSpec | None:
    """The convolution of rearranged operands that the tensor cores may compute instead, if they compute it: a large one turned to
    channels_last, a stem's channels padded. None where it is computed as it is."""
    if spec.geometry.groups != 1 or not spec.output.shape[0]:
        return None
    dense = all([part is None or part.is_dense_channels_last for part in (spec.input, spec.shortcut, spec.output)])
    if spec.macs > SMALL_ON_CUDA and not dense:
        shortcut = None if spec.shortcut is None else turned(spec.shortcut.shape)
        return spec._replace(input=turned(spec.input.shape), shortcut=shortcut, output=turned(spec.output.shape))
    if dense and spec.input.shape[1] < STEM_CHANNELS and is_stem_on_cuda(spec):
        return spec._replace(input=padded(spec.input.shape), weight=padded(spec.weight.shape))
    return None


def turned(shape: Sequence[int]) -> Layout:
    """Channels_last in its strides too where they are ambiguous: of one channel, say."""
    n, c, h, w = shape
    return Layout((n, c, h, w), (c * h * w, 1, w * c, c))


def padded(shape: Sequence[int]) -> Layout:
    """Channels_last, with a stem's channels."""
    n, _, h, w = shape
    return turned((n, STEM_CHANNELS, h, w))


def too_old(capability: tuple[int, int], architectures: Sequence[str], name: str) -> str:
    """A sentence for a GPU that is older than what a build is for; "" for any other. What was built runs on later ones too."""
    first = min(int(a.rstrip("a")) for a in architectures)
    if capability >= (first // 10, first % 10):
        return ""
    return (
        f"the CUDA kernels of this build are for compute capability {first // 10}.{first % 10} and later, "
        f"{name} has {capability[0]}.{capability[1]}"
    )
