"""The ``ConvSpec`` of a call: its parameters and how its operands and its output lie.

And what is legal, with the one sentence that says so when something is not. Every check runs before any work. ``TypeError`` is
for a wrong type or dtype, ``ValueError`` for a wrong value or shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Pair = tuple[int, int]
Operand = Literal["input", "weight"]  # of a convolution, in which it has a gradient
OTHER: dict[Operand, Operand] = {"input": "weight", "weight": "input"}  # what that is made of, beside the output's gradient

LEGAL_DTYPES = {
    "cpu": (torch.float64, torch.float32, torch.bfloat16),
    "cuda": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "meta": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
}
_INTS = (int, torch.SymInt)
_LONGEST = 2**62 - 1  # pixels of a padded side: beyond this 64-bit offsets cannot be formed
# The dtypes that accumulate in float32.
LOW_PRECISION = (torch.bfloat16, torch.float16)
# Below this an address is looked at: memory that was freed has none, so that a tensor's address is only its offset in the storage.
SUSPICIOUS = 1 << 40


class Padding(NamedTuple):
    """Zeros added around the input, in pixels. Only padding='same' makes the two ends differ (by one)."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def is_symmetric(self) -> bool:
        return self.top == self.bottom and self.left == self.right


NO_PADDING = Padding(0, 0, 0, 0)


class Geometry(NamedTuple):
    """How a convolution's kernel moves: stride and dilation (height, width) and padding in pixels, and the groups of channels."""

    stride: Pair = (1, 1)
    padding: Padding = NO_PADDING
    dilation: Pair = (1, 1)
    groups: int = 1


class Layout(NamedTuple):
    """A tensor's shape and strides."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def is_channels_last(self) -> bool:
        """As ``is_channels_last`` of such a tensor."""
        return _channels_last_strides(self.shape, self.strides)

    @property
    def is_dense_channels_last(self) -> bool:
        """Channels_last without gaps; strides of axes of length 1 do not count."""
        return self.meta().is_contiguous(memory_format=torch.channels_last)

    def meta(self) -> Tensor:
        """A float32 tensor without memory that lies so."""
        return torch.empty_strided(self.shape, self.strides, device="meta")


def layout(t: Tensor) -> Layout:
    return Layout(tuple(t.shape), t.stride())


class ConvSpec(NamedTuple):
    """One call of ``conv_bias_add_relu`` without its values: what is computed, on tensors that lie how. ``spec_of`` makes it, of legal calls.

    Layouts: input [N, C, H, W], weight [K, C / groups, R, S], bias [K], shortcut and output [N, K, P, Q]; None: there is none.
    """

    dtype: torch.dtype
    device: torch.device
    input: Layout
    weight: Layout
    bias: Layout | None
    shortcut: Layout | None
    output: Layout
    geometry: Geometry
    relu: bool

    @property
    def dtype_name(self) -> str:
        return dtype_name(self.dtype)

    @property
    def macs(self) -> int:
        """Multiply-adds."""
        n, k, p, q = self.output.shape
        _, c, r, s = self.weight.shape
        return n * k * p * q * c * r * s


def dtype_name(dtype: torch.dtype) -> str:
    """"float32" of ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def pair(value: int | Sequence[int], name: str, least: int) -> Pair:
    """An int or a pair of ints as a pair; each at least ``least``."""
    if isinstance(value, _INTS) and not isinstance(value, bool):
        both: tuple[int, ...] = (value, value)
    elif isinstance(value, (tuple, list)) and all(isinstance(v, _INTS) and not isinstance(v, bool) for v in value):
        both = tuple(value)
        if len(both) == 1:
            both = (both[0], both[0])
        if len(both) != 2:
            raise ValueError(f"{name} must be an int or a pair of ints, got {len(both)} numbers: {tuple(value)}")
    else:
        raise TypeError(f"{name} must be an int or a pair of ints, got {value!r}")
    if both[0] < least or both[1] < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if both[0] > _LONGEST or both[1] > _LONGEST:
        raise ValueError(f"{name} must be below 2**62, got {value}")
    return both[0], both[1]


def _pad(padding: int | str | Sequence[int], weight: Tensor, stride: Pair, dilation: Pair) -> Padding:
    """conv2d's ``padding`` argument as four numbers. 'same' puts the odd pixel at the bottom and at the right."""
    if isinstance(padding, str):
        if padding == "valid":
            return NO_PADDING
        if padding != "same":
            raise ValueError(f"padding must be an int, a pair of ints, 'same' or 'valid', got {padding!r}")
        if stride != (1, 1):
            raise ValueError(f"padding='same' needs stride 1, got stride {stride}")
        total_h, total_w = (d * (n - 1) for d, n in zip(dilation, weight.shape[2:], strict=True))
        return Padding(total_h // 2, total_h - total_h // 2, total_w // 2, total_w - total_w // 2)
    h, w = pair(padding, "padding", 0)
    return Padding(h, h, w, w)


def geometry_of_call(weight: Tensor, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: Any = 1) -> Geometry:
    """``conv2d``'s arguments: a number for a pair, 'same'."""
    stride, dilation = pair(stride, "stride", 1), pair(dilation, "dilation", 1)
    if type(groups) is not int and not isinstance(groups, torch.SymInt):
        raise TypeError(f"groups must be an int, got {groups!r}")
    if isinstance(padding, str):
        check_tensor(weight, "weight", 4)
    return Geometry(stride, _pad(padding, weight, stride, dilation), dilation, groups)  # type: ignore[arg-type]  # a SymInt is as good


def geometry_of_operator(
    weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Geometry:
    """The registered operator's arguments; their schema lets lists of other lengths through. ``weight``: as of a call, not asked."""
    for name, values, count in (("stride", stride, 2), ("padding", padding, 4), ("dilation", dilation, 2)):
        if len(values) != count:
            raise ValueError(f"{name} must have {count} numbers, got {len(values)}: {tuple(values)}")
    return Geometry((stride[0], stride[1]), Padding(*padding), (dilation[0], dilation[1]), groups)


def output_size(size: int, kernel: int, stride: int, before: int, after: int, dilation: int) -> int:
    """Length of a convolution's output along one axis (may be below 1: the kernel does not fit)."""
    return (size + before + after - dilation * (kernel - 1) - 1) // stride + 1


def _channels_last_strides(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """The rule of ``c10::is_channels_last_strides_2d``; Python has no binding for it."""
    if strides[1] == 0:
        return False
    least = 0
    for d in (1, 3, 2, 0):
        if shape[d] == 0 or strides[d] < least:
            return False
        if d == 0 and least == strides[1]:
            return False  # N x 1 x 1 x 1: ambiguous, and PyTorch takes contiguous
        least = strides[d]
        if shape[d] > 1:
            least *= shape[d]
    return True


def is_channels_last(t: Tensor) -> bool:
    """Whether PyTorch takes a 4-d tensor for channels_last: by its strides, contiguous where they are ambiguous."""
    return _channels_last_strides(t.shape, t.stride())


def _stays_channels_last(t: Tensor) -> bool:
    """The same after ``t.contiguous(memory_format=torch.channels_last)``, which can make the strides ambiguous."""
    if t.is_contiguous(memory_format=torch.channels_last):
        return is_channels_last(t)
    _, c, h, w = t.shape
    return _channels_last_strides(t.shape, (c * h * w, 1, w * c, c))


def output_format(input: Tensor, weight: Tensor, shape: Sequence[int]) -> torch.memory_format:
    """The memory format of eager ``conv2d``'s output: channels_last if one of the two is, before and after both are made so.

    For an empty batch eager makes the output from the input by a view: it keeps the input's format where the shape stays.
    """
    if input.shape[0] == 0:
        strides = input.stride()
        channels_last = tuple(input.shape) == tuple(shape) and strides[1] < strides[3]
    else:
        channels_last = (is_channels_last(input) or is_channels_last(weight)) and (
            _stays_channels_last(input) or _stays_channels_last(weight)
        )
    return torch.channels_last if channels_last else torch.contiguous_format


def empty_as(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised, dense, contiguous or channels_last as ``t`` is."""
    memory_format = torch.channels_last if is_channels_last(t) else torch.contiguous_format
    return torch.empty(t.shape, dtype=dtype, device=t.device, memory_format=memory_format)


def check_tensor(t: object, name: str, rank: int, like: Tensor | None = None) -> None:
    """One operand: a dense floating-point tensor of the given rank that shares dtype and device with ``like``."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    if t.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a nested one")
    if t.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {t.layout}")
    if t.dtype not in LEGAL_DTYPES.get(t.device.type, ()):
        if t.device.type not in LEGAL_DTYPES:
            raise ValueError(f"{name} must be on a CPU or CUDA device, got {t.device}")
        names = ", ".join(map(dtype_name, LEGAL_DTYPES[t.device.type]))
        raise TypeError(f"{name} must have one of the dtypes {names} on {t.device.type}, got {dtype_name(t.dtype)}")
    if like is not None:
        if t.dtype != like.dtype:
            raise TypeError(f"{name} must have input's dtype {dtype_name(like.dtype)}, got {dtype_name(t.dtype)}")
        if t.device != like.device:
            raise ValueError(f"{name} must be on input's device {like.device}, got {t.device}")
    if t.dim() != rank:
        axes = {4: "[N, C, H, W]", 1: "[K]"}[rank] if name != "weight" else "[K, C / groups, R, S]"
        raise ValueError(f"{name} must have {rank} dimensions {axes}, got {t.dim()}: {list(t.shape)}")


def check_allocated(t: Tensor, name: str) -> None:
    """Raises RuntimeError, as PyTorch's own operators do, for a tensor whose storage was freed (FSDP and offloading do that)."""
    if t.numel() and t.untyped_storage().nbytes() == 0:
        raise RuntimeError(f"{name} must have memory, got {t.numel()} elements in a storage that was freed")


def check_operands(
    input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, shortcut: Tensor | None = None
) -> None:
    """``check_allocated`` of each."""
    for name, t in (("input", input), ("weight", weight), ("bias", bias), ("shortcut", shortcut)):
        if t is not None:
            check_allocated(t, name)


def address(t: Tensor, name: str) -> int:
    """The address of a tensor's first element, for a kernel.

    Raises:
        RuntimeError: if the tensor's storage was freed.
    """
    found = t.data_ptr()
    if found < SUSPICIOUS:
        check_allocated(t, name)
    return found


def check_bias(bias: Tensor | None, channels: int, like: Tensor) -> None:
    if bias is None:
        return
    check_tensor(bias, "bias", 1, like)
    if bias.shape[0] != channels:
        raise ValueError(f"bias must have one value for each of the {channels} output channels, got {bias.shape[0]}")


def check_shortcut(shortcut: Tensor | None, shape: Sequence[int], like: Tensor) -> None:
    if shortcut is None:
        return
    check_tensor(shortcut, "shortcut", shortcut.dim() if isinstance(shortcut, Tensor) else 4, like)
    if tuple(shortcut.shape) != tuple(shape):
        raise ValueError(f"shortcut must have the output's shape {list(shape)}, got {list(shortcut.shape)}")


def check_convolution(
    input: Tensor, weight: Tensor, bias: Tensor | None, shortcut: Tensor | None, geometry: Geometry
) -> tuple[int, int, int, int]:
    """Check one call of the operator; returns the output's shape [N, K, P, Q]."""
    stride, padding, dilation, groups = geometry
    check_tensor(input, "input", 4)
    check_tensor(weight, "weight", 4, input)
    n, c, h, w = input.shape
    k, c_group, r, s = weight.shape
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    for name, values, least in (("stride", stride, 1), ("dilation", dilation, 1), ("padding", padding, 0)):
        if min(values) < least:
            raise ValueError(f"{name} must be at least {least}, got {tuple(values)}")
    if h + padding.top + padding.bottom > _LONGEST or w + padding.left + padding.right > _LONGEST:
        raise ValueError(f"padding must keep the padded input's sides below 2**62, got {tuple(padding)}")
    if c % groups or k % groups:
        raise ValueError(f"groups must divide the {c} input and the {k} output channels, got {groups}")
    if c_group * groups != c:
        raise ValueError(
            f"weight must have input channels / groups = {c // groups} channels in its second dimension, got {c_group}"
        )
    if k < 1 or r < 1 or s < 1 or c < 1:
        raise ValueError(f"weight must not be empty, got shape {list(weight.shape)}")
    p = output_size(h, r, stride[0], padding.top, padding.bottom, dilation[0])
    q = output_size(w, s, stride[1], padding.left, padding.right, dilation[1])
    if h < 1 or w < 1 or p < 1 or q < 1:
        raise ValueError(
            "weight's kernel must fit into the padded input: kernel "
            f"{[dilation[0] * (r - 1) + 1, dilation[1] * (s - 1) + 1]} with dilation, padded input "
            f"{[h + padding.top + padding.bottom, w + padding.left + padding.right]}"
        )
    _check_size((n, k, p, q), input.dtype)
    check_bias(bias, k, input)
    check_shortcut(shortcut, (n, k, p, q), input)
    return n, k, p, q


def _check_size(shape: Sequence[int], dtype: torch.dtype) -> None:
    """That an output can be counted. Sizes that a compiler has not fixed are not asked: the answer would be a guard."""
    if torch.compiler.is_compiling() or not all([type(size) is int for size in shape]):
        return
    if math.prod(shape) * dtype.itemsize >= 2**63:
        raise ValueError(f"the output must have fewer than 2**63 bytes, got the shape {list(shape)} in {dtype_name(dtype)}")


def spec_of(
    input: Tensor, weight: Tensor, bias: Tensor | None, shortcut: Tensor | None, geometry: Geometry, relu: bool
) -> ConvSpec:
    """The spec of one call with these tensors, which is checked.

    Raises:
        TypeError, ValueError: for arguments that are not legal.
    """
    shape = check_convolution(input, weight, bias, shortcut, geometry)
    strides = torch.empty(shape, device="meta", memory_format=output_format(input, weight, shape)).stride()
    return ConvSpec(
        input.dtype,
        input.device,
        layout(input),
        layout(weight),
        None if bias is None else layout(bias),
        None if shortcut is None else layout(shortcut),
        Layout(shape, strides),
        geometry,
        relu,
    )


def check_pass(input: Tensor, bias: Tensor | None, shortcut: Tensor | None) -> None:
    check_tensor(input, "input", 4)
    check_bias(bias, input.shape[1], input)
    check_shortcut(shortcut, input.shape, input)


def check_relu_backward(grad: Tensor, output: Tensor) -> None:
    check_tensor(output, "output", 4)
    check_tensor(grad, "grad", 4, output)
    if tuple(grad.shape) != tuple(output.shape):
        raise ValueError(f"grad must have the output's shape {list(output.shape)}, got {list(grad.shape)}")
