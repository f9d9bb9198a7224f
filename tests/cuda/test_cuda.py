"""On a GPU: the operators' values and gradients, with operands moved there and results brought back.

What is trusted: the reference on the CPU; integers on which every correct convolution gives the same bits; float64.

Skipped where there is no GPU or no compiled CUDA module. FUSED_RESNET_TEST_DEVICE=cpu runs what makes sense on the CPU: that is how
these tests are tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from _calls import FORMATS, MASK, laid_out, name
from _gpu import (
    DEVICE,
    DTYPES,
    LOW,
    TILE_CASES,
    TILES,
    failures_of,
    generator,
    gpu,
    integers,
    marks,
    ours,
    poisoned,
    there,
    undisturbed,
)
from torch import Tensor, nn

import fused_resnet
from fused_resnet import _settings, reference, testing
from fused_resnet.benchmark import gpu_contest, gpu_kernels
from fused_resnet.cases import AWKWARD, CONVS, BlockCase, ConvCase, Operands
from fused_resnet.cli import check

pytestmark = marks
__all__ = ["poisoned", "undisturbed"]  # fixtures


# ---------------------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("table", [AWKWARD, tuple(case.at(2) for case in CONVS)], ids=["awkward", "resnet"])
def test_exact_integers(table: tuple[ConvCase, ...], dtype: torch.dtype, form: torch.memory_format, poisoned: None) -> None:
    with testing.library(cudnn=False):
        failures = failures_of(table, lambda case: integers(case, dtype, form), exact=True)
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("form", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("table", [AWKWARD, TILE_CASES], ids=["awkward", "tiles"])
def test_envelope(table: tuple[ConvCase, ...], dtype: torch.dtype, form: torch.memory_format, poisoned: None) -> None:
    def make(case: ConvCase) -> Operands:
        return laid_out(testing.float_operands(case, dtype, generator(5)), form)

    failures = failures_of(table, make, exact=False, cutting=DEVICE.type == "cuda" and dtype in LOW)
    assert not failures, "\n".join(failures)


@gpu
@pytest.mark.parametrize("case", TILE_CASES, ids=name)
def test_tf32(case: ConvCase) -> None:
    """Allowed: integers are exact all the same, floats within what 10 bits lose. Not allowed: the envelope (above)."""
    for exact in (True, False):
        result = check.tf32(case, exact, 0, DEVICE)
        assert not result.reason, result.reason


def is_matrix(case: ConvCase) -> bool:
    return case.kernel == (1, 1) and case.stride == (1, 1) and case.padding == (0, 0)


def for_this_device(tile: str) -> None:
    assert TILES, "this build has no tiles"
    if not gpu_kernels.suits(tile, torch.cuda.get_device_capability(DEVICE)):
        pytest.skip(f"{tile} is not for this device")


def wrong_features(tile: str, features: Sequence[gpu_kernels.Feature]) -> list[str]:
    """A line for each that the tile's kernel computes wrong."""
    found = []
    with testing.library(tf32=True):
        for feature in features:
            wrong = gpu_kernels.Trial(tile, feature, DEVICE, generator()).wrong()
            if wrong:
                found.append(f"{feature.name} ({feature.case.name}): {wrong}")
    return found


@gpu
@pytest.mark.parametrize("tile", TILES or ["none"])
def test_features_of_each_tile(tile: str, poisoned: None) -> None:
    """Every form, those with a joined projection and those of a stem among them, from simple to hard."""
    for_this_device(tile)
    wrong = wrong_features(tile, gpu_kernels.features(tile))
    assert not wrong, "\n".join(wrong)


@gpu
@pytest.mark.parametrize("tile", TILES or ["none"])
def test_calls_in_a_row(tile: str) -> None:
    """Where a kernel may start while the one before it ends, it waits for what it reads."""
    for_this_device(tile)
    with testing.library(tf32=True, deterministic=False):  # which would fill memory between the calls
        wrong = gpu_kernels.wrong_in_a_row(tile, DEVICE, generator())
    assert wrong == ({} if tile.startswith("sm90 ") and gpu_kernels.form_of(tile) != "plain" else None)


@gpu
@pytest.mark.sanitized
@pytest.mark.parametrize("tile", TILES or ["none"])
def test_each_tile_on_little(tile: str) -> None:
    for_this_device(tile)
    little = [feature for feature in gpu_kernels.features(tile) if feature.name != gpu_kernels.MANY]
    wrong = wrong_features(tile, little[1::3])
    assert not wrong, "\n".join(wrong)


@gpu
@pytest.mark.parametrize("tile", [tile for tile in TILES if gpu_kernels.form_of(tile) in ("matrix", "image", "plain")] or ["none"])
def test_each_tile(tile: str, poisoned: None) -> None:
    """What tries the choice among tiles, on each of them."""
    for_this_device(tile)
    failures, count = [], 0
    with testing.library(tf32=True):
        for case in TILE_CASES:
            if gpu_kernels.form_of(tile) == "matrix" and not is_matrix(case):
                continue
            operands = integers(case, gpu_kernels.dtype_of(tile))
            device_operands = there(operands)
            plan = gpu_contest.planned(case, device_operands, tile)
            assert plan.kernel.algorithm == tile
            result = testing.compare_exact(plan(*device_operands).cpu(), reference.conv_bias_add_relu(*operands, **case.parameters))
            count += 1
            if not result:
                failures.append(f"{case.name}: {result.reason}")
    assert count > 1
    assert not failures, "\n".join(failures)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_general_kernel_on_little(dtype: torch.dtype) -> None:
    """Without tensor cores: tails, strides, groups, an expanded shortcut."""
    if DEVICE.type == "cuda":
        _settings.change(cuda_algorithm="general")
    little = [case for case in AWKWARD if case.batch][::12]
    for form in FORMATS:
        failures = failures_of(little, lambda case, form=form: integers(case, dtype, form), exact=True)  # type: ignore[misc]
        assert not failures, "\n".join(failures)
    operands = testing.layout(integers(AWKWARD[0], dtype), shortcut="expanded", input="sliced")
    result = testing.compare_forward(ours, operands, True, **AWKWARD[0].parameters)
    assert result, result.reason


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("operand", Operands._fields)
def test_layouts(operand: str, dtype: torch.dtype, poisoned: None) -> None:
    """Each operand on its own in every layout; on the tensor cores' shapes too."""
    failures = []
    with testing.library(cudnn=False):
        for case in (TILE_CASES[0], TILE_CASES[6], AWKWARD[0], check._SHAPES[-1]):
            for layout in testing.LAYOUTS:
                operands = testing.layout(integers(case, dtype), **{operand: layout})
                result = testing.compare_forward(ours, operands, True, **case.parameters)
                if not result:
                    failures.append(f"{case.name}, {operand} {layout}: {result.reason}")
    assert not failures, "\n".join(failures)


def misaligned(t: Tensor) -> Tensor:
    """channels_last without gaps, one element into its buffer: not aligned to 16 bytes."""
    buffer = t.new_full((t.numel() + 1,), float("nan"))
    if t.dim() == 1:
        return buffer[1:].copy_(t)
    n, c, h, w = t.shape
    return buffer[1:].view(n, h, w, c).permute(0, 3, 1, 2).copy_(t)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_misaligned_views(dtype: torch.dtype) -> None:
    case = TILE_CASES[0]
    operands = integers(case, dtype)
    for field in Operands._fields:
        changed = operands._replace(**{field: misaligned(getattr(operands, field))})
        result = testing.compare_forward(ours, changed, True, **case.parameters)
        assert result, f"{field}: {result.reason}"


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_shared_memory(dtype: torch.dtype) -> None:
    """The shortcut is the input itself, or a view of it."""
    case = ConvCase(64, 64, (9, 10), (3, 3), padding=(1, 1), shortcut=True, batch=2)
    operands = integers(case, dtype)
    wide = torch.cat((operands.input, operands.input[:, :8]), 1).contiguous(memory_format=torch.channels_last)
    for changed in (
        operands._replace(shortcut=operands.input),
        operands._replace(input=wide[:, :-8], shortcut=wide[:, 8:]),
    ):
        with testing.library(cudnn=False):
            result = testing.compare_forward(ours, changed, True, **case.parameters)
        assert result, result.reason


@pytest.mark.sanitized
@pytest.mark.parametrize("form", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_passes(dtype: torch.dtype, form: torch.memory_format) -> None:
    """bias_add_relu and relu_backward, bit for bit: integers; sizes around a vector's, incoming gradients in other layouts."""
    one_pass = testing.on(DEVICE, fused_resnet.bias_add_relu)
    for shape in ((2, 1, 3, 3), (3, 8, 5, 7), (1, 17, 1, 1), (2, 33, 9, 8), (65, 5, 3, 2), (2, 64, 20, 20)):
        m = testing.MAGNITUDE[dtype]
        x, s = (torch.randint(-m, m + 1, shape, generator=generator(i)).to(dtype).contiguous(memory_format=form) for i in (1, 2))
        b = torch.randint(-m, m + 1, shape[1:2], generator=generator(3)).to(dtype)
        for bias, shortcut, relu in ((b, s, True), (b, None, True), (None, s, False), (b, s[:, :, :1, :1].expand(shape), True)):
            result = testing.compare_exact(one_pass(x, bias, shortcut, relu), reference.bias_add_relu(x, bias, shortcut, relu))
            assert result, f"{shape}: {result.reason}"
        grad = testing.unit_gradient(shape, dtype, generator(4))
        expected = torch.where(s <= 0, torch.zeros_like(grad), grad)
        for incoming in (grad, grad.contiguous(memory_format=torch.channels_last), grad.mT.contiguous().mT):
            moved = testing.moved(DEVICE, incoming, s)
            for bias_grad in (True, False):
                masked, sums = MASK(*moved, bias_grad)
                assert masked.is_contiguous(memory_format=form)
                assert testing.compare_exact(masked.cpu(), expected), shape
                if bias_grad:
                    assert testing.compare_exact(sums.cpu(), expected.sum((0, 2, 3))), shape


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("operand", ["input", "bias", "shortcut"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_special_values(dtype: torch.dtype, operand: str, value: float) -> None:
    """NaN and infinities are where the reference has them; ReLU keeps a NaN."""
    for case in (TILE_CASES[0], TILE_CASES[6], AWKWARD[0]):
        operands = laid_out(testing.float_operands(case, dtype, generator(7)), torch.channels_last)
        t = getattr(operands, operand)
        t[(3,) if t.dim() == 1 else (0, 3, 1, 2)] = value
        with testing.library(cudnn=False):  # cuDNN's Winograd makes infinity - infinity
            result = testing.compare_forward(ours, operands, False, DEVICE.type == "cuda", **case.parameters)
        assert result, f"{case.name}: {result.reason}"


def test_empty_batch() -> None:
    operands = there(integers(TILE_CASES[6].at(0), torch.float32))
    leaves = [t.requires_grad_() for t in operands]
    output = fused_resnet.conv_bias_add_relu(*leaves, padding=1)
    assert output.shape == (0, 72, 14, 15)
    gradients = torch.autograd.grad(output.sum(), leaves)
    assert [g.shape for g in gradients] == [t.shape for t in leaves]
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_the_same_bits_each_time(dtype: torch.dtype) -> None:
    """Forward, mask and bias gradient over repeats, with other work between."""
    for case in (TILE_CASES[6], TILE_CASES[1], ConvCase(64, 64, (28, 28), (3, 3), padding=(1, 1), shortcut=True, batch=16)):
        operands = there(laid_out(testing.float_operands(case, dtype, generator(1)), torch.channels_last))
        first: tuple[Tensor, ...] = ()
        for repeat in range(5):
            output = fused_resnet.conv_bias_add_relu(*operands, **case.parameters)
            masked, sums = MASK(output.sin(), output, True)
            if repeat == 0:
                first = output, masked, sums
            assert all(map(torch.equal, (output, masked, sums), first)), case.name
            torch.randn(1 << 16, device=DEVICE).sum()


# ---------------------------------------------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------------------------------------------


@gpu
def test_a_parameter_elsewhere() -> None:
    """A layer that was left on the CPU: an error in a sentence, and no kernel reads its address."""
    block = BlockCase("basic", 16, 16, (8, 8)).eager().eval().to(DEVICE)
    assert fused_resnet.fuse_(block).fused
    x = torch.randn(2, 16, 8, 8, device=DEVICE)
    with torch.no_grad():
        expected = block(x)
        weight = block.conv2.weight
        block.conv2.weight = nn.Parameter(weight.cpu())
        with pytest.raises((ValueError, RuntimeError), match=r"device|cpu"):
            block(x)
        block.conv2.weight = weight
        assert torch.equal(block(x), expected)


@pytest.mark.parametrize("case", testing.gradient_cases(quick=True), ids=name)
def test_finite_differences(case: testing.GradientCase) -> None:
    """Against the reference; gradcheck and gradgradcheck in float64, on the device."""
    assert not check.finite_differences(case, 0, DEVICE).reason


@pytest.mark.parametrize("form", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_integer_gradients(dtype: torch.dtype, form: torch.memory_format) -> None:
    large = ConvCase(64, 128, (28, 28), (3, 3), padding=(1, 1), shortcut=True, batch=2)  # whose gradient in the input is a forward kernel's
    for case in (*check._SHAPES, TILE_CASES[0], TILE_CASES[6], TILE_CASES[7], large):
        operands = integers(case, dtype, form)
        grad = testing.unit_gradient(case.output_shape, dtype, generator(2))
        with testing.library(cudnn=False):
            found = testing.compare_gradients(ours, operands, grad, **case.parameters)
        assert len(found) >= 2
        for what, result in found.items():
            assert result, f"{case.name}, {what}: {result.reason}"


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_float_gradients(dtype: torch.dtype) -> None:
    """Against float64 in the 2-norm: twice what PyTorch's own lose on this device, and the rounding of the result. An output within
    rounding of 0 passes its gradient in one and not in the other: three elements' worth is allowed for those."""
    for case in (TILE_CASES[0], TILE_CASES[6], TILE_CASES[7], TILE_CASES[15]):
        operands = laid_out(testing.float_operands(case, dtype, generator(3)), torch.channels_last)
        grad = torch.randn(case.output_shape, generator=generator(4)).to(dtype)

        def run(function: Any, tensors: Any, incoming: Tensor, case: ConvCase = case) -> list[Tensor]:
            leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
            output = function(*leaves, **case.parameters)
            return [g.cpu() for g in torch.autograd.grad(output, [t for t in leaves if t is not None], incoming)]

        truth = run(reference.conv_bias_add_relu, [None if t is None else t.double() for t in operands], grad.double())
        moved, arriving = there(operands), grad.to(DEVICE)
        mine = run(fused_resnet.conv_bias_add_relu, moved, arriving)
        theirs = run(reference.conv_bias_add_relu, moved, arriving)
        flips = (3 / grad.numel()) ** 0.5
        for got, peer, wanted in zip(mine, theirs, truth, strict=True):
            error, allowed = testing.norm_error(got, wanted), 2 * testing.norm_error(peer, wanted) + torch.finfo(dtype).eps + flips
            assert error <= allowed, f"{case.name}: error {error:.2g}, allowed {allowed:.2g}"
