"""Which algorithm is chosen, and why; and numerics, which a process can set."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
from _calls import DTYPES, run_python
from _exact import WINOGRAD, kernel_of, results_of
from _winograd import rounds_transforms
from torch import Tensor

import fused_resnet
import fused_resnet.nn as fnn
from fused_resnet import _settings, testing
from fused_resnet.cases import CONVS, ConvCase


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
