"""Fuzz: convolutions of random shape, geometry, layout, dtype, algorithm, threads and instruction set, against float64.

What is trusted: the reference in float64, and the error that ``_winograd.element_scale`` and ``testing.compare_tensors`` allow to
the algorithm that really ran (the plan says which). Data are drawn from a seed, so that a failure is one line to repeat:

    python -c "from test_fuzz import *; check(Call(...))"        in tests/kernels/ with PYTHONPATH=..; the line is printed with the failure

The examples are the same in every run. FUSED_RESNET_FUZZ=100 runs a hundred times as many, and other ones.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from _calls import kernel_function, plan_of
from _winograd import element_scale
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import Tensor

import fused_resnet
from fused_resnet import _settings, testing, why_not
from fused_resnet._extension import cpu
from fused_resnet.cases import ConvCase, Operands

MANY = int(os.environ.get("FUSED_RESNET_FUZZ", "1"))
ISAS = cpu.available_isas() if cpu is not None else ["none"]
DTYPES = ("float32", "bfloat16", "float64")

our_kernel = kernel_function


@dataclass(frozen=True)
class Call:
    """One call, and the settings in force; its repr is what makes it again."""

    case: ConvCase
    dtype: str = "float32"
    input: str = "contiguous"
    weight: str = "contiguous"
    shortcut: str = "contiguous"
    algorithm: str = "auto"
    numerics: str = "fast"
    threads: int = 1
    isa: str = "scalar"
    seed: int = 0


def run(call: Call) -> tuple[Operands, str, Tensor, Tensor]:
    """Operands, the algorithm, the result through our kernel and the public function's."""
    torch.set_num_threads(call.threads)
    _settings.use_isa(call.isa)
    _settings.change(algorithm=call.algorithm)
    fused_resnet.set_numerics(call.numerics)
    case = call.case
    operands = testing.float_operands(case, getattr(torch, call.dtype), torch.Generator().manual_seed(call.seed))
    operands = testing.layout(operands, input=call.input, weight=call.weight, shortcut=call.shortcut)
    kernel = plan_of(operands, **case.parameters).kernel  # type: ignore[attr-defined]
    assert kernel.isa == call.isa
    ours = our_kernel(*operands, **case.parameters)
    return operands, str(kernel.algorithm), ours, fused_resnet.conv_bias_add_relu(*operands, **case.parameters)


def check(call: Call) -> str:
    """Raises AssertionError, with the line that repeats it; or returns the algorithm that ran."""
    repeat = f'python -c "from test_fuzz import *; check({call!r})"'
    operands, algorithm, ours, public = run(call)
    case = call.case
    assert algorithm in (call.algorithm, "direct") or call.algorithm == "auto", repeat
    assert not (call.algorithm == "auto" and call.numerics == "strict" and algorithm == "winograd4"), repeat
    truth, peer = testing.truth_and_peer(operands, **case.parameters)
    scale = element_scale(operands, algorithm, call.isa, **case.parameters)
    # Of many outputs, the largest come from partial sums of three times the usual size, and so do their roundings; in float64
    # the truth has an error of that size too.
    scale *= 6 if call.dtype == "float64" else 3
    result = testing.compare_tensors(ours, truth, peer, scale)
    assert result, f"{algorithm}: {result.reason}\n{repeat}"
    if not why_not(*operands, **case.parameters):
        assert torch.equal(ours, public), f"{algorithm}: the public function gives other bits\n{repeat}"
    eager = torch.nn.functional.conv2d(operands.input, operands.weight, None, case.stride, case.padding, case.dilation)
    assert ours.shape == eager.shape == case.output_shape, repeat
    assert not ours.numel() or ours.stride() == eager.stride(), f"strides {ours.stride()}, eager {eager.stride()}\n{repeat}"
    return algorithm


small = st.integers(1, 9)
sizes = st.one_of(small, st.sampled_from([13, 14, 15, 16, 17, 28, 29, 31, 58]))
channels = st.one_of(small, st.sampled_from([15, 16, 17, 24, 31, 32, 33, 40, 48, 64, 65, 80, 96]))
layouts = st.sampled_from(sorted(testing.LAYOUTS))


ANY = {
    "kernel": [(3, 3), (1, 1), (2, 3), (5, 1), (3, 5), (7, 7), (4, 4)],
    "stride": [(1, 1), (2, 2), (1, 2), (3, 1)],
    "dilation": [(1, 1), (2, 2), (1, 3)],
    "algorithm": ["auto", "direct", "winograd2", "winograd4"],
}
WINOGRAD = {
    "kernel": [(3, 3)],
    "stride": [(1, 1), (1, 1), (2, 2)],
    "dilation": [(1, 1)],
    "algorithm": ["winograd4", "winograd2", "auto"],
}


@st.composite
def calls(draw: st.DrawFn, of: dict[str, Any]) -> Call:
    kernel, stride, dilation, algorithm = (draw(st.sampled_from(of[key])) for key in ("kernel", "stride", "dilation", "algorithm"))
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    # At least as large, padded, as the kernel is wide.
    least = [d * (k - 1) + 1 - 2 * p for k, d, p in zip(kernel, dilation, padding, strict=True)]
    size = (max(draw(sizes), least[0]), max(draw(sizes), least[1]))
    flags = draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
    case = ConvCase(
        draw(channels), draw(channels), size, kernel, stride, padding, dilation,
        bias=flags[0], shortcut=flags[1], relu=flags[2], batch=draw(st.sampled_from([0, 1, 1, 2, 3, 5])),
    )  # fmt: skip
    return Call(
        case, draw(st.sampled_from(DTYPES)), draw(layouts), draw(layouts), draw(layouts), algorithm,
        draw(st.sampled_from(["fast", "fast", "strict"])), draw(st.integers(1, 3)), draw(st.sampled_from(ISAS)), draw(st.integers(0, 999)),
    )  # fmt: skip


@pytest.mark.parametrize("of", [ANY, WINOGRAD], ids=["any", "Winograd"])
def test_convolutions(kernels: object, of: dict[str, Any]) -> None:
    ran: Counter[str] = Counter()

    @settings(
        max_examples=400 * MANY,
        derandomize=MANY == 1,
        deadline=None,
        database=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(calls(of))
    def every(call: Call) -> None:
        note(repr(call))
        ran[check(call)] += 1

    every()
    for algorithm in ("direct",) if of is ANY else ("winograd2", "winograd4"):
        assert ran[algorithm] >= 40 * MANY, ran


def test_a_failure_can_be_repeated(kernels: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line in the message, executed, fails again; and what is wrong with one element is seen."""
    call = Call(ConvCase(5, 7, (6, 9), (3, 3), padding=(1, 1), shortcut=True, batch=2), algorithm="winograd4", isa=ISAS[-1], seed=3)
    assert check(call) == "winograd4"

    def wrong(*arguments: Any, **parameters: Any) -> Tensor:
        y = kernel_function(*arguments, **parameters)
        y[1, 3, 2, 4] += 1e-2
        return y

    monkeypatch.setattr(sys.modules[__name__], "our_kernel", wrong)
    with pytest.raises(AssertionError, match=r"winograd4: error .* beyond") as caught:
        check(call)
    line = next(line.strip() for line in str(caught.value).splitlines() if "python -c" in line)
    code = line.removeprefix('python -c "from test_fuzz import *; ').removesuffix('"')
    assert '"' not in code, "the line would need other quotes"
    with pytest.raises(AssertionError, match="beyond"):
        exec(code, globals())
