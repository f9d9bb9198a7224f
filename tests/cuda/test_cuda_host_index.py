"""Index arithmetic of the CUDA kernels beyond 2^31 elements, without the memory: strides that are huge between few elements.

What is trusted: Python's integers, and sparse maps of which only the touched pages exist.
"""

from __future__ import annotations

import mmap
from typing import Any

import _cuda_host as host
import pytest
import torch
from torch import Tensor

from fused_resnet import reference, testing
from fused_resnet.cases import ConvCase, Operands

INT32 = 2**31
# The kernels take 64 bits from here on: a margin for what a tile reaches beyond the problem.
LIMIT = INT32 - 1 - 2**16

# One convolution: [2, 3, 5, 6] -> [2, 8, 3, 6], 3x3, stride (2, 1), dilation (1, 2), padding (1, 2).
SHAPES: dict[str, Any] = {
    "input": [2, 3, 5, 6],
    "weight": [8, 3, 3, 3],
    "output": [2, 8, 3, 6],
    "stride": [2, 1],
    "pad": [1, 2],
    "dilation": [1, 2],
    "groups": 1,
    "input_strides": [90, 30, 6, 1],
    "weight_strides": [27, 9, 3, 1],
    "output_strides": [144, 18, 6, 1],
    "shortcut_strides": [144, 18, 6, 1],
}
# How many steps of a stride an operand takes at most. The input's rows are reached from -1 (padding) to 5, its columns from -2
# to 7; offsets of both signs are counted.
STEPS = {
    "input_strides": (1, 2, 7, 11),
    "weight_strides": (7, 2, 2, 2),
    "output_strides": (1, 7, 2, 5),
    "shortcut_strides": (1, 7, 2, 5),
}


def convolution(**changes: Any) -> Any:
    data = dict.fromkeys(("input_data", "weight_data", "bias_data", "shortcut_data", "output_data"), 4096)
    return host.build().Convolution(**{"dtype": "float32", "relu": True, "joined": None, **SHAPES, **data, **changes})


@pytest.mark.parametrize("operand", STEPS)
def test_64_bits_from_where_an_operand_needs_them(operand: str) -> None:
    assert convolution().plan()[1] is False
    for axis, steps in enumerate(STEPS[operand]):
        strides = list(SHAPES[operand])
        strides[axis] = 0
        others = sum(n * stride for n, stride in zip(STEPS[operand], strides, strict=True))
        strides[axis] = (LIMIT - others) // steps + 1
        assert convolution(**{operand: strides}).plan()[1] is True, (axis, strides)
        strides[axis] -= 1 + steps  # a few less than the limit
        assert convolution(**{operand: strides}).plan()[1] is False, (axis, strides)


@pytest.mark.parametrize(
    "changes",
    [
        {"input": [LIMIT, 3, 5, 6], "output": [LIMIT, 8, 3, 6]},  # pixels
        {"input": [2, LIMIT, 5, 6], "input_strides": [0, 0, 6, 1], "weight_strides": [27, 0, 3, 1]},  # terms
        {"pad": [LIMIT, 2], "input_strides": [90, 30, 0, 1]},  # rows
        {"pad": [1, LIMIT], "input_strides": [90, 30, 6, 0]},  # columns
        {"dilation": [LIMIT, 2], "input_strides": [90, 30, 0, 1]},
        {"stride": [2, LIMIT], "input_strides": [90, 30, 6, 0]},
        {"weight": [LIMIT, 3, 3, 3], "weight_strides": [0, 9, 3, 1], "output_strides": [144, 0, 6, 1], "shortcut_strides": [0] * 4},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_64_bits_for_sizes_without_strides(changes: dict[str, Any]) -> None:
    assert convolution(**changes).plan()[1] is True


def test_64_bits_for_a_joined_convolution() -> None:
    for strides, weight, wide in (
        ([90, 30, 6, 1], [3, 1, 1, 1], False),
        ([LIMIT, 30, 6, 1], [3, 1, 1, 1], True),
        ([90, 30, 6, 1], [LIMIT // 7 + 1, 1, 1, 1], True),
    ):
        joined = (4096, 3, [2, 1], strides, 4096, weight)
        assert convolution(joined=joined).plan()[1] is wide, (strides, weight)


def test_tiles() -> None:
    """Few channels in a group, few blocks, many blocks."""

    def tile(n: int, c: int, k: int, groups: int = 1) -> str:
        sizes = {"input": [n, c, 56, 56], "weight": [k, c // groups, 1, 1], "output": [n, k, 56, 56], "groups": groups}
        return str(convolution(**sizes, stride=[1, 1], pad=[0, 0]).plan()[0])

    assert tile(32, 64, 16) == "narrow"
    assert tile(32, 256, 256, 32) == "narrow"
    assert tile(1, 64, 64) == "medium"
    assert tile(32, 64, 64) == "large"


def test_offsets_of_pixels_and_terms() -> None:
    """Of a problem with 2^40 pixels and 2^33 terms, against Python's integers."""
    n, c, p, q, r, s = 2**20, 2**31 // 3, 2**10 + 1, 2**10 + 3, 3, 5
    xs, ys, ws = (7 * 2**40, 11, 2**38, 2**30), (3 * 2**41, 1, 2**39, 2**28), (2**39, 13, 2**35, 2**34)
    call = convolution(
        input=[n, c, 2 * p, q], weight=[8, c, r, s], output=[n, 8, p, q], stride=[2, 1], pad=[1, 2], dilation=[3, 2],
        input_strides=list(xs), weight_strides=list(ws), output_strides=list(ys), shortcut_strides=list(ys),
    )  # fmt: skip
    assert call.plan()[1] is True
    for image, row, col in ((0, 0, 0), (1, 2, 3), (n - 1, p - 1, q - 1), (n // 2, p - 1, 0)):
        for channel, tap_h, tap_w in ((0, 0, 0), (c - 1, r - 1, s - 1), (c // 2, 1, 3)):
            pixel, term = call.locate((image * p + row) * q + col, (tap_h * s + tap_w) * c + channel)
            h, w = 2 * row - 1, col - 2
            assert pixel == [h, w, image * xs[0] + h * xs[2] + w * xs[3], image * ys[0] + row * ys[2] + col * ys[3]]
            h, w = 3 * tap_h, 2 * tap_w
            assert term == [h, w, channel * xs[1] + h * xs[2] + w * xs[3], channel * ws[1] + tap_h * ws[2] + tap_w * ws[3]]


@pytest.mark.parametrize("channels_last", [False, True])
def test_positions_of_a_pass(channels_last: bool) -> None:
    for n, k, p, q in ((2**12, 257, 2**10 + 1, 2**9), (3, 5, 7, 11)):
        strides = [k * p * q, 1, k * q, k] if channels_last else [k * p * q, p * q, q, 1]
        shape = host.build().PassShape("float32", [n, k, p, q], strides, strides, strides)
        for place in ([0, 0, 0, 0], [n - 1, k - 1, p - 1, q - 1], [n // 2, 1, p - 1, 3], [1, k - 1, 0, q - 1]):
            element = sum(i * stride for i, stride in zip(place, strides, strict=True))
            assert shape.position(element) == place


def far(values: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The same values in a sparse map, ``strides`` elements apart."""
    elements = 1 + sum((n - 1) * stride for n, stride in zip(values.shape, strides, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, elements * values.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=values.dtype).as_strided(values.shape, strides).copy_(values)


# Between the two images, rows or columns of an operand; the last two stay within 32 bits, by little.
JUMPS = {
    "images": (INT32 + 40, 30, 6, 1),
    "rows": (7, 400, INT32 // 2 + 50, 60),
    "32 bits": (LIMIT - 4000, 30, 6, 1),
}


@pytest.mark.parametrize("jump", JUMPS)
@pytest.mark.parametrize("operand", ["input", "weight", "shortcut", "output"])
def test_convolution(operand: str, jump: str, generator: torch.Generator) -> None:
    case = ConvCase(2, 2, (3, 4), (3, 3), padding=(1, 1), shortcut=True, batch=2)
    operands = testing.integer_operands(case, torch.float32, generator)
    expected = reference.conv_bias_add_relu(*operands, **case.parameters)
    output = torch.full_like(expected, float("nan"))
    if operand == "output":
        output = far(output, JUMPS[jump])
    else:
        operands = Operands(**{**operands._asdict(), operand: far(getattr(operands, operand), JUMPS[jump])})
    call = host.call(output, *operands, **case.parameters)
    assert call.plan()[1] is (jump != "32 bits")
    call.run()
    assert testing.compare_exact(output, expected)


@pytest.mark.parametrize("jump", JUMPS)
def test_passes(jump: str, generator: torch.Generator) -> None:
    shape, strides = (2, 2, 3, 4), JUMPS[jump]
    a, b = (torch.randint(-2, 3, shape, generator=generator).float() for _ in range(2))
    bias = torch.tensor([1.0, -2.0])
    expected = reference.bias_add_relu(a, bias, b)
    masked = torch.where(b <= 0, 0.0, a)
    for first, second in ((far(a, strides), b), (a, far(b, strides))):
        assert testing.compare_exact(host.bias_add_relu(first, bias, second), expected)
        result, sums = host.relu_backward(first, second)
        assert testing.compare_exact(result, masked)
        assert sums is not None
        assert testing.compare_exact(sums, masked.sum((0, 2, 3)))
