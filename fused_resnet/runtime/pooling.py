"""Max pooling by our own kernel, where no gradient is wanted."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn

from .. import _settings
from .._compat import nobody_listens
from .._extension import cpu
from ..ops.spec import LEGAL_DTYPES, address, dtype_name

_WINDOW = operator.itemgetter("kernel_size", "stride", "padding", "dilation", "ceil_mode")


def max_pool(plans: _settings.Plans, module: nn.MaxPool2d, x: Tensor) -> Tensor | None:
    """What ``module``, a plain ``nn.MaxPool2d``, makes of ``x``; None where it is for the module itself: the same function, and its errors."""
    if cpu is None or not nobody_listens(x) or not x.is_cpu:
        return None
    window = _WINDOW(module.__dict__)
    key = (window, module.return_indices, x.shape, x.stride(), x.dtype, torch.get_num_threads(), _settings.number)
    try:
        plan = plans.kept.get(key, _settings.UNKNOWN)
    except TypeError:  # a list in the place of a tuple
        return None
    if plan is _settings.UNKNOWN:
        plan = plans.make(key, lambda: None if module.return_indices else _plan(window, x))
    if plan is None:
        return None
    pool, shape, strides = plan
    y = x.new_empty_strided(shape, strides)
    pool.run(address(x, "the input of the pooling"), y.data_ptr())
    return y


def _plan(window: tuple[Any, ...], x: Tensor) -> Any:
    """The pooling, and the output's shape and strides."""
    assert cpu is not None
    kernel, stride, padding, dilation = [value if isinstance(value, tuple) else (value, value) for value in window[:4]]
    if x.dtype not in LEGAL_DTYPES["cpu"] or x.numel() == 0 or x.dim() != 4 or dilation != (1, 1):
        return None
    try:
        like = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        y = torch.max_pool2d(like, kernel, stride, padding, dilation, window[4])
    except (RuntimeError, TypeError):
        return None
    channels = x.stride(1) == 1 and y.stride(1) == 1
    if not channels and not x.stride(3) == y.stride(3) == 1:
        return None
    if kernel[0] * kernel[1] > cpu.MaxPool.MOST_TAPS:
        return None
    threads = torch.get_num_threads()
    pool = cpu.MaxPool(
        dtype_name(x.dtype), x.shape, y.shape, kernel, stride, padding, x.stride(), y.stride(), channels, threads
    )
    return pool, y.shape, y.stride()
