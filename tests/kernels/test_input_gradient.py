"""The gradient of a convolution in its input, by our kernels.

What is trusted: PyTorch's autograd of its own convolution in float64. On small integers no order of additions rounds a sum, with Winograd's
F(2x2, 3x3) neither (``test_exact.py``), so there is no tolerance; floats are held to the envelope of ``testing/compare.py``.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from _calls import DTYPES, FORMATS, INPUT_GRADIENT, name
from _exact import winograd_fits
from _gradients import Of, check_without_memory
from _special import plant
from torch import Tensor

from fused_resnet import _extension, _settings, testing, why_not
from fused_resnet.cases import AWKWARD, CONVS, ConvCase, Operands

OF = Of("input")
plan_of, ours, truth = OF.plan, OF.ours, OF.truth
EXACT = ("direct", "winograd2")
UNGROUPED = tuple(case for case in AWKWARD if case.groups == 1)
# Each way that an axis can go: every residue with taps, residues without, dy read from its second pixel on, pixels that no window touches.
STRIDED = (
    ConvCase(5, 7, (12, 11), (3, 3), (2, 2), (1, 1), batch=2),
    ConvCase(5, 7, (12, 11), (1, 1), (2, 2), batch=2),
    ConvCase(5, 7, (9, 13), (1, 1), (3, 2), (2, 0)),
    ConvCase(5, 7, (12, 11), (2, 2), (3, 3), (1, 1)),
    ConvCase(5, 7, (14, 15), (3, 3), (2, 2), (3, 4)),
    ConvCase(5, 7, (14, 15), (3, 3), (2, 3), (2, 2), (2, 2)),
    ConvCase(5, 7, (14, 15), (3, 3), (2, 2), (2, 3), (4, 3)),
    ConvCase(5, 7, (14, 15), (5, 4), (3, 2), (2, 1), (2, 3)),
    ConvCase(5, 7, (10, 10), (3, 3), (2, 2)),
    ConvCase(3, 18, (23, 21), (7, 7), (2, 2), (3, 3)),
    ConvCase(4, 6, (3, 2), (1, 1), (5, 4)),
    ConvCase(4, 6, (1, 1), (1, 1), (2, 2), (1, 1)),  # no pixel is touched
    ConvCase(4, 6, (7, 6), (3, 3), (4, 5), (1, 2)),
    # Padding beyond the kernel: the gradient of what is cropped.
    ConvCase(4, 6, (5, 6), (1, 1), padding=(2, 3)),
    ConvCase(4, 6, (5, 6), (3, 3), padding=(4, 5), dilation=(1, 2)),
)


def integers(case: ConvCase, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """dy and a weight whose sums are exact: what ``integer_operands`` draws for the convolution of dy."""
    turned = ConvCase(case.outputs, case.channels, (9, 9), case.kernel)
    weight = testing.integer_operands(turned, dtype, generator).weight.transpose(0, 1).contiguous()
    m = testing.MAGNITUDE[dtype]
    return torch.randint(-m, m + 1, case.output_shape, generator=generator).to(dtype), weight


@pytest.mark.smoke
@pytest.mark.parametrize("algorithm", EXACT, indirect=True)
@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_awkward(one_thread: None, isa: str, algorithm: str, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    cases = (*UNGROUPED, *STRIDED) if algorithm == "direct" else tuple(c for c in UNGROUPED if c.stride == (1, 1) and winograd_fits(c))
    assert len(cases) > 20
    failures = OF.failures(cases, integers, dtype, memory_format)
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("algorithm", EXACT, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_many_channels(isa: str, algorithm: str, dtype: torch.dtype) -> None:
    for memory_format in FORMATS:
        failures = OF.failures([FLOATS[-1]], integers, dtype, memory_format)
        assert not failures, failures


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_resnet_shapes(isa: str, dtype: torch.dtype) -> None:
    """As chosen, with strict numerics, which keep integers exact."""
    _settings.set_numerics("strict")
    for number, case in enumerate(CONVS):
        failures = OF.failures([case], integers, dtype, FORMATS[number % 2])
        assert not failures, failures


# Kernels whose gradients are cut by rows, by images and by channels; in one part, in four, and with zeros.
FLOATS = (
    ConvCase(64, 64, (28, 28), (3, 3), padding=(1, 1)),
    ConvCase(48, 80, (14, 14), (3, 3), padding=(1, 1), batch=2),
    ConvCase(48, 80, (7, 7), (1, 1), batch=9),
    ConvCase(512, 70, (7, 7), (3, 3), padding=(1, 1), batch=2),
    ConvCase(33, 64, (15, 13), (3, 3), (2, 2), (1, 1), batch=3),
    ConvCase(64, 96, (28, 28), (1, 1), (2, 2), batch=2),
    # dy with so many channels that fresh weights come in several chunks, whatever the registers and caches.
    ConvCase(70, 600, (9, 8), (3, 3), padding=(1, 1)),
)


def floats(case: ConvCase, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(case.weight_shape, generator=generator) * (case.outputs * case.kernel[0] * case.kernel[1]) ** -0.5
    return torch.randn(case.output_shape, generator=generator).to(dtype), weight.to(dtype)


@pytest.mark.parametrize("numerics", ["fast", "strict"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", FLOATS, ids=name)
def test_error(isa: str, case: ConvCase, dtype: torch.dtype, numerics: str) -> None:
    """In the 2-norm, relative: a chain of L additions of random sign loses u sqrt(L) at most (a third of that is expected), F(4x4, 3x3) 8.2
    times as much (test_winograd.py); then the one rounding to the gradient's dtype. Or twice what the library loses."""
    _settings.set_numerics(numerics)
    grad, weight = floats(case, dtype)
    plan = plan_of(case, grad, weight)
    wide = truth(case, grad, weight)
    accumulator = testing.compare.accumulator(dtype)
    unit, rounding = testing.compare.unit_roundoff(accumulator), testing.compare.unit_roundoff(dtype)
    scale = unit * weight[:, 0].numel() ** 0.5 * (8.2 if plan.kernel.algorithm == "winograd4" else 1)
    if plan.kernel.algorithm != "direct" and isa == "avx512_bf16" and dtype == torch.bfloat16:
        scale += 2 * 2**0.5 * rounding  # both transformed operands are rounded, of each term
    error, theirs = (testing.norm_error(t, wide) for t in (plan(grad, weight), truth(case, grad, weight, accumulator)))
    assert error <= max(2 * theirs, scale) + (rounding if dtype != accumulator else 0), (error, theirs, scale)
    assert error > unit / 100 or dtype == torch.float64, "as good as float64: is it computed in float32?"


@pytest.mark.parametrize("which", ["grad", "weight"])
@pytest.mark.parametrize("layout", list(testing.LAYOUTS))
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_layouts(one_thread: None, integers_stay_exact: None, isa: str, dtype: torch.dtype, layout: str, which: str) -> None:
    """dy and the weight may lie anyhow: transposed, expanded, with gaps."""
    generator = torch.Generator().manual_seed(4)
    wide = ConvCase(17, 18, (6, 7), (3, 3), padding=(1, 1), batch=2)
    for case in (wide, ConvCase(5, 18, (6, 7), (1, 1)), STRIDED[0], STRIDED[9], STRIDED[12]):
        grad, weight = integers(case, dtype, generator)
        if layout == "expanded":  # of one value, so that the sums stay exact
            grad, weight = (grad != 0).to(dtype), weight.sign()
        if which == "grad":
            grad = testing.LAYOUTS[layout](grad)
        else:
            weight = testing.LAYOUTS[layout](weight)
        for memory_format in FORMATS:
            result = testing.compare_exact(ours(case, grad, weight, memory_format), truth(case, grad, weight).to(dtype))
            assert result, f"{case.name}: {result.reason}"


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", FLOATS, ids=name)
def test_the_same_bits(isa: str, case: ConvCase, dtype: torch.dtype) -> None:
    OF.check_bits(case, *floats(case, dtype))


def ended(
    case: ConvCase, grad: Tensor, weight: Tensor, end: Tensor, masked: bool, memory_format: torch.memory_format, ours: bool = True
) -> Tensor:
    return plan_of(case, grad, weight, memory_format, end, masked, ours)(grad, weight, end)


def with_end(gradient: Tensor, end: Tensor, masked: bool) -> Tensor:
    return torch.where(end <= 0, 0, gradient) if masked else gradient + end


@pytest.mark.smoke
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("algorithm", EXACT, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_ends(one_thread: None, isa: str, algorithm: str, dtype: torch.dtype, masked: bool) -> None:
    """What is added is added before the one rounding, also where no window touches a pixel; or the gradient passes where not (end <= 0). The
    end may lie anyhow."""
    generator = torch.Generator().manual_seed(6)
    cases = (*UNGROUPED, *STRIDED) if algorithm == "direct" else tuple(c for c in UNGROUPED if c.stride == (1, 1) and winograd_fits(c))
    layouts = list(testing.LAYOUTS.values())
    different = 0
    for number, case in enumerate(cases):
        grad, weight = integers(case, dtype, generator)
        end = torch.randint(-3, 4, case.input_shape, generator=generator).to(dtype)
        for memory_format in FORMATS:
            end = (layouts[number // 2 % len(layouts)] if number % 2 else lambda t: t.contiguous(memory_format=FORMATS[number // 2 % 2]))(end)  # noqa: B023
            laid = [t.contiguous(memory_format=memory_format) for t in (grad, weight)]
            found = ended(case, *laid, end, masked, memory_format)
            expected = with_end(truth(case, grad, weight), end.double(), masked).to(dtype)
            result = testing.compare_exact(found, expected)
            assert result, f"{case.name}: {result.reason}"
            assert found.stride() == torch.empty(found.shape, memory_format=memory_format).stride()
            different += int((expected != truth(case, grad, weight).to(dtype)).sum())
    assert different > 0


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
@pytest.mark.parametrize("case", FLOATS, ids=name)
def test_ends_to_the_bit(isa: str, case: ConvCase, dtype: torch.dtype, masked: bool) -> None:
    """The end changes nothing of the sums: the same bits as another pass over the gradient gives, whatever the threads."""
    grad, weight = floats(case, dtype)
    end = torch.randn(case.input_shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for number, memory_format in enumerate(FORMATS):
        laid = [t.contiguous(memory_format=memory_format) for t in (grad, weight, end)]
        expected = with_end(ours(case, *laid[:2], memory_format), end, masked)
        for threads in (1, 2 + number, 5):
            torch.set_num_threads(threads)
            assert torch.equal(ended(case, *laid, masked, memory_format), expected), threads


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_ends_of_special_values(integers_stay_exact: None, isa: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """The gradient passes where the ReLU gave NaN, and none where it gave a zero of either sign; a NaN of dy passes nowhere else; what is added
    may be anything."""
    nan, inf = float("nan"), float("inf")
    values = torch.tensor([nan, inf, -inf, 0.0, -0.0, 1.0, -1.0, torch.finfo(dtype).tiny, -torch.finfo(dtype).tiny], dtype=dtype)
    for case in (ConvCase(33, 40, (28, 28), (3, 3), padding=(1, 1)), ConvCase(9, 17, (5, 6), (1, 1)), STRIDED[0], STRIDED[1]):
        end = values[torch.randint(0, len(values), case.input_shape, generator=generator)]
        for special in ("nan", "inf", None):
            grad, weight = integers(case, dtype, generator)
            if special:
                grad = plant(grad, 1, special)
            for masked in (True, False):
                expected = with_end(truth(case, grad, weight), end.double(), masked).to(dtype)
                for memory_format in FORMATS:
                    result = testing.compare_exact(ended(case, grad, weight, end, masked, memory_format), expected)
                    assert result, f"{case.name}, {special}, masked {masked}: {result.reason}"


@pytest.mark.parametrize("masked", [True, False])
def test_ends_by_the_library(kernels: object, masked: bool) -> None:
    """Where the gradient is the library's, and where our kernels refuse a weight: the same end."""
    generator = torch.Generator().manual_seed(0)
    grouped = ConvCase(4, 6, (7, 8), (3, 3), (2, 1), (1, 0), groups=2)
    for case, by_ours in ((grouped, False), (ConvCase(5, 7, (6, 7), (3, 3), padding=(1, 1)), True)):
        grad, weight, end = (
            torch.randint(-2, 3, size, generator=generator).float() for size in (case.output_shape, case.weight_shape, case.input_shape)
        )
        if by_ours:
            weight = plant(weight, 1, "inf")
        expected = with_end(truth(case, grad, weight), end.double(), masked).float()
        for memory_format in FORMATS:
            found = ended(case, grad, weight, end.contiguous(memory_format=torch.channels_last), masked, memory_format, by_ours)
            result = testing.compare_exact(found, expected)
            assert result, result.reason
            assert found.is_contiguous(memory_format=memory_format)


def test_an_end_that_does_not_fit(kernels: object) -> None:
    case = FLOATS[0]
    grad, weight = floats(case, torch.float32)
    for end in (torch.zeros(1, 64, 28, 27), torch.zeros(case.input_shape).double(), torch.zeros(3)):
        with pytest.raises((TypeError, ValueError), match="end must"):
            plan_of(case, grad, weight, end=end)


def test_a_weight_that_changes_between_calls(kernels: object) -> None:
    """Nothing of it is kept: in place, through ``.data``, and unseen, through memory that is shared."""
    case = FLOATS[0]
    grad, weight = floats(case, torch.float32)
    plan = plan_of(case, grad, weight)
    shared = weight.numpy()
    for change in (lambda: weight.mul_(2), lambda: weight.data.neg_(), lambda: shared.__imul__(3)):
        change()
        fresh = ours(case, grad, weight.clone())
        assert torch.equal(plan(grad, weight), fresh)
        torch.testing.assert_close(fresh, truth(case, grad, weight).float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("special", ["nan", "inf", "-inf", "max", "denormal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_special_values(isa: str, dtype: torch.dtype, special: str, generator: torch.Generator) -> None:
    """One of them in dy: where Winograd's transforms are not finite the sums are made directly, so that it reaches what it belongs to and
    nothing else. Finite ones: directly in any case, for Winograd's fractions are not exact at the ends of the range."""
    if special in ("max", "denormal"):
        _settings.change(algorithm="direct")
    seen = 0
    for case in (ConvCase(33, 40, (28, 28), (3, 3), padding=(1, 1)), ConvCase(9, 17, (5, 6), (1, 1)), STRIDED[0], STRIDED[1]):
        for place in range(3):
            grad, weight = integers(case, dtype, generator)
            if special == "max":  # nothing that could overflow in only one order
                grad, weight = grad.sign(), weight.sign()
            grad = plant(grad, place, special)
            expected = truth(case, grad, weight).to(dtype)
            found = ours(case, grad, weight)
            if special == "denormal" and isa == "avx512_bf16" and dtype == torch.bfloat16:  # its products take one for zero
                assert not found.any()
                continue
            result = testing.compare_exact(found, expected)
            assert result, f"{case.name}, place {place}: {result.reason}"
            seen += int((~torch.isfinite(expected)).sum()) if special in ("nan", "inf", "-inf") else int(expected.count_nonzero())
    assert seen > 0 or (special == "denormal" and isa == "avx512_bf16" and dtype == torch.bfloat16)


@pytest.mark.parametrize("special", ["inf", "nan"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_a_weight_that_is_not_finite(isa: str, dtype: torch.dtype, special: str) -> None:
    """It reaches what it belongs to and nothing else: Winograd would spread it, and the zeros around dy, which are in no sum, would be NaN."""
    for case in (
        ConvCase(33, 40, (28, 28), (3, 3), padding=(1, 1)),
        ConvCase(33, 40, (9, 8), (3, 3), padding=(2, 2)),
        STRIDED[0],
        ConvCase(5, 7, (6, 7), (5, 3), padding=(2, 0)),
    ):
        grad, weight = integers(case, dtype, torch.Generator().manual_seed(0))
        weight = plant(weight, 1, special)
        for memory_format in FORMATS:
            found = ours(case, *(t.contiguous(memory_format=memory_format) for t in (grad, weight)), memory_format)
            result = testing.compare_exact(found, truth(case, grad, weight).to(dtype))
            assert result, f"{case.name}: {result.reason}"


def test_no_pixel_is_touched(kernels: object) -> None:
    """Nothing is to be computed, and what tells of it says so."""
    case = ConvCase(4, 6, (1, 1), (1, 1), (2, 2), (1, 1))
    grad, weight = integers(case, torch.float32, torch.Generator().manual_seed(0))
    plan = plan_of(case, grad, weight)
    assert not plan(grad, weight).any()
    kernel = plan.kernel
    assert (kernel.algorithm, kernel.reason, kernel.isa) == ("direct", "no window touches a pixel", _extension.cpu.isa())  # type: ignore[union-attr]
    assert kernel.describe() == "zeros for the pixels that no window touches"


def test_one_size_many_paddings(kernels: object) -> None:
    """Plans are kept: the same tensors with other parameters are another plan."""
    weight = torch.randint(-1, 2, (5, 4, 2, 3)).double()
    grad = torch.randint(-3, 4, (1, 5, 6, 7)).double()
    for padding, size in (((0, 1, 0, 2), (6, 7)), ((1, 0, 2, 0), (6, 7)), ((1, 0, 1, 1), (6, 7)), ((0, 0, 0, 0), (7, 9))):
        top, bottom, left, right = padding
        for channels_last in (False, True):
            found = INPUT_GRADIENT(grad, weight, (1, 4, *size), channels_last, (1, 1), padding, (1, 1), 1)
            x = torch.zeros(1, 4, *size, dtype=torch.float64, requires_grad=True)
            y = torch.nn.functional.conv2d(torch.nn.functional.pad(x, (left, right, top, bottom)), weight)
            assert torch.equal(found, torch.autograd.grad(y, x, grad)[0]), (padding, channels_last)


GEOMETRY = ((1, 1), (1, 1, 1, 1), (1, 1), 1)


def test_who_makes_it(kernels: object) -> None:
    """The operator: ours but where the selector says why not, and the same sentence for whoever asks."""
    grad, weight = floats(FLOATS[0], torch.float32)
    assert torch.equal(INPUT_GRADIENT(grad, weight, FLOATS[0].input_shape, False, *GEOMETRY), ours(FLOATS[0], grad, weight))
    assert why_not(torch.empty(FLOATS[0].input_shape), weight, padding=1, gradient="input") == []
    for changes, why in (({"groups": 2}, "groups = 2"), ({"stride": 3}, "stride 3")):
        case = ConvCase(8, 6, (9, 9), (3, 3), padding=(1, 1), **{k: (v, v) if k == "stride" else v for k, v in changes.items()})
        grad, weight = floats(case, torch.float64)
        x = torch.empty(case.input_shape, dtype=torch.float64)
        (sentence,) = why_not(x, weight, padding=1, gradient="input", **changes)
        assert sentence.startswith(why)
        found = INPUT_GRADIENT(grad, weight, case.input_shape, True, case.stride, (1, 1, 1, 1), (1, 1), case.groups)
        torch.testing.assert_close(found, truth(case, grad, weight))
        assert found.is_contiguous(memory_format=torch.channels_last)


BAD: dict[str, tuple[Any, ...]] = {
    "grad must have 4 dimensions": (torch.zeros(3), torch.zeros(4, 3, 3, 3), (1, 3, 5, 5), False, *GEOMETRY),
    "weight must have grad's dtype": (torch.zeros(1, 4, 5, 5), torch.zeros(4, 3, 3, 3).double(), (1, 3, 5, 5), False, *GEOMETRY),
    "grad must have the output's shape": (torch.zeros(1, 4, 5, 6), torch.zeros(4, 3, 3, 3), (1, 3, 5, 5), False, *GEOMETRY),
    "input_size must have 4 numbers": (torch.zeros(1, 4, 5, 5), torch.zeros(4, 3, 3, 3), (3, 5, 5), False, *GEOMETRY),
    "weight must have input channels / groups = 4": (torch.zeros(1, 4, 5, 5), torch.zeros(4, 3, 3, 3), (1, 4, 5, 5), False, *GEOMETRY),
    "input_size must not be negative": (torch.zeros(1, 4, 5, 5), torch.zeros(4, 3, 3, 3), (1, 3, -5, 5), False, *GEOMETRY),
    "stride must be at least 1": (torch.zeros(1, 4, 5, 5), torch.zeros(4, 3, 3, 3), (1, 3, 5, 5), False, (0, 1), *GEOMETRY[1:]),
    "groups must be at least 1": (torch.zeros(1, 4, 5, 5), torch.zeros(4, 3, 3, 3), (1, 3, 5, 5), False, *GEOMETRY[:3], 0),
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_input(kernels: object, sentence: str) -> None:
    with pytest.raises((TypeError, ValueError), match=sentence):
        INPUT_GRADIENT(*BAD[sentence])


def test_a_workspace_that_cannot_be_had(kernels: object) -> None:
    grad, weight = "torch.randn(1, 20, 20, 2048).permute(0, 3, 1, 2)", "torch.randn(2048, 2048, 1, 1)"
    arguments = "((1, 2048, 20, 20), True, (1, 1), (0, 0, 0, 0), (1, 1), 1)"
    check_without_memory(f"torch.ops.fused_resnet.conv_input_gradient, ({grad}, {weight}), {arguments}", 8 << 20)


@pytest.fixture
def operands() -> Operands:
    return testing.float_operands(FLOATS[1], torch.float32, torch.Generator().manual_seed(0))


def test_in_another_thread_and_twice(kernels: object, operands: Operands) -> None:
    """A graph that is kept gives the same again; one that was freed raises, as PyTorch's does; backward runs in any thread."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in operands]
    y = torch.ops.fused_resnet.conv_bias_add_relu(*leaves, (1, 1), (1, 1, 1, 1), (1, 1), 1, True)
    grad = torch.randn(y.shape)
    wanted = [t for t in leaves if t is not None]
    first = torch.autograd.grad(y, wanted, grad, retain_graph=True)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(torch.autograd.grad(y, wanted, grad, retain_graph=True)))
    thread.start()
    thread.join()
    assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(y, wanted, grad), strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, wanted, grad)
