"""Layouts: each operand on its own in every memory layout; the strides of the result, fake and real; no hidden copies.

What is trusted: the reference on the same tensors, integers throughout (no tolerance), and buffers filled with NaN around
sliced operands, so that a read outside shows. Strides are compared with those of eager ``conv2d`` itself.
"""

from __future__ import annotations

from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _calls import CONV, DTYPES, FORMATS, PASS, allocated, functions, laid_out, name, plan_of
from _exact import EXACT_ALGORITHMS, winograd_fits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_resnet
import fused_resnet.nn as fnn
from fused_resnet import reference, testing
from fused_resnet.cases import BLOCKS, CONVS, ConvCase, Operands

# Channels that fill no vector, rows packed and read in place, several images; rows so long that they are cut.
CASES = (
    ConvCase(5, 19, (6, 7), (3, 3), padding=(1, 1), shortcut=True, batch=2),
    ConvCase(18, 33, (5, 6), (1, 1), shortcut=True, batch=2),
    ConvCase(16, 16, (9, 9), (3, 3), (2, 2), (0, 1), shortcut=True),
    ConvCase(2, 3, (2, 400), (3, 3), padding=(1, 1), shortcut=True),
    ConvCase(6, 4, (5, 6), (3, 3), padding=(1, 1), groups=2, shortcut=True),
)


@EXACT_ALGORITHMS
@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("operand", Operands._fields)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_each_operand(one_thread: None, isa: str, dtype: torch.dtype, operand: str, layout: str, algorithm: str) -> None:
    generator = torch.Generator().manual_seed(6)
    for case in CASES if algorithm == "direct" else filter(winograd_fits, CASES):
        for others in FORMATS:
            operands = laid_out(testing.integer_operands(case, dtype, generator), others)
            operands = testing.layout(operands, **{operand: layout})
            for function in functions(operands, **case.parameters):
                result = testing.compare_forward(function, operands, exact=True, **case.parameters)
                assert result, f"{case.name}, {others}: {result.reason}"


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("operand", ["input", "bias", "shortcut"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_each_operand_of_bias_add_relu(one_thread: None, isa: str, dtype: torch.dtype, operand: str, layout: str) -> None:
    m = testing.MAGNITUDE[dtype]
    for shape in ((2, 19, 5, 6), (1, 1, 4, 5), (3, 16, 1, 1)):
        for others in FORMATS:
            x, s = (torch.randint(-m, m + 1, shape).to(dtype).contiguous(memory_format=others) for _ in range(2))
            b = torch.randint(-m, m + 1, shape[1:2]).to(dtype)
            arguments = {"input": x, "bias": b, "shortcut": s}
            arguments[operand] = testing.LAYOUTS[layout](arguments[operand])
            ours = fused_resnet.bias_add_relu(**arguments)
            result = testing.compare_exact(ours, reference.bias_add_relu(**arguments))
            assert result, f"{shape}, {others}: {result.reason}"
            assert ours.is_contiguous() or ours.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("operand", ["grad", "output"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_each_operand_of_relu_backward(one_thread: None, isa: str, dtype: torch.dtype, operand: str, layout: str) -> None:
    generator = torch.Generator().manual_seed(10)
    for shape in ((2, 19, 5, 6), (1, 1, 4, 5), (3, 16, 1, 1), (2, 3, 1, 9)):
        for others in FORMATS:
            arguments = {
                "grad": testing.unit_gradient(shape, dtype, generator).contiguous(memory_format=others),
                "output": torch.randint(-2, 3, shape, generator=generator).to(dtype).contiguous(memory_format=others),
            }
            arguments[operand] = testing.LAYOUTS[layout](arguments[operand])
            masked, sums = torch.ops.fused_resnet.relu_backward(**arguments, bias_grad=True)
            expected = torch.where(arguments["output"] <= 0, torch.zeros_like(masked), arguments["grad"])
            alone, _ = torch.ops.fused_resnet.relu_backward(**arguments, bias_grad=False)
            for what, ours, theirs in (("mask", masked, expected), ("alone", alone, expected), ("bias", sums, expected.sum((0, 2, 3)))):
                result = testing.compare_exact(ours, theirs)
                assert result, f"{what} {shape}, {others}: {result.reason}"


def _same_strides(ours: Tensor, theirs: Tensor) -> bool:
    """Equal; in an empty tensor only along axes longer than 1, since eager conv2d gives stride 0 to some of the others."""
    if theirs.numel():
        return ours.stride() == theirs.stride()
    return all(a == b for a, b, n in zip(ours.stride(), theirs.stride(), theirs.shape, strict=True) if n > 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_strides(one_thread: None, kernels: ModuleType, dtype: torch.dtype) -> None:
    """Real, fake and eager, over shapes whose strides do and do not tell the memory format: N = 0, C = 1, 1x1."""
    kinds = [kind for kind in testing.LAYOUTS if kind != "offset"]
    sizes = ((1, 1), (1, 3), (3, 1), (3, 4))
    wrong = []
    for n, c, k, size, kernel in product((0, 1, 2), (1, 3), (1, 3, 4), sizes, ((1, 1), (3, 3), (1, 3))):
        padding = (kernel[0] // 2, kernel[1] // 2)
        four = (padding[0], padding[0], padding[1], padding[1])
        for input_kind, weight_kind in product(kinds, kinds):
            x = testing.LAYOUTS[input_kind](torch.ones(n, c, *size, dtype=dtype))
            w = testing.LAYOUTS[weight_kind](torch.ones(k, c, *kernel, dtype=dtype))
            eager = F.conv2d(x, w, None, 1, padding)
            ours = fused_resnet.conv_bias_add_relu(x, w, padding=padding)
            if not _same_strides(ours, eager):
                wrong.append(
                    f"input {list(x.shape)} {x.stride()}, weight {list(w.shape)} {w.stride()}: "
                    f"{ours.stride()}, eager {eager.stride()}"
                )
            dispatched = CONV(x, w, None, None, (1, 1), four, (1, 1), 1, True)
            assert dispatched.stride() == ours.stride()
    assert not wrong, f"{len(wrong)} differ:\n" + "\n".join(wrong[:10])


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_fake_strides(kernels: ModuleType, dtype: torch.dtype) -> None:
    kinds = ("contiguous", "channels_last", "sliced channels_last", "stepped", "expanded")
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        pass
    for n, c, k, size in product((0, 1, 2), (1, 3), (1, 4), ((1, 1), (3, 4))):
        for input_kind, weight_kind, groups in product(kinds, kinds, (1, c)):
            if k % groups:
                continue
            x = testing.LAYOUTS[input_kind](torch.ones(n, c, *size, dtype=dtype))
            w = testing.LAYOUTS[weight_kind](torch.ones(k, c // groups, 3, 3, dtype=dtype))
            geometry = ((1, 1), (1, 1, 1, 1), (1, 1), groups, True)
            real = CONV(x, w, None, None, *geometry)
            passed = PASS(x, None, None, True)
            output = testing.LAYOUTS[weight_kind](passed) if passed.numel() else passed
            masked = torch.ops.fused_resnet.relu_backward(x, output, True)
            with mode:
                fx, fw, fo = (mode.from_tensor(t) for t in (x, w, output))
                fakes = (
                    CONV(fx, fw, None, None, *geometry),
                    PASS(fx, None, None, True),
                    *torch.ops.fused_resnet.relu_backward(fx, fo, True),
                )
            for fake, true in zip(fakes, (real, passed, *masked), strict=True):
                assert fake.shape == true.shape
                assert fake.stride() == true.stride(), (x.shape, x.stride(), w.stride(), groups)
                assert fake.dtype == true.dtype


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("algorithm", ["direct", "winograd2", "winograd4"], indirect=True)
def test_nothing_is_copied(isa: str, algorithm: str, dtype: torch.dtype) -> None:
    """A repeated call allocates its output and nothing else, contiguous or channels_last. (Our workspace: next test.)"""
    assert sum(allocated(lambda: torch.empty(1000, dtype=torch.uint8))) >= 1000, "the measurement sees nothing"
    for case in (CASES[0], CASES[1], ConvCase(64, 64, (28, 28), (3, 3), padding=(1, 1), shortcut=True, batch=2)):
        for memory_format in FORMATS:
            operands = laid_out(testing.float_operands(case, dtype, torch.Generator()), memory_format)
            for function in functions(operands, **case.parameters):

                def call(function: object = function, operands: Operands = operands, case: ConvCase = case) -> Tensor:
                    return function(*operands, **case.parameters)  # type: ignore[operator]

                output = call()  # packs the weight
                assert allocated(call) == [output.nbytes], (case.name, memory_format)


def transformed_input(case: ConvCase, kernel: Any, dtype: torch.dtype) -> int:
    """Bytes of the whole input as Winograd transforms it, where it does that first; in the accumulator's type."""
    if "input transformed first" not in kernel.describe():
        return 0
    m, alpha = {"winograd2": (2, 4 if case.stride == (1, 1) else 5), "winograd4": (4, 6)}[kernel.algorithm]
    n, _, p, q = case.output_shape
    elements = n * -(-p // m) * -(-q // m) * alpha**2 * -(-case.channels // 16) * 16
    return elements * max(dtype.itemsize, 4) + alpha**2 * 64  # a cache line between positions, against bad pitches


def small_image(case: ConvCase, dtype: torch.dtype) -> int:
    """Bytes of the padded input of one image, packed, whose output is a task of its own; and a tenth for what is kept beside."""
    _, _, p, q = case.output_shape
    height, width = (size + 2 * pad for size, pad in zip(case.size, case.padding, strict=True))
    each = max(dtype.itemsize, 4)
    return round(1.1 * height * width * (case.channels * each + 64)) if p * q <= 168 else 0


@pytest.mark.parametrize("algorithm", ["direct", "winograd2", "winograd4"], indirect=True)
def test_workspace_is_bounded(algorithm: str, kernels: ModuleType) -> None:
    """Half of the L2 cache for the packed rows of direct convolution, 0.6 of it for the tiles of Winograd, and what does not
    grow with the problem beside it: under one L2 cache for each thread, whatever the batch, for every convolution of the
    ResNets; or what one image of at most 168 output pixels reads, where that is more. Beside it, where Winograd transforms the
    input first, that: with the batch it grows as the input does."""
    l2 = kernels.cache_sizes()["l2"]
    shapes = (*CONVS, *(block.convs()[-1] for block in BLOCKS))
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        for case in shapes:
            for batch, dtype in product((1, 32), DTYPES):
                at = case.at(batch)
                # Expanded: shapes without memory.
                operands = Operands(
                    torch.zeros((), dtype=dtype).expand(at.input_shape),
                    torch.zeros((), dtype=dtype).expand(at.weight_shape),
                    None,
                    None,
                )
                kernel = plan_of(operands, **at.parameters).kernel  # type: ignore[attr-defined]
                used, most = kernel.workspace_bytes, threads * max(l2, small_image(at, dtype)) + transformed_input(at, kernel, dtype)
                assert used <= most, f"{at.name}, {dtype}: {used} bytes for {threads} threads, {kernel.describe()}"


def test_ambiguous_strides_give_the_right_values(one_thread: None, direct: None, isa: str) -> None:
    for c, k, size in product((1, 2), (1, 3), ((1, 1), (1, 4), (4, 1))):
        for input_kind, weight_kind, shortcut_kind in product(testing.LAYOUTS, testing.LAYOUTS, ("contiguous", "channels_last")):
            case = ConvCase(c, k, size, (1, 1), shortcut=True, batch=2)
            operands = testing.integer_operands(case, torch.float32, torch.Generator().manual_seed(7))
            operands = testing.layout(operands, input=input_kind, weight=weight_kind, shortcut=shortcut_kind)
            ours = fused_resnet.conv_bias_add_relu(*operands)
            result = testing.compare_exact(ours, reference.conv_bias_add_relu(*operands))
            assert result, f"{case.name} {input_kind} {weight_kind} {shortcut_kind}: {result.reason}"


@pytest.mark.smoke
@EXACT_ALGORITHMS
def test_shortcut_that_is_the_input_or_a_view_of_it(one_thread: None, isa: str, algorithm: str) -> None:
    for dtype, memory_format in product(DTYPES, FORMATS):
        case = ConvCase(9, 9, (6, 7), (3, 3), padding=(1, 1), batch=2)
        x, w, b, _ = laid_out(testing.integer_operands(case, dtype, torch.Generator().manual_seed(8)), memory_format)
        before = x.clone()
        buffer = torch.cat([x, x], 1)
        for input, shortcut in ((x, x), (buffer[:, :9], buffer[:, 5:14]), (x, x[:, :, :1, :1].expand_as(x)), (x, x[:1].expand_as(x))):
            result = testing.compare_forward(
                fused_resnet.conv_bias_add_relu, Operands(input, w, b, shortcut), exact=True, padding=1
            )
            assert result, result.reason
        assert torch.equal(x, before)


def _negative(*shape: int) -> torch.Tensor:
    """A tensor whose memory holds the negatives of its values."""
    found = torch.complex(torch.randn(shape), torch.randn(shape)).conj().imag
    assert found.is_neg()
    return found


def test_tensors_whose_memory_is_not_their_value(kernels: ModuleType) -> None:
    x, weight, bias, shortcut = _negative(2, 16, 8, 8), _negative(16, 16, 3, 3), _negative(16), _negative(2, 16, 8, 8)
    block = fnn.BasicBlock(16, 16).eval()
    for z in (x, torch._efficientzerotensor((2, 16, 8, 8))):
        with torch.no_grad():
            for _ in range(2):
                plain = z.clone()
                ours = fused_resnet.conv_bias_add_relu(z, weight, bias, shortcut, padding=1)
                expected = reference.conv_bias_add_relu(plain, weight.clone(), bias.clone(), shortcut.clone(), padding=1)
                torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(fused_resnet.bias_add_relu(z, bias, shortcut), (plain + bias.view(-1, 1, 1) + shortcut).relu())
                torch.testing.assert_close(block(z), block._plain_forward(plain), rtol=1e-4, atol=1e-4)
                block(plain)  # the next call repeats this one, if it may
