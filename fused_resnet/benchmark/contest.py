"""One case of a benchmark: the data that every contender gets, and how far from float64 its results may be.

The case is prepared once and saved to a file, from which each contender's process reads it; so all have the same values.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import _plain, cases, testing
from ..cases import BlockCase, ConvCase
from ..ops.gradients import library_gradient
from ..ops.spec import Geometry, Operand, geometry_of_call, is_channels_last
from ..testing.compare import accumulator, unit_roundoff
from .output import finite


@dataclass(frozen=True)
class NetworkCase:
    """A whole network of the table."""

    name: str

    def flops(self, batch: int = 1) -> int:
        from torch.utils.flop_counter import FlopCounterMode

        size, make = cases.NETWORKS[self.name]
        with torch.device("meta"):
            model, images = make(), torch.empty(batch, 3, size, size)
        with FlopCounterMode(display=False) as counter:
            model.eval()(images)
        return int(counter.get_total_flops())

    def make(self, batch: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        size = cases.NETWORKS[self.name][0]
        return torch.randn(batch, 3, size, size, generator=generator).to(dtype)

    def eager(self, generator: torch.Generator) -> nn.Module:
        return _plain.randomise(cases.NETWORKS[self.name][1](), generator).eval()

    def convs(self) -> tuple[ConvCase, ...]:
        """Of its distinct blocks."""
        return tuple(conv for block in cases.BLOCKS if block.network == self.name for conv in block.convs())


@dataclass(frozen=True)
class GradientCase:
    """The gradient of a convolution in its input or its weight, from its output's, by itself."""

    operand: Operand
    conv: ConvCase

    @property
    def name(self) -> str:
        return f"{self.operand} gradient of {replace(self.conv, bias=True, shortcut=False, relu=True).name}"

    def terms(self, batch: int) -> int:
        """Terms in the sum that makes one element, at most."""
        conv = self.conv.at(batch)
        sizes = (conv.outputs, *conv.kernel) if self.operand == "input" else (batch, *conv.output_shape[2:])
        return math.prod(sizes)

    def flops(self, batch: int = 1) -> int:
        return self.conv.flops(batch)


Case = ConvCase | BlockCase | NetworkCase | GradientCase
FORMATS = (torch.contiguous_format, torch.channels_last)


class Convolution(nn.Module):
    """A convolution and its end as a block in eager mode does it: the sum and the ReLU write over the convolution's output."""

    def __init__(self, weight: Tensor, bias: Tensor | None, relu: bool, **geometry: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.relu = relu
        self.geometry = geometry

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias, **self.geometry)
        if shortcut is not None:
            y += shortcut
        return F.relu_(y) if self.relu else y


class Gradient(nn.Module):
    """The gradient of a convolution in an operand of this size, by the library, in the memory format of its output's. The gradient in the input
    is made with the weight, which a step of training changes; that in the weight with the input."""

    def __init__(self, operand: Operand, weight: Tensor | None, size: Sequence[int], geometry: Geometry) -> None:
        super().__init__()
        self.operand: Operand = operand
        self.weight = None if weight is None else nn.Parameter(weight)
        self.size, self.geometry = torch.Size(size), geometry

    def forward(self, grad: Tensor, input: Tensor | None = None) -> Tensor:
        other = self.weight if input is None else input
        assert other is not None
        return self.gradient(grad, other)

    def gradient(self, grad: Tensor, other: Tensor) -> Tensor:
        memory_format = torch.channels_last if is_channels_last(grad) else torch.contiguous_format
        return library_gradient(self.operand, grad, other, self.size, memory_format, self.geometry)


BACKWARD = ("train", "frozen")  # the modes of a task that go backward too


@dataclass(frozen=True)
class Task:
    """What a contender computes: ``module(*inputs)``, contiguous; in training also the gradients, for ``grad`` at the output.

    mode: "forward"; "train"; "frozen": as train, but with modules in eval mode, whose norms keep their statistics; or "gradient": as forward,
    but the weights change between calls, as they do in training.
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]
    grad: Tensor
    mode: str

    @property
    def dtype(self) -> torch.dtype:
        return self.inputs[0].dtype

    def save(self, path: Path) -> None:
        torch.save(self, path)

    @staticmethod
    def load(path: Path) -> Task:
        # A pickle, but one that the parent process wrote a moment ago into a folder of its own.
        task = torch.load(path, weights_only=False)
        assert isinstance(task, Task)
        return task

    def run(self, dtype: torch.dtype | None = None, memory_format: torch.memory_format = torch.contiguous_format) -> tuple[Tensor, ...]:
        """The results in plain PyTorch, in this dtype and memory format: the output, in training followed by the gradients."""

        def ready(t: Tensor) -> Tensor:
            return t.to(dtype or t.dtype, memory_format=memory_format) if t.dim() == 4 else t.to(dtype or t.dtype)

        module = copy.deepcopy(self.module).to(dtype or self.dtype).to(memory_format=memory_format)  # type: ignore[call-overload]
        return step(module.train(self.mode == "train"), tuple(map(ready, self.inputs)), ready(self.grad), self.mode)


def step(module: nn.Module, inputs: tuple[Tensor, ...], grad: Tensor, mode: str) -> tuple[Tensor, ...]:
    """One call of a module, forward only or forward and backward."""
    if mode not in BACKWARD:
        with torch.no_grad():
            return (module(*inputs),)
    leaves = [t.detach().requires_grad_() for t in inputs]
    output = module(*leaves)
    return output.detach(), *torch.autograd.grad(output, [*leaves, *module.parameters()], grad)


def _task(case: Case, batch: int, dtype: torch.dtype, mode: str, seed: int) -> Task:
    generator = torch.Generator().manual_seed(seed)
    if isinstance(case, GradientCase):
        conv = case.conv.at(batch)
        x, weight, _, _ = conv.make(dtype=dtype, generator=generator)
        geometry = geometry_of_call(weight, conv.stride, conv.padding, conv.dilation, conv.groups)
        grad = torch.randn(conv.output_shape, generator=generator).to(dtype)
        if case.operand == "input":
            return Task(Gradient("input", weight, conv.input_shape, geometry), (grad,), grad, "gradient")
        return Task(Gradient("weight", None, conv.weight_shape, geometry), (grad, x), grad, "gradient")
    if isinstance(case, ConvCase):
        x, weight, bias, shortcut = case.at(batch).make(dtype=dtype, generator=generator)
        module: nn.Module = Convolution(weight, bias, **case.parameters)
        inputs = (x,) if shortcut is None else (x, shortcut)
    else:
        module = case.eager(generator).to(dtype)
        inputs = (case.make(batch, dtype=dtype, generator=generator),)
    with torch.no_grad():
        grad = torch.randn(module(*inputs).shape, generator=generator).to(dtype)
    return Task(module, inputs, grad, mode)


class Undecided(TorchFunctionMode):
    """Each ReLU lets pass by its pre-activation plus noise, of ``share`` of the pre-activations' root mean square: what another
    order of additions, as far from float64, may do to elements next to 0."""

    def __init__(self, share: float, generator: torch.Generator) -> None:
        super().__init__()
        self.share, self.generator = share, generator

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (F.relu, torch.relu, torch.relu_):
            return func(*args, **(kwargs or {}))
        z: Tensor = args[0]
        size = self.share * z.detach().double().square().mean().sqrt()
        noise = size * torch.randn(z.shape, generator=self.generator)
        return z * (z.detach() + noise > 0)


# How often the noise is drawn. What varies between draws is which single elements fall on the other side; the factor 2 of the
# bound is four times as many of them.
DRAWS = 3


@dataclass
class Contest:
    """A task, its results in float64, and how far from them a contender may be.

    Results are the output and in training the gradients after it. Errors are relative. The output's is the largest
    difference over the largest value; ``allowed``: twice the largest of eager's own errors, contiguous and channels_last, and
    of ``scale``, what the sums are expected to lose, plus the rounding of the result. Both memory formats count, for they are the
    same definition added up in another order, and their errors differ: batch norm sums over the map, and ResNet-50 at batch 8 in
    training is 1.2e-5 from float64 contiguous and 5e-5 to 9e-5 channels_last, which depends on the processor.

    Where a pre-activation is within that error of 0, its ReLU may let the gradient pass in one implementation and not in the
    other, and both are right. A single such element moves a gradient by far more than rounding does (3e-3 in ResNet-18; without
    one 7e-6), and eager may have none of them by luck. So eager is run again, ``DRAWS`` times, with ReLUs that decide by
    pre-activations with noise of the size of the output's error (``Undecided``). A gradient's error is the 2-norm of the
    difference over the 2-norm of the gradient, each parameter's for itself, since those near the output pass fewer ReLUs;
    ``allowed_gradients``: twice the largest of eager's in all of these runs, and at least twice ``scale``, plus the rounding.
    """

    task: Task
    truth: tuple[Tensor, ...]
    scale: float
    seed: int = 0
    allowed: float = math.inf
    allowed_gradients: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        roundoff = unit_roundoff(self.task.dtype)
        runs = [self.task.run(memory_format=memory_format) for memory_format in FORMATS]
        peer = max(testing.relative_error(run[0], self.truth[0]) for run in runs)
        self.allowed = 2 * max(peer, self.scale) + roundoff
        if self.task.mode not in BACKWARD:
            return
        share = max(self.scale, *(testing.norm_error(run[0], self.truth[0]) for run in runs))
        generator = torch.Generator().manual_seed(self.seed)
        for i in range(DRAWS):
            with Undecided(share, generator):
                runs.append(self.task.run(memory_format=FORMATS[i % len(FORMATS)]))
        each = zip(*(self._gradient_errors(run) for run in runs), strict=True)
        self.allowed_gradients = tuple(2 * max(self.scale, *errors) + roundoff for errors in each)

    def errors(self, results: tuple[Tensor, ...]) -> dict[str, float | None]:
        """A contender's errors (null: not finite): of the output and, in training, of the gradient that is the farthest for what
        it may be, and its share of that."""
        if len(results) != len(self.truth):
            return {"error": None}
        found = {"error": finite(testing.relative_error(results[0], self.truth[0]))}
        if self.allowed_gradients:
            pairs = zip(self._gradient_errors(results), self.allowed_gradients, strict=True)
            share, error = max((error / allowed if math.isfinite(error) else math.inf, error) for error, allowed in pairs)
            found |= {"gradient_error": finite(error), "gradient_share": finite(share)}
        return found

    def _gradient_errors(self, results: tuple[Tensor, ...]) -> list[float]:
        return [testing.norm_error(*pair) for pair in zip(results[1:], self.truth[1:], strict=True)]

    def ok(self, errors: dict[str, float | None]) -> bool:
        """Whether a contender's errors are allowed."""
        limits = {"error": self.allowed, **({"gradient_error": math.inf, "gradient_share": 1.0} if self.allowed_gradients else {})}
        found = [(errors.get(name), limit) for name, limit in limits.items()]
        return all(value is not None and value <= limit for value, limit in found)


def prepare(case: Case, batch: int, dtype: torch.dtype, mode: str, seed: int) -> Contest:
    """The contest of one case. Ours is compared with eager even if eager is not timed."""
    task = _task(case, batch, dtype, mode, seed)
    # Additions that an output's error passes through, one layer after the other.
    if isinstance(case, GradientCase):
        reduction = case.terms(batch)
    else:
        reduction = case.reduction if isinstance(case, ConvCase) else sum(conv.reduction for conv in case.convs())
    if task.mode in BACKWARD:  # gradients and the statistics of batch norm sum over the map too
        reduction += (task.grad if isinstance(case, ConvCase) else task.inputs[0])[:, 0].numel()
    # Errors of random sign in a sum of this many terms, where the result's largest value is 1.
    scale = unit_roundoff(accumulator(dtype)) * reduction**0.5
    return Contest(task, task.run(torch.float64), scale, seed)
