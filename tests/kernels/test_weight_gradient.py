"""The gradient of a convolution in its weight, by our kernels.

What is trusted: PyTorch's autograd of its own convolution in float64. On small integers no order of additions rounds a sum, with Winograd's
F(3x3, 2x2) neither, whose only fractions are quarters of sums, so there is no tolerance; floats are held to an envelope.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _calls import DTYPES, FORMATS, ROOT, WEIGHT_GRADIENT, name, run_python
from _gradients import Of, check_without_memory
from _special import plant
from torch import Tensor

from fused_resnet import _settings, testing, why_not
from fused_resnet.cases import AWKWARD, CONVS, ConvCase
from fused_resnet.ops.gradients import library_weight_gradient
from fused_resnet.ops.spec import geometry_of_call

OF = Of("weight")
plan_of, ours, truth = OF.plan, OF.ours, OF.truth
EXACT = ("direct", "winograd2")
UNGROUPED = tuple(case for case in AWKWARD if case.groups == 1)
NOTHING_BUT_PADDING = ConvCase(4, 6, (5, 6), (1, 1), padding=(2, 3))
PANELS_INSIDE_A_TAP = ConvCase(17, 33, (9, 6), (3, 3), (2, 2), (1, 1), batch=2)
STRIDED = ConvCase(15, 33, (6, 5), (1, 1), (2, 2), batch=2)
# Whatever the registers: several panels of columns, loads, chunks; products the other way round, and in place.
CUT = (
    NOTHING_BUT_PADDING,
    PANELS_INSIDE_A_TAP,
    STRIDED,
    ConvCase(70, 17, (9, 6), (3, 3), padding=(1, 1), batch=2),
    ConvCase(16, 64, (9, 6), (3, 3), padding=(1, 1)),  # as many products at a time as there is room for
    ConvCase(18, 65, (20, 21), (3, 3), padding=(1, 1), batch=3),
    ConvCase(5, 7, (40, 39), (3, 3), padding=(1, 1), batch=2),
    ConvCase(6, 5, (37, 38), (3, 3), padding=(1, 1), batch=4),
    ConvCase(3, 300, (7, 6), (3, 3), padding=(0, 2)),
    ConvCase(64, 16, (20, 15), (1, 1), batch=2),
    ConvCase(16, 64, (30, 31), (1, 1), batch=2),
    ConvCase(300, 33, (8, 7), (1, 1), batch=2),
    ConvCase(33, 300, (30, 31), (1, 1), batch=2),
    ConvCase(5, 7, (12, 11), (2, 2), (3, 3), (1, 1)),
    ConvCase(3, 8, (46, 45), (7, 7), (2, 2), (3, 3)),
    ConvCase(5, 7, (14, 15), (3, 3), (2, 2), (2, 3), (4, 3)),
    ConvCase(3, 5, (41, 43), (3, 3), padding=(2, 2), dilation=(2, 2), batch=2),
    ConvCase(4, 6, (5, 6), (3, 3), padding=(4, 5), dilation=(1, 2)),
)


def integers(case: ConvCase, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """dy and an input whose sums are exact: at most 24 bits of float32 hold them, with the 9 and 4 terms of a transformed tile of either and
    the 4 of a quarter."""
    pixels = case.output_shape[0] * case.output_shape[2] * case.output_shape[3]
    assert pixels * 2 * 2 * 9 * 4 * 4 < 2**24
    return tuple(  # type: ignore[return-value]
        torch.randint(-2, 3, shape, generator=generator).to(dtype) for shape in (case.output_shape, case.input_shape)
    )


def is_winograds(case: ConvCase) -> bool:
    return case.kernel == (3, 3) and case.stride == case.dilation == (1, 1)


@pytest.mark.smoke
@pytest.mark.parametrize("algorithm", EXACT, indirect=True)
@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_awkward(one_thread: None, isa: str, algorithm: str, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    cases = [c for c in (*UNGROUPED, *CUT) if algorithm == "direct" or is_winograds(c)]
    assert len(cases) > 20
    failures = OF.failures(cases, integers, dtype, memory_format)
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_resnet_shapes(isa: str, dtype: torch.dtype) -> None:
    """As chosen, with strict numerics, which keep integers exact."""
    _settings.set_numerics("strict")
    for number, case in enumerate(CONVS):
        failures = OF.failures([case], integers, dtype, FORMATS[number % 2])
        assert not failures, failures


FLOATS = (
    ConvCase(64, 64, (28, 28), (3, 3), padding=(1, 1), batch=3),
    ConvCase(48, 80, (14, 14), (3, 3), padding=(1, 1), batch=2),
    ConvCase(48, 80, (7, 7), (1, 1), batch=9),
    ConvCase(200, 64, (28, 28), (1, 1), batch=3),
    ConvCase(24, 32, (56, 56), (1, 1), batch=2),  # eight chunks
    ConvCase(16, 18, (60, 60), (3, 3), padding=(1, 1), batch=2),
    ConvCase(33, 64, (15, 13), (3, 3), (2, 2), (1, 1), batch=3),
    ConvCase(64, 96, (56, 56), (1, 1), (2, 2), batch=3),
)


def floats(case: ConvCase, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    grad, input = (torch.randn(shape, generator=generator).to(dtype) for shape in (case.output_shape, case.input_shape))
    return grad, input


@pytest.mark.parametrize("numerics", ["fast", "strict"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", FLOATS, ids=name)
def test_error(isa: str, case: ConvCase, dtype: torch.dtype, numerics: str) -> None:
    """In the 2-norm, relative. A chain of L additions of random sign loses u sqrt(L) at most (a third of that is expected). Sums are made in
    chains of at most 96, here of at most 32 of these, in each of at most 32 chunks; F(3x3, 4x4) loses 8.2 times as much, for it is
    F(4x4, 3x3) with its transforms transposed (test_winograd.py). Then the one rounding to the gradient's dtype. What is taken for the truth
    is a chain as well, in float64."""
    _settings.set_numerics(numerics)
    grad, input = floats(case, dtype)
    plan = plan_of(case, grad, input)
    wide = truth(case, grad, input)
    accumulator = testing.compare.accumulator(dtype)
    unit, rounding = testing.compare.unit_roundoff(accumulator), testing.compare.unit_roundoff(dtype)
    scale = unit * (96 + 32 + 32) ** 0.5 * (8.2 if plan.kernel.algorithm == "winograd4" else 1)
    scale += testing.compare.unit_roundoff(torch.float64) * grad[:, 0].numel() ** 0.5
    error = testing.norm_error(plan(grad, input), wide)
    assert error <= scale + (rounding if dtype != accumulator else 0), (error, scale)
    assert error > unit / 100 or dtype == torch.float64, "as good as float64: is it computed in float32?"


@pytest.mark.parametrize("which", ["grad", "input"])
@pytest.mark.parametrize("layout", list(testing.LAYOUTS))
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_layouts(one_thread: None, integers_stay_exact: None, isa: str, dtype: torch.dtype, layout: str, which: str) -> None:
    """dy and the input may lie anyhow: transposed, expanded, with gaps."""
    generator = torch.Generator().manual_seed(4)
    wide = ConvCase(17, 18, (6, 7), (3, 3), padding=(1, 1), batch=2)
    for case in (wide, ConvCase(5, 18, (6, 7), (1, 1)), ConvCase(16, 32, (6, 7), (1, 1), batch=2), *CUT[:3]):
        grad, input = integers(case, dtype, generator)
        if which == "grad":
            grad = testing.LAYOUTS[layout](grad)
        else:
            input = testing.LAYOUTS[layout](input)
        for memory_format in FORMATS:
            result = testing.compare_exact(ours(case, grad, input, memory_format), truth(case, grad, input).to(dtype))
            assert result, f"{case.name}: {result.reason}"


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", FLOATS, ids=name)
def test_the_same_bits(isa: str, case: ConvCase, dtype: torch.dtype) -> None:
    OF.check_bits(case, *floats(case, dtype))


@pytest.mark.parametrize("which", ["grad", "input"])
@pytest.mark.parametrize("special", ["nan", "inf", "-inf", "max", "denormal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_special_values(isa: str, dtype: torch.dtype, special: str, which: str, generator: torch.Generator) -> None:
    """One of them in dy or the input. Where a sum is not finite the library makes them, for its kernels differ in what an infinity times a zero
    of padding is: nothing, or NaN. Finite ones: directly, for Winograd's fractions are not exact at the ends of the range."""
    if special in ("max", "denormal"):
        _settings.change(algorithm="direct")
    seen = 0
    for case in (ConvCase(33, 40, (28, 28), (3, 3), padding=(1, 1)), ConvCase(9, 17, (5, 6), (1, 1)), PANELS_INSIDE_A_TAP, STRIDED):
        for place in range(3):
            grad, input = integers(case, dtype, generator)
            if special == "max":  # alone, so that nothing could overflow in only one order
                grad, input = (torch.zeros_like(grad), input.sign()) if which == "grad" else (grad.sign(), torch.zeros_like(input))
            if which == "grad":
                grad = plant(grad, place, special)
            else:
                input = plant(input, place, special)
            found, wide = ours(case, grad, input), truth(case, grad, input)
            if special in ("max", "denormal"):
                result = testing.compare_exact(found, wide.to(dtype))
                seen += int(wide.count_nonzero())
            else:
                geometry = geometry_of_call(torch.empty(case.weight_shape), case.stride, case.padding, case.dilation)
                theirs = library_weight_gradient(grad, input, case.weight_shape, FORMATS[0], geometry)
                result = testing.compare_exact(found, theirs)
                seen += int((~torch.isfinite(found)).sum())
            assert result, f"{case.name}, place {place}: {result.reason}"
    assert seen > 0


def test_where_winograd_overflows(isa: str) -> None:
    """Its transforms of huge values are not finite, the sums themselves are: they are made directly."""
    case = ConvCase(8, 8, (8, 8), (3, 3), padding=(1, 1))
    grad, input = integers(case, torch.float32, torch.Generator().manual_seed(0))
    grad *= 2.0**127 / 2
    input = input.sign() * 2.0**-90
    _settings.change(algorithm="winograd4")
    assert torch.equal(ours(case, grad, input), truth(case, grad, input).float())


def test_no_images(kernels: object) -> None:
    """The sum of nothing is zero."""
    for kernel, padding in (((3, 3), (1, 1)), ((1, 1), (0, 0)), ((5, 5), (2, 2))):
        case = ConvCase(9, 17, (6, 7), kernel, padding=padding, batch=0)
        for memory_format in FORMATS:
            found = ours(case, torch.empty(case.output_shape), torch.empty(case.input_shape), memory_format)
            assert found.shape == case.weight_shape
            assert not found.any()


def test_one_size_many_paddings(kernels: object) -> None:
    """Plans are kept: the same tensors with other parameters are another plan."""
    input = torch.randint(-2, 3, (2, 8, 6, 7)).double()
    grad = torch.randint(-2, 3, (2, 24, 6, 7)).double()
    more = torch.randint(-2, 3, (2, 24, 7, 9)).double()
    for padding, kernel, dy in (
        ((0, 1, 0, 2), (2, 3), grad),
        ((1, 0, 2, 0), (2, 3), grad),
        ((1, 0, 1, 1), (2, 3), grad),
        ((1, 1, 1, 1), (3, 3), grad),
        ((0, 0, 0, 0), (1, 1), grad),
        ((0, 1, 0, 2), (1, 1), more),
        ((1, 0, 2, 0), (1, 1), more),
    ):
        top, bottom, left, right = padding
        for channels_last in (False, True):
            operands = [t.contiguous(memory_format=FORMATS[channels_last]) for t in (dy, input)]
            found = WEIGHT_GRADIENT(*operands, (24, 8, *kernel), channels_last, (1, 1), padding, (1, 1), 1)
            w = torch.zeros(24, 8, *kernel, dtype=torch.float64, requires_grad=True)
            y = torch.nn.functional.conv2d(torch.nn.functional.pad(input, (left, right, top, bottom)), w)
            assert torch.equal(found, torch.autograd.grad(y, w, dy)[0]), (padding, kernel, channels_last)


GEOMETRY = ((1, 1), (1, 1, 1, 1), (1, 1), 1)


def test_who_makes_it(kernels: object) -> None:
    """The operator: ours but where the selector says why not, and the same sentence for whoever asks."""
    case = FLOATS[0]
    grad, input = floats(case, torch.float32)
    assert torch.equal(WEIGHT_GRADIENT(grad, input, case.weight_shape, False, *GEOMETRY), ours(case, grad, input))
    assert why_not(input, torch.empty(case.weight_shape), padding=1, gradient="weight") == []
    changes: list[tuple[dict[str, Any], str]] = [
        ({"groups": 2}, "groups = 2"),
        ({"stride": 2}, "a contiguous map with stride 2"),
        ({"dilation": 2}, "a contiguous map under a dilated kernel"),
        ({"kernel": 5}, "a 5x5 kernel"),
        ({"channels": 4}, "4 input channels"),
        ({"kernel": 1, "size": 64}, "6 channels of a 1x1 convolution"),
    ]
    for change, why in changes:
        pairs = {k: (v, v) for k, v in change.items() if k in ("stride", "dilation")}
        kernel, size, groups = change.get("kernel", 3), change.get("size", 9), change.get("groups", 1)
        case = ConvCase(change.get("channels", 8), 6, (size, size), (kernel, kernel), padding=(1, 1), groups=groups, **pairs)
        grad, input = floats(case, torch.float64)
        if kernel == 1:
            grad, input = (t.contiguous(memory_format=torch.channels_last) for t in (grad, input))
        w = torch.empty(case.weight_shape, dtype=torch.float64)
        (sentence,) = why_not(input, w, padding=1, gradient="weight", **pairs, groups=groups)  # type: ignore[arg-type]
        assert sentence.startswith(why)
        found = WEIGHT_GRADIENT(grad, input, case.weight_shape, True, case.stride, (1, 1, 1, 1), case.dilation, groups)
        torch.testing.assert_close(found, truth(case, grad, input))
        assert found.is_contiguous(memory_format=torch.channels_last)
    last = [torch.empty(1, 8, 9, 9), torch.empty(6, 8, 3, 3)]
    last = [t.contiguous(memory_format=torch.channels_last) for t in last]
    assert why_not(*last, dilation=2, gradient="weight")[0].startswith("6 output channels of a dilated kernel")
    bf16 = [torch.empty(1, 8, 9, 9).bfloat16(), torch.empty(8, 8, 1, 1).bfloat16()]
    assert why_not(*bf16, gradient="weight")[0].startswith("bfloat16 without Winograd's transforms")
    with pytest.raises(ValueError, match="gradient must be 'input', 'weight' or None, got 'bias'"):
        why_not(*bf16, gradient="bias")  # type: ignore[arg-type]


BAD: dict[str, tuple[Any, ...]] = {
    "grad must have 4 dimensions": (torch.zeros(3), torch.zeros(1, 3, 5, 5), (4, 3, 3, 3), False, *GEOMETRY),
    "input must have grad's dtype": (torch.zeros(1, 4, 5, 5), torch.zeros(1, 3, 5, 5).double(), (4, 3, 3, 3), False, *GEOMETRY),
    "grad must have the output's shape": (torch.zeros(1, 4, 5, 6), torch.zeros(1, 3, 5, 5), (4, 3, 3, 3), False, *GEOMETRY),
    "weight_size must have 4 numbers": (torch.zeros(1, 4, 5, 5), torch.zeros(1, 3, 5, 5), (3, 3, 3), False, *GEOMETRY),
    "weight must have input channels / groups = 3": (torch.zeros(1, 4, 5, 5), torch.zeros(1, 3, 5, 5), (4, 4, 3, 3), False, *GEOMETRY),
    "weight_size must not be negative": (torch.zeros(1, 4, 5, 5), torch.zeros(1, 3, 5, 5), (4, 3, -3, 3), False, *GEOMETRY),
    "stride must be at least 1": (torch.zeros(1, 4, 5, 5), torch.zeros(1, 3, 5, 5), (4, 3, 3, 3), False, (0, 1), *GEOMETRY[1:]),
    "groups must be at least 1": (torch.zeros(1, 4, 5, 5), torch.zeros(1, 3, 5, 5), (4, 3, 3, 3), False, *GEOMETRY[:3], 0),
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_input(kernels: object, sentence: str) -> None:
    with pytest.raises((TypeError, ValueError), match=sentence):
        WEIGHT_GRADIENT(*BAD[sentence])


def test_a_workspace_that_cannot_be_had(kernels: object) -> None:
    operands = "(torch.randn(1, 512, 60, 60), torch.randn(1, 512, 60, 60))"
    arguments = "((512, 512, 3, 3), True, (1, 1), (1, 1, 1, 1), (1, 1), 1)"
    check_without_memory(f"torch.ops.fused_resnet.conv_weight_gradient, {operands}, {arguments}", 10 << 20)


def kernel_of(case: ConvCase, dtype: torch.dtype = torch.float32) -> Any:
    grad, input = (torch.zeros((), dtype=dtype).expand(shape) for shape in (case.output_shape, case.input_shape))
    return plan_of(case, grad, input).kernel


def test_the_workspace_is_bounded(kernels: object) -> None:
    """Of a thread what it loads, and products or sums of at most 256 channels; of all chunks together at most 16 MiB of sums. None of it grows
    with the batch."""
    torch.set_num_threads(2)
    sizes = [kernel_of(ConvCase(64, 64, (56, 56), (3, 3), padding=(1, 1), batch=batch)).workspace_bytes for batch in (1, 8, 256, 4096)]
    assert max(sizes) < 32 << 20
    # With more sums than that there is one chunk, however many pixels, and each thread has those of its channels.
    large = kernel_of(ConvCase(512, 2048, (14, 14), (3, 3), (2, 2), (1, 1), batch=4096))
    assert large.describe().startswith("1 chunk of ")
    assert " 256 of 2048 output channels in a task" in large.describe()
    assert large.workspace_bytes < 2 * (256 * 512 * 9 * 4 + (2 << 20))


@pytest.mark.parametrize("algorithm", EXACT, indirect=True)
@pytest.mark.parametrize("channels", [2**14, 2**28])
def test_sizes_that_no_machine_has(kernels: object, algorithm: str, channels: int) -> None:
    """What no memory holds is planned, and its workspace counted, all the same: the sums of 256 output channels for each of two threads, and
    what is loaded, which is little beside them."""
    torch.set_num_threads(2)
    size = 3 if algorithm == "winograd2" else 1
    sums = 2 * 256 * channels * size**2 * 4
    case = ConvCase(channels, channels, (40, 50), (size, size), padding=(size // 2,) * 2, batch=2**20)
    assert sums <= kernel_of(case).workspace_bytes < 1.25 * sums


def test_float64_is_made_directly(isa: str) -> None:
    """As everywhere: it is for precision."""
    case = FLOATS[0]
    assert kernel_of(case).algorithm == "winograd4"
    assert (kernel_of(case, torch.float64).algorithm, "float64" in kernel_of(case, torch.float64).reason) == ("direct", True)


GUARD_PAGES = """
import ctypes, mmap, sys, torch, fused_resnet
from fused_resnet import _settings
sys.path[:0] = TESTS
import test_weight_gradient as t
from fused_resnet.cases import ConvCase
page, libc, kept = mmap.PAGESIZE, ctypes.CDLL(None, use_errno=True), []

def at_the_end(source):
    # A copy that ends where a page begins that nobody may read.
    size = source.numel() * source.element_size()
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    kept.append(memory)
    copy = torch.frombuffer(memory, dtype=source.dtype, count=source.numel(), offset=pages * page - size)
    copy = copy.as_strided(source.shape, source.stride()).copy_(source)
    first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(first + pages * page), ctypes.c_size_t(page), 0) == 0
    return copy

_settings.use_isa(ISA)
_settings.set_numerics('strict')
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
for case in (*t.CUT, ConvCase(5, 5, (1, 193), (1, 1)), ConvCase(16, 32, (7, 9), (1, 1)), ConvCase(64, 8, (9, 7), (1, 1), batch=2)):
    for dtype in t.DTYPES:
        grad, input = t.integers(case, dtype, generator)
        for memory_format in t.FORMATS:
            operands = [at_the_end(o.contiguous(memory_format=memory_format)) for o in (grad, input)]
            assert torch.equal(t.ours(case, *operands, memory_format), t.truth(case, grad, input).to(dtype)), case.name
print("nothing")
"""


def test_nothing_beyond_the_operands_is_read(isa: str) -> None:
    words = f"ISA, TESTS = {isa!r}, {[str(ROOT / 'tests'), str(ROOT / 'tests' / 'kernels')]!r}\n"
    done = run_python(words + GUARD_PAGES)
    assert done.stdout.strip() == "nothing", (done.returncode, done.stderr[-2000:])
