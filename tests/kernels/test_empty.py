"""Empty and tiny: no images, forward and backward; maps of one pixel; kernels larger than the unpadded input.

What is trusted: the reference on the same tensors; gradients of an empty batch are zeros of the right shape.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from _calls import DTYPES, FORMATS, compare_all, laid_out, name

import fused_resnet
from fused_resnet import reference, testing
from fused_resnet.cases import ConvCase

pytestmark = pytest.mark.usefixtures("one_thread", "integers_stay_exact")


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_no_images(isa: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    for kernel, stride, groups, relu in product((1, 3), (1, 2), (1, 2), (True, False)):
        case = ConvCase(4, 6, (5, 6), (kernel, kernel), (stride, stride), (1, 1), groups=groups, shortcut=True, batch=0)
        operands = testing.integer_operands(case, dtype, generator)
        leaves = [t.requires_grad_() for t in operands if t is not None]
        y = fused_resnet.conv_bias_add_relu(*leaves, **{**case.parameters, "relu": relu})
        assert y.shape == case.output_shape
        assert y.dtype == dtype
        grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
        for grad, leaf in zip(grads, leaves, strict=True):
            assert grad.shape == leaf.shape
            assert torch.equal(grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_nothing_for_bias_add_relu(isa: str, dtype: torch.dtype) -> None:
    for shape in ((0, 3, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (2, 0, 4, 5)):
        for relu in (True, False):
            x, s = (torch.ones(shape, dtype=dtype, requires_grad=True) for _ in range(2))
            b = torch.ones(shape[1], dtype=dtype, requires_grad=True)
            y = fused_resnet.bias_add_relu(x, b, s, relu)
            assert y.shape == shape
            for grad, leaf in zip(torch.autograd.grad(y, [x, b, s], torch.ones_like(y)), (x, b, s), strict=True):
                assert torch.equal(grad, torch.zeros_like(leaf))


def test_an_empty_batch_packs_nothing_wrong(isa: str, generator: torch.Generator) -> None:
    """The same weight serves an empty and then a real batch."""
    case = ConvCase(4, 6, (5, 6), (3, 3), padding=(1, 1), shortcut=True, batch=2)
    operands = testing.integer_operands(case, torch.float32, generator)
    empty = operands._replace(input=operands.input[:0], shortcut=operands.shortcut[:0])
    assert fused_resnet.conv_bias_add_relu(*empty, padding=1).shape == (0, 6, 5, 6)
    ours = fused_resnet.conv_bias_add_relu(*operands, padding=1)
    assert torch.equal(ours, reference.conv_bias_add_relu(*operands, padding=1))


@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_tiny(isa: str, dtype: torch.dtype, memory_format: torch.memory_format, generator: torch.Generator) -> None:
    cases = []
    for size in ((1, 1), (1, 2), (2, 1), (2, 2)):
        for kernel in ((1, 1), (3, 3), (5, 5), (7, 7), (1, 7), (6, 2)):
            padding = (kernel[0] // 2, kernel[1] // 2)
            for c, k in ((1, 1), (3, 2), (17, 33)):
                cases.append(ConvCase(c, k, size, kernel, padding=padding, shortcut=True))
                cases.append(ConvCase(c, k, size, kernel, (2, 3), padding, shortcut=True, batch=3))
                cases.append(ConvCase(c, k, size, kernel, padding=(7, 7), dilation=(2, 2), shortcut=True))
    larger = [c for c in cases if c.kernel[0] > c.size[0] and c.kernel[1] > c.size[1]]
    assert larger, "no kernel is larger than its input"
    count, failures = compare_all(
        cases, lambda case: laid_out(testing.integer_operands(case, dtype, generator), memory_format), exact=True
    )
    assert not failures, "\n".join(failures)
    assert count >= len(cases)
    for case in larger[::3]:
        operands = laid_out(testing.integer_operands(case, dtype, generator), memory_format)
        grad = testing.unit_gradient(case.output_shape, dtype, generator)
        results = testing.compare_gradients(fused_resnet.conv_bias_add_relu, operands, grad, **case.parameters)
        for of, result in results.items():
            assert result, f"{case.name}, {of}: {result.reason}"
