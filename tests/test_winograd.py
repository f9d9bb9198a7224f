"""Winograd convolution: its error, special values, which algorithm is chosen and why, changed weights, its workspace.

What is trusted: the reference in float64 as the truth; the bounds of ``_winograd.py``, formulas in the unit roundoff, the
channels and the transforms; direct convolution, which the exact and envelope tests hold to the reference. That F(2x2, 3x3) is exact
on integers is in test_exact.py, the kernels' use of memory in test_memory.py, that bits depend on neither threads nor neighbours
in a batch in test_determinism.py, random shapes in test_fuzz.py.
"""

from __future__ import annotations

import copy
import pickle
import sys
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
from _calls import DTYPES, FORMATS, eager, kernel_function, laid_out, name, plan_of, run_python
from _winograd import TILES, element_scale, losses, norm_bound, rounds_transforms, transforms
from test_exact import ISAS, winograd_fits
from torch import Tensor, nn

import fused_resnet
import fused_resnet.nn as fnn
from fused_resnet import _settings, reference, testing
from fused_resnet.cases import AWKWARD, BLOCKS, CONVS, BlockCase, ConvCase, Operands
from fused_resnet.ops import cpu, derived
from fused_resnet.runtime import program as native_program
from fused_resnet.testing.compare import unit_roundoff

WINOGRAD = ("winograd2", "winograd4")


def fits(case: ConvCase, algorithm: str) -> bool:
    return algorithm == "direct" or winograd_fits(case, algorithm)


def algorithm_of(operands: Operands, **parameters: Any) -> str:
    return str(plan_of(operands, **parameters).kernel.algorithm)  # type: ignore[attr-defined]


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
# Which algorithm, and numerics
# ---------------------------------------------------------------------------------------------------------------------


def shape_only(case: ConvCase, dtype: torch.dtype = torch.float32) -> Operands:
    """Operands of these shapes on one element of memory."""
    x, w = (torch.zeros((), dtype=dtype).expand(shape) for shape in (case.input_shape, case.weight_shape))
    return Operands(x, w, None, None)


def kernel_of(case: ConvCase, dtype: torch.dtype = torch.float32) -> Any:
    return plan_of(shape_only(case, dtype), **case.parameters).kernel  # type: ignore[attr-defined]


@pytest.mark.parametrize("numerics", ["fast", "strict"])
def test_the_large_layers_take_winograd(isa: str, numerics: str) -> None:
    fused_resnet.set_numerics(numerics)
    for channels, size in ((64, 56), (128, 28), (256, 14)):
        for batch in (1, 8):
            kernel = kernel_of(ConvCase(channels, channels, (size, size), (3, 3), padding=(1, 1), batch=batch))
            # At batch 1 the 9 MiB of F(4x4, 3x3)'s weights may take longer to come than the products: that is the machine's business.
            expected = {"winograd2"} if numerics == "strict" else {"winograd4"}
            if (channels, batch) == (256, 1):
                expected.add("winograd2")
            assert kernel.algorithm in expected, kernel.reason
            assert kernel.describe().startswith(f"Winograd F({kernel.algorithm[-1]}x{kernel.algorithm[-1]}")


NEVER = {
    "1x1": (ConvCase(64, 64, (56, 56), (1, 1)), torch.float32, "Winograd is for 3x3 kernels"),
    "5x5": (ConvCase(64, 64, (56, 56), (5, 5)), torch.float32, "Winograd is for 3x3 kernels"),
    "3x1": (ConvCase(64, 64, (56, 56), (3, 1)), torch.float32, "Winograd is for 3x3 kernels"),
    "dilation 2": (ConvCase(64, 64, (56, 56), (3, 3), dilation=(2, 2)), torch.float32, "dilation 1"),
    "stride 3": (ConvCase(64, 64, (56, 56), (3, 3), (3, 3)), torch.float32, "with stride 1"),
    "stride 1 and 2": (ConvCase(64, 64, (56, 56), (3, 3), (1, 2)), torch.float32, "with stride 1"),
    "float64": (ConvCase(64, 64, (56, 56), (3, 3)), torch.float64, "float64 is for precision"),
    "no images": (ConvCase(64, 64, (56, 56), (3, 3), batch=0), torch.float32, "the output is empty"),
    "few channels": (ConvCase(1, 1, (56, 56), (3, 3)), torch.float32, "estimated time over direct"),
}


@pytest.mark.parametrize("what", NEVER)
def test_what_is_convolved_directly(isa: str, what: str) -> None:
    case, dtype, reason = NEVER[what]
    kernel = kernel_of(case, dtype)
    assert kernel.algorithm == "direct"
    assert reason in kernel.reason
    if what not in ("float64", "few channels"):  # nor where it is asked for
        for algorithm in WINOGRAD:
            _settings.change(algorithm=algorithm)
            assert kernel_of(case, dtype).algorithm == "direct"


def test_f4_has_no_stride(kernels: ModuleType) -> None:
    _settings.change(algorithm="winograd4")
    assert kernel_of(ConvCase(64, 64, (56, 56), (3, 3), (2, 2), (1, 1))).algorithm == "direct"


def test_the_choice_is_a_function_of_the_shape(isa: str) -> None:
    """The same again, in any order and for any number of threads; with a reason that is a sentence; never F(4x4) in strict."""
    cases = [case.at(batch) for case in CONVS for batch in (1, 2, 32)]
    cases += [ConvCase(c, k, (h, w), (3, 3), padding=(1, 1)) for c, k, (h, w) in product((8, 96, 512), (32, 2048), ((2, 3), (7, 3)))]
    chosen: dict[str, dict[Any, str]] = {}
    for numerics in ("fast", "strict"):
        fused_resnet.set_numerics(numerics)
        found: dict[Any, str] = {}
        for threads in (1, 2, 7, 64):
            torch.set_num_threads(threads)
            for case, dtype in product(cases if threads % 2 else reversed(cases), DTYPES):
                kernel = kernel_of(case, dtype)
                assert found.setdefault((case, dtype), kernel.algorithm) == kernel.algorithm, (case.name, threads)
                assert len(kernel.reason) > 10
                assert "direct" in kernel.reason or "Winograd" in kernel.reason or "empty" in kernel.reason
        chosen[numerics] = found
    assert "winograd4" not in chosen["strict"].values()
    assert {"direct", "winograd4"} <= set(chosen["fast"].values())
    # Strict changes nothing but F(4x4, 3x3) and products of bfloat16 that round the transforms.
    for (case, dtype), algorithm in chosen["fast"].items():
        if algorithm == "direct":
            assert chosen["strict"][case, dtype] == "direct"
        elif algorithm == "winograd2" and not rounds_transforms(isa, dtype):
            assert chosen["strict"][case, dtype] == "winograd2"
        assert dtype != torch.float64 or algorithm == "direct"


def test_a_blocks_convolutions_say_why(kernels: ModuleType) -> None:
    """What was chosen for each of them alone, and the same reason, whatever the size of a group of images."""
    for batch, size, channels in ((1, 56, 64), (5, 28, 128), (9, 7, 256)):
        block = fnn.BasicBlock(channels, channels).eval()
        with torch.no_grad():
            block(torch.randn(batch, channels, size, size))
        (plan,) = block._fused_resnet.current.bound.plans.kept.values()  # type: ignore[union-attr]
        assert plan.program.convolutions == 2
        for i in range(2):
            found = plan.program.convolution(i)
            # The reason has estimates of a whole convolution, to which the shortcut is no matter.
            alone = kernel_of(ConvCase(channels, channels, (size, size), (3, 3), padding=(1, 1), batch=batch))
            assert (found.algorithm, found.reason) == (alone.algorithm, alone.reason)
        for wrong in (2, 2**40):
            with pytest.raises(IndexError):
                plan.program.convolution(wrong)


def test_algorithms_have_names(kernels: ModuleType) -> None:
    for wrong in ("", "winograd", "Direct", "winograd3"):
        _settings.change(algorithm=wrong)
        with pytest.raises(ValueError, match="algorithm must be auto, direct, winograd2 or winograd4, got"):
            kernel_of(CONVS[0])
    _settings.change(algorithm="auto")
    kernel_of(CONVS[0])


def test_numerics_by_name() -> None:
    if not sys.flags.ignore_environment:
        assert fused_resnet.get_numerics() in ("fast", "strict")
    for name_ in ("strict", "fast"):
        assert fused_resnet.set_numerics(name_) is None  # type: ignore[func-returns-value]
        assert fused_resnet.get_numerics() == name_
    for wrong in ("", "Fast", "exact", "slow ", None, 1):
        with pytest.raises(ValueError, match="numerics must be 'fast' or 'strict', got "):
            fused_resnet.set_numerics(wrong)  # type: ignore[arg-type]
        assert fused_resnet.get_numerics() == "fast"


NUMERICS_CODE = """
import torch, fused_resnet
from fused_resnet.ops import plans
with torch.no_grad():
    fused_resnet.conv_bias_add_relu(torch.ones(1, 64, 28, 28), torch.ones(64, 64, 3, 3), padding=1)
(plan,) = plans.convolution_plans.kept.values()
print(fused_resnet.get_numerics(), plan.kernel.algorithm)
"""


def test_numerics_from_the_environment(kernels: ModuleType) -> None:
    for value, expected in ((None, ["fast", "winograd4"]), ("strict", ["strict", "winograd2"]), ("", ["fast", "winograd4"])):
        done = run_python(NUMERICS_CODE, **({} if value is None else {"FUSED_RESNET_NUMERICS": value}))
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.split() == expected
    done = run_python(NUMERICS_CODE, FUSED_RESNET_NUMERICS="exact")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "ValueError: FUSED_RESNET_NUMERICS must be fast or strict, got 'exact'"


def test_a_switch_changes_the_next_call(kernels: ModuleType, generator: torch.Generator) -> None:
    """No plan of the other numerics is used again: operator, module, and a block's repeated call."""
    case = ConvCase(64, 64, (14, 14), (3, 3), padding=(1, 1), shortcut=True)
    operands = testing.float_operands(case, torch.float32, generator)
    block = fnn.BasicBlock(64, 64).eval()
    layer = fnn.ConvBiasAddReLU2d(64, 64, 3, padding=1).eval()
    calls: dict[str, Callable[[], Tensor]] = {
        "operator": lambda: fused_resnet.conv_bias_add_relu(*operands, **case.parameters),
        "layer": lambda: layer(operands.input, operands.shortcut),
        "block": lambda: block(operands.input),
    }
    with torch.no_grad():
        for what, call in calls.items():
            results: dict[str, list[Tensor]] = {"fast": [], "strict": []}
            for numerics in ("fast", "strict", "fast", "strict"):
                fused_resnet.set_numerics(numerics)
                results[numerics] += [call() for _ in range(3)]
            assert all(torch.equal(y, results["fast"][0]) for y in results["fast"]), what
            assert all(torch.equal(y, results["strict"][0]) for y in results["strict"]), what
            assert not torch.equal(results["fast"][0], results["strict"][0]), what
        _settings.change(algorithm="winograd2")
        assert torch.equal(calls["operator"](), results_of("strict", calls["operator"]))


def results_of(numerics: str, call: Callable[[], Tensor]) -> Tensor:
    _settings.change(algorithm="auto")
    fused_resnet.set_numerics(numerics)
    return call()


# ---------------------------------------------------------------------------------------------------------------------
# Weights that change, copies, threads
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["direct", *WINOGRAD], indirect=True)
def test_modules_whose_weights_change(algorithm: str, one_thread: None) -> None:
    """load_state_dict, .data =, in place, an optimizer's step, deepcopy, pickle: the result is that of a module that was
    made with these weights, bit for bit; of a layer, and of a block whose call is repeated."""
    x = torch.randn(2, 16, 9, 9)

    def fresh(module: nn.Module) -> Tensor:
        twin = copy.deepcopy(module)
        twin.load_state_dict(module.state_dict())
        y: Tensor = twin(x)
        return y

    modules = (fnn.ConvBiasAddReLU2d(16, 16, 3, padding=1), fnn.BasicBlock(16, 16), fnn.Bottleneck(16, 4))
    for module in (m.eval() for m in modules):
        parameter = next(p for p in module.parameters() if p.dim() == 4 and p.shape[2] == 3)
        other = {key: t * 1.5 if t.is_floating_point() else t for key, t in module.state_dict().items()}

        def step(parameter: nn.Parameter = parameter, module: nn.Module = module) -> None:
            with torch.enable_grad():
                module(x).square().sum().backward()
            torch.optim.SGD([parameter], lr=1e-3).step()

        changes: dict[str, Callable[[], Any]] = {
            "load_state_dict": lambda module=module, other=other: module.load_state_dict(other),
            ".data =": lambda parameter=parameter: setattr(parameter, "data", -parameter.data.clone()),
            "in place": lambda parameter=parameter: parameter.mul_(0.5),
            "in place through .data": lambda parameter=parameter: parameter.data.mul_(3),
            "one element": lambda parameter=parameter: parameter[3, 2, 1, 0].add_(1),
            "step": step,
            "channels_last": lambda module=module: module.to(memory_format=torch.channels_last),
        }
        with torch.no_grad():
            for what, change in changes.items():
                before = [module(x) for _ in range(3)][-1]
                change()
                ours = [module(x) for _ in range(3)]
                expected = fresh(module)
                assert all(torch.equal(y, expected) for y in ours), f"{type(module).__name__}: {what}"
                assert what == "channels_last" or not torch.equal(ours[0], before), "nothing has changed"
            for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
                assert torch.equal(twin(x), expected)
                next(twin.parameters()).mul_(2)
                assert torch.equal(twin(x), fresh(twin))
                assert torch.equal(module(x), expected)


class Layer(nn.Module):
    """One 3x3 convolution without a bias: one tensor, so that a result belongs to one state of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(32, 32, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return fused_resnet.conv_bias_add_relu(x, self.conv.weight, padding=1, relu=False)


@pytest.mark.parametrize("whole", [False, True], ids=["layer", "block"])
@pytest.mark.parametrize("algorithm", ["direct", *WINOGRAD], indirect=True)
def test_a_weight_that_is_replaced_while_eight_threads_use_it(algorithm: str, whole: bool, one_thread: None) -> None:
    """Each result is that of the old weight or of the new one, entirely; and when the last replacement is over, of the last."""
    module: nn.Module = fnn.BasicBlock(32, 32, norm_layer=nn.Identity).eval() if whole else Layer()
    conv = module.conv2 if whole else module.conv
    x = torch.randn(1, 32, 14, 14)
    weights = [conv.weight.detach().clone(), -conv.weight.detach(), 2 * conv.weight.detach()]  # type: ignore[operator, union-attr]
    with torch.no_grad():
        expected = []
        for w in weights:
            conv.weight.data = w  # type: ignore[union-attr]
            expected.append(copy.deepcopy(module)(x))
        errors: list[str] = []
        stop = threading.Event()

        def read() -> None:
            with torch.no_grad():  # of this thread
                while not stop.is_set():
                    y = module(x)
                    if not any(torch.equal(y, e) for e in expected):
                        errors.append("neither the one nor the other")
                        return

        for last in (0, 1, 2, 0):
            stop.clear()
            threads = [threading.Thread(target=read) for _ in range(8)]
            for thread in threads:
                thread.start()
            for turn in range(15):
                time.sleep(0.001)
                conv.weight.data = weights[(turn + last + 1) % 3]  # type: ignore[union-attr]
            conv.weight.data = weights[last]  # type: ignore[union-attr]
            stop.set()
            for thread in threads:
                thread.join()
            assert not errors, errors[0]
            for _ in range(3):
                assert torch.equal(module(x), expected[last]), "a weight that is no longer there is still used"


def test_a_weight_that_changes_during_a_blocks_call(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the kernels run, other threads may. What they change is seen at the next call, also where it would be repeated."""
    x = torch.randn(1, 16, 8, 8)
    native_run = native_program.run
    for change in ("in place", ".data =", "running_mean", "eps"):
        block = fnn.BasicBlock(16, 16).eval()

        def meanwhile(block: fnn.BasicBlock = block, change: str = change) -> None:
            if change == "in place":
                block.conv2.weight.mul_(-2)
            elif change == ".data =":
                block.conv2.weight.data = -2 * block.conv2.weight.data
            elif change == "running_mean":
                block.bn1.running_mean.add_(1)  # type: ignore[union-attr]
            else:
                block.bn1.eps = 1.0  # type: ignore[union-attr]

        def run(*arguments: Any, meanwhile: Callable[[], None] = meanwhile) -> Any:
            result = native_run(*arguments)
            meanwhile()
            return result

        with torch.no_grad():
            with monkeypatch.context() as patched:
                patched.setattr(native_program, "run", run)
                before = block(x)
            expected = copy.deepcopy(block)(x)
            assert not torch.equal(before, expected)
            for _ in range(3):
                assert torch.equal(block(x), expected), f"{change}: the old state is still used"


@pytest.mark.parametrize("whole", [False, True], ids=["layer", "block"])
@pytest.mark.parametrize("moment", ["before the packing", "while it packs"])
def test_a_weight_that_is_replaced_and_put_back(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, whole: bool, moment: str
) -> None:
    """Another thread replaces the weight and puts the old one back, all within one call: what was made meanwhile from the other one
    must not be kept for the old one."""
    module: nn.Module = fnn.BasicBlock(32, 32, norm_layer=nn.Identity).eval() if whole else Layer()
    conv = module.conv2 if whole else module.conv
    old = conv.weight.data  # type: ignore[union-attr]
    other = -old  # type: ignore[operator]
    x = torch.randn(1, 32, 14, 14)
    find = derived.find

    def replaced_before(tag: Any, sources: Any, make: Any, *store: Any) -> Any:
        conv.weight.data = other  # type: ignore[union-attr]
        try:
            return find(tag, sources, make, *store)
        finally:
            conv.weight.data = old  # type: ignore[union-attr]

    def replaced_within(tag: Any, sources: Any, make: Any, *store: Any) -> Any:
        def while_replaced(*held: Any) -> Any:
            conv.weight.data = other  # type: ignore[union-attr]
            try:
                return make(*held)
            finally:
                conv.weight.data = old  # type: ignore[union-attr]

        return find(tag, sources, while_replaced, *store)

    with torch.no_grad():
        expected = copy.deepcopy(module)(x)
        with monkeypatch.context() as patched:
            replaced = replaced_within if moment == "while it packs" else replaced_before
            patched.setattr(native_program if whole else cpu, "find", replaced)
            y = module(x)
        assert torch.equal(y, expected) == (moment == "while it packs"), "the weight was not replaced at that moment"
        for _ in range(3):
            assert torch.equal(module(x), expected), "a weight that is no longer there is still used"


@pytest.mark.parametrize("algorithm", ["direct", *WINOGRAD], indirect=True)
def test_load_state_dict_while_others_call(algorithm: str, one_thread: None) -> None:
    """A call that overlaps with it may see both states, as it may in PyTorch itself. Afterwards none does."""
    module = fnn.BasicBlock(32, 32).eval()
    x = torch.randn(1, 32, 14, 14)
    states = [copy.deepcopy(module.state_dict()) for _ in range(2)]
    for key, t in states[1].items():
        if t.is_floating_point() and "var" not in key:
            t.mul_(-1)
    stop = threading.Event()

    def read() -> None:
        with torch.no_grad():
            while not stop.is_set():
                assert module(x).isfinite().all()

    with torch.no_grad():
        for turn in range(8):
            stop.clear()
            threads = [threading.Thread(target=read) for _ in range(3)]
            for thread in threads:
                thread.start()
            time.sleep(0.004)
            module.load_state_dict(states[turn % 2])
            stop.set()
            for thread in threads:
                thread.join()
            twin = copy.deepcopy(module)
            assert torch.equal(module(x), twin(x))


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


# ---------------------------------------------------------------------------------------------------------------------
# Workspace
# ---------------------------------------------------------------------------------------------------------------------

BIG = 1 << 59
REFUSALS = (OverflowError, ValueError, MemoryError)
# input, weight, output
EXTREMES: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    "batch": ((BIG, 1, 3, 3), (1, 1, 3, 3), (BIG, 1, 1, 1)),
    "batch and channels": ((1 << 47, 1 << 12, 3, 3), (1, 1 << 12, 3, 3), (1 << 47, 1, 1, 1)),
    "channels": ((1, BIG, 3, 3), (1, BIG, 3, 3), (1, 1, 1, 1)),
    "outputs": ((1, 1, 3, 3), (BIG, 1, 3, 3), (1, BIG, 1, 1)),
    "outputs and channels": ((1, 1 << 12, 3, 3), (1 << 47, 1 << 12, 3, 3), (1, 1 << 47, 1, 1)),
    "width": ((1, 1, 3, BIG), (1, 1, 3, 3), (1, 1, 1, BIG - 2)),
    "beyond 63 bits": ((1 << 40, 1 << 40, 3, 3), (1, 1 << 40, 3, 3), (1 << 40, 1, 1, 1)),
}


# Direct convolution lists the pieces of its reduction, of which this many channels have too many.
REFUSED = [(sizes, a) for sizes in EXTREMES for a in ("auto", "direct", *WINOGRAD) if sizes != "channels" or a in WINOGRAD]


@pytest.mark.parametrize(("sizes", "algorithm"), REFUSED)
def test_sizes_beyond_any_memory(isa: str, algorithm: str, sizes: str, kernels: ModuleType) -> None:
    """Planning them allocates nothing: either it is refused, or what is asked for is at least what is needed."""
    input, weight, output = EXTREMES[sizes]
    for dtype, threads in product(("float32", "bfloat16", "float64"), (1, 2, 2**31 - 1)):
        try:
            kernel = kernels.Convolution(
                dtype, input, weight, output, (1, 1), (0, 0), (1, 1), (9, 9, 3, 1), (1, 1, 1, 1), None, False, True,
                threads, algorithm, False,
            )  # fmt: skip
            packed, workspace = kernel.packed_bytes, kernel.workspace_bytes
        except REFUSALS:
            continue
        assert packed >= 2 * weight[0] * weight[1] * 9
        assert workspace > 0


@pytest.mark.parametrize("algorithm", ["direct", *WINOGRAD])
def test_absurd_numbers_of_threads(algorithm: str, kernels: ModuleType) -> None:
    """No more threads are planned for than there are tasks, so no workspace either."""
    arguments: tuple[Any, ...] = (
        "float32", (1, 64, 28, 28), (64, 64, 3, 3), (1, 64, 28, 28), (1, 1), (1, 1), (1, 1), (1, 1, 28 * 64, 64),
        (1, 1, 28 * 64, 64), None, False, True,
    )  # fmt: skip
    for threads in (0, -1, -(2**31)):
        kernel = kernels.Convolution(*arguments, threads, algorithm)
        assert kernel.workspace_bytes == kernels.Convolution(*arguments, 1, algorithm).workspace_bytes
    assert kernels.Convolution(*arguments, 2**31 - 1, algorithm).workspace_bytes < 1 << 30


NO_MEMORY = """
import resource, torch, fused_resnet
from fused_resnet import _settings, reference
_settings.change(algorithm="ALGORITHM")
torch.set_num_threads(THREADS)
w = torch.ones(1, 2048, 3, 3)
small = torch.ones(1, 2048, 4, 4)
expected = reference.conv_bias_add_relu(small, w)
large = torch.ones(1, 1, 1, 1).expand(1, 2048, 200, 200)  # its transform: more than 700 MB
fused_resnet.conv_bias_add_relu(small, w)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20), resource.RLIM_INFINITY))
for _ in range(3):
    try:
        fused_resnet.conv_bias_add_relu(large, w)
    except MemoryError as error:
        print("MemoryError", end=" ")
    y = fused_resnet.conv_bias_add_relu(small, w)
    print(torch.allclose(y, expected, rtol=1e-4), end=" ")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space as Linux does")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("algorithm", WINOGRAD)
def test_no_memory_for_the_workspace(algorithm: str, threads: int, kernels: ModuleType) -> None:
    """MemoryError, and the next call works."""
    done = run_python(NO_MEMORY.replace("ALGORITHM", algorithm).replace("THREADS", str(threads)))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["MemoryError", "True"] * 3


@pytest.mark.parametrize("algorithm", ["auto", "direct", *WINOGRAD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=name)
def test_one_weight_for_inputs_of_every_size(algorithm: str, dtype: torch.dtype, isa: str, generator: torch.Generator) -> None:
    """What was packed for one size and batch is used for all others."""
    _settings.change(algorithm=algorithm)
    for channels, outputs in ((80, 72), (128, 128)):
        base = testing.integer_operands(ConvCase(channels, outputs, (3, 3), (3, 3), padding=(1, 1)), dtype, generator)
        for batch, size in ((1, 14), (2, 12), (1, 28), (1, 3), (5, 9), (1, 7)):
            x = torch.randint(-2, 3, (batch, channels, size, size), generator=generator).to(dtype)
            y = fused_resnet.conv_bias_add_relu(x, base.weight, padding=1)
            truth = reference.conv_bias_add_relu(x.double(), base.weight.double(), padding=1)
            error = testing.norm_error(y, truth)
            assert error <= (5e-2 if dtype == torch.bfloat16 else 1e-5), (batch, size)  # a wrong layout: of order 1; rounding: at most 2e-2
        if algorithm != "auto":
            assert len(derived._beside[id(base.weight.untyped_storage())].entries()) == 1, "packed anew for another size"


@pytest.mark.parametrize("algorithm", ["auto", *WINOGRAD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
def test_groups_of_a_block_share_their_weights(algorithm: str, dtype: torch.dtype, kernels: ModuleType) -> None:
    """Also the last group of images, which may be smaller."""
    block = fnn.BasicBlock(128, 128).eval().to(dtype)
    _settings.change(algorithm=algorithm)
    with torch.no_grad():
        for batch, size in ((3, 13), (3, 14), (5, 10), (7, 7)):
            x = torch.randn(batch, 128, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)
            for threads in (1, 2):
                torch.set_num_threads(threads)
                alone = torch.cat([copy.deepcopy(block)(x[i : i + 1]) for i in range(batch)])
                assert testing.norm_error(block(x), alone.double()) <= 1e-5, (batch, size, threads)


def test_derived_values_of_each_algorithm_are_kept_apart(kernels: ModuleType, generator: torch.Generator) -> None:
    """One weight under every algorithm in turn, twice: three packings, each used again."""
    case = ConvCase(5, 19, (6, 7), (3, 3), padding=(1, 1))
    operands = testing.integer_operands(case, torch.float32, generator)
    derived.clear()
    expected = reference.conv_bias_add_relu(*operands, **case.parameters)
    for algorithm in ("direct", *WINOGRAD, "direct", *WINOGRAD):
        _settings.change(algorithm=algorithm)
        y = fused_resnet.conv_bias_add_relu(*operands, **case.parameters)
        assert torch.allclose(y, expected, rtol=0, atol=0 if algorithm != "winograd4" else 1e-3)
    (kept,) = derived._beside.values()
    assert len(kept.entries()) == 3
