"""The contenders on a GPU: eager PyTorch, torch.compile with max-autotune, cuDNN's own fusion, and ours."""

from __future__ import annotations

import contextlib
import copy
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .. import _plain, _settings, ops
from ..cases import ConvCase, Operands

DEPENDENT = "ours, dependent"  # launched so that a kernel starts while the one before it ends: a setting that is off
OURS = ("ours", "ours, bias only")
TILE = "tile "  # before a kernel's name: that kernel, whatever the choice is; neither ours nor a peer
CONVOLUTION = ("eager", "channels_last", "compile", "cudnn", "ours")
MODULE = ("channels_last", "folded", "compile", "cudnn", *OURS, DEPENDENT)


def is_peer(name: str) -> bool:
    return name not in OURS and name != DEPENDENT and not name.startswith(TILE)


class Left(Exception):
    """A contender that has no part in this case, with the reason."""


class _TooLong(BaseException):
    """What interrupts: compilers hold on to an Exception, or take it for one of theirs."""


@contextlib.contextmanager
def at_most(seconds: float, what: str) -> Iterator[None]:
    """Interrupt what takes longer, with TimeoutError: a compilation. In the main thread only, where Python hears signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1), 5.0)  # and again, where it got lost
    try:
        yield
    except _TooLong:
        raise TimeoutError(f"{what} took more than {seconds:.0f} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def optimised(function: Any) -> Any:
    """torch.compile at its best: every kernel tuned, weights constant (freezing, which wants ``no_grad``). CUDA graphs are made by
    whoever times, of all contenders alike."""
    import torch._inductor.config as inductor

    inductor.freezing = True
    torch.compiler.reset()
    return torch.compile(function, mode="max-autotune-no-cudagraphs", dynamic=False)


def warm(call: Callable[[], Any], limit: float) -> float:
    """The first call of what compiles, within ``limit`` seconds; how long it took."""
    start = time.perf_counter()
    with at_most(limit, "compiling"):
        call()
    return time.perf_counter() - start


# ---------------------------------------------------------------------------------------------------------------------
# One convolution and its end
# ---------------------------------------------------------------------------------------------------------------------


def operands(case: ConvCase, dtype: torch.dtype, device: torch.device) -> Operands:
    """As ``case.make``, drawn on the device, in channels_last."""

    def normal(shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
        t = (torch.randn(shape, device=device, dtype=torch.float32) * scale).to(dtype)
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t

    return Operands(
        normal(case.input_shape),
        normal(case.weight_shape, case.reduction**-0.5),
        normal((case.outputs,)) if case.bias else None,
        normal(case.output_shape) if case.shortcut else None,
    )


def as_nchw(given: Operands) -> Operands:
    return Operands(*(None if t is None else t.contiguous() for t in given))  # type: ignore[arg-type]


def eager_function(case: ConvCase) -> Callable[..., Tensor]:
    """As a block in eager mode does it: the sum and the ReLU write over the convolution's output."""
    geometry = {key: value for key, value in case.parameters.items() if key != "relu"}

    def function(x: Tensor, weight: Tensor, bias: Tensor | None, shortcut: Tensor | None) -> Tensor:
        y = F.conv2d(x, weight, bias, **geometry)
        if shortcut is not None:
            y += shortcut
        return F.relu_(y) if case.relu else y

    return function


def cudnn_function(case: ConvCase) -> Callable[..., Tensor]:
    if not case.relu:
        raise Left("cuDNN's fusion is with a ReLU")
    if isinstance(case.padding, str):
        raise Left("cuDNN's fusion has no such padding")
    geometry = list(case.stride), list(case.padding), list(case.dilation), case.groups

    def function(x: Tensor, weight: Tensor, bias: Tensor | None, shortcut: Tensor | None) -> Tensor:
        if shortcut is None:
            return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
        return torch.cudnn_convolution_add_relu(x, weight, shortcut, 1.0, bias, *geometry)

    return function


def our_function(case: ConvCase) -> Callable[..., Tensor]:
    parameters = case.parameters
    return lambda x, weight, bias, shortcut: ops.conv_bias_add_relu(x, weight, bias, shortcut, **parameters)


def convolution(name: str, case: ConvCase, sets: list[Operands], device: torch.device) -> Callable[[int], Tensor]:
    """A contender of one convolution: what it computes on the operands of this number."""
    if name == "cudnn" and device.type != "cuda":
        raise Left("cuDNN is for CUDA devices")
    function = {"cudnn": cudnn_function, "ours": our_function}.get(name, eager_function)(case)
    mine = [as_nchw(given) for given in sets] if name == "eager" else sets
    if name == "compile":
        function = optimised(function)
    return lambda i: function(*mine[i])


# ---------------------------------------------------------------------------------------------------------------------
# Blocks and networks
# ---------------------------------------------------------------------------------------------------------------------


def folded(model: nn.Module) -> nn.Module:
    """A copy of a model in eval mode with each batch norm folded into the convolution before it: convolutions with biases."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        names = [(f"conv{i}", f"bn{i}") for i in (1, 2, 3)] + [("0", "1")]
        for conv, norm in names:
            first, second = getattr(module, conv, None), getattr(module, norm, None)
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                setattr(module, conv, fuse_conv_bn_eval(first, second))
                setattr(module, norm, nn.Identity())
    return model


class CudnnBlock(nn.Module):
    """A residual block of the plain networks, folded, through cuDNN's fusion: the way to use it by hand."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        assert isinstance(block, (_plain.BasicBlock, _plain.Bottleneck))
        self.convolutions = nn.ModuleList(getattr(block, f"conv{i}") for i in (1, 2, 3) if hasattr(block, f"conv{i}"))
        self.downsample = block.downsample

    def forward(self, x: Tensor) -> Tensor:
        *first, last = self.convolutions
        y = x
        for conv in first:
            y = _cudnn(conv, y)
        shortcut = x if self.downsample is None else self.downsample(x)
        return _cudnn(last, y, shortcut)


def _cudnn(conv: Any, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
    geometry = list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups
    if shortcut is None:
        return torch.cudnn_convolution_relu(x, conv.weight, conv.bias, *geometry)
    return torch.cudnn_convolution_add_relu(x, conv.weight, shortcut, 1.0, conv.bias, *geometry)


def _through_cudnn(model: nn.Module) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (_plain.BasicBlock, _plain.Bottleneck)):
                setattr(parent, name, CudnnBlock(child))
    return model


def fused(model: nn.Module) -> nn.Module:
    """Converted by ``fuse_``; every residual block of it, or it says which were not."""
    from ..fusion import fuse_

    blocks = sum(isinstance(m, (_plain.BasicBlock, _plain.Bottleneck)) for m in model.modules())
    report = fuse_(model)
    if len(report.fused) < blocks:
        raise RuntimeError(f"only {len(report.fused)} of {blocks} residual blocks were fused")
    return model


def module(name: str, model: nn.Module, dtype: torch.dtype, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A contender of a block or network, given in eval mode and float32 with batch norm: a function of the input."""
    if name == "cudnn" and device.type != "cuda":
        raise Left("cuDNN is for CUDA devices")
    bias_only = name in ("folded", "cudnn", "ours, bias only")
    # In a container, so that a model that is itself a block can be replaced.
    mine: nn.Module = nn.Sequential(folded(model) if bias_only else copy.deepcopy(model))
    mine = mine.requires_grad_(False).to(device, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if name in OURS:
        mine = fused(mine)
    elif name == DEPENDENT:
        ours = fused(mine)

        def dependent(x: Tensor) -> Tensor:
            with _settings.using(cuda_dependent=True):
                output: Tensor = ours(x)
                return output

        return dependent
    elif name == "cudnn":
        mine = _through_cudnn(mine)
    elif name == "compile":
        return optimised(mine)
    return mine
