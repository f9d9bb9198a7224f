"""A residual block as data, and the one function that executes it.

The description names submodules by path and functions by name: plain strings and numbers, so that a block that carries
its description can be copied, pickled and compiled. Parameters are read from the modules at every call.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _whole
from ._compat import nobody_listens
from ._extension import cpu
from ._fold import folded, sources_of
from ._settings import Plans
from .ops.api import bias_add_relu, conv_bias_add_relu
from .ops.derived import Store
from .ops.plans import backends, joined
from .ops.spec import is_channels_last

_MOST_PLANS = 256  # of one block: beyond, start over
# Functions without side effects that may stand in a path, by the name under which a description keeps them.
FUNCTIONS: dict[str, Callable[..., Any]] = {"getitem": operator.getitem, "pad": F.pad, "avg_pool2d": F.avg_pool2d}


@dataclass(frozen=True)
class Layer:
    """A convolution, the batch normalisation behind it if there is one, and whether a ReLU follows."""

    conv: str
    norm: str | None
    relu: bool


@dataclass(frozen=True)
class Call:
    """A module without side effects (by path), or one of FUNCTIONS (by name) with further constant arguments."""

    target: str
    function: bool = False
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()


Step = Layer | Call


@dataclass(frozen=True)
class Residual:
    """``relu(main(x) + shortcut(x))``; the last step of ``main`` is a Layer without a ReLU of its own.

    shortcut: no steps is the identity; None is no addition at all (a plain block).
    left: the operand on the left of the +, "main" or "shortcut", which decides the sum's memory format.
    inplace: the addition writes into its left operand, whose dtype the sum then has.
    """

    main: tuple[Step, ...]
    shortcut: tuple[Step, ...] | None
    left: str = "main"
    inplace: bool = False
    relu: bool = True


class BoundLayer(NamedTuple):
    conv: nn.Conv2d
    norm: Any  # a BatchNorm2d or SyncBatchNorm, or None
    relu: bool
    store: Store | None  # its block's; None while compiling, where nothing is kept


class BoundCall(NamedTuple):
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


BoundStep = BoundLayer | BoundCall


class Bound(NamedTuple):
    """A description with the modules of one block in the place of their paths."""

    main: tuple[BoundStep, ...]
    last: BoundLayer
    shortcut: tuple[BoundStep, ...] | None
    left_is_main: bool
    inplace: bool
    relu: bool
    kind: str | None  # of its shortcut, where it can be executed as a whole: see _whole.run
    plans: Plans
    store: Store | None  # None while compiling

    def clear(self) -> None:
        """Give back what is derived from the block's parameters."""
        if self.store is not None:
            self.store.clear()


def _find(module: nn.Module, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def bind_step(
    module: nn.Module, step: Step, store: Store | None, functions: dict[str, Callable[..., Any]] = FUNCTIONS
) -> BoundStep:
    if isinstance(step, Layer):
        norm = None if step.norm is None else _find(module, step.norm)
        return BoundLayer(_find(module, step.conv), norm, step.relu, store)
    function = functions[step.target] if step.function else _find(module, step.target)
    return BoundCall(function, step.args, dict(step.kwargs))


def bind(module: nn.Module, description: Residual, store: Store | None) -> Bound:
    """The description with ``module``'s submodules filled in, and where to keep what is derived from their parameters."""
    steps = tuple([bind_step(module, step, store) for step in description.main])
    last = steps[-1]
    assert isinstance(last, BoundLayer)
    shortcut = description.shortcut
    if cpu is None or not all(isinstance(step, Layer) for step in description.main):
        kind = None
    elif shortcut is None:
        kind = "none"
    elif not shortcut:
        kind = "identity"
    else:
        kind = "projection" if len(shortcut) == 1 and isinstance(shortcut[0], Layer) and not shortcut[0].relu else "external"
    return Bound(
        steps[:-1],
        last,
        None if shortcut is None else tuple([bind_step(module, step, store) for step in shortcut]),
        description.left == "main",
        description.inplace,
        description.relu,
        kind,
        Plans(_MOST_PLANS),
        store,
    )


def execute(block: Bound, x: Tensor, compiling: bool) -> Tensor:
    """Execute a bound block. ``compiling``: inside torch.compile or torch.export, where nothing may be cached."""
    if block.kind is not None and not compiling:
        y = _execute_whole(block, x)
        if y is not None:
            return y
    h = run_steps(block.main, x, compiling)
    if block.shortcut is None:
        return _layer(block.last, h, None, block.relu, compiling)
    if block.kind == "projection" and not compiling and backends.of(h).on_gpu:
        y = _joined(block, h, x)
        if y is not None:
            return y
    shortcut = run_steps(block.shortcut, x, compiling)
    return _end(block, h, shortcut, compiling)


def _joined(block: Bound, h: Tensor, x: Tensor) -> Tensor | None:
    """The last layer and the projection as one kernel on a GPU, or None where they have to be two."""
    assert block.shortcut is not None
    (step,) = block.shortcut
    assert isinstance(step, BoundLayer)
    last = block.last
    if _is_live(last.norm) or _is_live(step.norm) or not _is_projection(step.conv):
        return None
    sources = [t for layer in (last, step) for t in _operand(layer, False).sources]
    if not nobody_listens(h, x, *sources) or h.dtype != x.dtype or h.dtype != last.conv.weight.dtype:
        return None
    layers = [
        (layer.conv.weight, layer.conv.bias) if layer.norm is None else folded(layer.conv, layer.norm, False, layer.store)
        for layer in (last, step)
    ]
    conv = last.conv
    parameters = conv.stride, conv.padding, conv.dilation, conv.groups
    return joined(h, layers[0], parameters, x, layers[1], step.conv.stride, block.relu)


def _is_projection(conv: nn.Conv2d) -> bool:
    return tuple(conv.kernel_size) == (1, 1) and conv.groups == 1 and conv.padding in (0, (0, 0), "valid") and conv.padding_mode == "zeros"


def _execute_whole(block: Bound, x: Tensor) -> Tensor | None:
    """The block as one call, or None where it has to go layer by layer."""
    if not nobody_listens(x) or backends.of(x).on_gpu:
        return None
    ready = _ready(block, x)
    layers = []
    for step in block.main:
        assert isinstance(step, BoundLayer)
        if _is_live(step.norm):
            return None
        layers.append(_operand(step, step.relu))
    if _is_live(block.last.norm):
        return None
    layers.append(_operand(block.last, block.relu))
    shortcut = None
    if block.kind == "projection":
        assert block.shortcut is not None
        (step,) = block.shortcut
        assert isinstance(step, BoundLayer)
        if _is_live(step.norm):
            return None
        layers.append(_operand(step, False))
    elif block.kind == "external":
        assert block.shortcut is not None
        if any([isinstance(step, BoundLayer) and _is_live(step.norm) for step in block.shortcut]):
            return None  # its statistics must change once
        shortcut = run_steps(block.shortcut, x)
    assert block.kind is not None
    found = _whole.run(block.plans, block.store, layers, x, shortcut, block.kind, block.left_is_main)
    if found is None:
        return None
    if ready is not None and ready.accept(found, shortcut):
        assert block.store is not None
        block.store.ready = ready
    return found.output


_CONV_SETTINGS = operator.itemgetter("stride", "padding", "dilation", "groups")
_NORM_SETTINGS = operator.itemgetter("training", "eps")


def _ready(block: Bound, x: Tensor) -> _whole.Ready | None:
    """What will repeat this call; None for tensors that are kept in unusual places."""
    places: list[tuple[dict[str, Any], str]] = []
    settings: list[tuple[dict[str, Any], Callable[[Any], Any]]] = []
    external = block.shortcut if block.kind == "external" else None
    # An external shortcut is made anew each time; of its layers it matters only whether a norm is live.
    settings += [(s.norm.__dict__, _NORM_SETTINGS) for s in external or () if isinstance(s, BoundLayer) and s.norm is not None]
    for step in (*block.main, block.last, *(() if external is not None else block.shortcut or ())):
        assert isinstance(step, BoundLayer)
        conv, norm = step.conv, step.norm
        places += [(conv._parameters, "weight"), (conv._parameters, "bias")]
        settings.append((conv.__dict__, _CONV_SETTINGS))
        if norm is not None:
            places += [(norm._parameters, "weight"), (norm._parameters, "bias")]
            places += [(norm._buffers, "running_mean"), (norm._buffers, "running_var")]
            settings.append((norm.__dict__, _NORM_SETTINGS))
    if any([name not in place for place, name in places]):
        return None
    return _whole.Ready(places, settings, x, None if external is None else functools.partial(run_steps, external))


def _operand(layer: BoundLayer, relu: bool) -> _whole.Operand:
    conv, norm = layer.conv, layer.norm
    if norm is None:
        return _whole.Operand((conv.weight, conv.bias), None, conv.stride, conv.padding, conv.dilation, conv.groups, relu)
    sources = sources_of(conv, norm)
    return _whole.Operand(sources, norm.eps, conv.stride, conv.padding, conv.dilation, conv.groups, relu)


def run_step(step: BoundStep, x: Tensor, compiling: bool) -> Tensor:
    if isinstance(step, BoundLayer):
        return _layer(step, x, None, step.relu, compiling)
    output: Tensor = step.function(x, *step.args, **step.kwargs)
    return output


def run_steps(steps: Sequence[BoundStep], x: Tensor, compiling: bool = False) -> Tensor:
    for step in steps:
        x = run_step(step, x, compiling)
    return x


def _is_live(norm: Any) -> bool:
    """Whether a normalisation takes its statistics from the batch (``nn.BatchNorm2d.forward``'s own rule)."""
    return norm is not None and (norm.training or norm.running_mean is None)


def _layer(layer: BoundLayer, x: Tensor, shortcut: Tensor | None, relu: bool, compiling: bool) -> Tensor:
    """One layer; ``shortcut`` only where the normalisation is not live and the operator can add it."""
    conv, norm = layer.conv, layer.norm
    if norm is None:
        weight, bias = conv.weight, conv.bias
    elif _is_live(norm):
        y: Tensor = norm(conv(x))
        return F.relu(y, inplace=True) if relu else y
    else:
        weight, bias = folded(conv, norm, compiling, layer.store)
    return conv_bias_add_relu(x, weight, bias, shortcut, conv.stride, conv.padding, conv.dilation, conv.groups, relu)


def _end(block: Bound, h: Tensor, shortcut: Tensor, compiling: bool) -> Tensor:
    """The last layer, the addition and the ReLU."""
    last = block.last
    if _is_live(last.norm):
        y = _layer(last, h, None, False, compiling)
        if (
            y.dtype != shortcut.dtype
            or y.shape != shortcut.shape
            or not (block.left_is_main or _same_format(shortcut, is_channels_last(y)))
        ):
            return _add(block, y, shortcut)
        return bias_add_relu(y, None, shortcut, block.relu)

    dtype, device = h.dtype, h.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    if shortcut.dtype != dtype or not (
        block.left_is_main or _same_format(shortcut, is_channels_last(h) or is_channels_last(last.conv.weight))
    ):
        return _add(block, _layer(last, h, None, False, compiling), shortcut)
    if compiling:
        return _layer(last, h, shortcut, block.relu, compiling)
    try:
        return _layer(last, h, shortcut, block.relu, compiling)
    except ValueError:
        # The operator does not broadcast; the block's own addition may.
        y = _layer(last, h, None, False, compiling)
        if y.shape == shortcut.shape:
            raise
    return _add(block, y, shortcut)


def _same_format(t: Tensor, channels_last: bool) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _add(block: Bound, main: Tensor, shortcut: Tensor) -> Tensor:
    """The addition exactly as the block's author wrote it: for mixed dtypes, other memory formats and broadcasting."""
    left, right = (main, shortcut) if block.left_is_main else (shortcut, main)
    total = left.add_(right) if block.inplace else left + right
    return F.relu(total, inplace=True) if block.relu else total
