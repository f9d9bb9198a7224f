"""The CUDA passes without a GPU: bias + shortcut + ReLU, and the mask with the bias gradient. See test_cuda_host.py.

Sizes around a vector (16 bytes) and a block (1024 vectors), so that there are whole blocks, a part of one, and single values
after the last vector; operands that start one element into a vector, which leaves the values one by one.
"""

from __future__ import annotations

import _cuda_host as host
import pytest
import torch
from _calls import FORMATS, name
from _special import SPECIAL, plant
from torch import Tensor

from fused_resnet import reference, testing
from fused_resnet.testing.compare import accumulator, unit_roundoff

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CHANNELS = (1, 3, 8, 16, 17, 33)
SIZES = ((1, 1), (1, 9), (5, 1), (4, 4), (3, 11), (17, 33))


def integers(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    m = testing.MAGNITUDE[dtype]
    return torch.randint(-m, m + 1, shape, generator=generator).to(dtype)


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "no relu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_bias_add_relu(dtype: torch.dtype, relu: bool, generator: torch.Generator) -> None:
    failures = []
    for channels in CHANNELS:
        for size in SIZES:
            shape = (2, channels, *size)
            bias = integers((channels,), dtype, generator)
            for memory_format in FORMATS:
                x, s = (integers(shape, dtype, generator).contiguous(memory_format=memory_format) for _ in range(2))
                for b in (None, bias):
                    for number, shortcut in enumerate((None, s, s[:, :, :1, :1].expand(shape), x)):
                        ours = host.bias_add_relu(x, b, shortcut, relu, skew=number == 3)
                        result = testing.compare_exact(ours, reference.bias_add_relu(x, b, shortcut, relu))
                        if not result:
                            failures.append(f"{shape} {memory_format} {number}: {result.reason}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_layouts(dtype: torch.dtype, layout: str, generator: torch.Generator) -> None:
    lay_out = testing.LAYOUTS[layout]
    for shape in ((2, 16, 5, 8), (3, 6, 4, 5)):
        plain = [integers(shape, dtype, generator) for _ in range(2)]
        bias = lay_out(integers(shape[1:2], dtype, generator)).contiguous()
        for memory_format in FORMATS:
            for which in (0, 1):
                a, b = (lay_out(t) if i == which else t.contiguous(memory_format=memory_format) for i, t in enumerate(plain))
                result = testing.compare_exact(host.bias_add_relu(a, bias, b), reference.bias_add_relu(a, bias, b))
                assert result, f"{shape} {memory_format} {which}: {result.reason}"
                check_backward(a, b, f"{shape} {memory_format} {which}")


def check_backward(grad: Tensor, output: Tensor, what: str, skew: int = 0) -> None:
    expected = torch.where(output <= 0, torch.zeros_like(grad), grad)
    masked, sums = host.relu_backward(grad, output, skew=skew)
    alone, none = host.relu_backward(grad, output, bias=False, skew=skew)
    assert none is None
    assert sums is not None
    total = expected.double().sum((0, 2, 3)).to(grad.dtype)
    for part, ours, theirs in (("mask", masked, expected), ("mask alone", alone, expected), ("bias", sums, total)):
        result = testing.compare_exact(ours, theirs)
        assert result, f"{part} {what}: {result.reason}"


@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_relu_backward(dtype: torch.dtype, memory_format: torch.memory_format, generator: torch.Generator) -> None:
    # The last ones: several pieces; more channels than a block takes (256).
    for shape in (
        *((2, c, *size) for c in CHANNELS for size in SIZES), (65, 5, 3, 2), (2, 16, 40, 40), (4, 8, 96, 64), (2, 264, 9, 8),
    ):  # fmt: skip
        grad = testing.unit_gradient(shape, dtype, generator)
        output = integers(shape, dtype, generator).contiguous(memory_format=memory_format)
        for skew in (0, 1):
            check_backward(grad.contiguous(memory_format=memory_format), output, f"{shape} skew {skew}", skew)
        check_backward(grad.mT.contiguous().mT, output, f"{shape} transposed")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name)
def test_wide_input(dtype: torch.dtype, generator: torch.Generator) -> None:
    """float32 in (the library's convolution), one rounding out."""
    for shape in ((2, 8, 5, 5), (1, 5, 7, 3), (2, 24, 33, 20)):
        for memory_format in FORMATS:
            x = (torch.randn(shape, generator=generator) * 300).contiguous(memory_format=memory_format)
            s = torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=memory_format)
            bias = torch.randn(shape[1], generator=generator).to(dtype)
            for given, shortcut in ((x, s), (x, None), (x.mT.contiguous().mT, s), (x, s[:1, :, :1].expand(shape))):
                ours = host.bias_add_relu(given, bias, shortcut, dtype=dtype)
                assert ours.dtype == dtype
                result = testing.compare_exact(ours, reference.bias_add_relu(given, bias, shortcut).to(dtype))
                assert result, f"{shape} {memory_format}: {result.reason}"


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_in_place(dtype: torch.dtype, generator: torch.Generator) -> None:
    for shape in ((2, 16, 5, 8), (3, 7, 35, 33)):
        for memory_format in FORMATS:
            x = integers(shape, dtype, generator).contiguous(memory_format=memory_format)
            bias, s = integers(shape[1:2], dtype, generator), integers(shape, dtype, generator)
            for shortcut in (s, s.contiguous(memory_format=memory_format)):
                expected = reference.bias_add_relu(x, bias, shortcut)
                assert testing.compare_exact(host.bias_add_relu(x.clone(), bias, shortcut, in_place=True), expected)


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_special_values(dtype: torch.dtype, special: str, generator: torch.Generator) -> None:
    for length in (7, 8, 9, 16, 17):
        for shape in ((2, length, 2, 3), (1, 2, 1, length)):
            for place, memory_format in ((0, FORMATS[0]), (1, FORMATS[1]), (2, FORMATS[1])):
                for field in ("input", "bias", "shortcut"):
                    sizes = {"input": shape, "bias": shape[1:2], "shortcut": shape}
                    tensors = {key: integers(size, dtype, generator) for key, size in sizes.items()}
                    if special == "denormal":
                        tensors = {key: torch.zeros_like(t) for key, t in tensors.items()}
                    tensors[field] = plant(tensors[field], place, special)
                    expected = reference.bias_add_relu(tensors["input"], tensors["bias"], tensors["shortcut"])
                    x, s = (tensors[key].contiguous(memory_format=memory_format) for key in ("input", "shortcut"))
                    result = testing.compare_exact(host.bias_add_relu(x, tensors["bias"], s), expected)
                    assert result, f"{shape} {field} place {place}: {result.reason}"
                grad = plant(testing.unit_gradient(shape, dtype, generator), place, special)
                output = plant(integers(shape, dtype, generator), 2 - place, special)
                grad, output = (t.contiguous(memory_format=memory_format) for t in (grad, output))
                check_backward(grad, output, f"{shape} place {place}")


def test_the_gradient_at_nan_passes() -> None:
    output = torch.tensor([float("nan"), 0.0, -0.0, -1.0, 1.0, float("inf"), -float("inf"), 1e-45]).reshape(1, 8, 1, 1)
    masked, sums = host.relu_backward(torch.arange(1.0, 9.0).reshape(1, 8, 1, 1), output)
    assert masked.flatten().tolist() == [1, 0, 0, 0, 5, 6, 0, 8]
    assert sums is not None
    assert sums.tolist() == [1, 0, 0, 0, 5, 6, 0, 8]


def test_empty() -> None:
    for shape in ((0, 5, 4, 4), (0, 8, 1, 1)):
        x = torch.empty(shape)
        assert host.bias_add_relu(x, torch.ones(shape[1]), x).shape == shape
        masked, sums = host.relu_backward(x, x)
        assert masked.shape == shape
        assert sums is not None
        assert sums.tolist() == [0.0] * shape[1]


LARGER = ((4, 24, 40, 31), (3, 33, 40, 31), (2, 64, 64, 64))


@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_the_order_of_threads_changes_no_bit(dtype: torch.dtype, memory_format: torch.memory_format, generator: torch.Generator) -> None:
    for shape in LARGER[:2]:
        a, b = (torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=memory_format) for _ in range(2))
        bias = torch.randn(shape[1], generator=generator).to(dtype)

        def run(a: Tensor = a, b: Tensor = b, bias: Tensor = bias) -> tuple[Tensor, ...]:
            masked, sums = host.relu_backward(a, b)
            assert sums is not None
            return host.bias_add_relu(a, bias, b), masked, sums

        expected = run()
        for order, poison in (("forward", 0xFF), ("reverse", 0xFF), ("shuffled", 0xA5)):
            with host.options(order, poison):
                assert all(map(host.same_bits, run(), expected)), (shape, order)


@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_error_of_the_bias_gradient(dtype: torch.dtype, memory_format: torch.memory_format, generator: torch.Generator) -> None:
    """Beyond the one rounding of the result: L additions whose errors have random signs, u sqrt(L) times the terms' norm."""
    for shape in LARGER:
        grad, output = (torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=memory_format) for _ in range(2))
        masked, sums = host.relu_backward(grad, output)
        assert sums is not None
        truth = masked.double().sum((0, 2, 3))
        norm = masked.double().square().sum((0, 2, 3)).sqrt()
        length = grad[:, 0].numel()
        allowed = 2 * unit_roundoff(accumulator(dtype)) * length**0.5 * norm + unit_roundoff(dtype) * truth.abs()
        assert ((sums.double() - truth).abs() <= allowed).all(), shape


def test_pieces() -> None:
    """Whole, without overlap, and enough of them for a large GPU (132 multiprocessors, two blocks each).

    In channels_last a block takes 256 channels of a piece.
    """
    for n, k, p, q, enough in ((256, 256, 56, 56, True), (256, 64, 56, 56, True), (256, 2048, 7, 7, True), (2, 3, 5, 7, False)):
        for channels_last in (False, True):
            strides = [k * p * q, 1, k * q, k] if channels_last else [k * p * q, p * q, q, 1]
            count, length = host.build().PassShape("bfloat16", [n, k, p, q], strides, strides, strides).pieces()
            pixels = n * p * q
            assert (count - 1) * length < pixels <= count * length
            assert not enough or count * (-(-k // 256) if channels_last else k) >= 264
            assert count * k * 4 <= 2**24  # bytes of workspace
