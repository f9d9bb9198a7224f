"""Special values: operand x {nan, inf, -inf, -0, denormal, max}, at lengths just below, at and above each vector width.

What is trusted: the reference on integers that hold one special value. The comparisons are made where the result does not
depend on the order of a sum:

- One special value in one operand. Infinity times 0 is NaN wherever it is computed; sums with one infinity or one NaN have one
  value in any order; the largest number plus small integers rounds to itself in any order; a denormal alone times small
  integers is exact. Several large values, whose partial sums may overflow in one order and not in another, are left out.
- Padding. The zeros around the map times an infinite or NaN weight would be NaN, and a library is free to skip them: weights
  with such values are only used without padding. (Infinite inputs with padding are well-defined: weights are never padded.)
- Direct convolution. Winograd spreads a NaN over a tile, and overflows where a tile's sums do: test_winograd.py says how far.
- The sign of a zero is not compared: ``torch.equal`` does not tell, and relu(-0) is not specified.
"""

from __future__ import annotations

import pytest
import torch
from _calls import DTYPES, FORMATS, functions, laid_out, name
from _special import SPECIAL, operands_with, plant, value_of
from torch import Tensor

import fused_resnet
from fused_resnet import reference, testing
from fused_resnet.cases import ConvCase, Operands

pytestmark = pytest.mark.usefixtures("one_thread", "direct")

LENGTHS = (1, 7, 8, 9, 15, 16, 17, 31, 32, 33)  # channels, and pixels in a row: the vectors run over either
def same_or_zero(ours: Tensor, expected: Tensor) -> testing.Comparison:
    """The processor's instructions for bfloat16 take a denormal for zero. (The shape and dtype are compared too.)"""
    zero = (ours == 0) & (expected.abs() < 64 * torch.finfo(expected.dtype).tiny)
    return testing.compare_exact(torch.where(zero, expected, ours), expected)


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("operand", Operands._fields)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_convolution(isa: str, dtype: torch.dtype, operand: str, special: str, generator: torch.Generator) -> None:
    failures, seen = [], 0
    flushes = isa == "avx512_bf16" and dtype == torch.bfloat16 and special == "denormal"
    compare = same_or_zero if flushes else testing.compare_exact
    for length in LENGTHS:
        padding = (0, 0) if operand == "weight" else (1, 1)
        cases = (
            ConvCase(length, length, (3, 4), (1, 1), shortcut=True),
            ConvCase(3, length, (3, 4), (3, 3), padding=padding, shortcut=True),
            ConvCase(2, 3, (1, length), (1, 1), shortcut=True),
        )
        for number, case in enumerate(cases):
            place = (length + number) % 3
            for relu in (True, False):
                parameters = {**case.parameters, "relu": relu}
                plain = operands_with(case, dtype, operand, place, special, generator)
                expected = reference.conv_bias_add_relu(*plain, **parameters)
                bad = {"nan": torch.isnan, "inf": torch.isinf, "-inf": torch.isinf}.get(special)
                seen += int((bad(expected) | torch.isnan(expected)).sum()) if bad else int(expected.count_nonzero())
                for memory_format in FORMATS:
                    operands = laid_out(plain, memory_format)
                    for function in functions(operands, **parameters):
                        result = compare(function(*operands, **parameters), expected)
                        if not result:
                            failures.append(f"{case.name} place {place} relu={relu} {memory_format}: {result.reason}")
    assert not failures, "\n".join(failures)
    assert seen > 0, "the special value never reached an output"


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("operand", ["input", "bias", "shortcut"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_bias_add_relu(isa: str, dtype: torch.dtype, operand: str, special: str, generator: torch.Generator) -> None:
    m = testing.MAGNITUDE[dtype]
    for length in LENGTHS:
        for shape in ((2, length, 2, 3), (1, 2, 1, length)):
            for place, relu, memory_format in ((0, True, FORMATS[0]), (1, False, FORMATS[1]), (2, True, FORMATS[1])):
                tensors = {
                    field: torch.randint(-m, m + 1, size, generator=generator).to(dtype)
                    for field, size in (("input", shape), ("bias", shape[1:2]), ("shortcut", shape))
                }
                if special == "denormal":
                    tensors = {field: torch.zeros_like(t) for field, t in tensors.items()}
                tensors[operand] = plant(tensors[operand], place, special)
                expected = reference.bias_add_relu(**tensors, relu=relu)
                tensors["input"] = tensors["input"].contiguous(memory_format=memory_format)
                ours = fused_resnet.bias_add_relu(**tensors, relu=relu)
                result = testing.compare_exact(ours, expected)
                assert result, f"{shape} place {place} relu={relu}: {result.reason}"


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_relu_of_nan_is_nan(isa: str, dtype: torch.dtype) -> None:
    for length in LENGTHS:
        for shape in ((1, length, 2, 2), (1, 2, 1, length)):
            for memory_format in FORMATS:
                x = torch.full(shape, float("nan"), dtype=dtype).contiguous(memory_format=memory_format)
                assert fused_resnet.bias_add_relu(x).isnan().all()
                w = torch.zeros(shape[1], shape[1], 1, 1, dtype=dtype)
                assert fused_resnet.conv_bias_add_relu(torch.zeros_like(x), w, None, x).isnan().all()
                assert fused_resnet.conv_bias_add_relu(x, w).isnan().all()


@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_gradient_where_output_or_gradient_is_special(
    isa: str, dtype: torch.dtype, memory_format: torch.memory_format, generator: torch.Generator
) -> None:
    """The gradient passes where not (y <= 0), so also where y is NaN; behind the ReLU it is 0 even if infinite."""
    specials = [value_of(special, dtype) for special in SPECIAL]
    for length in LENGTHS:
        for shape in ((2, length, 2, 3), (1, 2, 1, length)):
            count = 2 * len(specials) + 5
            values = torch.tensor([*specials, *(-v for v in specials), 0.0, 1.0, -1.0, 2.0, -2.0], dtype=dtype)
            picks = torch.randint(0, count, (2, *shape), generator=generator)
            output = values[picks[0]].contiguous(memory_format=memory_format)
            grad = values[picks[1]]
            masked, sums = torch.ops.fused_resnet.relu_backward(grad, output, True)
            expected = torch.where(output <= 0, torch.zeros_like(grad), grad)
            for part in ((masked, expected), (masked, torch.ops.aten.threshold_backward(grad, output, 0))):
                result = testing.compare_exact(*part)
                assert result, f"{shape}: {result.reason}"
            # The bias gradient of a channel with a NaN, or infinities of both signs, is NaN; with one sign, that infinity.
            wide = expected.double().sum((0, 2, 3))
            assert torch.equal(sums.isnan() | sums.isinf(), (wide.isnan() | wide.isinf()) | sums.isinf())
            assert torch.equal(sums.isnan(), wide.isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_gradients_through_nan_outputs(isa: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """All four gradients of a call whose output holds NaNs equal the reference's."""
    for length in (7, 16, 33):
        case = ConvCase(3, length, (4, 5), (3, 3), padding=(1, 1), shortcut=True)
        operands = testing.integer_operands(case, dtype, generator)
        operands = operands._replace(shortcut=plant(operands.shortcut, 1, "nan"))
        grad = testing.unit_gradient(case.output_shape, dtype, generator)
        grad[:, (length - 1) // 2] = 1
        results = testing.compare_gradients(fused_resnet.conv_bias_add_relu, operands, grad, **case.parameters)
        for of, result in results.items():
            assert result, f"{of}: {result.reason}"
        output = fused_resnet.conv_bias_add_relu(*operands, **case.parameters)
        assert output.isnan().sum() == 1
        masked, _ = torch.ops.fused_resnet.relu_backward(grad, output, False)
        assert torch.equal(masked[output.isnan()], grad[output.isnan()])
