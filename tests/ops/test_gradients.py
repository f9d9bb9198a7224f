"""Gradients: gradcheck and gradgradcheck in float64, exact integer gradients in every dtype, and no work that nobody asked for.

What is trusted: finite differences of our own forward in float64 (which the exact tests hold to the reference), with
pre-activations kept away from the kink by ``testing.gradient_cases``; at the kink itself, the reference's autograd on integers.
``python -m fused_resnet check`` runs gradgradcheck element by element over all cases; here that is done for the quick ones, and
along random directions (fast_mode) for all.
"""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import pytest
import torch
from _calls import CONV, DTYPES, FORMATS, INPUT_GRADIENT, MASK, WEIGHT_GRADIENT, Calls, laid_out, name, nodes, run_python
from torch import Tensor

import fused_resnet
from fused_resnet import reference, testing
from fused_resnet.cases import AWKWARD, ConvCase, Operands

CASES = testing.gradient_cases()
CASE = ConvCase(3, 5, (6, 7), (3, 3), padding=(1, 1), shortcut=True, batch=2)


pytestmark = pytest.mark.usefixtures("one_thread", "integers_stay_exact")


@pytest.mark.parametrize("case", CASES, ids=name)
def test_gradcheck(case: testing.GradientCase, kernels: object) -> None:
    function, leaves = case.build()
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.smoke
@pytest.mark.parametrize("case", testing.gradient_cases(quick=True), ids=name)
def test_gradcheck_isa(case: testing.GradientCase, isa: str) -> None:
    function, leaves = case.build(seed=1)
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_gradgradcheck(case: testing.GradientCase, kernels: object) -> None:
    function, leaves = case.build()
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("case", testing.gradient_cases(quick=True), ids=name)
def test_gradgradcheck_every_element(case: testing.GradientCase, kernels: object) -> None:
    function, leaves = case.build()
    assert torch.autograd.gradgradcheck(function, leaves)


def test_gradients_that_are_differentiated_further(kernels: object) -> None:
    """With create_graph they come by another way: the same values, on integers to the bit."""
    generator = torch.Generator().manual_seed(6)
    for case in AWKWARD[::3]:
        operands = testing.integer_operands(case, torch.float64, generator)
        grad = testing.unit_gradient(case.output_shape, torch.float64, generator)
        leaves = [t.requires_grad_() for t in operands if t is not None]
        y = fused_resnet.conv_bias_add_relu(*operands, **case.parameters)
        once = torch.autograd.grad(y, leaves, grad, retain_graph=True)
        further = torch.autograd.grad(y, leaves, grad, create_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(once, further, strict=True)), case.name


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "no relu"])
def test_batches_of_gradients(kernels: object, relu: bool) -> None:
    """Autograd's own batching (is_grads_batched, vectorize), whose tensors hide their batch: as one after the other."""
    operands = testing.float_operands(CASE, torch.float64, torch.Generator().manual_seed(0))
    leaves = [t.requires_grad_() for t in operands if t is not None]
    y = fused_resnet.conv_bias_add_relu(*operands, padding=1, relu=relu)
    grads = torch.randn(3, *y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    batched = torch.autograd.grad(y, leaves, grads, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(grads):
        for b, single in zip(batched, torch.autograd.grad(y, leaves, grad, retain_graph=True), strict=True):
            torch.testing.assert_close(b[i], single)

    def total(x: Tensor) -> Tensor:
        return fused_resnet.conv_bias_add_relu(x, operands.weight, None, None, padding=1, relu=relu).square().sum()

    x = operands.input[:1, :, :3, :3].detach()
    once = torch.autograd.functional.hessian(total, x)
    torch.testing.assert_close(torch.autograd.functional.hessian(total, x, vectorize=True), once)


def test_gradcheck_sees_a_wrong_gradient(kernels: object) -> None:
    """The cases themselves: a gradient that is 1 % too large does not pass any of them."""

    class TooLarge(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return grad * 1.01

    for case in testing.gradient_cases(quick=True):
        function, leaves = case.build()
        if not function(*leaves).any():  # every output behind its ReLU
            continue
        with pytest.raises(RuntimeError, match="Jacobian mismatch"):
            torch.autograd.gradcheck(lambda *t, f=function: TooLarge.apply(f(*t)), leaves)


def test_the_cases_have_outputs_on_both_sides_of_the_relu() -> None:
    dead = [case.name for case in CASES if not case.build()[0](*case.build()[1]).any()]
    assert not dead, f"all outputs are 0, so nothing is checked: {dead}"


@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_exact_integer_gradients(isa: str, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """All four gradients equal the reference's, zeros of the output included."""
    generator = torch.Generator().manual_seed(2)
    failures, zeros = [], 0
    for case in AWKWARD:
        operands = laid_out(testing.integer_operands(case, dtype, generator), memory_format)
        grad = testing.unit_gradient(case.output_shape, dtype, generator).contiguous(memory_format=memory_format)
        zeros += int((fused_resnet.conv_bias_add_relu(*operands, **case.parameters) == 0).sum())
        results = testing.compare_gradients(fused_resnet.conv_bias_add_relu, operands, grad, **case.parameters)
        failures += [f"{case.name}, {of}: {result.reason}" for of, result in results.items() if not result]
    assert not failures, "\n".join(failures)
    assert zeros > 0


@pytest.mark.smoke
@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_exact_gradients_of_bias_add_relu(isa: str, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(3)
    m = testing.MAGNITUDE[dtype]
    for shape in ((2, 1, 3, 3), (3, 8, 5, 7), (1, 17, 1, 1), (2, 33, 9, 8), (4, 5, 17, 31)):
        x, s = (torch.randint(-m, m + 1, shape, generator=generator).to(dtype) for _ in range(2))
        b = torch.randint(-m, m + 1, shape[1:2], generator=generator).to(dtype)
        x = x.contiguous(memory_format=memory_format)
        grad = testing.unit_gradient(shape, dtype, generator)
        for relu in (True, False):

            def run(function: Any, operands: tuple[Tensor, ...] = (x, b, s), relu: bool = relu) -> tuple[Tensor, ...]:
                leaves = [t.detach().clone().requires_grad_() for t in operands]
                return torch.autograd.grad(function(*leaves, relu), leaves, grad)  # noqa: B023

            both = run(fused_resnet.bias_add_relu), run(fused_resnet.reference.bias_add_relu)
            for which, ours, expected in zip(("input", "bias", "shortcut"), *both, strict=True):
                result = testing.compare_exact(ours, expected)
                assert result, f"{which} {shape} relu={relu}: {result.reason}"


@pytest.mark.parametrize("incoming", ["transposed", "expanded", "stepped", "sliced channels_last", "offset"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_layout_of_the_incoming_gradient(isa: str, dtype: torch.dtype, incoming: str) -> None:
    generator = torch.Generator().manual_seed(4)
    for case in (CASE, ConvCase(3, 5, (6, 7), (1, 1), shortcut=True), CASE.at(1)):
        for memory_format in FORMATS:
            operands = laid_out(testing.integer_operands(case, dtype, generator), memory_format)
            grad = testing.unit_gradient(case.output_shape, dtype, generator)
            if incoming == "expanded":
                grad = (grad != 0).to(dtype)
            grad = testing.LAYOUTS[incoming](grad)
            for relu in (True, False):
                results = testing.compare_gradients(
                    fused_resnet.conv_bias_add_relu, operands, grad, **{**case.parameters, "relu": relu}
                )
                for of, result in results.items():
                    assert result, f"{case.name}, {of}, relu={relu}: {result.reason}"


def _leaves(needs: tuple[str, ...]) -> Operands:
    operands = testing.float_operands(CASE, torch.float32, torch.Generator().manual_seed(0))
    return Operands(*(t.requires_grad_(field in needs) for field, t in operands._asdict().items()))  # type: ignore[arg-type]


SUBSETS = [n for count in range(1, 5) for n in combinations(("input", "weight", "bias", "shortcut"), count)]


@pytest.mark.parametrize("needs", SUBSETS, ids="+".join)
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "no relu"])
def test_no_work_for_gradients_that_nobody_asked_for(needs: tuple[str, ...], relu: bool, kernels: object) -> None:
    operands = _leaves(needs)
    output = fused_resnet.conv_bias_add_relu(*operands, padding=1, relu=relu)
    incoming = torch.ones_like(output)
    leaves = [getattr(operands, field) for field in needs]
    with Calls() as calls:
        grads = torch.autograd.grad(output, leaves, incoming)
    assert [g.shape for g in grads] == [t.shape for t in leaves]
    masks = calls.of(MASK)
    assert len(masks) == (1 if relu else 0)
    if relu:
        assert masks[0][0][2] is ("bias" in needs)
    assert len(calls.of(INPUT_GRADIENT)) == ("input" in needs)
    assert len(calls.of(WEIGHT_GRADIENT)) == ("weight" in needs)
    # Nothing else: no copies, no temporaries; a sum for the bias where there is no mask to make it on the way.
    sums = calls.of(torch.ops.aten.sum.dim_IntList)
    assert len(sums) == (1 if "bias" in needs and not relu else 0)
    usual = {MASK, INPUT_GRADIENT, WEIGHT_GRADIENT, torch.ops.aten.sum.dim_IntList, torch.ops.aten.detach.default}
    assert {f for f, _, _ in calls.calls} <= usual


def test_shortcut_gradient_is_the_masked_gradient(kernels: object) -> None:
    """The same memory: no copy. And the gradients of input and weight are made from that tensor too."""
    operands = _leaves(("input", "weight", "bias", "shortcut"))
    output = fused_resnet.conv_bias_add_relu(*operands, padding=1)
    with Calls() as calls:
        (grad,) = torch.autograd.grad(output, [operands.shortcut], torch.ones_like(output), retain_graph=True)
        (masked, _) = calls.of(MASK)[0][1]
        assert grad.data_ptr() == masked.data_ptr()
        grads = torch.autograd.grad(output, list(operands), torch.ones_like(output))
    masked = calls.of(MASK)[1][1][0]
    of = [calls.of(gradient)[1][0][0].data_ptr() for gradient in (INPUT_GRADIENT, WEIGHT_GRADIENT)]
    assert [grads[3].data_ptr(), *of] == [masked.data_ptr()] * 3
    # Without a ReLU it is the incoming gradient.
    output = fused_resnet.conv_bias_add_relu(*operands, padding=1, relu=False)
    incoming = torch.ones_like(output)
    assert torch.autograd.grad(output, [operands.shortcut], incoming)[0].data_ptr() == incoming.data_ptr()
    # bias_add_relu: input and shortcut have the same gradient, and it is one tensor.
    x, s = (torch.randn(2, 5, 6, 7, requires_grad=True) for _ in range(2))
    y = fused_resnet.bias_add_relu(x, None, s)
    gx, gs = torch.autograd.grad(y, [x, s], torch.ones_like(y))
    assert gx.data_ptr() == gs.data_ptr()


@pytest.mark.parametrize("formats", list(product(FORMATS, repeat=3)), ids=lambda f: ",".join(map(name, f)))
def test_memory_formats(formats: tuple[torch.memory_format, ...], kernels: object) -> None:
    """The input's gradient lies as eager's does, the weight's as the weight, for whom it is accumulated; whatever the incoming one's."""
    of_input, of_weight, of_grad = formats
    for case in (CASE, CASE.at(1), ConvCase(8, 8, (6, 7), (1, 1)), ConvCase(1, 5, (6, 7), (3, 3)), ConvCase(8, 6, (5, 5), (3, 3), (2, 2))):
        x, w, _, _ = testing.float_operands(case, torch.float32, torch.Generator().manual_seed(0))
        leaves = [x.contiguous(memory_format=of_input).requires_grad_(), w.contiguous(memory_format=of_weight).requires_grad_()]
        grad = torch.randn(case.output_shape).contiguous(memory_format=of_grad)
        found = []
        for function in (fused_resnet.conv_bias_add_relu, reference.conv_bias_add_relu):
            y = function(*leaves, **{**case.parameters, "relu": False})
            found.append([g.stride() for g in torch.autograd.grad(y, leaves, grad)])
        assert found[0] == [found[1][0], leaves[1].stride()], case.name


def test_accumulated_gradients_do_not_share_memory(kernels: object) -> None:
    """What lands in ``.grad`` is each leaf's own: an optimizer may write over it."""
    for relu in (True, False):
        x, s = (torch.randn(2, 5, 6, 7, requires_grad=True) for _ in range(2))
        y = fused_resnet.bias_add_relu(x, None, s, relu)
        incoming = torch.ones_like(y)
        y.backward(incoming)
        assert x.grad is not None
        assert s.grad is not None
        pointers = {x.grad.data_ptr(), s.grad.data_ptr(), incoming.data_ptr()}
        assert len(pointers) == 3


def test_no_node_where_nothing_requires_grad(kernels: object) -> None:
    operands = _leaves(())
    output = fused_resnet.conv_bias_add_relu(*operands, padding=1)
    through_torch = CONV(*operands, (1, 1), (1, 1, 1, 1), (1, 1), 1, True)
    passed = fused_resnet.bias_add_relu(output, operands.bias, operands.shortcut)
    for y in (output, through_torch, passed):
        assert y.grad_fn is None
        assert not y.requires_grad
    required = _leaves(("weight",))
    with torch.no_grad():
        assert fused_resnet.conv_bias_add_relu(*required, padding=1).grad_fn is None
    for field in Operands._fields:
        y = fused_resnet.conv_bias_add_relu(*_leaves((field,)), padding=1)
        assert nodes(y) == ["ConvBiasAddReLUBackward", "torch::autograd::AccumulateGrad"]


@pytest.mark.parametrize("needs", SUBSETS, ids="+".join)
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "no relu"])
def test_what_backward_keeps(needs: tuple[str, ...], relu: bool, kernels: object) -> None:
    """Saved for backward: the input for the weight's gradient, the weight for the input's and, for the mask, the output; nothing else."""
    operands = _leaves(needs)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.data_ptr()), t)[1], lambda t: t):
        y = fused_resnet.conv_bias_add_relu(*operands, padding=1, relu=relu)
    expected = [operands.input.data_ptr()] if "weight" in needs else []
    expected += [operands.weight.data_ptr()] if "input" in needs else []
    assert saved == expected + ([y.data_ptr()] if relu else [])


def test_a_saved_tensor_that_was_changed_is_an_error(kernels: object) -> None:
    operands = _leaves(("input", "weight", "bias", "shortcut"))
    for changed in ("weight", "output"):
        y = fused_resnet.conv_bias_add_relu(*operands, padding=1)
        with torch.no_grad():
            (operands.weight if changed == "weight" else y.detach()).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_forward_mode_is_right_or_an_error(kernels: object) -> None:
    """A tangent must never be lost in silence."""
    import torch.autograd.forward_ad as forward

    generator = torch.Generator().manual_seed(0)
    x, s = (torch.randn(2, 5, 6, 7, dtype=torch.float64, generator=generator) for _ in range(2))
    w = torch.randn(5, 5, 3, 3, dtype=torch.float64, generator=generator)
    cases = {
        "conv": (lambda m, t: m.conv_bias_add_relu(t, w, None, s, padding=1)),
        "pass": (lambda m, t: m.bias_add_relu(t, None, s)),
    }
    lost = []
    for what, call in cases.items():
        with forward.dual_level():
            dual = forward.make_dual(x, torch.ones_like(x))
            expected = forward.unpack_dual(call(fused_resnet.reference, dual)).tangent
            try:
                ours = forward.unpack_dual(call(fused_resnet, dual)).tangent
            except (NotImplementedError, RuntimeError):
                continue
            if ours is None or not torch.allclose(ours, expected):
                lost.append(what)
    assert not lost, f"forward-mode AD loses the tangent in silence: {lost}"


def test_only_the_shortcut_wants_a_gradient(kernels: object) -> None:
    """The convolution is then a constant: its operands may be changed in place between forward and backward, and are not kept alive."""
    for relu in (False, True):
        case = ConvCase(3, 5, (6, 7), (3, 3), padding=(1, 1), shortcut=True, relu=relu, batch=2)
        operands = testing.integer_operands(case, torch.float32, torch.Generator().manual_seed(0))
        ours, theirs = (operands.shortcut.clone().requires_grad_() for _ in range(2))  # type: ignore[union-attr]
        expected = reference.conv_bias_add_relu(*operands[:3], theirs, **case.parameters)
        y = fused_resnet.conv_bias_add_relu(*operands[:3], ours, **case.parameters)
        assert torch.equal(y, expected)
        for t in operands[:3]:
            assert t is not None
            t.add_(1)
        grad = torch.randn(y.shape)
        y.backward(grad)
        expected.backward(grad)
        assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("wanted", ["input", "weight"])
def test_what_a_gradient_needs_must_not_change(kernels: object, wanted: str) -> None:
    """Changes in place of what the backward pass reads raise, as PyTorch's do."""
    operands = testing.integer_operands(CASE, torch.float32, torch.Generator().manual_seed(0))
    getattr(operands, wanted).requires_grad_()
    y = fused_resnet.conv_bias_add_relu(*operands, **CASE.parameters)
    with torch.no_grad():
        getattr(operands, "weight" if wanted == "input" else "input").add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# glibc's own checks of the heap, where it has them: what is written beyond a buffer ends the process.
CHECKED_HEAP = {"LD_PRELOAD": "libc_malloc_debug.so.0", "MALLOC_CHECK_": "3"}
FEW_CHANNELS = """
import torch, fused_resnet
torch.set_num_threads(THREADS)
for _ in range(5):
    for channels in (1, 3, 4, 8, 12, 15):
        for padding, size in ((0, 16), (0, 15), (1, 14)):
            x = torch.randint(-3, 4, (3, channels, size, size)).float().contiguous(memory_format=torch.channels_last)
            w = torch.randint(-3, 4, (8, channels, 1, 1)).float().requires_grad_()
            y = fused_resnet.conv_bias_add_relu(x, w, stride=2, padding=padding, relu=False)
            grad = torch.randint(-3, 4, y.shape).float()
            y.backward(grad)
            met = torch.nn.functional.pad(x, [padding] * 4)[:, :, ::2, ::2].double()
            expected = torch.einsum("nkpq,ncpq->kc", grad.double(), met)
            assert torch.equal(w.grad[:, :, 0, 0].double(), expected), (channels, padding, size)
print("right")
"""


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_projection_of_few_channels(kernels: object, threads: int) -> None:
    """Where the library's own gradient writes beyond its buffer."""
    done = run_python(FEW_CHANNELS.replace("THREADS", str(threads)), **CHECKED_HEAP)
    assert done.stdout.strip() == "right", done.stderr[-2000:]
