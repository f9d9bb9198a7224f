"""On a GPU: PyTorch's machinery around the operators, and converted networks. See test_cuda.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _blocks import SPELLINGS, assert_same, randomise
from _calls import CONV, MASK, PASS, laid_out, name
from _gpu import (
    DEVICE,
    LOW,
    TILE_CASES,
    generator,
    gpu,
    integers,
    marks,
    poisoned,
    there,
    undisturbed,
)
from torch import Tensor, nn

import fused_resnet
from fused_resnet import _plain, cases, reference, testing
from fused_resnet.benchmark import gpu_contest
from fused_resnet.cases import ConvCase, Operands
from fused_resnet.cli import check

pytestmark = marks
__all__ = ["poisoned", "undisturbed"]  # fixtures


@gpu
def test_the_tensor_cores_are_what_runs() -> None:
    for dtype in LOW:
        for case in TILE_CASES:
            operands = there(integers(case, dtype))
            assert fused_resnet.why_not(*operands, **case.parameters) == []
            assert gpu_contest.planned(case, operands, "auto").kernel.tensor_cores, case.name


CALLS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "float32": lambda: (*leaves(TILE_CASES[0], torch.float32), (1, 1), (0, 0, 0, 0), (1, 1), 1, True),
    "bfloat16, channels_last": lambda: (*leaves(TILE_CASES[6], torch.bfloat16), (1, 1), (1, 1, 1, 1), (1, 1), 1, True),
    "bfloat16, contiguous": lambda: (
        *leaves(TILE_CASES[6], torch.bfloat16, torch.contiguous_format), (1, 1), (1, 1, 1, 1), (1, 1), 1, True
    ),
    "float64, groups, channels_last": lambda: (*leaves(check._SHAPES[-1], torch.float64), (1, 1), (1, 1, 1, 1), (1, 1), 4, True),
    "uneven padding": lambda: (*leaves(TILE_CASES[6], torch.float32)[:3], None, (1, 1), (1, 2, 0, 1), (1, 1), 1, True),
    "groups, bfloat16, no ReLU": lambda: (*leaves(check._SHAPES[-1], torch.bfloat16), (1, 1), (1, 1, 1, 1), (1, 1), 4, False),
}  # fmt: skip


def leaves(case: ConvCase, dtype: torch.dtype, form: torch.memory_format = torch.channels_last) -> Operands:
    operands = there(laid_out(testing.float_operands(case, dtype, generator(1)), form))
    return Operands(*(None if t is None else t.requires_grad_() for t in operands))  # type: ignore[arg-type]


@pytest.mark.parametrize("call", CALLS)
def test_opcheck(call: str) -> None:
    torch.library.opcheck(CONV, CALLS[call]())


@pytest.mark.parametrize("call", CALLS)
def test_fake_strides_are_the_real_ones(call: str) -> None:
    arguments = CALLS[call]()
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = CONV(*arguments)
    with FakeTensorMode() as mode:
        fake = CONV(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
    assert (fake.shape, fake.stride(), fake.dtype, fake.device) == (real.shape, real.stride(), real.dtype, real.device)


def test_opcheck_of_the_passes() -> None:
    x, _, b, s = leaves(ConvCase(64, 64, (5, 6), (1, 1), shortcut=True, batch=2), torch.bfloat16)
    torch.library.opcheck(PASS, (x, b, s, True))
    torch.library.opcheck(MASK, (x.detach(), s.detach(), True))


@pytest.mark.parametrize("backend", ["aot_eager", *(["inductor"] if DEVICE.type == "cuda" else [])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_compile_without_a_break(dtype: torch.dtype, backend: str) -> None:
    case = TILE_CASES[6]
    torch._dynamo.reset()

    def function(*tensors: Tensor) -> Tensor:
        return fused_resnet.conv_bias_add_relu(*tensors, **case.parameters) * 2

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    results = []
    for f in (function, compiled):
        operands = leaves(case, dtype)
        output = f(*operands)
        results.append((output, *torch.autograd.grad(output.float().square().mean(), operands)))
    torch._dynamo.reset()
    for mine, wanted in zip(*results, strict=True):
        # The same kernels on the same data; what the compiler fuses around them may round once less.
        assert testing.norm_error(mine, wanted.double()) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", LOW, ids=name)
@pytest.mark.parametrize("shortcut_dtype", ["same", "float32"])
def test_autocast(dtype: torch.dtype, shortcut_dtype: str) -> None:
    """The convolution in the autocast's dtype, the sum as eager promotes it; errors at most twice eager's own."""
    case = TILE_CASES[6]
    operands = laid_out(testing.float_operands(case, torch.float32, generator(1)), torch.channels_last)
    truth = reference.conv_bias_add_relu(*(t.double() for t in operands), **case.parameters)  # type: ignore[union-attr]
    x, w, b, s = there(operands)
    s = s.to(dtype) if shortcut_dtype == "same" else s
    with torch.autocast(DEVICE.type, dtype):
        mine = fused_resnet.conv_bias_add_relu(x, w, b, s, **case.parameters)
        theirs = torch.relu(torch.nn.functional.conv2d(x, w, b, padding=1) + s)
    assert mine.dtype == theirs.dtype
    error, peer = (testing.relative_error(t.cpu(), truth) for t in (mine, theirs))
    assert error <= 2 * peer + torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_spellings(spelling: str, train: bool) -> None:
    """Hand-written blocks in float32, without TF32."""
    model = randomise(nn.Sequential(SPELLINGS[spelling]()).train(train)).to(DEVICE)
    converted = copy.deepcopy(model)
    assert fused_resnet.fuse_(converted).fused
    x = torch.randn(2, 8, 8, 8, generator=generator(1)).to(DEVICE)
    with torch.no_grad():
        assert_same(converted, model, x)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("network", [_plain.resnet18, _plain.resnet50], ids=["resnet18", "resnet50"])
def test_networks(network: Callable[[], nn.Module], dtype: torch.dtype, train: bool) -> None:
    """Torchvision's networks after ``fuse_``: the 2-norm of output and gradients against float64, at most four times eager's own
    error (folding rounds three times more than eager's layers, once), twice for the scatter of one sample."""
    model = _plain.randomise(network(), generator()).train(train).to(DEVICE, dtype).to(memory_format=torch.channels_last)
    converted = copy.deepcopy(model)
    report = fused_resnet.fuse_(converted)
    assert len(report.fused) == {"resnet18": 8, "resnet50": 16}[network.__name__]
    x = torch.randn(4, 3, 64, 64, generator=generator(1)).to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)
    arriving = torch.randn(4, 1000, generator=generator(2)).to(DEVICE)

    def run(m: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        output = m(images)
        weight = m.get_parameter("fc.weight")
        (gradient,) = torch.autograd.grad(output, weight, arriving.to(output.dtype))
        return output.detach(), gradient

    truth = run(copy.deepcopy(model).double(), x.double())
    theirs, mine = run(copy.deepcopy(model), x), run(converted, x)
    for got, peer, wanted in zip(mine, theirs, truth, strict=True):
        assert got.isfinite().all()
        error, allowed = testing.norm_error(got, wanted), 8 * testing.norm_error(peer, wanted) + torch.finfo(dtype).eps
        assert error <= allowed, f"error {error:.2g}, allowed {allowed:.2g}"


@pytest.mark.parametrize("network", ["resnet18", "resnet50"])
def test_inputs_of_the_table_take_the_hot_path(network: str) -> None:
    """Every convolution of the residual blocks, in bfloat16 and channels_last; on a GPU on tensor cores."""
    convs = {conv for block in cases.BLOCKS if block.network == network for conv in block.convs()}
    assert len(convs) > 8
    for conv in convs:
        operands = laid_out(conv.at(2).make(dtype=torch.bfloat16), torch.channels_last)
        moved = there(operands)
        assert fused_resnet.why_not(*moved, **conv.parameters) == [], conv.name
        if DEVICE.type == "cuda":
            assert gpu_contest.planned(conv.at(2), moved, "auto").kernel.tensor_cores, conv.name
