"""The contenders that are torch modules: eager, torch.compile, and ours. Each function gets a task and the number of threads."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import conv_bias_add_relu
from ..ops.functions import gradient
from ..ops.spec import is_channels_last
from .contest import Convolution, Gradient, Task, step
from .worker import Built


class _FusedConvolution(Convolution):
    """The same with our operator."""

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        return conv_bias_add_relu(x, self.weight, self.bias, shortcut, relu=self.relu, **self.geometry)


class _FusedGradient(Gradient):
    """The same with our operator."""

    def gradient(self, grad: Tensor, other: Tensor) -> Tensor:
        return gradient(self.operand, grad, other, self.size, is_channels_last(grad), self.geometry)


def convert(module: nn.Module) -> nn.Module:
    """The module with its residual blocks fused, in place where it is not a block itself."""
    from ..fusion import fuse_

    if isinstance(module, Convolution):
        bias = None if module.bias is None else module.bias.detach()
        fused = _FusedConvolution(module.weight.detach(), bias, module.relu, **module.geometry)
        return fused.requires_grad_(module.weight.requires_grad)
    if isinstance(module, Gradient):
        weight = None if module.weight is None else module.weight.detach()
        return _FusedGradient(module.operand, weight, module.size, module.geometry)
    # In a container, so that a module that is itself a block can be replaced.
    holder = nn.Sequential(module)
    fuse_(holder)
    return holder


def _build(
    task: Task,
    threads: int,
    channels_last: bool = False,
    change: Callable[[nn.Module], Any] = lambda module: module,
    context: Callable[[], Any] = torch.inference_mode,
) -> Built:
    torch.set_num_threads(threads)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def ready(t: Tensor) -> Tensor:
        return t.contiguous(memory_format=memory_format) if t.dim() == 4 else t

    # A copy for each contender, so that its caches are its own.
    module = copy.deepcopy(task.module).train(task.mode == "train").to(memory_format=memory_format)  # type: ignore[call-overload]
    inputs, grad = tuple(ready(t) for t in task.inputs), ready(task.grad)
    if task.mode != "forward":
        # What is kept of a weight does not outlive a step of training: each is written before each call, its first element alone.
        written = [p.detach()[(0,) * p.dim()] for p in module.parameters()]
        module = change(module)

        def call() -> tuple[Tensor, ...]:
            if written:
                torch._foreach_mul_(written, 1.0)
            return step(module, inputs, grad, task.mode)

        return Built(call)
    module = change(module.requires_grad_(False))
    return Built(lambda: module(*inputs), lambda output: (output,), context)


def eager(task: Task, threads: int, folder: Path) -> Built:
    return _build(task, threads)


def channels_last(task: Task, threads: int, folder: Path) -> Built:
    return _build(task, threads, channels_last=True)


def compiled(task: Task, threads: int, folder: Path) -> Built:
    """Inductor chooses its own layouts inside; its input stays contiguous."""
    import torch._inductor.config as inductor

    # Freezing, as TORCHINDUCTOR_FREEZING=1 does: weights become constants and are laid out once, as ours are. It applies
    # under no_grad only, and not where weights change.
    inductor.freezing = task.mode == "forward"
    torch.compiler.reset()
    return _build(task, threads, change=torch.compile, context=torch.no_grad)


def fused(task: Task, threads: int, folder: Path) -> Built:
    return _build(task, threads, change=convert)


def fused_channels_last(task: Task, threads: int, folder: Path) -> Built:
    return _build(task, threads, channels_last=True, change=convert)
