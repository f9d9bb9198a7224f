"""Max pooling by our own kernels: without gradients in either memory format, with them in channels_last."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _settings
from .._compat import GLOBAL_HOOKS, HOOKS, is_in_memory, nobody_listens
from .._extension import cpu
from ..ops.role import Rectified
from ..ops.schema import relu_backward
from ..ops.spec import LEGAL_DTYPES, address, dtype_name, is_channels_last

# Inputs of fewer elements, in contiguous memory and in channels_last: the module's whole call takes less than our checks (bench/pooling.py).
FEW, FEW_CHANNELS_LAST = 4096, 20480

SETTINGS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_read = operator.itemgetter(*SETTINGS)


class Window(NamedTuple):
    """What steers a pooling. Sizes in pixels: height, width."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    ceil_mode: bool

    def output(self, like: Tensor) -> Tensor | None:
        """The output without memory, of an input [N, C, H, W] without memory; None where PyTorch refuses it.

        By PyTorch's rules (aten/src/ATen/native/Pool.h). Its own function for tensors without memory is not asked: it imports the symbolic
        shapes of torch.fx, 800 modules, which take a second and 67 MiB.
        """
        sizes = [
            _output_size(size, kernel, stride, padding, self.ceil_mode)
            for size, kernel, stride, padding in zip(like.shape[2:], self.kernel, self.stride, self.padding, strict=True)
        ]
        if None in sizes or like.shape[1] == 0:
            return None
        memory_format = torch.channels_last if is_channels_last(like) else torch.contiguous_format
        return torch.empty((*like.shape[:2], *sizes), dtype=like.dtype, device="meta", memory_format=memory_format)  # type: ignore[arg-type]


def _output_size(size: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> int | None:
    """Windows along one axis. The last one may reach beyond the padding with ``ceil_mode``, but not begin there."""
    if size < 1 or kernel < 1 or stride < 1 or not 0 <= padding <= kernel // 2:
        return None
    count = (size + 2 * padding - kernel + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (count - 1) * stride >= size + padding:
        count -= 1
    return count if count > 0 else None


def mean_of(like: Tensor) -> Tensor:
    """The mean of each channel of [N, C, H, W] as a map of one pixel, without memory; strides as ``F.adaptive_avg_pool2d`` gives them."""
    n, c = like.shape[:2]
    strides = (c, 1, c, c) if is_channels_last(like) else (c, 1, 1, 1)
    return torch.empty_strided((n, c, 1, 1), strides, dtype=like.dtype, device="meta")


def window_of(module: nn.MaxPool2d) -> Window | None:
    """The settings of a plain ``nn.MaxPool2d`` as they are now; None where our kernel is not for them."""
    assert cpu is not None
    try:
        *sizes, ceil_mode, return_indices = _read(module.__dict__)
    except KeyError:
        return None
    kernel, stride, padding, dilation = map(_pair, sizes)
    if kernel is None or stride is None or padding is None or dilation != (1, 1) or type(ceil_mode) is not bool or return_indices is not False:
        return None
    return Window(kernel, stride, padding, ceil_mode) if kernel[0] * kernel[1] <= cpu.MaxPool.MOST_TAPS else None


class PoolInTraining(torch.autograd.Function):
    """Without indices: which element of a window was the largest, its input tells again, which the ReLU in front keeps as well. The gradient
    goes through that ReLU at its end, where there is one (``reads``)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, plans: _settings.Plans, window: Window, plan: Any, reads: Rectified | None, x: Tensor
    ) -> Tensor:
        ctx.plans, ctx.window, ctx.reads = plans, window, reads
        ctx.save_for_backward(x)
        return _run(plan, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        kernel, stride, padding, ceil_mode = ctx.window
        masked = ctx.reads is not None
        if nobody_listens(grad, x, but_for_profiler=True) and grad.dtype == x.dtype:
            grad = grad.contiguous(memory_format=torch.channels_last)
            if grad.stride(1) != 1:  # of one channel, whose stride says nothing
                grad = grad.as_strided(grad.shape, (grad.stride(0), 1, *grad.stride()[2:]))
            key = (ctx.window, masked, x.shape, x.stride(), grad.stride(), x.dtype, torch.get_num_threads(), _settings.number)
            gradient = ctx.plans.kept.get(key)
            if gradient is None:
                gradient = ctx.plans.make(key, lambda: _gradient(ctx.window, x, grad, masked))
            result = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
            gradient.run(address(grad, "the gradient of the pooling"), address(x, "the input of the pooling"), result.data_ptr())
            return None, None, None, None, result
        with torch.no_grad():
            _, indices = F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil_mode, return_indices=True)
        found = torch.ops.aten.max_pool2d_with_indices_backward(grad, x.detach(), kernel, stride, padding, (1, 1), ceil_mode, indices)
        return None, None, None, None, relu_backward(found, x, False)[0] if masked else found


def max_pool(
    plans: _settings.Plans, module: nn.MaxPool2d, x: Tensor, trained: bool = False, reads: Rectified | None = None
) -> Tensor | None:
    """What ``module``, a plain ``nn.MaxPool2d``, makes of ``x``; None where it is for the module itself: the same function, and its errors.
    Of equal zeros of both signs either may be the largest. trained: nobody listens, but gradients may be wanted. reads: the ReLU whose
    output ``x`` is, if nobody else reads it."""
    if cpu is None or not isinstance(x, Tensor) or not x.is_cpu:
        return None
    trains = trained and type(x) is Tensor and x.layout is torch.strided and x.requires_grad
    if not (_has_gradient(x) if trains else nobody_listens(x)):
        return None
    if x.dim() != 4 or x.numel() < (FEW_CHANNELS_LAST if x.stride(1) == 1 else FEW):
        return None
    attributes = module.__dict__
    # What was quiet when the network was looked at may have been changed by a module that ran before in this call.
    if any(GLOBAL_HOOKS) or "forward" in attributes or any([attributes.get(name) for name in HOOKS]):
        return None
    window = window_of(module)
    if window is None:
        return None
    key = (window, x.shape, x.stride(), x.dtype, torch.get_num_threads(), _settings.number)
    plan = plans.kept.get(key, _settings.UNKNOWN)
    if plan is _settings.UNKNOWN:
        plan = plans.make(key, lambda: _plan(window, x))
    if plan is None:
        return None
    if not trains:
        return _run(plan, x)
    y: Tensor = PoolInTraining.apply(plans, window, plan, reads, x)
    if reads is not None:
        reads.reader_masks = True
    return y


def _has_gradient(x: Tensor) -> bool:
    """Whether our kernel is for the gradient in ``x``."""
    dense = x.dim() == 4 and x.numel() > 0 and x.stride(1) == 1 and x.is_contiguous(memory_format=torch.channels_last)
    return dense and x.dtype in (torch.float32, torch.float64) and is_in_memory(x)


def _run(plan: Any, x: Tensor) -> Tensor:
    pool, shape, strides = plan
    y = x.new_empty_strided(shape, strides)
    pool.run(address(x, "the input of the pooling"), y.data_ptr())
    return y


def _gradient(window: Window, x: Tensor, grad: Tensor, masked: bool) -> Any:
    assert cpu is not None
    sizes = window[:3]
    return cpu.MaxPoolGradient(
        dtype_name(x.dtype), x.shape, grad.shape, *sizes, x.stride(), grad.stride(), masked, torch.get_num_threads()
    )


def _pair(value: Any) -> tuple[int, int] | None:
    """A size for both directions or one for each; None for whatever else a module may hold."""
    if type(value) is int:
        return value, value
    if type(value) is tuple and len(value) == 2 and type(value[0]) is int and type(value[1]) is int:
        return value
    return None


def _plan(window: Window, x: Tensor) -> Any:
    """The pooling, and the output's shape and strides."""
    assert cpu is not None
    if x.dtype not in LEGAL_DTYPES["cpu"] or x.numel() == 0:
        return None
    y = window.output(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"))
    if y is None:
        return None
    channels = x.stride(1) == 1 and y.stride(1) == 1
    if not channels and not x.stride(3) == y.stride(3) == 1:
        return None
    sizes = window[:3]
    pool = cpu.MaxPool(dtype_name(x.dtype), x.shape, y.shape, *sizes, x.stride(), y.stride(), channels, torch.get_num_threads())
    return pool, y.shape, y.stride()
