"""The contenders of a benchmark: one function built in several ways, as calls without arguments that return tensors.

Every contender of a case gets the same values. What a call returns is compared with float64 before anything is timed.
"""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _plain, cases, testing
from ..cases import BlockCase, ConvCase
from ..ops import conv_bias_add_relu
from ..testing.compare import accumulator, unit_roundoff
from ._common import finite

Call = Callable[[], tuple[Tensor, ...]]

EAGER = ("eager", "channels_last")
OURS = ("fused", "fused_channels_last")
CONTENDERS = (*EAGER, "compile", *OURS)


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


def _reduction(case: BlockCase | NetworkCase) -> int:
    """Additions that an output's error passes through, one layer after the other."""
    return sum(conv.reduction for conv in case.convs())


def missing(name: str) -> str:
    """Why this contender cannot run here, or ''."""
    if name == "compile" and not any(shutil.which(compiler) for compiler in ("g++", "c++", "clang++")):
        return "torch.compile needs a C++ compiler and there is none on the path"
    return ""


@dataclass
class Contest:
    """The calls to time, what they must return, and how far from it they may be.

    A call returns its output, and in training the gradients after it. Errors are relative. The output's is the largest
    difference over the largest value; ``allowed``: twice the larger of eager's error and of what the sums are expected to
    lose, plus the rounding of the result. Where a pre-activation is within that error of 0, its ReLU may let the gradient
    pass in one implementation and not in the other, and both are right. Gradients are therefore compared in the 2-norm, and
    ``allowed_gradient`` adds what such elements make: the square root of their expected share of a layer's outputs (a density
    of about 2 / largest value, times the error, three elements at least), over ``layers`` layers.
    """

    calls: dict[str, Call]
    truth: tuple[Tensor, ...]
    scale: float
    layers: int
    dtype: torch.dtype
    eager: Call
    contexts: ExitStack = field(default_factory=ExitStack)
    allowed: float = math.inf
    allowed_gradient: float = math.inf

    def errors(self) -> dict[str, dict[str, float | None]]:
        """The errors of each contender (null: not finite): of the output and, in training, the largest of a gradient."""
        peer, peer_gradient = self._errors(self.eager)
        self.allowed = 2 * max(peer, self.scale) + unit_roundoff(self.dtype)
        flips = 2 * max(peer, self.scale) + 3 / max(self.truth[0].numel(), 3)
        self.allowed_gradient = 2 * max(peer_gradient, self.scale) + (self.layers * flips) ** 0.5
        found = {}
        for name, call in self.calls.items():
            output, gradient = self._errors(call)
            found[name] = {"error": finite(output)}
            if len(self.truth) > 1:
                found[name]["gradient_error"] = finite(gradient)
        return found

    def _errors(self, call: Call) -> tuple[float, float]:
        results = call()
        assert len(results) == len(self.truth)
        pairs = list(zip(results, self.truth, strict=True))
        return testing.relative_error(*pairs[0]), max((testing.norm_error(*pair) for pair in pairs[1:]), default=0.0)

    def ok(self, errors: dict[str, float | None]) -> bool:
        """Whether a contender's errors are allowed."""
        limits = {"error": self.allowed, "gradient_error": self.allowed_gradient}
        return all(value is not None and value <= limits[name] for name, value in errors.items())

    def close(self) -> None:
        self.contexts.close()


def prepare(case: Case, batch: int, dtype: torch.dtype, mode: str, names: list[str], seed: int) -> Contest:
    """The contest of one case. It stays in inference mode (``mode`` "forward") until it is closed."""
    if isinstance(case, ConvCase):
        build, truth, reduction = _operator(case, batch, dtype, mode, seed)
        layers = 1
    else:
        build, truth, reduction = _module(case, batch, dtype, mode, seed)
        layers = len(case.convs())
    contexts = ExitStack()
    calls = {name: build(name) for name in names}
    # Ours is compared with eager even if eager is not timed.
    eager = calls.get("eager") or build("eager")
    if mode == "forward":
        contexts.enter_context(torch.inference_mode())
    # Errors of random sign in a sum of this many terms, where the result's largest value is 1.
    scale = unit_roundoff(accumulator(dtype)) * reduction**0.5
    return Contest(calls, truth, scale, layers, dtype, eager, contexts)


def _format(name: str) -> torch.memory_format:
    # Inductor chooses its own layouts inside; its input stays contiguous.
    return torch.channels_last if name.endswith("channels_last") else torch.contiguous_format


def _eager_convolution(x: Tensor, w: Tensor, b: Tensor | None, s: Tensor | None, relu: bool, **geometry: Any) -> Tensor:
    """As a block in eager mode does it: the sum and the ReLU write over the convolution's output."""
    y = F.conv2d(x, w, b, **geometry)
    if s is not None:
        y += s
    return F.relu_(y) if relu else y


def _operator(case: ConvCase, batch: int, dtype: torch.dtype, mode: str, seed: int) -> tuple[Callable[[str], Call], tuple[Tensor, ...], int]:
    case = case.at(batch)
    operands = case.make(dtype=dtype, generator=torch.Generator().manual_seed(seed))
    grad = torch.randn(case.output_shape, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)

    def call(function: Callable[..., Tensor], memory_format: torch.memory_format, of: torch.dtype = dtype) -> Call:
        def convert(t: Tensor) -> Tensor:
            # A copy for each contender, so that its caches are its own.
            return t.to(of).clone(memory_format=memory_format if t.dim() == 4 else torch.contiguous_format)

        tensors = [None if t is None else convert(t) for t in operands]
        if mode == "forward":
            return lambda: (function(*tensors, **case.parameters),)
        leaves = [t.requires_grad_() for t in tensors if t is not None]
        incoming = convert(grad)

        def step() -> tuple[Tensor, ...]:
            output = function(*tensors, **case.parameters)
            return output.detach(), *torch.autograd.grad(output, leaves, incoming)

        return step

    def build(name: str) -> Call:
        if name == "compile":
            return call(_compiled(_eager_convolution), _format(name))
        return call(conv_bias_add_relu if name in OURS else _eager_convolution, _format(name))

    # In training, gradients sum over the map too.
    reduction = case.reduction + (batch * case.output_shape[2] * case.output_shape[3] if mode == "train" else 0)
    return build, call(_eager_convolution, torch.contiguous_format, torch.float64)(), reduction


def _compiled(function: Any) -> Any:
    import torch._inductor.config as inductor

    # Freezing: weights become constants and are laid out once, as ours are. It applies under no_grad only.
    inductor.freezing = True
    torch.compiler.reset()
    return torch.compile(function)


def _module(
    case: BlockCase | NetworkCase, batch: int, dtype: torch.dtype, mode: str, seed: int
) -> tuple[Callable[[str], Call], tuple[Tensor, ...], int]:
    generator = torch.Generator().manual_seed(seed)
    plain = case.eager(generator).to(dtype)
    x = case.make(batch, dtype=dtype, generator=generator)
    with torch.no_grad():
        grad = torch.randn(plain(x).shape, generator=generator).to(dtype)

    def call(
        module: Callable[[Tensor], Tensor],
        parameters: list[Tensor],
        memory_format: torch.memory_format,
        of: torch.dtype = dtype,
    ) -> Call:
        mine = x.to(of).clone(memory_format=memory_format)
        if mode == "forward":
            return lambda: (module(mine),)
        mine.requires_grad_()
        incoming = grad.to(of)
        if incoming.dim() == 4:
            incoming = incoming.contiguous(memory_format=memory_format)

        def step() -> tuple[Tensor, ...]:
            output = module(mine)
            return output.detach(), *torch.autograd.grad(output, [mine, *parameters], incoming)

        return step

    def ready(name: str, of: torch.dtype = dtype) -> tuple[Any, list[Tensor]]:
        module = copy.deepcopy(plain).to(of).train(mode == "train")
        if name in OURS:
            module = convert(module)
        module = module.to(memory_format=_format(name))  # type: ignore[call-overload]
        parameters = list(module.parameters())
        if mode == "forward":
            module.requires_grad_(False)
        return (_compiled(module) if name == "compile" else module), parameters

    def build(name: str) -> Call:
        return call(*ready(name), _format(name))

    reduction = _reduction(case)
    if mode == "train":
        reduction += x[:, 0].numel()
    with torch.set_grad_enabled(mode == "train"):
        truth = call(*ready("eager", torch.float64), torch.contiguous_format, torch.float64)()
    return build, truth, reduction


def convert(module: nn.Module) -> nn.Module:
    """The module with its residual blocks fused, in place where it is not a block itself."""
    from ..fusion import fuse_

    # In a container, so that a module that is itself a block can be replaced.
    holder = nn.Sequential(module)
    fuse_(holder)
    return holder
