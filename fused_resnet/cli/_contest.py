"""One case of a benchmark: the data that every contender gets, and how far from float64 its results may be.

The case is prepared once and saved to a file, from which each contender's process reads it; so all have the same values.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _plain, cases, testing
from ..cases import BlockCase, ConvCase
from ..testing.compare import accumulator, unit_roundoff
from ._common import finite


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


Case = ConvCase | BlockCase | NetworkCase


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


@dataclass(frozen=True)
class Task:
    """What a contender computes: ``module(*inputs)``, contiguous; in training also the gradients, for ``grad`` at the output."""

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

    def run(self, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """The results in plain PyTorch, in this dtype: the output, in training followed by the gradients."""
        module, inputs, grad = copy.deepcopy(self.module), self.inputs, self.grad
        if dtype is not None:
            module, inputs, grad = module.to(dtype), tuple(t.to(dtype) for t in inputs), grad.to(dtype)
        return step(module.train(self.mode == "train"), inputs, grad, self.mode)


def step(module: nn.Module, inputs: tuple[Tensor, ...], grad: Tensor, mode: str) -> tuple[Tensor, ...]:
    """One call of a module, forward only or forward and backward."""
    if mode == "forward":
        with torch.no_grad():
            return (module(*inputs),)
    leaves = [t.detach().requires_grad_() for t in inputs]
    output = module(*leaves)
    return output.detach(), *torch.autograd.grad(output, [*leaves, *module.parameters()], grad)


def _task(case: Case, batch: int, dtype: torch.dtype, mode: str, seed: int) -> Task:
    generator = torch.Generator().manual_seed(seed)
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


@dataclass
class Contest:
    """A task, its results in float64, and how far from them a contender may be.

    Results are the output and in training the gradients after it. Errors are relative. The output's is the largest
    difference over the largest value; ``allowed``: twice the larger of eager's error and of what the sums are expected to
    lose, plus the rounding of the result. Where a pre-activation is within that error of 0, its ReLU may let the gradient
    pass in one implementation and not in the other, and both are right. Gradients are therefore compared in the 2-norm, and
    ``allowed_gradient`` adds what such elements make: the square root of their expected share of a layer's outputs (a density
    of about 2 / largest value, times the error, three elements at least), over ``layers`` layers.
    """

    task: Task
    truth: tuple[Tensor, ...]
    scale: float
    layers: int
    allowed: float = math.inf
    allowed_gradient: float = math.inf

    def __post_init__(self) -> None:
        peer, peer_gradient = self._errors(self.task.run())
        self.allowed = 2 * max(peer, self.scale) + unit_roundoff(self.task.dtype)
        flips = 2 * max(peer, self.scale) + 3 / max(self.truth[0].numel(), 3)
        self.allowed_gradient = 2 * max(peer_gradient, self.scale) + (self.layers * flips) ** 0.5

    def errors(self, results: tuple[Tensor, ...]) -> dict[str, float | None]:
        """A contender's errors (null: not finite): of the output and, in training, the largest of a gradient."""
        output, gradient = self._errors(results)
        found = {"error": finite(output)}
        if len(self.truth) > 1:
            found["gradient_error"] = finite(gradient)
        return found

    def _errors(self, results: tuple[Tensor, ...]) -> tuple[float, float]:
        if len(results) != len(self.truth):
            return math.inf, math.inf
        pairs = list(zip(results, self.truth, strict=True))
        return testing.relative_error(*pairs[0]), max((testing.norm_error(*pair) for pair in pairs[1:]), default=0.0)

    def ok(self, errors: dict[str, float | None]) -> bool:
        """Whether a contender's errors are allowed."""
        limits = {"error": self.allowed, "gradient_error": self.allowed_gradient}
        return all(value is not None and value <= limits[name] for name, value in errors.items())


def prepare(case: Case, batch: int, dtype: torch.dtype, mode: str, seed: int) -> Contest:
    """The contest of one case. Ours is compared with eager even if eager is not timed."""
    task = _task(case, batch, dtype, mode, seed)
    if isinstance(case, ConvCase):
        reduction, layers = case.reduction, 1
    else:
        # Additions that an output's error passes through, one layer after the other.
        reduction, layers = sum(conv.reduction for conv in case.convs()), len(case.convs())
    if mode == "train":  # gradients sum over the map too
        reduction += (task.grad if isinstance(case, ConvCase) else task.inputs[0])[:, 0].numel()
    # Errors of random sign in a sum of this many terms, where the result's largest value is 1.
    scale = unit_roundoff(accumulator(dtype)) * reduction**0.5
    return Contest(task, task.run(torch.float64), scale, layers)
