"""The gradient of a convolution in its input on a GPU: a convolution by a forward kernel, without a GPU.

What is trusted: the module's twin (``_cuda_twin``), whose stand-ins for tensor-core kernels refuse what those cannot read; PyTorch's
gradients; integers, on which every correct gradient gives the same bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import _cuda_twin
import pytest
import torch
from _calls import FORMATS, laid_out, name
from torch import Tensor

import fused_resnet
from fused_resnet import _settings, reference, testing
from fused_resnet.cases import ConvCase, Operands
from fused_resnet.ops import cuda, plans, select
from fused_resnet.ops.gradients import library_input_gradient
from fused_resnet.ops.spec import Geometry, geometry_of_call

BF16 = torch.bfloat16
# Stride 1, all kinds of padding, channels in multiples of 8.
CASES = (
    ConvCase(16, 24, (9, 7), (3, 3), padding=(1, 1), shortcut=True, batch=2),
    ConvCase(24, 16, (6, 5), (1, 1), shortcut=True, batch=3),
    ConvCase(8, 16, (7, 9), (3, 3), batch=2),
    ConvCase(8, 8, (11, 9), (5, 5), padding="same", dilation=(2, 1), shortcut=True),
    ConvCase(8, 8, (6, 7), (4, 2), padding="same", shortcut=True),
    ConvCase(8, 32, (5, 6), (3, 2), padding=(2, 0), relu=False),
    ConvCase(16, 8, (5, 5), (1, 1), shortcut=True, bias=False),
)


@pytest.fixture(autouse=True)
def twin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small convolutions take part too."""
    monkeypatch.setattr(select, "SMALL_ON_CUDA", 0)
    with plans.backends.using(cpu=cuda.CudaBackend(_cuda_twin.build())):
        yield


def operands_of(case: ConvCase, form: torch.memory_format, seed: int = 0) -> Operands:
    return laid_out(testing.integer_operands(case, BF16, torch.Generator().manual_seed(seed)), form)


def geometry_of(case: ConvCase, weight: Tensor) -> Geometry:
    return geometry_of_call(weight, case.stride, case.padding, case.dilation, case.groups)


@pytest.mark.parametrize("form", FORMATS, ids=name)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_gradients(case: ConvCase, form: torch.memory_format) -> None:
    """Of all operands, exactly; the input's by a tensor-core kernel, with what is added or through a ReLU too."""
    operands = operands_of(case, form)
    grad = testing.unit_gradient(case.output_shape, BF16, torch.Generator().manual_seed(2))
    plans.gradient_plans.kept.clear()
    for what, result in testing.compare_gradients(fused_resnet.conv_bias_add_relu, operands, grad, **case.parameters).items():
        assert result, f"{what}: {result.reason}"
    kernels = [plan.kernel.algorithm for plan in plans.gradient_plans.kept.values() if plan.kernel is not None]
    assert kernels == [kernel for kernel in kernels if kernel.startswith("sm90 bfloat16")]
    assert len(kernels) == 1

    geometry = geometry_of(case, operands.weight)
    grad = grad.contiguous(memory_format=form)
    plain = library_input_gradient(grad, operands.weight, operands.input.shape, form, geometry)
    last = form is torch.channels_last
    ends = operands.input, operands.input.contiguous(memory_format=FORMATS[FORMATS[0] is form])
    for masked, end in itertools.product((False, True), ends):
        plan = plans.find_gradient("input", grad, operands.weight, operands.input.shape, last, *geometry, end=end, masked=masked)
        assert plan.kernel is not None
        wide = plain.float()
        expected = torch.where(operands.input <= 0, 0.0, wide) if masked else wide + operands.input.float()
        found = plan(grad, operands.weight, end)
        assert testing.compare_exact(found, expected.to(BF16)), masked
        assert found.is_contiguous(memory_format=form)


def test_special_values() -> None:
    """NaN and infinities of the gradient reach every pixel that its definition says, and no other."""
    case = CASES[0]
    operands = operands_of(case, torch.channels_last)
    for value in (float("nan"), float("inf"), -float("inf")):
        grad = torch.zeros(case.output_shape, dtype=BF16).contiguous(memory_format=torch.channels_last)
        grad[1, 3, 4, 0] = value
        geometry = geometry_of(case, operands.weight)
        plan = plans.find_gradient("input", grad, operands.weight, operands.input.shape, True, *geometry)
        assert plan.kernel is not None
        expected = torch.nn.grad.conv2d_input(operands.input.shape, operands.weight.float(), grad.float(), padding=1)
        assert testing.compare_exact(plan(grad, operands.weight), expected.to(BF16))


def test_weights_of_any_layout_follow_their_parameter() -> None:
    """The rotated weight is made in each call: a step of training has changed it."""
    case = CASES[0]
    operands = operands_of(case, torch.channels_last)
    grad = testing.unit_gradient(case.output_shape, BF16, torch.Generator().manual_seed(3)).contiguous(memory_format=torch.channels_last)
    for layout in ("contiguous", "channels_last", "sliced"):
        weight = testing.layout(operands, weight=layout).weight
        for _ in range(2):
            x = operands.input.clone().requires_grad_()
            (found,) = torch.autograd.grad(fused_resnet.conv_bias_add_relu(x, weight, relu=False, padding=1), x, grad)
            (expected,) = torch.autograd.grad(reference.conv_bias_add_relu(x, weight, relu=False, padding=1), x, grad)
            assert testing.compare_exact(found, expected), layout
            with torch.no_grad():
                weight.neg_()


def test_float32_and_second_derivatives() -> None:
    """float32 where TF32 is allowed. What is differentiated further is the library's, and gives the same."""
    case = ConvCase(8, 8, (6, 5), (3, 3), padding=(1, 1), batch=2)
    operands = laid_out(testing.float_operands(case, torch.float32, torch.Generator().manual_seed(4)), torch.channels_last)
    grad = torch.randn(case.output_shape, generator=torch.Generator().manual_seed(5))

    def gradients(function: Any) -> list[Tensor]:
        x, w = (t.clone().requires_grad_() for t in operands[:2])
        plans.gradient_plans.kept.clear()
        (first,) = torch.autograd.grad(function(x, w, padding=1), x, grad)
        kernels.append([plan.kernel.algorithm for plan in plans.gradient_plans.kept.values() if plan.kernel])
        (again,) = torch.autograd.grad(function(x, w, padding=1), x, grad, create_graph=True)
        return [first, *torch.autograd.grad(again.square().sum(), (x, w), allow_unused=True, materialize_grads=True)]

    kernels: list[list[str]] = []
    with testing.library(tf32=True):
        ours = gradients(fused_resnet.conv_bias_add_relu)
    assert kernels == [["sm90 float32 image 128x64"]]
    # Sums of 72 terms of size 1, in another order: some units of the last place.
    for found, expected in zip(ours, gradients(reference.conv_bias_add_relu), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_a_weight_that_was_freed() -> None:
    """Between forward and backward, as offloading does: an error, and nothing is read."""
    case = CASES[0]
    operands = operands_of(case, torch.channels_last)
    x = operands.input.clone().requires_grad_()
    y = fused_resnet.conv_bias_add_relu(x, operands.weight, relu=False, padding=1)
    operands.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="weight"):
        y.sum().backward()


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def why(case: ConvCase, dtype: torch.dtype = BF16, gradient: str = "input") -> list[str]:
        operands = laid_out(testing.integer_operands(case, dtype, torch.Generator().manual_seed(0)), torch.channels_last)
        sentences = fused_resnet.why_not(*operands, **case.parameters, gradient=gradient)
        x, w = operands.input.clone().requires_grad_(), operands.weight.clone()
        plans.gradient_plans.kept.clear()
        fused_resnet.conv_bias_add_relu(x, w, operands.bias, operands.shortcut, **case.parameters).sum().backward()
        assert any(plan.kernel is not None for plan in plans.gradient_plans.kept.values()) == (not sentences or gradient == "weight")
        return sentences

    assert why(CASES[0]) == []
    assert why(CASES[0], gradient="weight") == ["there are no kernels for the gradient of a weight on a GPU"]
    assert "stride 2" in why(ConvCase(8, 8, (9, 9), (3, 3), (2, 2), (1, 1)))[0]
    assert "more padding than kernel" in why(ConvCase(8, 8, (5, 5), (3, 3), padding=(3, 3)))[0]
    assert "float64" in why(CASES[0], torch.float64)[0]
    assert "multiples of 8" in why(ConvCase(12, 8, (9, 9), (3, 3), padding=(1, 1)))[0]
    assert "groups" in why(ConvCase(16, 16, (9, 9), (3, 3), padding=(1, 1), groups=2))[0]
    with _settings.using(cuda_gradients=False):
        assert why(CASES[0]) == ["our gradients on a GPU are turned off"]
    with _settings.using(cuda_algorithm="sm90 bfloat16 image 128x128"):
        assert why(CASES[0]) == ["a kernel is asked for by name, which need not be for the gradient"]
    monkeypatch.setattr(select, "SMALL_ON_CUDA", 1 << 24)
    plans.gradient_plans.kept.clear()
    assert "a small convolution" in why(CASES[0])[0]
