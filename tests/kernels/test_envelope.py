"""Error envelope: the error against float64 is at most twice PyTorch's own in the same dtype.

What is trusted: the reference in float64 as the truth, and the bound of ``testing/compare.py``, which is a formula in the unit
roundoffs and PyTorch's measured error; a NaN or infinity in only one of the two fails before anything is subtracted.

Direct convolution; test_winograd.py has the other algorithms' bounds.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from _calls import DTYPES, FORMATS, compare_all, functions, laid_out, name
from _exact import ISAS
from torch import Tensor

from fused_resnet import bias_add_relu, reference, testing
from fused_resnet.cases import AWKWARD, CONVS, ConvCase, Operands

pytestmark = pytest.mark.usefixtures("direct")

# Of each kernel size and stride, the convolution with the longest sum: there the error is largest.
LONGEST = tuple({(case.kernel, case.stride, case.shortcut): case for case in sorted(CONVS, key=lambda c: c.reduction)}.values())


@lru_cache(maxsize=1)
def expected(case: ConvCase, dtype: torch.dtype) -> tuple[Operands, Tensor, Tensor, float]:
    operands = testing.float_operands(case, dtype, torch.Generator().manual_seed(0))
    truth, peer = testing.truth_and_peer(operands, **case.parameters)
    return operands, truth, peer, testing.error_scale(operands, dtype, **case.parameters)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", LONGEST, ids=name)
def test_resnet_convolutions(case: ConvCase, dtype: torch.dtype, isa: str) -> None:
    operands, truth, peer, scale = expected(case, dtype)
    operands = laid_out(operands, torch.channels_last)
    for function in functions(operands, **case.parameters):
        result = testing.compare_tensors(function(*operands, **case.parameters), truth, peer, scale)
        assert result, f"{function.__name__}: {result.reason}"


@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_awkward_convolutions(one_thread: None, isa: str, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(5)
    count, failures = compare_all(
        AWKWARD, lambda case: laid_out(testing.float_operands(case, dtype, generator), memory_format), exact=False
    )
    assert not failures, "\n".join(failures)
    assert count >= len(AWKWARD)


@pytest.mark.smoke
def test_bfloat16_rounds_once(isa: str, generator: torch.Generator) -> None:
    """The sum with bias and shortcut is rounded to bfloat16 once, at the end; also on the general path."""
    for groups in (1, 2):
        case = ConvCase(64, 64, (6, 6), (3, 3), padding=(1, 1), groups=groups, shortcut=True)
        operands = testing.float_operands(case, torch.bfloat16, generator)
        # A large shortcut: rounding the convolution alone first is then seen in the last place of the small outputs.
        operands = operands._replace(shortcut=operands.shortcut * 16)
        truth, peer = testing.truth_and_peer(operands, **case.parameters)
        scale = testing.error_scale(operands, torch.bfloat16, **case.parameters)
        for function in functions(operands, **case.parameters):
            result = testing.compare_tensors(function(*operands, **case.parameters), truth, peer, scale)
            assert result, f"groups {groups}: {result.reason}"
        twice = torch.nn.functional.conv2d(operands.input, operands.weight, operands.bias, padding=1, groups=groups)
        twice = torch.relu(twice + operands.shortcut)
        assert not testing.compare_tensors(twice, truth, peer, scale), "the bound does not tell one rounding from two"


@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_bias_add_relu(one_thread: None, isa: str, dtype: torch.dtype, memory_format: torch.memory_format, generator: torch.Generator) -> None:
    """input + bias + shortcut in that order, each rounded in the accumulator's type: equal to the reference, bit for bit."""
    for channels in (1, 7, 16, 33):
        shape = (2, channels, 5, 9)
        x, s = (
            torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=memory_format) for _ in range(2)
        )
        b = torch.randn(channels, generator=generator).to(dtype)
        for relu in (True, False):
            result = testing.compare_exact(bias_add_relu(x, b, s, relu), reference.bias_add_relu(x, b, s, relu))
            assert result, result.reason


@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_bias_gradient(
    isa: str, dtype: torch.dtype, memory_format: torch.memory_format, generator: torch.Generator
) -> None:
    """The sum over N, P, Q: float32 inside pieces and float64 over them, so well within twice a float32 sum's error."""
    for shape in ((8, 5, 40, 40), (3, 64, 28, 28), (70, 17, 3, 3)):
        output = torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=memory_format)
        grad = torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=memory_format)
        _, sums = torch.ops.fused_resnet.relu_backward(grad, output, True)
        masked = torch.where(output <= 0, torch.zeros_like(grad), grad)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        terms = masked.double().square().sum((0, 2, 3))
        count = masked.numel() // masked.shape[1]
        scale = torch.finfo(wide).eps / 2 * (count * terms.max().item()) ** 0.5
        result = testing.compare_tensors(sums, masked.double().sum((0, 2, 3)), masked.to(wide).sum((0, 2, 3)), scale)
        assert result, f"{shape}: {result.reason}"
