"""Folding: with running statistics, batch norm is an affine map of each channel and belongs into weight and bias."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .._compat import dispatch_modes
from .._extension import cpu
from ..ops.derived import derive
from ..ops.spec import LOW_PRECISION, is_channels_last
from ..ops.store import Place

Sources = tuple[Tensor, "Tensor | None", "Tensor | None", "Tensor | None", Tensor, Tensor]


def sources_of(conv: nn.Module, norm: nn.Module) -> Sources:
    """(weight, bias) of the convolution, (weight, bias, running_mean, running_var) of the normalisation."""
    try:  # around nn.Module.__getattr__, which costs half a microsecond a name
        p, q, b = conv._parameters, norm._parameters, norm._buffers
        return p["weight"], p["bias"], q["weight"], q["bias"], b["running_mean"], b["running_var"]  # type: ignore[return-value]
    except KeyError:  # the replicas of nn.DataParallel keep their parameters as attributes
        c: Any = conv
        n: Any = norm
        return c.weight, c.bias, n.weight, n.bias, n.running_mean, n.running_var


def folded(conv: nn.Module, norm: Any, compiling: bool, place: Place | None) -> tuple[Tensor, Tensor]:
    """Weight [K, C / groups, R, S] and bias [K] of ``norm(conv(.))`` with running statistics.

    Differentiable where a parameter wants its gradient; otherwise kept in ``place``, their module's, until a source changes.
    """
    if compiling:
        sources: Sources = (conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)  # type: ignore[assignment]
        return fold(*sources, norm.eps)
    sources = sources_of(conv, norm)
    if (torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in sources])) or (
        dispatch_modes()  # a fake or logging mode: its tensors must not outlive it in a cache
    ):
        return fold(*sources, norm.eps)
    eps = norm.eps
    # Batch norm's update of its statistics raises no version; that of its counter, in the same call, does.
    counter = norm.num_batches_tracked
    if counter is None and (cpu is None or not conv.weight.is_cpu):  # nor are bytes read
        return fold(*sources, eps)
    return derive(("folded", eps), (*sources, counter), lambda *held: library_fold(*held[:-1], eps), place)  # type: ignore[call-arg, arg-type]


def _check(weight: Tensor, mean: Tensor, eps: float, **vectors: Tensor | None) -> None:
    """What eager batch norm accepts behind a convolution: the same dtype, or float32 behind a low-precision one; one value for each channel."""
    for name, t in {"running_mean": mean, **vectors}.items():
        if t is not None and t.shape != weight.shape[:1]:
            raise RuntimeError(f"{name} must have shape [{weight.shape[0]}], got {[*t.shape]}")
    if eps < 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    if mean.dtype != weight.dtype and not (weight.dtype in LOW_PRECISION and mean.dtype == torch.float32):
        names = [str(t.dtype).removeprefix("torch.") for t in (weight, mean)]
        raise TypeError(f"running_mean must have the convolution's dtype {names[0]}, got {names[1]}")


def fold(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Differentiable folding: weight * s and (bias - mean) * s + beta with s = gamma / sqrt(var + eps).

    The formula of ``torch.nn.utils.fusion.fuse_conv_bn_weights``, which cuts the graph, in the same order: the results
    are bitwise the same. Low precision folds in float32.
    """
    _check(weight, mean, eps, running_var=var, bias=bias, norm_weight=gamma, norm_bias=beta)
    dtype = torch.float32 if weight.dtype in LOW_PRECISION else weight.dtype
    scale = torch.rsqrt(var.to(dtype) + eps)
    shift = -mean.to(dtype) if bias is None else bias.to(dtype) - mean.to(dtype)
    shift = shift * scale
    if gamma is not None:
        scale, shift = gamma.to(dtype) * scale, shift * gamma.to(dtype)
    if beta is not None:
        shift = shift + beta.to(dtype)
    product = weight.to(dtype) * scale.reshape(-1, 1, 1, 1)
    return _in_format_of(weight, product.to(weight.dtype)), shift.to(weight.dtype)


def library_fold(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """As ``fold``, by torch's own function; not differentiable."""
    _check(weight, mean, eps, running_var=var, bias=bias, norm_weight=gamma, norm_bias=beta)
    dtype = torch.float32 if weight.dtype in LOW_PRECISION else weight.dtype
    b, g, t = (None if s is None else s.to(dtype) for s in (bias, gamma, beta))
    new_weight, new_bias = fuse_conv_bn_weights(weight.to(dtype), b, mean.to(dtype), var.to(dtype), eps, g, t)
    product = new_weight.detach().to(weight.dtype)
    return _in_format_of(weight, product), new_bias.detach().to(weight.dtype)


def weight_and_bias(sources: Sequence[Tensor | None], eps: float | None) -> tuple[Tensor, Tensor | None]:
    """Of a layer, from its weight and bias and, where there is a normalisation (eps is not None), its weight, bias, running mean and
    variance; not differentiable."""
    if eps is not None:
        return library_fold(*sources, eps)  # type: ignore[arg-type, call-arg]
    weight, bias = sources
    assert weight is not None
    return weight, bias


def _in_format_of(weight: Tensor, product: Tensor) -> Tensor:
    """``product`` in weight's memory format: eager conv2d looks at it to choose its output's.

    Arithmetic loses the format of a 1x1 kernel, whose strides are ambiguous.
    """
    channels_last = is_channels_last(weight)
    if is_channels_last(product) == channels_last:
        return product
    return product.clone(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
