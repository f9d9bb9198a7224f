"""Exact integers: small-integer operands whose sums no order of additions rounds, ``torch.equal`` with the reference.

What is trusted: the library's convolution on integers (its sums are exact too), and ``testing.integer_operands``, which keeps
every partial sum inside the range where the format holds all integers. There is no tolerance: an index, padding or tail
that is wrong by one changes an integer.

Direct convolution and Winograd F(2x2, 3x3), whose sums stay exact on the same data. With operands of at most m, its transformed
input is a sum of four integers, at most 4 m; its transformed weight a multiple of 1/4 of at most 9 m / 4 (both are kept in the
accumulator's type). A position's sum over C channels is so a multiple of 1/4 of at most 9 m^2 C, and an output, which adds and
subtracts nine positions, one of at most 81 m^2 C. A format that holds all integers up to E holds all multiples of 1/4 up to E / 4:

    4 (81 m^2 C + 2 m) <= E        float32, m = 8, E = 2^24: C <= 809.   float64, E = 2^53: any C.
                                   bfloat16, m = 2, float32 accumulators: C <= 12945, and one rounding, that direct has too

Where the transformed operands are kept as bfloat16 (avx512_bf16), 4 m = 8 and 9 m = 18 quarters are exact too: they fit 8 bits.
With stride 2 (inputs in two phases: three taps on the one, two on the other) all of these are smaller.

``EXACT_CHANNELS`` has the bound and the tests assert it. F(4x4, 3x3) has fractions that are no powers of two: test_winograd.py.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from _calls import DTYPES, FORMATS, compare_all, functions, laid_out, name, plan_of
from _exact import EXACT_ALGORITHMS, ISAS, winograd_fits
from torch import Tensor

from fused_resnet import bias_add_relu, reference, testing, why_not
from fused_resnet.cases import AWKWARD, CONVS, ConvCase, Operands
from fused_resnet.testing.compare import accumulator
from fused_resnet.testing.data import EXACT


def exact_channels(dtype: torch.dtype) -> int:
    """So many input channels at most keep F(2x2, 3x3) exact: see this file's head."""
    m = testing.MAGNITUDE[dtype]
    return (EXACT[accumulator(dtype)] // 4 - 2 * m) // (81 * m * m)


# F(2x2, 3x3) where it is another computation than direct.
BOTH = [(case, "direct") for case in CONVS] + [(case, "winograd2") for case in CONVS if winograd_fits(case)]
@lru_cache(maxsize=1)
def resnet_operands(case: ConvCase, dtype: torch.dtype) -> tuple[Operands, Tensor]:
    """Operands and what they must give; kept for the instruction sets and layouts that follow."""
    operands = testing.integer_operands(case, dtype, torch.Generator().manual_seed(0))
    return operands, reference.conv_bias_add_relu(*operands, **case.parameters)


# The last mark is the one that varies fastest, so that a reference is computed once for all instruction sets.
@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize(("case", "algorithm"), BOTH, ids=name, indirect=["algorithm"])
def test_resnet_convolutions(case: ConvCase, algorithm: str, dtype: torch.dtype, isa: str) -> None:
    operands, expected = resnet_operands(case, dtype)
    assert expected.count_nonzero() > 0
    assert case.channels <= exact_channels(dtype) or algorithm == "direct"
    assert plan_of(operands, **case.parameters).kernel.algorithm == algorithm  # type: ignore[attr-defined]
    for memory_format in FORMATS:
        arguments = laid_out(operands, memory_format)
        for function in functions(arguments, **case.parameters):
            ours = function(*arguments, **case.parameters)
            result = testing.compare_exact(ours, expected)
            assert result, f"{memory_format} {function.__name__}: {result.reason}"
            assert ours.is_contiguous(memory_format=memory_format)


@pytest.mark.smoke
@EXACT_ALGORITHMS
@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_awkward_convolutions(
    one_thread: None, isa: str, algorithm: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    generator = torch.Generator().manual_seed(1)
    cases = AWKWARD if algorithm == "direct" else tuple(filter(winograd_fits, AWKWARD))
    count, failures = compare_all(
        cases, lambda case: laid_out(testing.integer_operands(case, dtype, generator), memory_format), exact=True
    )
    assert not failures, "\n".join(failures)
    assert count >= len(cases) > 40


@EXACT_ALGORITHMS
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_more_images_than_one_task_takes(isa: str, algorithm: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    cases = (
        ConvCase(16, 24, (7, 7), (3, 3), padding=(1, 1), shortcut=True, batch=9),
        ConvCase(33, 40, (7, 7), (1, 1), shortcut=True, batch=11),
        ConvCase(8, 70, (2, 3), (3, 3), padding=(1, 1), shortcut=True, batch=65),
        ConvCase(3, 5, (3, 400), (3, 3), padding=(1, 1), shortcut=True, batch=2),  # rows cut into columns
    )
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        _, failures = compare_all(cases, lambda case: testing.integer_operands(case, dtype, generator), exact=True)
        assert not failures, "\n".join(failures)


def test_the_hot_path_is_what_runs(kernels: object, generator: torch.Generator) -> None:
    """groups = 1 is on the hot path unless ``why_not`` gives a reason of speed; groups > 1 is never."""
    for case in AWKWARD:
        operands = testing.integer_operands(case, torch.float32, generator)
        why = why_not(*operands, **case.parameters)
        if case.groups > 1:
            assert any("groups" in sentence for sentence in why), case.name
        else:
            assert not any("groups" in sentence or "module" in sentence for sentence in why), (case.name, why)


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "no relu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_bias_add_relu(one_thread: None, isa: str, dtype: torch.dtype, relu: bool, generator: torch.Generator) -> None:
    failures = []
    m = testing.MAGNITUDE[dtype]

    def integers(*shape: int) -> Tensor:
        return torch.randint(-m, m + 1, shape, generator=generator).to(dtype)

    for channels in (1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64):
        for size in ((1, 1), (1, 9), (5, 1), (4, 4), (3, 11), (16, 33)):
            for memory_format in FORMATS:
                shape = (2, channels, *size)
                x, s = (integers(*shape).contiguous(memory_format=memory_format) for _ in range(2))
                for bias in (None, integers(channels)):
                    for shortcut in (None, s, s[:, :, :1, :1].expand(shape), x):
                        ours = bias_add_relu(x, bias, shortcut, relu)
                        result = testing.compare_exact(ours, reference.bias_add_relu(x, bias, shortcut, relu))
                        if not result:
                            failures.append(f"{shape} {memory_format}: {result.reason}")
                        assert ours.data_ptr() != x.data_ptr()
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_relu_backward(
    one_thread: None, isa: str, dtype: torch.dtype, memory_format: torch.memory_format, generator: torch.Generator
) -> None:
    for shape in ((2, 1, 3, 3), (3, 8, 5, 7), (1, 17, 1, 1), (2, 33, 9, 8), (65, 5, 3, 2), (2, 16, 40, 40)):
        grad = testing.unit_gradient(shape, dtype, generator)
        output = torch.randint(-2, 3, shape, generator=generator).to(dtype).contiguous(memory_format=memory_format)
        expected = torch.where(output <= 0, torch.zeros_like(grad), grad)
        for incoming in (grad, grad.contiguous(memory_format=torch.channels_last), grad.mT.contiguous().mT):
            masked, sums = torch.ops.fused_resnet.relu_backward(incoming, output, True)
            for what, ours, theirs in (("mask", masked, expected), ("bias", sums, expected.sum((0, 2, 3)))):
                result = testing.compare_exact(ours, theirs)
                assert result, f"{what} {shape}: {result.reason}"
            assert masked.is_contiguous(memory_format=memory_format)
            assert torch.ops.fused_resnet.relu_backward(incoming, output, False)[1].numel() == 0
