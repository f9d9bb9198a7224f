"""Registration: PyTorch's own machinery meets the operators - opcheck, compile, export, autocast, flop counter, modes.

What is trusted: ``torch.library.opcheck``; graphs as the compiler hands them to a backend, in which our operator is counted (a
graph break, or a fall back to eager, would not show in the values); eager PyTorch for what autocast and the counter give.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _calls import CONV, DTYPES, FORMATS, INPUT_GRADIENT, MASK, PASS, WEIGHT_GRADIENT, laid_out, name
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule
from torch.utils.flop_counter import FlopCounterMode

import fused_resnet
from fused_resnet import reference, testing
from fused_resnet.cases import ConvCase, Operands

pytestmark = pytest.mark.usefixtures("one_thread", "kernels")
CASE = ConvCase(4, 6, (5, 6), (3, 3), padding=(1, 1), shortcut=True, batch=2)
GEOMETRY = ((1, 1), (1, 1, 1, 1), (1, 1), 1, True)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tensors(case: ConvCase = CASE, dtype: torch.dtype = torch.float32, needs: str = "", form: Any = FORMATS[0]) -> Operands:
    operands = laid_out(testing.float_operands(case, dtype, torch.Generator().manual_seed(0)), form)
    return Operands(
        *(None if t is None else t.requires_grad_(f in needs.split("+")) for f, t in operands._asdict().items())
    )  # type: ignore[arg-type]


ALL = "input+weight+bias+shortcut"
CONV_ARGUMENTS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "plain": lambda: (*tensors(), *GEOMETRY),
    "gradients": lambda: (*tensors(needs=ALL), *GEOMETRY),
    "channels_last, gradients": lambda: (*tensors(needs=ALL, form=torch.channels_last), *GEOMETRY),
    "bfloat16": lambda: (*tensors(dtype=torch.bfloat16, needs="input+weight"), *GEOMETRY),
    "float64, weight only": lambda: (*tensors(dtype=torch.float64, needs="weight"), *GEOMETRY),
    "no bias, no shortcut": lambda: (*tensors(needs="input+weight")[:2], None, None, *GEOMETRY),
    "no relu": lambda: (*tensors(needs=ALL), *GEOMETRY[:-1], False),
    "uneven padding": lambda: (*tensors(needs=ALL)[:3], None, (1, 1), (1, 2, 0, 1), (1, 1), 1, True),
    "stride and dilation": lambda: (*tensors(needs=ALL)[:3], None, (2, 1), (2, 2, 2, 2), (2, 1), 1, True),
    "groups": lambda: (*tensors(ConvCase(4, 6, (5, 6), (3, 3), padding=(1, 1), groups=2, shortcut=True), needs=ALL),
                       *GEOMETRY[:3], 2, True),
    "sliced": lambda: (
        *testing.layout(tensors(), input="sliced", shortcut="expanded", weight="transposed"), *GEOMETRY
    ),
}


@pytest.mark.parametrize("arguments", CONV_ARGUMENTS)
def test_opcheck_conv_bias_add_relu(arguments: str) -> None:
    torch.library.opcheck(CONV, CONV_ARGUMENTS[arguments]())


@pytest.mark.parametrize("needs", ["", "input", "bias+shortcut", "input+bias+shortcut"])
@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
def test_opcheck_the_other_operators(needs: str, memory_format: torch.memory_format) -> None:
    x, _, b, s = tensors(ConvCase(6, 6, (5, 6), (1, 1), shortcut=True, batch=2), needs=needs, form=memory_format)
    for relu in (True, False):
        torch.library.opcheck(PASS, (x, b, s, relu))
        torch.library.opcheck(PASS, (x, None, None, relu))
    grad = torch.randn(x.shape).requires_grad_("input" in needs)
    for bias_grad in (True, False):
        torch.library.opcheck(MASK, (grad, s.detach(), bias_grad))


@pytest.mark.parametrize("operand", ["input", "weight"])
@pytest.mark.parametrize("needs", ["", "grad", "other", "grad+other"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck_gradients(operand: str, needs: str, channels_last: bool) -> None:
    call = INPUT_GRADIENT if operand == "input" else WEIGHT_GRADIENT
    for stride, groups in ((1, 1), (2, 1), (3, 1), (1, 2)):
        case = ConvCase(8, 6, (7, 6), (3, 3), (stride, stride), (1, 1), groups=groups, batch=2)
        size, made = (case.input_shape, case.weight_shape) if operand == "input" else (case.weight_shape, case.input_shape)
        grad, other = torch.randn(case.output_shape), torch.randn(made)
        grad.requires_grad_("grad" in needs), other.requires_grad_("other" in needs)
        torch.library.opcheck(call, (grad, other, size, channels_last, case.stride, (1, 1, 1, 1), (1, 1), groups))
    # Shapes whose strides say nothing about the memory format.
    size, made = ((2, 1, 5, 5), (1, 1, 3, 3)) if operand == "input" else ((1, 1, 3, 3), (2, 1, 5, 5))
    torch.library.opcheck(call, (torch.randn(2, 1, 5, 5), torch.randn(made), size, channels_last, (1, 1), (1, 1, 1, 1), (1, 1), 1))


class Counting:
    """A backend that runs the graphs as they are and keeps them: forward and backward, after autograd was traced."""

    def __init__(self) -> None:
        self.graphs: list[GraphModule] = []
        self.backend = aot_autograd(fw_compiler=self._keep, bw_compiler=self._keep)

    def _keep(self, graph: GraphModule, inputs: Any) -> Any:
        self.graphs.append(graph)
        from functorch.compile import make_boxed_func

        return make_boxed_func(graph.forward)

    def count(self, operator: Any) -> int:
        return sum(node.target is operator for graph in self.graphs for node in graph.graph.nodes)


def model(x: Tensor, w: Tensor, b: Tensor | None, s: Tensor | None) -> Tensor:
    y = fused_resnet.conv_bias_add_relu(x, w, b, s, padding=1)
    return fused_resnet.bias_add_relu(y * 2, b, y)


@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_compile(dynamic: bool, memory_format: torch.memory_format) -> None:
    """Forward and backward, one graph, our operators in it; batches and sizes that change."""
    counting = Counting()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=counting.backend)
    # No two sizes of the first call are equal: the compiler would take them for one symbol.
    sizes = ((2, (8, 9)), (3, (7, 5)), (5, (11, 11))) if dynamic else ((2, (5, 6)),)
    for batch, size in sizes:
        case = ConvCase(4, 6, size, (3, 3), padding=(1, 1), shortcut=True, batch=batch)
        leaves = tensors(case, needs=ALL, form=memory_format)
        ours, expected = compiled(*leaves), model(*leaves)
        assert torch.equal(ours, expected)
        assert ours.stride() == expected.stride()
        grad = torch.randn(expected.shape)
        for a, b in zip(torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
            torch.testing.assert_close(a, b)
            assert a.stride() == b.stride()
    assert counting.count(CONV) == 1
    assert counting.count(PASS) == 1
    assert counting.count(MASK) == 2
    assert counting.count(torch.ops.aten.convolution.default) == 0
    assert len(counting.graphs) == 2, "one forward and one backward graph; another size did not make another"


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_compile_without_gradients(dynamic: bool) -> None:
    for arguments, mode in ((tensors(), torch.no_grad), (tensors(needs=ALL), torch.no_grad), (tensors(), torch.inference_mode)):
        torch._dynamo.reset()
        counting = Counting()
        compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=counting.backend)
        with mode():
            assert torch.equal(compiled(*arguments), model(*arguments))
        assert counting.count(CONV) == 1
        assert counting.count(PASS) == 1


def test_compile_same_padding_groups_and_autocast() -> None:
    counting = Counting()

    def function(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return fused_resnet.conv_bias_add_relu(x, w, None, s, padding="same", groups=2)

    x, w, s = torch.randn(2, 4, 5, 6), torch.randn(6, 2, 2, 4), torch.randn(2, 6, 5, 6)
    ours = torch.compile(function, fullgraph=True, backend=counting.backend)(x, w, s)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, function(x, w, s))
    assert counting.count(CONV) == 1


class Asks(nn.Module):
    """A forward that asks which way its convolution takes."""

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        fused_resnet.why_not(x, w, padding=1)
        return fused_resnet.conv_bias_add_relu(x, w, padding=1)


def test_why_not_while_compiling() -> None:
    """A question about sizes that the compiler has not fixed is no guard on them."""
    for shape in ((6, 4, 3, 3), (3, 2, 3, 3), (17, 5, 1, 1)):
        x, w = torch.randn(2, shape[1], 7, 9), torch.randn(shape)
        torch._dynamo.reset()
        compiled = torch.compile(Asks(), fullgraph=True, dynamic=True, backend="aot_eager")
        assert torch.equal(compiled(x, w), Asks()(x, w))
        for strict in (False, True):
            program = torch.export.export(Asks(), (x, w), dynamic_shapes=({0: torch.export.Dim("batch")}, None), strict=strict)
            more = torch.randn(5, *x.shape[1:])
            assert torch.equal(program.module()(more, w), Asks()(more, w))


def test_compile_sees_wrong_shapes() -> None:
    """The fake kernel checks as the real one does: the error is raised while compiling, and names the argument."""
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, w, b, s = tensors()
    with pytest.raises(Exception, match=r"shortcut must have the output's shape \[2, 6, 5, 6\], got \[2, 6, 1, 1\]"):
        compiled(x, w, b, s[:, :, :1, :1])
    torch._dynamo.reset()
    assert torch.equal(compiled(x, w, b, s), model(x, w, b, s))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor() -> None:
    leaves = tensors(needs=ALL, form=torch.channels_last)
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    ours, expected = compiled(*leaves), model(*leaves)
    torch.testing.assert_close(ours, expected)
    assert ours.stride() == expected.stride()
    grad = torch.ones_like(expected)
    for a, b in zip(torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, b)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return fused_resnet.conv_bias_add_relu(x, self.conv.weight, self.conv.bias, x, padding="same")


@pytest.mark.smoke
def test_export(tmp_path: Any) -> None:
    block = Block().eval()
    x = torch.randn(2, 4, 8, 8)
    program = torch.export.export(block, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1, max=64)}})
    assert sum(node.target is CONV for node in program.graph.nodes) == 1
    assert not any(node.target is torch.ops.aten.conv2d.default for node in program.graph.nodes)
    torch.export.save(program, tmp_path / "block.pt2")
    for exported in (program, torch.export.load(tmp_path / "block.pt2"), program.run_decompositions()):
        for batch in (1, 2, 5):
            y = torch.randn(batch, 4, 8, 8)
            with torch.no_grad():
                assert torch.equal(exported.module()(y), block(y))


AUTOCAST = {
    "all float32": (torch.float32,) * 4,
    "shortcut bfloat16": (torch.float32, torch.float32, torch.float32, torch.bfloat16),
    "input bfloat16": (torch.bfloat16, torch.float32, torch.float32, torch.float32),
    "input and shortcut bfloat16": (torch.bfloat16, torch.float32, torch.float32, torch.bfloat16),
    "all bfloat16": (torch.bfloat16,) * 4,
    "all float64": (torch.float64,) * 4,
    "shortcut float64": (torch.float32, torch.float32, torch.float32, torch.float64),
    "no shortcut": (torch.float32, torch.float32, torch.float32, None),
    "no bias": (torch.float32, torch.float32, None, torch.float32),
}


def _eager(x: Tensor, w: Tensor, b: Tensor | None, s: Tensor | None) -> Tensor:
    y = F.conv2d(x, w, b, padding=1)
    return F.relu(y if s is None else y + s)


@pytest.mark.smoke
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtypes", AUTOCAST)
def test_autocast(isa: str, dtypes: str, gradients: bool) -> None:
    """dtype as eager's; values within the envelope around the convolution of the operands as autocast rounds them."""
    drawn = tensors(CASE, torch.float64)
    operands = Operands(
        *(None if d is None or t is None else t.to(d) for t, d in zip(drawn, AUTOCAST[dtypes], strict=True))  # type: ignore[arg-type]
    )
    leaves = [t for t in operands if t is not None]
    for t in leaves:
        t.requires_grad_(gradients)
    with torch.autocast("cpu", torch.bfloat16):
        ours, eager = fused_resnet.conv_bias_add_relu(*operands, padding=1), _eager(*operands)
        again = fused_resnet.conv_bias_add_relu(*operands, padding=1)
    assert ours.dtype == eager.dtype
    assert ours.stride() == eager.stride()
    assert torch.equal(ours, again)
    cast = Operands(
        *(t if t is None or t.dtype == torch.float64 or f == "shortcut" else t.bfloat16() for f, t in operands._asdict().items())
    )
    wide = Operands(*(None if t is None else t.detach().double() for t in cast))  # type: ignore[arg-type]
    truth = reference.conv_bias_add_relu(*wide, padding=1)
    scale = testing.error_scale(wide, torch.float32, padding=1)
    result = testing.compare_tensors(ours.detach(), truth, eager.detach(), scale)
    assert result, result.reason
    if gradients:
        # Twice the largest difference from float64 that eager autocast itself has, plus the output's rounding; in float64, where eager is the
        # truth, that of a sum of N P Q = 60 terms (the weight's; the input's has 54), which grows as its root.
        wide_leaves = [t.requires_grad_() for t in wide if t is not None]
        true_grads = torch.autograd.grad(reference.conv_bias_add_relu(*wide, padding=1).sum(), wide_leaves)
        # relu's mask is at the rounded output: only where truth and both results agree on it are gradients comparable.
        assert torch.equal(ours > 0, truth > 0)
        assert torch.equal(eager > 0, truth > 0)
        for leaf, a, e, t in zip(
            leaves, torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(eager.sum(), leaves), true_grads, strict=True
        ):
            assert a.dtype == e.dtype == leaf.dtype
            low = 60**0.5 * torch.finfo(torch.float64).eps / 2 if dtypes == "all float64" else torch.finfo(torch.bfloat16).eps / 2
            result = testing.compare_tensors(a, t, e, low * t.abs().max().item())
            assert result, result.reason


def test_autocast_of_bias_add_relu() -> None:
    """Addition promotes in eager mode, under autocast as elsewhere: a bfloat16 map and a float32 shortcut give float32."""
    x, s, b = torch.randn(2, 6, 5, 6).bfloat16(), torch.randn(2, 6, 5, 6), torch.randn(6)
    with torch.autocast("cpu", torch.bfloat16):
        ours, eager = fused_resnet.bias_add_relu(x, b, s), F.relu(x + b[:, None, None] + s)
    assert ours.dtype == eager.dtype
    torch.testing.assert_close(ours, eager)


def test_autocast_disabled_inside() -> None:
    x, w, b, s = tensors()
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        ours = fused_resnet.conv_bias_add_relu(x, w, b, s, padding=1)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, fused_resnet.conv_bias_add_relu(x, w, b, s, padding=1))


@pytest.mark.smoke
def test_flop_counter() -> None:
    """The operations of eager ``conv2d``, forward and backward, for every geometry."""
    for case in (
        CASE,
        ConvCase(4, 8, (9, 7), (3, 5), (2, 1), (1, 2), bias=False),
        ConvCase(8, 8, (6, 6), (3, 3), padding=(2, 2), dilation=(2, 2), groups=4, batch=3),
        ConvCase(5, 7, (4, 4), (1, 1), shortcut=True, relu=False),
    ):
        counts = []
        for function in (fused_resnet.conv_bias_add_relu, reference.conv_bias_add_relu):
            leaves = tensors(case, needs=ALL)
            with FlopCounterMode(display=False) as counter:
                y = function(*leaves, **case.parameters)
                forward = counter.get_total_flops()
                y.sum().backward()
            counts.append((forward, counter.get_total_flops()))
        assert counts[0] == counts[1]
        assert counts[0][0] == case.flops()


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_modes(isa: str, dtype: torch.dtype) -> None:
    """inference_mode, no_grad and neither give the same; an inference output may be used again under inference_mode."""
    operands = tensors(dtype=dtype)
    expected = fused_resnet.conv_bias_add_relu(*operands, padding=1)
    with torch.inference_mode():
        y = fused_resnet.conv_bias_add_relu(*operands, padding=1)
        assert y.is_inference()
        z = fused_resnet.bias_add_relu(y, operands.bias, y)
        again = fused_resnet.conv_bias_add_relu(y, torch.ones(2, 6, 1, 1, dtype=dtype))
        assert again.shape == (2, 2, 5, 6)
    assert torch.equal(y, expected)
    assert torch.equal(z, reference.bias_add_relu(expected, operands.bias, expected))
    with torch.no_grad():
        y = fused_resnet.conv_bias_add_relu(*tensors(dtype=dtype, needs=ALL), padding=1)
    assert torch.equal(y, expected)
    assert not y.requires_grad
    leaves = tensors(dtype=dtype, needs=ALL)
    y = fused_resnet.conv_bias_add_relu(*leaves, padding=1)
    assert torch.equal(y, expected)
    assert y.grad_fn is not None


def test_meta_tensors() -> None:
    """Shapes without memory, as for a model on the meta device."""
    operands = tensors(form=torch.channels_last)
    real = fused_resnet.conv_bias_add_relu(*operands, padding=1)
    fake = fused_resnet.conv_bias_add_relu(*(t.to("meta") for t in operands if t is not None), padding=1)
    assert fake.is_meta
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_subclasses_and_function_modes() -> None:
    """A tensor subclass and a TorchFunctionMode see the call; the fast way must not pass them by."""

    class Logged(Tensor):
        seen: list[str] = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Logged.seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs or {})

    x, w, b, s = tensors()
    expected = fused_resnet.conv_bias_add_relu(x, w, b, s, padding=1)
    y = fused_resnet.conv_bias_add_relu(x.as_subclass(Logged), w, b, s, padding=1)
    assert type(y) is Logged
    assert any("conv_bias_add_relu" in one for one in Logged.seen)
    assert torch.equal(y.as_subclass(Tensor), expected)

    class Mode(torch.overrides.TorchFunctionMode):
        seen: list[str] = []  # noqa: RUF012

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Mode():
        assert torch.equal(fused_resnet.conv_bias_add_relu(x, w, b, s, padding=1), expected)
    assert any("conv_bias_add_relu" in one for one in Mode.seen)


def test_profiler_sees_the_operator() -> None:
    operands = tensors()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        fused_resnet.conv_bias_add_relu(*operands, padding=1)
    assert any(event.key == "fused_resnet::conv_bias_add_relu" for event in recorded.key_averages())


def test_functional_transforms_are_right_or_an_error() -> None:
    """torch.func.grad, vmap and jvp: the reference's value, or an exception; never something else."""
    x, w, b, s = tensors(dtype=torch.float64)

    def loss(module: ModuleType) -> Callable[[Tensor], Tensor]:
        return lambda weight: module.conv_bias_add_relu(x, weight, b, s, padding=1).square().sum()

    def grad(module: ModuleType) -> Tensor:
        result: Tensor = torch.func.grad(loss(module))(w)
        return result

    def jvp(module: ModuleType) -> Tensor:
        result: Tensor = torch.func.jvp(loss(module), (w,), (torch.ones_like(w),))[1]
        return result

    def vmap(module: ModuleType) -> Tensor:
        result: Tensor = torch.vmap(lambda one: module.conv_bias_add_relu(one, w, b, s, padding=1))(torch.stack([x, 2 * x]))
        return result

    wrong = []
    for transform in (grad, jvp, vmap):
        expected = transform(reference)
        try:
            ours = transform(fused_resnet)
        except (NotImplementedError, RuntimeError):
            continue
        if not torch.allclose(ours, expected):
            wrong.append(transform.__name__)
    assert not wrong, f"silently wrong: {wrong}"
