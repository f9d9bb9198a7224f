"""What the tests of both gradients of a convolution share: ``Of("input")`` and ``Of("weight")``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import torch
from _calls import FORMATS, run_python
from torch import Tensor

from fused_resnet import _extension, reference, testing
from fused_resnet.cases import ConvCase
from fused_resnet.ops.cpu import CpuBackend
from fused_resnet.ops.gradients import Gradient, gradient_spec
from fused_resnet.ops.spec import Operand, geometry_of_call

Make = Callable[[ConvCase, torch.dtype, torch.Generator], tuple[Tensor, Tensor]]  # dy and the other operand


class Of:
    """The gradient in one operand; ``other``: the one that it is made with."""

    def __init__(self, operand: Operand) -> None:
        self.operand: Operand = operand

    def size(self, case: ConvCase) -> tuple[int, ...]:
        return case.input_shape if self.operand == "input" else case.weight_shape

    def plan(
        self,
        case: ConvCase,
        grad: Tensor,
        other: Tensor,
        memory_format: torch.memory_format = FORMATS[0],
        end: Tensor | None = None,
        masked: bool = False,
        ours: bool = True,
    ) -> Gradient:
        """Our kernel, also where the library's is chosen, or the library's."""
        weight = torch.empty(case.weight_shape, device="meta")
        geometry = geometry_of_call(weight, case.stride, case.padding, case.dilation, case.groups)
        spec = gradient_spec(self.operand, grad, other, self.size(case), memory_format, geometry, end)
        backend = CpuBackend(_extension.cpu, _extension.missing)
        return Gradient(self.operand, spec, backend, backend.gradient_plan(self.operand, spec, masked) if ours else None, masked)

    def ours(self, case: ConvCase, grad: Tensor, other: Tensor, memory_format: torch.memory_format = FORMATS[0]) -> Tensor:
        return self.plan(case, grad, other, memory_format)(grad, other)

    def truth(self, case: ConvCase, grad: Tensor, other: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """PyTorch's, in float64; in another dtype what the library loses."""
        leaf = torch.zeros(self.size(case), dtype=dtype, requires_grad=True)
        other = other.detach().to(dtype)
        operands = (leaf, other) if self.operand == "input" else (other, leaf)
        y = reference.conv_bias_add_relu(*operands, None, None, **{**case.parameters, "relu": False})
        return torch.autograd.grad(y, leaf, grad.to(dtype))[0]

    def failures(self, cases: Iterable[ConvCase], make: Make, dtype: torch.dtype, memory_format: torch.memory_format) -> list[str]:
        """Where ours is not the truth, element by element, or lies otherwise than it should."""
        found, different = [], 0
        generator = torch.Generator().manual_seed(3)
        for case in cases:
            grad, other = make(case, dtype, generator)
            expected = self.truth(case, grad, other).to(dtype)
            different += int(expected.count_nonzero())
            result = self.ours(case, *(t.contiguous(memory_format=memory_format) for t in (grad, other)), memory_format)
            comparison = testing.compare_exact(result, expected)
            if not comparison:
                found.append(f"{case.name}: {comparison.reason}")
            elif result.stride() != torch.empty(result.shape, memory_format=memory_format).stride():
                found.append(f"{case.name}: strides {result.stride()}")
        assert different > 0
        return found

    def check_bits(self, case: ConvCase, grad: Tensor, other: Tensor) -> None:
        """The same whatever the number of threads, again and again, beside other callers, and in either memory format."""
        torch.set_num_threads(1)
        first = self.ours(case, grad, other)
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(self.ours(case, grad, other), first), threads
        last = [t.contiguous(memory_format=torch.channels_last) for t in (grad, other)]
        assert torch.equal(self.ours(case, *last, torch.channels_last), first)
        torch.set_num_threads(2)
        plan = self.plan(case, grad, other)
        same: list[bool] = []

        def call() -> None:
            same.extend(torch.equal(plan(grad, other), first) for _ in range(5))

        others = [threading.Thread(target=call) for _ in range(3)]
        for thread in others:
            thread.start()
        for thread in others:
            thread.join()
        assert same == [True] * 15


NO_MEMORY = """
import resource, torch, fused_resnet
torch.set_num_threads(1)
op, operands, arguments = CALL
before = op(*operands, *arguments)
fused_resnet.clear_derived()
limit = resource.getrlimit(resource.RLIMIT_AS)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + LEFT, limit[1]))
try:
    op(*operands, *arguments)
except MemoryError:
    print("MemoryError")
resource.setrlimit(resource.RLIMIT_AS, limit)
assert torch.equal(op(*operands, *arguments), before)
"""


def check_without_memory(call: str, left: int) -> None:
    """MemoryError before any work where only so many bytes are left, and the next call works. call: operator, operands and other arguments."""
    done = run_python(NO_MEMORY.replace("CALL", call).replace("LEFT", str(left)), MALLOC_ARENA_MAX="1")
    assert done.stdout.strip() == "MemoryError", done.stderr[-2000:]
