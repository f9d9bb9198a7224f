"""The general CUDA convolution without a GPU: its device code compiled as C++ and run thread block by thread block.

What is trusted: the reference on small integers, whose sums no order of additions rounds (see test_exact.py), and guard bytes
and NaN around and in every result (see _cuda_host.py). What the host cannot show is a race, since there the threads of a phase
run one after another: so they run in three orders, and the results must have the same bits in all of them. Memory that the GPU
would hand over uninitialised holds NaN or garbage. What remains for a GPU to show: that it compiles and launches.
"""

from __future__ import annotations

import _cuda_host as host
import pytest
import torch
import torch.nn.functional as F
from _calls import FORMATS, laid_out, name
from _special import SPECIAL, operands_with

from fused_resnet import reference, testing
from fused_resnet.cases import AWKWARD, ConvCase, Operands

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:Using padding='same'")]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# As the library calls it; then every tile and 64-bit offsets, whatever the shape.
VARIANTS = (("auto", False), ("large", False), ("medium", False), ("narrow", False), ("large", True), ("narrow", True))
# More than a tile of pixels and of channels, more than a table of terms (256); groups of few channels.
LARGER = (
    ConvCase(40, 70, (13, 12), (3, 3), padding=(1, 1), shortcut=True, batch=2),
    ConvCase(6, 132, (9, 9), (7, 7), (2, 2), (3, 3), shortcut=True, batch=3),
    ConvCase(36, 36, (11, 9), (3, 3), padding=(2, 0), dilation=(2, 1), groups=12, shortcut=True, batch=2),
    ConvCase(64, 64, (16, 20), (1, 1), shortcut=True),
)


@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_exact_integers(dtype: torch.dtype, memory_format: torch.memory_format, generator: torch.Generator) -> None:
    failures = []
    for case in (*AWKWARD, *LARGER):
        operands = laid_out(testing.integer_operands(case, dtype, generator), memory_format)
        result = testing.compare_forward(host.convolution, operands, True, **case.parameters)
        if not result:
            failures.append(f"{case.name}: {result.reason}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("variant", VARIANTS[1:], ids=lambda v: f"{v[0]} {'64' if v[1] else '32'} bits")
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_every_tile(dtype: torch.dtype, variant: tuple[str, bool], generator: torch.Generator) -> None:
    tile, wide = variant
    failures = []
    for number, case in enumerate((*AWKWARD[::3], *LARGER)):
        plain = testing.integer_operands(case, dtype, generator)
        expected = reference.conv_bias_add_relu(*plain, **case.parameters)
        for memory_format in FORMATS:
            operands = laid_out(plain, memory_format)
            ours = host.convolution(*operands, **case.parameters, tile=tile, wide=wide, skew=number % 2)
            result = testing.compare_exact(ours, expected)
            if not result:
                failures.append(f"{case.name} {memory_format}: {result.reason}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_each_operand_in_each_layout(dtype: torch.dtype, layout: str, generator: torch.Generator) -> None:
    for case in (
        ConvCase(6, 8, (5, 7), (3, 2), (2, 1), (1, 1), groups=2, shortcut=True, batch=2),
        ConvCase(4, 20, (6, 4), (1, 1), shortcut=True, batch=3),
    ):
        plain = testing.integer_operands(case, dtype, generator)
        for memory_format in FORMATS:
            for field in ("input", "weight", "shortcut"):
                operands = testing.layout(laid_out(plain, memory_format), **{field: layout})
                result = testing.compare_forward(host.convolution, operands, True, **case.parameters)
                assert result, f"{case.name} {memory_format} {field}: {result.reason}"


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_the_input_itself_as_shortcut(dtype: torch.dtype, generator: torch.Generator) -> None:
    for channels, groups in ((5, 1), (32, 1), (12, 4)):
        case = ConvCase(channels, channels, (6, 7), (3, 3), padding=(1, 1), groups=groups, batch=2)
        for memory_format in FORMATS:
            operands = laid_out(testing.integer_operands(case, dtype, generator), memory_format)
            operands = operands._replace(shortcut=operands.input)
            result = testing.compare_forward(host.convolution, operands, True, **case.parameters)
            assert result, f"{case.name} {memory_format}: {result.reason}"


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_joined_convolution(dtype: torch.dtype, variant: tuple[str, bool], generator: torch.Generator) -> None:
    """A projection as further terms of the same sums: reductions that are and are not whole stages (8 terms)."""
    integers = testing.data.integers
    for channels, extra, outputs, strides in ((5, 7, 9, (1, 1)), (4, 8, 20, (2, 1)), (1, 1, 70, (2, 2)), (1, 37, 3, (1, 2))):
        case = ConvCase(channels, outputs, (5, 6), (3, 3), padding=(1, 1), shortcut=True, batch=2)
        plain = testing.integer_operands(case, dtype, generator)
        size = ((case.size[0] - 1) * strides[0] + 1, (case.size[1] - 1) * strides[1] + 1)
        x = integers((2, extra, *size), dtype, generator)
        weight = integers((outputs, extra, 1, 1), dtype, generator)
        assert case.reduction + extra <= testing.data.terms(dtype) - 1
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        projected = F.conv2d(x.to(wide), weight.to(wide), stride=strides)
        assert plain.bias is not None
        assert plain.shortcut is not None
        whole = Operands(plain.input.to(wide), plain.weight.to(wide), plain.bias.to(wide), plain.shortcut + projected)
        expected = reference.conv_bias_add_relu(*whole, **case.parameters).to(dtype)
        for memory_format in FORMATS:
            operands = laid_out(plain, memory_format)
            joined = (x.contiguous(memory_format=memory_format), weight, strides)
            ours = host.convolution(*operands, **case.parameters, joined=joined, tile=variant[0], wide=variant[1])
            result = testing.compare_exact(ours, expected)
            assert result, f"{channels}+{extra}->{outputs} {memory_format}: {result.reason}"


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("operand", Operands._fields)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_special_values(dtype: torch.dtype, operand: str, special: str, generator: torch.Generator) -> None:
    seen = 0
    padding = (0, 0) if operand == "weight" else (1, 1)
    for place, channels in enumerate((3, 8, 17)):
        case = ConvCase(channels, channels, (3, 4), (3, 3), padding=padding, shortcut=True)
        for relu in (True, False):
            parameters = {**case.parameters, "relu": relu}
            plain = operands_with(case, dtype, operand, place, special, generator)
            expected = reference.conv_bias_add_relu(*plain, **parameters)
            bad = {"nan": torch.isnan, "inf": torch.isinf, "-inf": torch.isinf}.get(special)
            seen += int((bad(expected) | torch.isnan(expected)).sum()) if bad else int(expected.count_nonzero())
            for memory_format in FORMATS:
                ours = host.convolution(*laid_out(plain, memory_format), **parameters)
                result = testing.compare_exact(ours, expected)
                assert result, f"{case.name} relu={relu} {memory_format}: {result.reason}"
    assert seen > 0, "the special value never reached an output"


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_padded_zero_times_a_weight(value: str, generator: torch.Generator) -> None:
    """Zero times infinity or NaN is NaN, at the map's border too: the definition, with the zeros written down."""
    case = ConvCase(3, 5, (4, 5), (3, 3), padding=(1, 2))
    operands = testing.integer_operands(case, torch.float32, generator)
    operands.weight[2, 1, 0, 0] = float(value)
    padded = F.pad(operands.input, (2, 2, 1, 1))
    expected = reference.conv_bias_add_relu(padded, operands.weight, operands.bias)
    assert torch.isnan(expected[0, 2, 0]).all()  # the first line: that tap is outside
    assert testing.compare_exact(host.convolution(*operands, **case.parameters), expected)


@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_error_envelope(dtype: torch.dtype, memory_format: torch.memory_format, generator: torch.Generator) -> None:
    for case in (*LARGER, ConvCase(256, 24, (5, 5), (3, 3), padding=(1, 1), shortcut=True)):
        operands = laid_out(testing.float_operands(case, dtype, generator), memory_format)
        result = testing.compare_forward(host.convolution, operands, False, **case.parameters)
        assert result, f"{case.name}: {result.reason}"


@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_the_order_of_threads_changes_no_bit(dtype: torch.dtype, memory_format: torch.memory_format, generator: torch.Generator) -> None:
    for case in LARGER:
        operands = laid_out(testing.float_operands(case, dtype, generator), memory_format)
        for tile, wide in (("auto", False), ("large", False), ("narrow", True)):
            expected = host.convolution(*operands, **case.parameters, tile=tile, wide=wide)
            assert not torch.isnan(expected).any()
            for order, poison in (("forward", 0xFF), ("reverse", 0xFF), ("shuffled", 0xA5)):
                with host.options(order, poison):
                    ours = host.convolution(*operands, **case.parameters, tile=tile, wide=wide)
                assert host.same_bits(ours, expected), f"{case.name} {tile} {order}"


def test_a_refused_descriptor_is_told_with_its_numbers() -> None:
    message = host.build().refused_descriptor
    image = message(
        "an image", "CUDA_ERROR_INVALID_VALUE", 9, 0x7F00C0DE0010, [64, 56, 55, 32], [128, 0, 7168], "[64, 128]", "[-1, -1] to [0, 1]", [1] * 4
    )
    assert image == (
        "the driver refused the TMA descriptor of an image (CUDA_ERROR_INVALID_VALUE): type 9, address 0x7f00c0de0010, sizes [64, 56, 55, 32], "
        "strides [128, 0, 7168] bytes, box [64, 128], corners [-1, -1] to [0, 1], steps [1, 1, 1, 1]"
    )
    matrix = message("a matrix", "error 999", 6, 0, [8, 2**40], [16], "[8, 1]", "", [1, 2])
    assert matrix == (
        "the driver refused the TMA descriptor of a matrix (error 999): type 6, address 0x0, sizes [8, 1099511627776], strides [16] bytes, "
        "box [8, 1], steps [1, 2]"
    )
