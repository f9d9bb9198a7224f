"""The shortcut without parameters: strided pixels, channels of zeros before and behind."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


class ZeroPadShortcut(nn.Module):
    """The shortcut without parameters (He et al. 2015, section 4.2, option A): strided pixels, zero channels.

    pad: "end" puts the zero channels behind the others, "both" half in front and half behind (the odd one behind).
    x [N, C, H, W] -> [N, K, ceil(H / stride), ceil(W / stride)], which is x itself if nothing changes.

    Raises:
        ValueError: for fewer output than input channels, a stride below 1 or another ``pad``.
    """

    _fx_leaf: ClassVar[bool] = True
    _fx_pure: ClassVar[bool] = True

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, pad: str = "end") -> None:
        super().__init__()
        if in_channels < 1 or out_channels < in_channels:
            raise ValueError(f"out_channels must be at least in_channels = {in_channels}, got {out_channels}")
        if stride < 1:
            raise ValueError(f"stride must be at least 1, got {stride}")
        if pad not in ("end", "both"):
            raise ValueError(f"pad must be 'end' or 'both', got {pad!r}")
        self.in_channels, self.out_channels, self.stride, self.pad = in_channels, out_channels, stride, pad
        extra = out_channels - in_channels
        self.before = extra // 2 if pad == "both" else 0
        self.after = extra - self.before

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.before or self.after:
            x = F.pad(x, (0, 0, 0, 0, self.before, self.after))
        return x

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}, pad={self.pad!r}"


class ZeroPad(NamedTuple):
    """What is done to a map: every so many pixels are taken, and so many channels of zeros put before and behind the others."""

    stride: tuple[int, int] = (1, 1)
    before: int = 0
    after: int = 0

    def output(self, like: Tensor) -> Tensor:
        """The output's shape and memory format, for an input on the meta device."""
        strided = like[:, :, :: self.stride[0], :: self.stride[1]] if self.stride != (1, 1) else like
        return F.pad(strided, (0, 0, 0, 0, self.before, self.after)) if self.before or self.after else strided


SETTINGS = ("stride", "before", "after")  # of a ZeroPadShortcut
_FORWARD = ZeroPadShortcut.forward
_ALL = slice(None)
PAD = F.pad  # as it is when this package is imported


def zero_pad_of(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> ZeroPad | None:
    """What ``function(x, *args, **kwargs)`` does as it is now, where it is that and nothing else: a ``ZeroPadShortcut``, an index of strided
    pixels, ``F.pad`` of channels with zeros."""
    if type(function) is ZeroPadShortcut and not args and not kwargs:
        attributes = function.__dict__
        stride, before, after = [attributes.get(name) for name in SETTINGS]
        if ZeroPadShortcut.forward is not _FORWARD or F.pad is not PAD or "forward" in attributes:
            return None
        return _checked(stride, stride, before, after)
    if function is operator.getitem and len(args) == 1 and not kwargs:
        index = args[0]
        if type(index) is not tuple or len(index) > 4 or not all([type(s) is slice and s.start is s.stop is None for s in index]):
            return None
        steps = [1 if s.step is None else s.step for s in (*index, _ALL, _ALL, _ALL, _ALL)[:4]]
        return _checked(steps[2], steps[3], 0, 0) if steps[:2] == [1, 1] else None
    if function is F.pad:
        pad, mode, value = (*args, *[None] * 3)[:3]
        mode, value = kwargs.get("mode", mode), kwargs.get("value", value)
        known = len(args) <= 3 and kwargs.keys() <= {"mode", "value"} and mode in (None, "constant") and value in (None, 0)
        if known and isinstance(pad, (tuple, list)) and len(pad) == 6 and not any(pad[:4]):
            return _checked(1, 1, *pad[4:])
    return None


def _checked(stride_h: Any, stride_w: Any, before: Any, after: Any) -> ZeroPad | None:
    if not all([type(v) is int for v in (stride_h, stride_w, before, after)]) or min(stride_h, stride_w) < 1 or min(before, after) < 0:
        return None
    return ZeroPad((stride_h, stride_w), before, after)


def combined(steps: Sequence[ZeroPad | None]) -> ZeroPad | None:
    """Several, one after the other, as one; None where one of them is not known, and of none."""
    together = ZeroPad()
    for step in steps:
        if step is None:
            return None
        (h, w), (next_h, next_w) = together.stride, step.stride
        together = ZeroPad((h * next_h, w * next_w), together.before + step.before, together.after + step.after)
    return together if steps else None
