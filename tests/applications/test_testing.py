"""The tests themselves: known faults are planted in the operator, and every comparison that should see one goes red.

The faulty operators are the reference with one thing wrong. Each fault is shown to exactly the helpers that the other tests,
``fused-resnet check`` and the demo rely on; the reference itself passes them all.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet import _compat, cli, ops, reference, testing
from fused_resnet.cases import AWKWARD, BLOCKS, CONVS, ConvCase, Operands
from fused_resnet.cli import check
from fused_resnet.testing.data import EXACT, MAGNITUDE, terms

CASE = ConvCase(5, 6, (7, 8), (3, 3), padding=(1, 1), shortcut=True, batch=2)
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
Operator = Callable[..., Tensor]
pytestmark = pytest.mark.usefixtures("one_thread")


def dropped_bias(input: Tensor, weight: Tensor, bias: Any = None, shortcut: Any = None, **parameters: Any) -> Tensor:
    return reference.conv_bias_add_relu(input, weight, None, shortcut, **parameters)


def dropped_shortcut(input: Tensor, weight: Tensor, bias: Any = None, shortcut: Any = None, **parameters: Any) -> Tensor:
    return reference.conv_bias_add_relu(input, weight, bias, None, **parameters)


def shifted_padding(input: Tensor, weight: Tensor, bias: Any = None, shortcut: Any = None, **parameters: Any) -> Tensor:
    """One pixel more at the top, one less at the bottom."""
    top, left = parameters.pop("padding")
    padded = F.pad(input, (left, left, top + 1, top - 1))
    return reference.conv_bias_add_relu(padded, weight, bias, shortcut, **parameters)


def relu_before_shortcut(input: Tensor, weight: Tensor, bias: Any = None, shortcut: Any = None, **parameters: Any) -> Tensor:
    return reference.conv_bias_add_relu(input, weight, bias, None, **parameters) + shortcut


def lost_last_channel(input: Tensor, weight: Tensor, bias: Any = None, shortcut: Any = None, **parameters: Any) -> Tensor:
    """The tail of a vector loop that was forgotten."""
    return reference.conv_bias_add_relu(input[:, :-1], weight[:, :-1], bias, shortcut, **parameters)


def rounded_twice(input: Tensor, weight: Tensor, bias: Any = None, shortcut: Any = None, **parameters: Any) -> Tensor:
    """The convolution is rounded to the output's type before the shortcut is added."""
    z = reference.conv_bias_add_relu(input, weight, bias, None, **{**parameters, "relu": False})
    return torch.relu(z + shortcut)


def half_accumulator(input: Tensor, weight: Tensor, bias: Any = None, shortcut: Any = None, **parameters: Any) -> Tensor:
    """Operands lose half of their digits on the way in (as TF32 and bfloat16 products do)."""
    low = torch.bfloat16 if input.dtype == torch.float32 else torch.float32
    return reference.conv_bias_add_relu(input.to(low).to(input.dtype), weight, bias, shortcut, **parameters)


def lost_nan(input: Tensor, weight: Tensor, bias: Any = None, shortcut: Any = None, **parameters: Any) -> Tensor:
    """ReLU by a maximum instruction: max(nan, 0) = 0."""
    z = reference.conv_bias_add_relu(input, weight, bias, shortcut, **{**parameters, "relu": False})
    return torch.where(z > 0, z, torch.zeros_like(z))


def wrong_strides(input: Tensor, weight: Tensor, bias: Any = None, shortcut: Any = None, **parameters: Any) -> Tensor:
    return reference.conv_bias_add_relu(input, weight, bias, shortcut, **parameters).contiguous(memory_format=torch.channels_last)


def aliased(input: Tensor, weight: Tensor, bias: Any = None, shortcut: Any = None, **parameters: Any) -> Tensor:
    assert shortcut is not None
    return shortcut.copy_(reference.conv_bias_add_relu(input, weight, bias, shortcut, **parameters))  # type: ignore[no-any-return]


class _WrongMask(torch.autograd.Function):
    """ReLU whose gradient passes where y >= 0, not where y > 0."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        y = torch.relu(z)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (y,) = ctx.saved_tensors
        return grad * (y >= 0)


def wrong_mask(input: Tensor, weight: Tensor, bias: Any = None, shortcut: Any = None, **parameters: Any) -> Tensor:
    z = reference.conv_bias_add_relu(input, weight, bias, shortcut, **{**parameters, "relu": False})
    return _WrongMask.apply(z)


class _KinkMask(torch.autograd.Function):
    """As above, but only exactly at z = 0: finite differences, kept away from the kink, cannot see it."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return torch.relu(z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (z,) = ctx.saved_tensors
        return grad * (z >= 0)


def kink_mask(input: Tensor, weight: Tensor, bias: Any = None, shortcut: Any = None, **parameters: Any) -> Tensor:
    z = reference.conv_bias_add_relu(input, weight, bias, shortcut, **{**parameters, "relu": False})
    return _KinkMask.apply(z)


WRONG_VALUES = (dropped_bias, dropped_shortcut, shifted_padding, relu_before_shortcut, lost_last_channel)
IN_SHAPE = (*WRONG_VALUES, wrong_strides, aliased)


def operands(dtype: torch.dtype, exact: bool, case: ConvCase = CASE) -> Operands:
    make = testing.integer_operands if exact else testing.float_operands
    return make(case, dtype, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("exact", [True, False], ids=["integers", "floats"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_passes(dtype: torch.dtype, exact: bool) -> None:
    found = testing.compare_forward(reference.conv_bias_add_relu, operands(dtype, exact), exact, **CASE.parameters)
    assert found, found.reason


@pytest.mark.parametrize("exact", [True, False], ids=["integers", "floats"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", IN_SHAPE, ids=lambda f: f.__name__)
def test_forward_sees(fault: Operator, dtype: torch.dtype, exact: bool) -> None:
    assert not testing.compare_forward(fault, operands(dtype, exact), exact, **CASE.parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_envelope_sees_low_precision(dtype: torch.dtype) -> None:
    assert not testing.compare_forward(half_accumulator, operands(dtype, exact=False), False, **CASE.parameters)


def test_envelope_sees_a_second_rounding() -> None:
    assert not testing.compare_forward(rounded_twice, operands(torch.bfloat16, exact=False), False, **CASE.parameters)


@pytest.mark.parametrize("exact", [True, False], ids=["integers", "floats"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_sees_a_lost_nan(dtype: torch.dtype, exact: bool) -> None:
    """Without a NaN in the data the fault is invisible, which is why the data must hold one."""
    good = operands(dtype, exact)
    assert testing.compare_forward(lost_nan, good, exact, **CASE.parameters)
    assert good.shortcut is not None
    bad = good._replace(shortcut=good.shortcut.clone())
    bad.shortcut[1, 2, 3, 4] = float("nan")  # type: ignore[index]
    assert testing.compare_forward(reference.conv_bias_add_relu, bad, exact, **CASE.parameters)
    found = testing.compare_forward(lost_nan, bad, exact, **CASE.parameters)
    assert "NaN in only one of the two: 1 of" in found.reason
    assert "[1, 2, 3, 4]" in found.reason


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", [dropped_bias, shifted_padding, relu_before_shortcut, wrong_mask, kink_mask])
def test_integer_gradients_see(fault: Operator, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    data = testing.integer_operands(CASE, dtype, generator)
    grad = testing.unit_gradient(CASE.output_shape, dtype, generator)
    right = testing.compare_gradients(reference.conv_bias_add_relu, data, grad, **CASE.parameters)
    assert all(right.values()), right
    assert not all(testing.compare_gradients(fault, data, grad, **CASE.parameters).values())


@pytest.mark.parametrize("fault", [dropped_bias, wrong_mask], ids=lambda f: f.__name__)
def test_finite_differences_see(fault: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    case = testing.GradientCase()
    assert not check.finite_differences(case).reason
    monkeypatch.setattr(ops, "conv_bias_add_relu", fault)
    assert check.finite_differences(case).reason


def test_finite_differences_miss_the_kink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why `check` compares integer gradients too."""
    monkeypatch.setattr(ops, "conv_bias_add_relu", kink_mask)
    assert not check.finite_differences(testing.GradientCase()).reason


@pytest.mark.parametrize("fault", [*WRONG_VALUES, kink_mask], ids=lambda f: f.__name__)
def test_check_ends_with_1(fault: Operator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def guarded(*tensors: Any, **parameters: Any) -> Tensor:
        # The faults know the usual case only; elsewhere the right answer must not hide the wrong ones.
        usual = parameters.get("padding") == (1, 1) and parameters.get("relu", True) and tensors[3] is not None
        return (fault if usual else reference.conv_bias_add_relu)(*tensors, **parameters)

    monkeypatch.setattr(ops, "conv_bias_add_relu", guarded)
    assert cli.main(["check", "--quick", "--dtype", "float32"]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.smoke
def test_exact_data_are_exact() -> None:
    """No sum of the absolute values of the terms of any output leaves the integers that the format holds."""
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        assert terms(dtype) * MAGNITUDE[dtype] ** 2 + 2 * MAGNITUDE[dtype] <= EXACT[dtype]
        for case in (CONVS[0], BLOCKS[6].convs()[-1], CASE):
            data = testing.integer_operands(case, dtype, generator)
            magnitudes = Operands(*(None if t is None else t.double().abs() for t in data))  # type: ignore[arg-type]
            assert reference.conv_bias_add_relu(*magnitudes, **case.parameters).max() <= EXACT[dtype]
            assert data.weight.count_nonzero(dim=(1, 2, 3)).max() <= terms(dtype)
            assert reference.conv_bias_add_relu(*data, **case.parameters).any()


def test_integer_data_reach_the_kink() -> None:
    """Outputs of exactly 0 before the ReLU, with a gradient that is not 0 there."""
    for dtype in DTYPES:
        generator = torch.Generator().manual_seed(4)
        data = testing.integer_operands(CASE, dtype, generator)
        z = reference.conv_bias_add_relu(*data, **{**CASE.parameters, "relu": False})
        assert ((z == 0) & (testing.unit_gradient(CASE.output_shape, dtype, generator) != 0)).any()


@pytest.mark.parametrize("name", testing.LAYOUTS)
def test_layouts_keep_shape_and_values(name: str) -> None:
    for shape in ((2, 3, 4, 5), (1, 1, 1, 1), (0, 3, 4, 5), (7,)):
        t = torch.randn(shape)
        laid = testing.LAYOUTS[name](t)
        assert laid.shape == t.shape
        assert name == "expanded" or torch.equal(laid, t)


def test_layouts_differ() -> None:
    t = torch.randn(2, 3, 4, 5)
    found = {name: make(t) for name, make in testing.LAYOUTS.items()}
    assert len({(laid.stride(), laid.storage_offset()) for laid in found.values()}) == len(found)


def test_gradient_cases_cover() -> None:
    """Every shortcut kind with every subset of the tensors that can require a gradient, in three layouts."""
    cases = testing.gradient_cases()
    assert len({case.name for case in cases}) == len(cases)
    for layout in ("contiguous", "channels_last", "sliced"):
        for shortcut, subsets in (("none", 7), ("tensor", 15), ("input", 7), ("view", 7), ("expanded", 15)):
            usual = [
                case.needs
                for case in cases
                if (case.operator, case.shortcut, case.layout, case.incoming) == ("conv_bias_add_relu", shortcut, layout, "plain")
                and case.parameters == (("padding", 1),)
            ]
            assert len(set(usual)) >= subsets


def test_gradient_cases_need_what_they_say() -> None:
    for case in testing.gradient_cases():
        _, leaves = case.build()
        assert sum(t.requires_grad for t in leaves) == len(case.needs), case.name


@pytest.mark.parametrize("table", [CONVS, BLOCKS, AWKWARD], ids=["CONVS", "BLOCKS", "AWKWARD"])
def test_names_are_distinct(table: tuple[Any, ...]) -> None:
    assert len({case.name for case in table}) == len(table)


def test_layer_table_is_the_networks() -> None:
    """The convolutions of the table are those that the networks run, found by running them on meta tensors."""
    from fused_resnet.cases import NETWORKS, STEMS

    for network, (size, make) in NETWORKS.items():
        with torch.device("meta"):
            model, images = make().eval(), torch.empty(1, 3, size, size)
        seen: set[tuple[Any, ...]] = set()

        def note(module: Any, args: tuple[Tensor], seen: set[tuple[Any, ...]] = seen) -> None:
            seen.add((module.in_channels, module.out_channels, tuple(args[0].shape[2:]), module.kernel_size, module.stride))

        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_pre_hook(note)
        model(images)
        stem = STEMS[1] if network == "cifar20" else STEMS[0]
        convs = {stem, *(conv for block in BLOCKS if block.network == network for conv in block.convs())}
        assert seen == {(c.channels, c.outputs, c.size, c.kernel, c.stride) for c in convs}


def test_shapes_and_flops_of_cases() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for case in (*CONVS, *AWKWARD):
        made = Operands(*(None if t is None else t.to("meta") for t in case.make()))  # type: ignore[arg-type]
        with FlopCounterMode(display=False) as counter:
            output = reference.conv_bias_add_relu(*made, **case.parameters)
        assert tuple(output.shape) == case.output_shape, case.name
        if case.padding != "same":  # PyTorch pads first and counts the same; its counter sees another input
            assert counter.get_total_flops() == case.flops(), case.name


# ---------------------------------------------------------------------------------------------------------------------
# Another device: the CPU in its place, to which tensors are copied all the same
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_moved_tensors_are_laid_out_as_they_were(layout: str) -> None:
    for t in (torch.randn(2, 3, 4, 5), torch.randn(6)):
        t = testing.LAYOUTS[layout](t).detach().requires_grad_()
        (copy,) = testing.moved("cpu", t)
        assert torch.equal(copy, t)
        assert (copy.stride(), copy.storage_offset(), copy.requires_grad) == (t.stride(), t.storage_offset(), True)
        assert copy.is_leaf
        assert copy.untyped_storage().data_ptr() != t.untyped_storage().data_ptr()


def test_what_shares_memory_shares_it_there() -> None:
    x = torch.randn(2, 5, 3, 3)
    first, second, other, none = testing.moved("cpu", x[:, :-1], x[:, 1:], x.clone(), None)
    assert none is None
    first[:, 1] = 7.0
    assert (second[:, 0] == 7.0).all()
    assert not (other == 7.0).any()
    assert not (x == 7.0).any()


@pytest.mark.parametrize("exact", [True, False])
def test_on_a_device(exact: bool) -> None:
    """The same results and gradients, of the same kind and number; the operands themselves never get there."""
    seen: list[Tensor] = []

    def operator(*tensors: Any, **parameters: Any) -> Tensor:
        seen.extend(t for t in tensors if t is not None)
        return reference.conv_bias_add_relu(*tensors, **parameters)

    moving = testing.on("cpu", operator)
    given = testing.layout(operands(torch.float64, exact), input="sliced", shortcut="expanded", weight="offset")
    assert testing.compare_forward(moving, given, exact, **CASE.parameters)
    assert len(seen) == 4
    for there, here in zip(seen, given, strict=True):
        assert here is not None
        assert there.stride() == here.stride()
        assert there.untyped_storage().data_ptr() != here.untyped_storage().data_ptr()
    if exact:
        grad = testing.unit_gradient(CASE.output_shape, torch.float64, torch.Generator().manual_seed(1))
        assert all(testing.compare_gradients(moving, given, grad, **CASE.parameters).values())
        assert not all(testing.compare_gradients(testing.on("cpu", dropped_bias), given, grad, **CASE.parameters).values())
    assert not testing.compare_forward(testing.on("cpu", shifted_padding), given, exact, **CASE.parameters)


def test_gradients_pass_to_a_device_and_back_twice() -> None:
    case = testing.GradientCase()
    function, leaves = case.build()
    moving = testing.on("cpu", function)
    assert torch.autograd.gradcheck(moving, leaves)
    assert torch.autograd.gradgradcheck(moving, leaves)


def test_on_a_device_refuses_an_alias() -> None:
    with pytest.raises(AssertionError, match="alias of an argument"):
        testing.on("cpu", lambda x: x[1:])(torch.ones(3))


def test_the_library_is_put_back() -> None:
    cudnn = torch.backends.cudnn

    def state() -> tuple[Any, ...]:
        return cudnn.deterministic, cudnn.benchmark, cudnn.enabled, _compat.tf32()

    before = state()
    with testing.library():
        assert state() == (True, False, True, False)
        with testing.library(tf32=True, deterministic=False, cudnn=False):
            assert state() == (False, False, False, True)
        assert not _compat.tf32()
    assert state() == before


def test_tf32_bound_allows_its_rounding_and_sees_faults() -> None:
    """Operands cut to 10 bits behind the first are inside; one tap less, or 4 bits, is outside."""
    case = ConvCase(64, 64, (9, 9), (3, 3), padding=(1, 1), shortcut=True)
    given = operands(torch.float32, False, case)
    truth, _ = testing.truth_and_peer(given, **case.parameters)
    allowed = testing.tf32_allowed(given, **case.parameters)

    def cut(t: Tensor, bits: int) -> Tensor:
        return (t.view(torch.int32) & -(1 << (23 - bits))).view(torch.float32).double()

    def worst(x: Tensor, w: Tensor) -> float:
        assert given.bias is not None
        assert given.shortcut is not None
        y = reference.conv_bias_add_relu(x, w, given.bias.double(), given.shortcut.double(), **case.parameters)
        return ((y - truth).abs() / allowed).max().item()

    assert 0 < worst(cut(given.input, 10), cut(given.weight, 10)) <= 1
    # All of one sign, where the losses add up: half of the largest loss is the usual one.
    positive = Operands(given.input.abs(), given.weight.abs(), None, None)
    whole = reference.conv_bias_add_relu(positive.input.double(), positive.weight.double(), **case.parameters)
    lossy = reference.conv_bias_add_relu(cut(positive.input, 10), cut(positive.weight, 10), **case.parameters)
    ratio = ((whole - lossy) / testing.tf32_allowed(positive, **case.parameters)).max().item()
    assert 0.25 < ratio <= 1
    weight = given.weight.double().clone()
    weight[:, :, 1, 1] = 0
    assert worst(given.input.double(), weight) > 1
    assert worst(cut(given.input, 4), cut(given.weight, 4)) > 1


def test_cutting_allows_more_for_long_sums_only() -> None:
    for case, more in ((ConvCase(4, 4, (5, 5), (1, 1)), False), (ConvCase(512, 8, (5, 5), (3, 3), padding=(1, 1)), True)):
        given = operands(torch.bfloat16, False, case)
        plain, cutting = (testing.error_scale(given, torch.bfloat16, cutting, **case.parameters) for cutting in (False, True))
        assert (cutting > plain) == more
        # Still far from the rounding of the result, so that the bound for bfloat16 keeps its sense.
        assert cutting < 2**-9 / 4


def test_check_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks that a GPU gets beside the CPU's, made on the CPU; and a fault in what is computed there is seen by each group."""
    gpu: Any = SimpleNamespace(type="cuda")
    assert len(list(check.plan([torch.float16], True, 0, gpu))) > 100
    monkeypatch.setattr(check, "_operator", lambda device: testing.on("cpu", ops.conv_bias_add_relu))
    groups = {"forward float32 with TF32, integers", "forward float32 with TF32, floats"}
    groups |= {f"forward {name}, {data}" for name in ("float32", "bfloat16") for data in ("integers", "floats")}
    groups |= {f"integer gradients {name}" for name in ("float32", "bfloat16")}
    results = [make() for make in check.plan([torch.float32, torch.bfloat16], True, 0, gpu)]
    assert {result.group for result in results} == groups
    assert not [result for result in results if result.reason]
    assert any("channels_last" in result.name for result in results)
    monkeypatch.setattr(check, "_operator", lambda device: testing.on("cpu", shifted_padding))
    failed = {make().group for make in check.plan([torch.float32, torch.bfloat16], True, 0, gpu) if make().reason}
    assert failed == groups


def test_every_planted_fault_has_its_text() -> None:
    """``faults.py`` runs by hand; that its texts are in the sources, and change something, is seen here."""
    import faults

    for fault in faults.FAULTS:
        for file in fault.files:
            assert fault.old in (faults.ROOT / file).read_text(), f"{fault.name}: {file} has no {fault.old!r}"
        assert fault.old != fault.new
        for test in fault.tests:
            assert (faults.ROOT / test.split("::")[0]).is_file(), f"{fault.name}: no {test}"
