"""Winograd convolution where values are not finite, or overflow on the way: exactly what direct convolution gives.

A transform mixes the values of a tile, and adds what the definition never adds: a NaN would spread over its tile, and sums of large numbers
overflow. The output transform looks for what is not finite; a convolution or block where it finds something is computed again, directly.

What is trusted: direct convolution, which test_special_values.py holds to the reference.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
from _calls import DTYPES, FORMATS, eager, kernel_function, laid_out, name, plan_of
from _winograd import TILES, element_scale, transforms
from torch import Tensor, nn

import fused_resnet
import fused_resnet.nn as fnn
from fused_resnet import _settings, reference, testing
from fused_resnet.cases import ConvCase, Operands

WINOGRAD = ("winograd2", "winograd4")


def directly(operands: Operands, algorithm: str, **parameters: Any) -> Tensor:
    _settings.change(algorithm="direct")
    y = kernel_function(*operands, **parameters)
    _settings.change(algorithm=algorithm)
    return y


def assert_exact(ours: Tensor, expected: Tensor) -> None:
    result = testing.compare_exact(ours, expected)
    assert result, result.reason


@pytest.mark.parametrize("special", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("algorithm", WINOGRAD, indirect=True)
def test_special_input(one_thread: None, isa: str, algorithm: str, dtype: torch.dtype, special: str) -> None:
    """One value in one image of two, at every kind of place, forward in both formats: what direct convolution gives; and an output that the
    value does not reach is what it is without the value."""
    generator = torch.Generator().manual_seed(0)
    for stride, relu in product((1, 2), (False, True)):
        if (algorithm, stride) not in TILES:
            continue
        for channels, place in product((3, 17), ((0, 0), (0, 5), (3, 4), (4, 4), (6, 9), (10, 12), (7, 12))):
            case = ConvCase(channels, 19, (11, 13), (3, 3), (stride, stride), (1, 1), shortcut=True, relu=relu, batch=2)
            plain = testing.integer_operands(case, dtype, generator)
            spoilt = plain._replace(input=plain.input.clone())
            spoilt.input[1, channels // 2, place[0], place[1]] = float(special)
            # Without the ReLU, which makes minus infinity 0.
            reached = ~eager(spoilt, **{**case.parameters, "relu": False}).isfinite()
            assert reached.any()
            for memory_format in FORMATS:
                operands = laid_out(spoilt, memory_format)
                ours = kernel_function(*operands, **case.parameters)
                assert_exact(ours, directly(operands, algorithm, **case.parameters))
                without = directly(laid_out(plain, memory_format), algorithm, **case.parameters)
                assert torch.equal(ours[~reached], without[~reached])


# The value that all inputs or all weights have. Sums of them overflow, or come near to it: float32 ends at 3.4e38.
LARGE = (1e30, 1e35, 1e36, 3e36, 1e37, 1e38, 3e38)


@pytest.mark.parametrize("size", LARGE)
@pytest.mark.parametrize("operand", ["input", "weight", "both"])
@pytest.mark.parametrize("algorithm", WINOGRAD, indirect=True)
def test_large_values(one_thread: None, isa: str, algorithm: str, operand: str, size: float, generator: torch.Generator) -> None:
    """Numbers of one size and either sign, so that some sums overflow and some do not. Where direct convolution gives a finite number so
    does Winograd, and within its bound; else the same infinity, zero or NaN. Never a finite number that is wrong."""
    for stride, memory_format in product((1, 2), FORMATS):
        if (algorithm, stride) not in TILES:
            continue
        case = ConvCase(5, 19, (9, 10), (3, 3), (stride, stride), (1, 1), shortcut=True, batch=2)
        plain = testing.integer_operands(case, torch.float32, generator)
        factor = {"input": (size, 1.0), "weight": (1.0, size), "both": (size**0.5, size**0.5)}[operand]
        signs = [torch.sign(t) for t in (plain.input, plain.weight)]
        operands = laid_out(plain._replace(input=signs[0] * factor[0], weight=signs[1] * factor[1]), memory_format)
        ours = kernel_function(*operands, **case.parameters)
        direct = directly(operands, algorithm, **case.parameters)
        assert torch.equal(ours.isnan(), direct.isnan())
        finite = direct.isfinite()
        assert torch.equal(ours[~finite].nan_to_num(nan=7.0), direct[~finite].nan_to_num(nan=7.0))
        # F(4x4, 3x3): its largest loss is 8.2 in each of two dimensions; a sum of 45 terms rounds each.
        assert float((ours[finite].double() - direct[finite].double()).abs().max()) <= 45 * 8.2**2 * 2**-24 * size


@pytest.mark.parametrize("algorithm", WINOGRAD, indirect=True)
def test_all_outputs_overflow(isa: str, algorithm: str) -> None:
    """PyTorch gives infinity, or 0 behind the ReLU."""
    x, weight = torch.full((1, 8, 12, 12), 1e25), torch.full((8, 8, 3, 3), 1e25)
    weight[::2] *= -1
    for memory_format in FORMATS:
        y = fused_resnet.conv_bias_add_relu(x.contiguous(memory_format=memory_format), weight, padding=1)
        assert torch.equal(y, reference.conv_bias_add_relu(x, weight, padding=1))
        assert y.isinf().any()
        assert (y[:, ::2] == 0).all()


@pytest.mark.smoke
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("size", [1e36, 3e38, float("inf"), float("nan")])
def test_whole_blocks(kernels: ModuleType, size: float, batch: int, threads: int) -> None:
    """One large value in the last image, in a block that is one call: first, repeated, and after other inputs again."""
    torch.set_num_threads(threads)
    for block in (fnn.BasicBlock(64, 64), fnn.BasicBlock(64, 64, norm_layer=nn.Identity)):
        block.eval()
        with torch.no_grad():
            x = torch.randn(batch, 64, 14, 14)
            spoilt = x.clone()
            spoilt[-1, 3, 7, 7] = size
            before = block(x)
            ours = [block(spoilt) for _ in range(2)]
            _settings.change(algorithm="direct")
            direct = copy.deepcopy(block)(spoilt)
            _settings.change(algorithm="auto")
            for y in ours:
                assert torch.equal(y.isfinite(), direct.isfinite())
                assert testing.norm_error(y.nan_to_num(0, 0, 0), direct.nan_to_num(0, 0, 0).double()) <= 1e-5
            assert torch.equal(block(x), before)


@pytest.mark.parametrize("special", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("operand", ["bias", "shortcut"])
@pytest.mark.parametrize("algorithm", WINOGRAD, indirect=True)
def test_special_bias_and_shortcut(isa: str, algorithm: str, operand: str, special: str, generator: torch.Generator) -> None:
    """They are added after the transforms: only their own outputs change."""
    for memory_format, relu in product(FORMATS, (False, True)):
        case = ConvCase(7, 19, (6, 7), (3, 3), padding=(1, 1), shortcut=True, relu=relu, batch=2)
        plain = laid_out(testing.integer_operands(case, torch.float32, generator), memory_format)
        spoilt = plain._replace(**{operand: getattr(plain, operand).clone()})
        where = (11,) if operand == "bias" else (1, 11, 3, 5)
        getattr(spoilt, operand)[where] = float(special)
        reached = torch.zeros(case.output_shape, dtype=torch.bool)
        reached[:, 11] = operand == "bias"
        reached[1, 11, 3, 5] = True
        ours, without = (kernel_function(*o, **case.parameters) for o in (spoilt, plain))
        number = torch.tensor(float(special))
        wanted = torch.relu(number) if relu else number
        assert torch.equal(ours[reached].nan_to_num(nan=77.0), wanted.nan_to_num(nan=77.0).expand(int(reached.sum())))
        assert torch.equal(ours[~reached], without[~reached])


# Weights with these have a transform that is not finite: sums of them overflow, if they are not infinite themselves.
HUGE: dict[str, Callable[[Tensor], Any]] = {
    "nan": lambda w: w[3, 1, 1, 1].fill_(float("nan")),
    "inf": lambda w: w[3, 1, 0, 2].fill_(float("inf")),
    "-inf in the last": lambda w: w[-1, -1, -1, -1].fill_(-float("inf")),
    "nan in the first": lambda w: w[0, 0, 0, 0].fill_(float("nan")),
    "largest, whole kernel": lambda w: w[3, 1].fill_(torch.finfo(w.dtype).max),
    "all not finite": lambda w: w.fill_(float("nan")),
}


@pytest.mark.parametrize("weight", HUGE)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("algorithm", WINOGRAD, indirect=True)
def test_weights_without_a_finite_transform(
    isa: str, algorithm: str, dtype: torch.dtype, weight: str, generator: torch.Generator
) -> None:
    """Exactly what direct convolution gives; and afterwards, with the old weight, what Winograd gave."""
    case = ConvCase(5, 19, (6, 7), (3, 3), shortcut=True, batch=2)
    for memory_format in FORMATS:
        operands = laid_out(testing.integer_operands(case, dtype, generator), memory_format)
        plan = plan_of(operands, **case.parameters)
        assert plan.kernel.algorithm == algorithm  # type: ignore[attr-defined]
        before = plan(*operands)
        kept = operands.weight.clone()
        HUGE[weight](operands.weight)
        ours = [plan(*operands) for _ in range(2)]
        _settings.change(algorithm="direct")
        direct = kernel_function(*operands, **case.parameters)
        _settings.change(algorithm=algorithm)
        assert not direct.isfinite().all()
        for y in ours:
            result = testing.compare_exact(y, direct)
            assert result, result.reason
        operands.weight.copy_(kept)
        assert torch.equal(plan(*operands), before)


@pytest.mark.parametrize("weight", HUGE)
def test_blocks_with_weights_without_a_finite_transform(weight: str, kernels: ModuleType) -> None:
    """A block as one call: the same, for each of its convolutions."""
    x = torch.randn(2, 16, 9, 9)
    for which in ("conv1", "conv2"):
        block = fnn.BasicBlock(16, 16, norm_layer=nn.Identity).eval()
        conv = getattr(block, which)
        with torch.no_grad():
            before = block(x), block(x)
            kept = conv.weight.clone()
            HUGE[weight](conv.weight)
            ours = [block(x) for _ in range(3)]
            _settings.change(algorithm="direct")
            direct = block(x)
            _settings.change(algorithm="auto")
            assert not direct.isfinite().all()
            assert all(testing.compare_exact(y, direct) for y in ours)
            conv.weight.copy_(kept)
            assert all(torch.equal(block(x), y) for y in before)


@pytest.mark.parametrize("algorithm", WINOGRAD, indirect=True)
def test_denormal_weights(isa: str, algorithm: str, generator: torch.Generator) -> None:
    """A transformed weight below the smallest normal number may be taken as 0: with u such numbers at each position that is an
    error of sum over c of |A'| tiny (|B'| |d| |B|) |A|. Beside normal weights it disappears in the usual bound."""
    a, _, b = transforms(algorithm)
    worst = float((a.abs() @ b.abs().sum(1)).max()) ** 2
    case = ConvCase(7, 19, (6, 7), (3, 3), padding=(1, 1), bias=False, relu=False)
    operands = testing.float_operands(case, torch.float32, generator)
    tiny = torch.finfo(torch.float32).tiny
    for scale in (tiny, tiny / 8, tiny * torch.finfo(torch.float32).eps):
        denormal = operands._replace(weight=operands.weight / operands.weight.abs().max() * scale)
        error = (kernel_function(*denormal, **case.parameters).double() - eager(Operands(*(  # type: ignore[arg-type]
            None if t is None else t.double() for t in denormal)), **case.parameters)).abs().max().item()  # fmt: skip
        assert error <= 2 * worst * case.channels * tiny * denormal.input.abs().max().item()
    mixed = operands._replace(weight=operands.weight.clone())
    mixed.weight[:, ::2] *= tiny
    truth, peer = testing.truth_and_peer(mixed, **case.parameters)
    result = testing.compare_tensors(
        kernel_function(*mixed, **case.parameters), truth, peer, element_scale(mixed, algorithm, isa, **case.parameters)
    )
    assert result, result.reason
