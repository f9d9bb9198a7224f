"""The same data on another device: operands moved with their strides, results brought back, the library's precision fixed.

The reference is computed on the CPU, whose convolutions round as IEEE 754 says; what is compared with it is computed by
``on(device, function)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .._compat import using_tf32

Storages = dict[int, tuple[Any, Any]]  # address -> (a storage, its copy on the device)


class _Move(torch.autograd.Function):
    """A tensor on another device, strides and offset as they are; the gradient goes the way back."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, device: torch.device, copies: Storages) -> Tensor:  # type: ignore[override]
        ctx.device = t.device
        return _rebuilt(t, device, copies)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _Move.apply(grad, ctx.device, {}), None, None


def _rebuilt(t: Tensor, device: torch.device, copies: Storages) -> Tensor:
    """A tensor with the values, strides and offset of ``t``; tensors that share memory share it there too."""
    storage = t.untyped_storage()
    if storage.data_ptr() not in copies or not storage.nbytes():
        everything = torch.empty(0, dtype=torch.uint8, device=t.device).set_(storage)
        # The first is kept: while it lives, no other storage can come to its address.
        copies[storage.data_ptr()] = storage, everything.to(device, copy=True).untyped_storage()
    copied = copies[storage.data_ptr()][1]
    return torch.empty(0, dtype=t.dtype, device=device).set_(copied, t.storage_offset(), t.shape, t.stride())


def moved(device: torch.device | str, *tensors: Tensor | None) -> tuple[Any, ...]:
    """Copies on ``device`` that are laid out as the tensors are and require gradients where they do; leaves, each of them."""
    copies: Storages = {}
    with torch.no_grad():
        found = [None if t is None else _rebuilt(t.detach(), torch.device(device), copies) for t in tensors]
    return tuple(
        copy if t is None or copy is None else copy.requires_grad_(t.requires_grad) for t, copy in zip(tensors, found, strict=True)
    )


def on(device: torch.device | str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``function``, computed on ``device``: its tensors are moved there with their strides (sliced, expanded and misaligned
    layouts too, and what shares memory shares it there) and the result is brought back with its own. Differentiable, twice.

    Raises:
        AssertionError: where the result is not on the device, or is an alias of an argument, which the copy would hide.
    """
    target = torch.device(device)

    def there(*arguments: Any, **parameters: Any) -> Tensor:
        copies: Storages = {}

        def move(value: Any) -> Any:
            return _Move.apply(value, target, copies) if isinstance(value, Tensor) else value

        result = function(*map(move, arguments), **{name: move(value) for name, value in parameters.items()})
        assert result.device.type == target.type, f"the result is on {result.device}, the operands were on {target}"
        address = result.untyped_storage().data_ptr()
        shared = result.numel() and any(copied.data_ptr() == address for _, copied in copies.values())
        assert not shared, "the result is an alias of an argument"
        back: Tensor = _Move.apply(result, torch.device("cpu"), {})
        return back

    there.__name__ = getattr(function, "__name__", "function")
    return there


@contextmanager
def library(tf32: bool = False, deterministic: bool = True, cudnn: bool = True) -> Iterator[None]:
    """The library's convolutions on a GPU as a check needs them, put back afterwards.

    ``tf32``: whether float32 may be computed in TF32. ``deterministic``: the same result each time. ``cudnn``: False for exact
    integers, which cuDNN's Winograd rounds; PyTorch's own convolution is a product of matrices.
    """
    flags = torch.backends.cudnn
    before = flags.deterministic, flags.benchmark, flags.enabled
    try:
        flags.deterministic, flags.benchmark, flags.enabled = deterministic, False, cudnn
        with using_tf32(tf32):
            yield
    finally:
        flags.deterministic, flags.benchmark, flags.enabled = before
