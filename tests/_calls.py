"""What the tests of the operators share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import fused_resnet
from fused_resnet import _extension, reference, testing, why_not
from fused_resnet.cases import ConvCase, Operands
from fused_resnet.ops.cpu import CpuBackend, CpuPlan
from fused_resnet.ops.spec import geometry_of_call, spec_of

ROOT = Path(__file__).parent.parent
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
FORMATS = (torch.contiguous_format, torch.channels_last)

CONV = torch.ops.fused_resnet.conv_bias_add_relu.default
PASS = torch.ops.fused_resnet.bias_add_relu.default
MASK = torch.ops.fused_resnet.relu_backward.default
INPUT_GRADIENT = torch.ops.fused_resnet.conv_input_gradient.default
WEIGHT_GRADIENT = torch.ops.fused_resnet.conv_weight_gradient.default


def name(value: object) -> str:
    """For pytest's ids: a case, dtype or memory format."""
    return str(getattr(value, "name", value)).removeprefix("torch.")


def backward_nodes(y: Tensor) -> list[Any]:
    """The nodes of autograd's graph behind a result, each once."""
    found: dict[Any, None] = {}
    todo: list[Any] = [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found[node] = None
            todo += [following for following, _ in node.next_functions]
    return list(found)


def nodes(y: Tensor) -> list[str]:
    """Their names."""
    return [node.name() for node in backward_nodes(y)]


def laid_out(operands: Operands, memory_format: torch.memory_format) -> Operands:
    """All 4-d operands in one memory format."""
    return Operands(
        *(t.contiguous(memory_format=memory_format) if t is not None and t.dim() == 4 else t for t in operands)
    )  # type: ignore[arg-type]


def plan_of(
    operands: Operands,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    relu: bool = True,
) -> CpuPlan:
    """Our kernel for a call, also where the general path is chosen for its speed. ``.kernel`` tells about it."""
    assert groups == 1
    spec = spec_of(*operands, geometry_of_call(operands.weight, stride, padding, dilation, groups), relu)
    return CpuPlan(spec, CpuBackend(_extension.cpu, _extension.missing))


def kernel_function(input: Tensor, weight: Tensor, bias: Any, shortcut: Any, **parameters: Any) -> Tensor:
    """``conv_bias_add_relu`` through our kernel, whatever path would be chosen."""
    operands = Operands(input, weight, bias, shortcut)
    return plan_of(operands, **parameters)(*operands)


def functions(operands: Operands, **parameters: Any) -> Iterator[Callable[..., Tensor]]:
    """The public function; and our kernel as well, where a call with groups = 1 would be given to the library."""
    yield fused_resnet.conv_bias_add_relu
    if parameters.get("groups", 1) == 1 and why_not(*operands, **parameters):
        yield kernel_function


def compare_all(
    cases: Iterable[ConvCase], make: Callable[[ConvCase], Operands], exact: bool
) -> tuple[int, list[str]]:
    """Every case against the reference: how many comparisons, and a line for each that failed."""
    count, failures = 0, []
    for case in cases:
        operands = make(case)
        for function in functions(operands, **case.parameters):
            result = testing.compare_forward(function, operands, exact, **case.parameters)
            count += 1
            if not result:
                failures.append(f"{case.name} ({function.__name__}): {result.reason}")
    return count, failures


def eager(operands: Operands, **parameters: Any) -> Tensor:
    return reference.conv_bias_add_relu(*operands, **parameters)


class Calls(TorchDispatchMode):
    """Records every operator that is called, with arguments and result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, result))
        return result

    def of(self, func: Any) -> list[tuple[tuple[Any, ...], Any]]:
        return [(args, result) for f, args, result in self.calls if f is func]


def allocated(call: Callable[[], object]) -> list[int]:
    """Bytes of each allocation that PyTorch's CPU allocator makes during the call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = call()
    del kept
    events = recorded.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]


# Seconds for another process that takes a few: longer is a hang, and no slow or busy machine.
PATIENCE = 600


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A new interpreter with this repository on its path. It must end by itself: a signal fails the test."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    clean = {key: value for key, value in os.environ.items() if not key.startswith("FUSED_RESNET_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=PATIENCE,
        env={**clean, "PYTHONPATH": path, **environment},
    )
    assert done.returncode >= 0, f"ended by signal {-done.returncode}: {done.stderr[-2000:]}"
    return done
