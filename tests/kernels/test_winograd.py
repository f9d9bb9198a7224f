"""Winograd convolution: its error, against derived bounds, and its gradients.

What is trusted: the reference in float64 as the truth; the bounds of ``_winograd.py``, formulas in the unit roundoff, the
channels and the transforms; direct convolution, which the exact and envelope tests hold to the reference. That F(2x2, 3x3) is exact
on integers is in test_exact.py, the kernels' use of memory in test_memory.py, that bits depend on neither threads nor neighbours
in a batch in test_determinism.py, random shapes in test_fuzz.py.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from itertools import product
from types import ModuleType

import pytest
import torch
from _calls import DTYPES, FORMATS, eager, kernel_function, laid_out, name
from _exact import ISAS, WINOGRAD, algorithm_of, fits, winograd_fits
from _winograd import TILES, element_scale, losses, norm_bound, rounds_transforms, transforms
from torch import Tensor

import fused_resnet
from fused_resnet import _settings, testing
from fused_resnet.cases import AWKWARD, BLOCKS, CONVS, BlockCase, ConvCase, Operands
from fused_resnet.testing.compare import unit_roundoff

# ---------------------------------------------------------------------------------------------------------------------
# Rounding error
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("algorithm", "stride"), TILES)
def test_the_transforms_on_paper_are_winograd(algorithm: str, stride: int) -> None:
    """What the bounds are calculated from: A [(G g) * (B d)] is the convolution of d with g."""
    m, step, alpha = TILES[algorithm, stride]
    a, g, b = transforms(algorithm, stride)
    assert (a.shape, g.shape, b.shape, step) == ((m, alpha), (alpha, 3), (alpha, alpha), m * stride)
    d, w = torch.randn(alpha, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    direct = torch.stack([d[i * stride : i * stride + 3] @ w for i in range(m)])
    assert torch.allclose(a @ ((g @ w) * (b @ d)), direct, rtol=0, atol=1e-13)


def test_the_losses() -> None:
    """The numbers that documents and the C++ test quote."""
    assert losses("winograd2").tolist() == pytest.approx([5 / 3] * 2)
    assert losses("winograd2", 2).tolist() == pytest.approx([5 / 3] * 2)
    assert losses("winograd4").mean().item() == pytest.approx(4.8, abs=0.05)
    assert losses("winograd4").max().item() == pytest.approx(8.2, abs=0.05)
    # F(4x4, 3x3) with the usual points 0, +-1, +-2 loses more than twice as much.
    a = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]], dtype=torch.float64)
    g = torch.tensor([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], dtype=torch.float64) / 24
    b = [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0], [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]]
    usual = a.square() @ (g.square().sum(1) * torch.tensor(b, dtype=torch.float64).square().sum(1)) / 3
    assert usual.mean() > 2 * losses("winograd4").mean()


# One of each size of 3x3 convolution in the ResNets, with and without a shortcut in turn; and short sums.
SIZES = {(c.channels, c.stride): c for c in CONVS if winograd_fits(c)}
ENVELOPE = (
    *SIZES.values(),
    ConvCase(1, 40, (30, 31), (3, 3), padding=(1, 1)),
    ConvCase(5, 33, (27, 18), (3, 3), padding=(0, 2), shortcut=True),
)


@lru_cache(maxsize=1)
def truth_of(case: ConvCase, dtype: torch.dtype) -> tuple[Operands, Tensor, Tensor, Tensor]:
    """Operands; the truth; what float32 PyTorch gives; and the convolution alone, before bias and shortcut, in float64."""
    operands = testing.float_operands(case, dtype, torch.Generator().manual_seed(0))
    truth, peer = testing.truth_and_peer(operands, **case.parameters)
    alone = Operands(operands.input.double(), operands.weight.double(), None, None)
    return operands, truth, peer, eager(alone, **{**case.parameters, "relu": False})


@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize(
    ("case", "algorithm"), [(c, a) for c in ENVELOPE for a in WINOGRAD if fits(c, a)], ids=name, indirect=["algorithm"]
)
def test_error_of_the_whole(
    case: ConvCase, dtype: torch.dtype, algorithm: str, isa: str, memory_format: torch.memory_format
) -> None:
    """In norm. F(4x4, 3x3) within its bound; F(2x2, 3x3) within its own and inside direct convolution's envelope."""
    operands, truth, peer, convolution = truth_of(case, dtype)
    arguments = laid_out(operands, memory_format)
    ours = kernel_function(*arguments, **case.parameters)
    assert algorithm_of(arguments, **case.parameters) == algorithm
    rounding = 2 * unit_roundoff(torch.float32) + (unit_roundoff(dtype) if dtype == torch.bfloat16 else 0)  # bias, shortcut; the store
    bound = norm_bound(algorithm, case.stride[0], case.channels, dtype)
    if rounds_transforms(isa, dtype):
        # Two operands of each term, their roundings weighed as the others are; see ``norm_bound``.
        bound += 1.5 * unit_roundoff(dtype) * float(losses(algorithm, case.stride[0]).mean()) * (2 * 0.18) ** 0.5
    error = (ours.double() - truth).norm().item()
    assert error <= bound * convolution.norm().item() + rounding * truth.norm().item()
    if algorithm == "winograd2" and not rounds_transforms(isa, dtype):
        result = testing.compare_tensors(ours, truth, peer, testing.error_scale(operands, dtype, **case.parameters))
        assert result, result.reason


def test_the_bound_is_tight() -> None:
    """Half as much error again as F(4x4, 3x3) has is seen: direct convolution of an input that lacks five of its bits."""
    _settings.change(algorithm="winograd4")
    case = ConvCase(64, 64, (28, 28), (3, 3), padding=(1, 1), bias=False, relu=False)
    operands, truth, _, convolution = truth_of(case, torch.float32)
    bound = norm_bound("winograd4", 1, 64, torch.float32) * convolution.norm()
    good = (kernel_function(*operands, **case.parameters).double() - truth).norm()
    assert bound / 2 < good < bound, "no tighter and no looser than it says"
    _settings.change(algorithm="direct")
    cut = (operands.input.view(torch.int32) & ~0x1F).view(torch.float32)
    assert (kernel_function(cut, operands.weight, None, None, **case.parameters).double() - truth).norm() > bound


EDGES = tuple(
    dict.fromkeys(
        [case for case in AWKWARD if winograd_fits(case)]
        # Every size from 1 up to two tiles and a bit, each way, with every padding.
        + [
            ConvCase(5, 7, size, (3, 3), (stride, stride), (pad, pad), shortcut=True, batch=2)
            for n, pad, stride in product(range(1, 11), (0, 1, 2), (1, 2))
            for size in ((n, 4), (3, n))
            if min(size) + 2 * pad >= 3
        ]
        # Channels around the vectors of every instruction set, in and out.
        + [
            ConvCase(c, k, (6, 9), (3, 3), padding=(1, 0), shortcut=True)
            for c, k in product((1, 3, 8, 15, 16, 17, 33), (1, 5, 16, 31, 32, 40, 65))
        ]
        + [
            ConvCase(9, 19, (7, 6), (3, 3), padding=(1, 1), bias=bias, shortcut=shortcut, relu=relu)
            for bias, shortcut, relu in product((False, True), repeat=3)
        ]
    )
)


@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("algorithm", WINOGRAD, indirect=True)
def test_error_of_each_element(
    one_thread: None, isa: str, algorithm: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    generator, failures, count = torch.Generator().manual_seed(0), [], 0
    for case in EDGES:
        if not fits(case, algorithm):
            continue
        operands = laid_out(testing.float_operands(case, dtype, generator), memory_format)
        ours = kernel_function(*operands, **case.parameters)
        truth, peer = testing.truth_and_peer(operands, **case.parameters)
        scale = element_scale(operands, algorithm, isa, **case.parameters)
        result = testing.compare_tensors(ours, truth, peer, scale)
        count += 1
        if not result:
            failures.append(f"{case.name}: {result.reason}")
    assert not failures, "\n".join(failures)
    assert count > 100


@pytest.mark.parametrize("algorithm", ["direct", *WINOGRAD], indirect=True)
def test_bfloat16_is_rounded_once(isa: str, algorithm: str, generator: torch.Generator) -> None:
    """Half a unit in the last place of the output and float32's error, no more. (AVX512_BF16 also rounds the transforms.)"""
    if rounds_transforms(isa, torch.bfloat16) and algorithm != "direct":
        fused_resnet.set_numerics("strict")
        _settings.change(algorithm="auto")
    case = ConvCase(64, 64, (9, 10), (3, 3), padding=(1, 1), shortcut=True)
    operands = testing.float_operands(case, torch.bfloat16, generator)
    operands = operands._replace(shortcut=operands.shortcut * 16)  # type: ignore[operator]
    truth, _ = testing.truth_and_peer(operands, **case.parameters)
    _, exponent = torch.frexp(truth)
    half = torch.ldexp(torch.ones_like(truth), exponent - 9)  # 8 bits
    scale = 2 * testing.error_scale(operands, torch.float32, **case.parameters) * float(losses("winograd4").max())
    ours = kernel_function(*operands, **case.parameters)
    assert ((ours.double() - truth).abs() <= half + scale).all()
    # The bound tells one rounding from two.
    twice = torch.nn.functional.conv2d(operands.input, operands.weight, operands.bias, padding=1)
    twice = torch.relu(twice + operands.shortcut)
    assert not ((twice.double() - truth).abs() <= half + scale).all()


@pytest.mark.smoke
@pytest.mark.parametrize("case", [b for b in BLOCKS if b.network != "cifar20"], ids=name)
def test_error_of_whole_blocks(case: BlockCase, kernels: ModuleType) -> None:
    """The norm error, folded batch norm and all, is at most 2e-6 up to 256 channels in a 3x3 convolution and 3e-6 at 512."""
    module = case.eager()
    x = case.make(1, memory_format=torch.channels_last, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        truth = copy.deepcopy(module).double()(x.double())
        report = fused_resnet.fuse_(module)
        assert len(report.fused) == 1
        errors = {}
        for numerics in ("fast", "strict"):
            fused_resnet.set_numerics(numerics)
            errors[numerics] = testing.norm_error(module(x), truth)
    assert errors["fast"] <= (2e-6 if case.planes <= 256 else 3e-6)
    assert errors["strict"] <= 1.5e-6
    assert errors["strict"] <= 1.1 * errors["fast"]


# ---------------------------------------------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_exact_integer_gradients(isa: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """The mask comes from F(2x2, 3x3)'s output, zeros included: all four gradients equal the reference's."""
    _settings.change(algorithm="winograd2")
    for stride, memory_format in product((1, 2), FORMATS):
        case = ConvCase(17, 19, (7, 10), (3, 3), (stride, stride), (1, 1), shortcut=True, batch=2)
        operands = laid_out(testing.integer_operands(case, dtype, generator), memory_format)
        assert algorithm_of(operands, **case.parameters) == "winograd2"
        grad = testing.unit_gradient(case.output_shape, dtype, generator)
        results = testing.compare_gradients(fused_resnet.conv_bias_add_relu, operands, grad, **case.parameters)
        for of, result in results.items():
            assert result, f"{of}: {result.reason}"


