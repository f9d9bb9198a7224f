"""Instruction sets: what was asked for is what runs.

What is trusted: ``plan.kernel.isa``, which the compiled module takes from the table whose function pointers the plan holds.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import pytest
import torch
from _calls import DTYPES, FORMATS, Calls, laid_out, name, run_python

import fused_resnet
from fused_resnet import _settings, reference, testing
from fused_resnet._extension import cpu
from fused_resnet.cases import ConvCase
from fused_resnet.ops import plans

AT_IMPORT = None if cpu is None else cpu.isa()

CASE = ConvCase(5, 19, (6, 7), (3, 3), padding=(1, 1), shortcut=True, batch=2)


def _plans_made(case: ConvCase, dtype: torch.dtype, memory_format: torch.memory_format, dispatched: bool) -> list[object]:
    """The kernels of the plans that one call makes; checked against the reference."""
    operands = laid_out(testing.integer_operands(case, dtype, torch.Generator().manual_seed(9)), memory_format)
    plans.convolution_plans.kept.clear()
    if dispatched:
        with Calls():
            ours = fused_resnet.conv_bias_add_relu(*operands, **case.parameters)
    else:
        ours = fused_resnet.conv_bias_add_relu(*operands, **case.parameters)
    result = testing.compare_exact(ours, reference.conv_bias_add_relu(*operands, **case.parameters))
    assert result, result.reason
    return [plan.kernel for plan in plans.convolution_plans.kept.values()]


DESCRIPTIONS = {"direct": "direct, input rows packed", "winograd2": "Winograd F(2x2, 3x3)"}


@pytest.mark.smoke
@pytest.mark.parametrize("algorithm", DESCRIPTIONS, indirect=True)
@pytest.mark.parametrize("dispatched", [False, True], ids=["direct call", "through the dispatcher"])
@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_the_plan_is_of_this_instruction_set(
    isa: str, algorithm: str, dtype: torch.dtype, memory_format: torch.memory_format, dispatched: bool
) -> None:
    (kernel,) = _plans_made(CASE, dtype, memory_format, dispatched)
    assert kernel is not None, "the general path ran"
    assert kernel.isa == isa  # type: ignore[attr-defined]
    assert kernel.algorithm == algorithm  # type: ignore[attr-defined]
    assert kernel.describe().startswith(DESCRIPTIONS[algorithm])  # type: ignore[attr-defined]


def test_groups_make_no_plan(isa: str) -> None:
    case = ConvCase(8, 16, (6, 7), (3, 3), padding=(1, 1), groups=2, shortcut=True, batch=2)
    plans = _plans_made(case, torch.float32, torch.channels_last, False)
    assert plans
    assert not any(plans)


@pytest.mark.parametrize("algorithm", DESCRIPTIONS, indirect=True)
def test_changing_the_instruction_set_changes_plan_and_packing(kernels: ModuleType, algorithm: str) -> None:
    """One weight under each instruction set in turn, and back: their packings differ, the results do not."""
    operands = testing.integer_operands(CASE, torch.float32, torch.Generator().manual_seed(9))
    expected = reference.conv_bias_add_relu(*operands, **CASE.parameters)
    seen = []
    for isa in (*kernels.available_isas(), *kernels.available_isas()):
        _settings.use_isa(isa)
        plans.convolution_plans.kept.clear()
        assert torch.equal(fused_resnet.conv_bias_add_relu(*operands, **CASE.parameters), expected)
        (plan,) = plans.convolution_plans.kept.values()
        seen.append(plan.kernel.isa)
    assert seen == [*kernels.available_isas()] * 2


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="asks Linux what the processor has")
def test_every_instruction_set_of_the_processor_is_there(kernels: ModuleType) -> None:
    isas = kernels.available_isas()
    assert isas[0] == "scalar"
    assert len(set(isas)) == len(isas)
    flags = Path("/proc/cpuinfo").read_text().split()
    for isa, needed in (("avx2", {"avx2", "fma"}), ("avx512", {"avx512f", "avx512bw", "avx512dq", "avx512vl"})):
        assert (isa in isas) == (needed <= set(flags))


CODE = """
import torch, fused_resnet
from fused_resnet import _extension, reference
from fused_resnet.ops import plans
x, w, b, s = torch.ones(1, 4, 6, 6), torch.ones(20, 4, 3, 3), torch.ones(20), torch.ones(1, 20, 6, 6)
assert torch.equal(fused_resnet.conv_bias_add_relu(x, w, b, s, padding=1), reference.conv_bias_add_relu(x, w, b, s, padding=1))
(plan,) = plans.convolution_plans.kept.values()
print(_extension.cpu.isa(), plan.kernel.isa)
"""


def test_environment_variable(kernels: ModuleType) -> None:
    isas = kernels.available_isas()
    for wanted in {isas[0], isas[len(isas) // 2]}:
        done = run_python(CODE, FUSED_RESNET_ISA=wanted)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.split() == [wanted, wanted]
    if not os.environ.get("FUSED_RESNET_ISA"):
        assert isas[-1] == AT_IMPORT, "unset, the widest instruction set is in force"
