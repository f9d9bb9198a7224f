"""Runs a module's graph, part after part: as one native call where that can be, else node by node.

Parameters are read from the modules at every call.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._compat import GLOBAL_HOOKS, PLAIN, is_quiet, nobody_listens, profiler_enabled
from .._extension import cpu
from ..graph.ir import Addition
from ..ops.api import bias_add_relu, conv_bias_add_relu
from ..ops.derived import may_repeat
from ..ops.functions import add_relu_, convolution_in_block, needs_grad, relu_
from ..ops.plans import backends, joined
from ..ops.select import how_to_train
from ..ops.spec import geometry_of_call, is_channels_last, layout
from . import launches, program
from .bound import Bound, BoundCall, BoundConvolution, BoundMaxPool, BoundNode, Part, Segment
from .cached import CachedCalls, external_layout, key_of
from .calls import Result
from .fold import folded
from .pooling import max_pool
from .stages import paths
from .training import Training


def repeat(module: Any, graph: Bound, x: Tensor) -> Tensor | None:
    """What ``module``'s graph gives for a plain tensor ``x``, where its first part's call is one that can be repeated; or None."""
    first = graph.parts[0]
    y = None if first.segment is None else _repeat(graph, first.segment, x)
    if y is None or len(graph.parts) == 1:
        return y
    held = [y]
    del y
    return _run_parts(module, graph, 1, held, False)


def execute(module: Any, graph: Bound, x: Tensor, compiling: bool) -> Tensor:
    """Run ``module``'s bound graph. ``compiling``: inside torch.compile or torch.export, where nothing may be kept."""
    return _run_parts(module, graph, 0, [x], compiling)


def _run_parts(module: Any, graph: Bound, begin: int, held: list[Tensor], compiling: bool) -> Tensor:
    """held: the input of part number ``begin``, which is taken away: nobody keeps a value longer than something may read it."""
    for i, part in enumerate(graph.parts[begin:], begin):
        native = None
        # A module that was called before, in this call, may have changed what a segment stands for.
        if part.segment is not None and (i == 0 or graph.holds(module)) and not any(GLOBAL_HOOKS):
            if i and type(held[0]) is Tensor:
                native = _repeat(graph, part.segment, held[0])
            if native is None:
                native = _run_native(module, graph, part.segment, held[0])
        if native is None:
            native = _run_nodes(part, [held.pop()], compiling)
        held[:] = [native]
        del native
    return held.pop()


def _run_nodes(part: Part, values: list[Any], compiling: bool) -> Tensor:
    """Node by node. values: the part's input."""
    joins = part.projection is not None and backends.of(values[0]).on_gpu
    trained = Training(part, values) if _may_train(values[0], compiling) else None
    for i, node in enumerate(part.nodes):
        if joins and i == part.projection:
            assert isinstance(node, BoundConvolution)
            found = _joined(part.nodes[-1], node, values[part.inputs[-1]], values[0])
            if found is not None:
                return found
        values.append(_run(node, values[part.inputs[i]], values, compiling, trained and trained.at(i)))
        for number in part.dead_after[i]:
            values[number] = None
    output: Tensor = values[-1]
    return output


def _may_train(x: Any, compiling: bool) -> bool:
    """Whether gradients of CPU tensors may be wanted, and nobody listens."""
    if compiling or cpu is None or not torch.is_grad_enabled() or type(x) not in PLAIN or not x.is_cpu or x.dim() != 4:
        return False
    return is_quiet(but_for_profiler=True, but_for_autocast=True)


def _run(node: BoundNode, x: Tensor, values: list[Any], compiling: bool, trained: Training | None = None) -> Tensor:
    if isinstance(node, BoundCall):
        output: Tensor = node.function(x, *node.args, **node.kwargs)
        return output
    if isinstance(node, BoundMaxPool):
        reads = None if trained is None else trained.reads()
        pooled = None if node.plans is None else max_pool(node.plans, node.module, x, trained is not None, reads)
        return node.module(x) if pooled is None else pooled
    if node.addition is None:
        return _convolution(node, x, None, node.relu, compiling, trained)
    return _residual(node, node.addition, x, values[node.addition.shortcut], compiling, trained)


def _repeat(graph: Bound, segment: Segment, x: Tensor) -> Tensor | None:
    """What a segment gives for a plain tensor, where its call is one that can be repeated; or None."""
    cached: CachedCalls | None = graph.cached.get(segment.number)
    return None if cached is None else cached.run(x, partial(_external, segment))


def _external(segment: Segment, x: Tensor) -> Tensor | None:
    """The value ``EXTERNAL``; None where no step reads it."""
    if not segment.external:
        return None
    for node in segment.external:
        x = _run(node, x, [], False)
    return x


def _run_native(module: Any, graph: Bound, segment: Segment, x: Tensor) -> Tensor | None:
    """The segment's output; None where it has to go node by node, as on a GPU under the profiler. On the CPU its stages are ranges there."""
    if graph.store is None or not nobody_listens(x, but_for_profiler=True):
        return None
    on_gpu = backends.of(x).on_gpu
    if not launches.may_run(graph.plans, segment, x) if on_gpu else cpu is None:
        return None
    if torch.is_grad_enabled() and any([p.requires_grad for node in segment.convolutions[:1] for p in node.conv.parameters(False)]):
        return None  # the rest would only say the same, later
    # Also those of an external shortcut, for the statistics of a live norm must change once.
    external = [node for node in segment.external if isinstance(node, BoundConvolution)]
    if any([node.is_live for node in (*segment.convolutions, *external)]):
        return None
    before: CachedCalls | None = graph.cached.get(segment.number)
    if before is not None and not before.holds():
        graph.cached.pop(segment.number, None)  # what they hold is given back before the new is made
    before = None
    key, cached = key_of(x), CachedCalls(segment, on_gpu) if cpu is not None and may_repeat(x) else None
    found: Result | None
    if on_gpu:
        found = launches.run(graph.plans, segment, x)
    else:
        found = program.run(graph.plans, segment, x, partial(_external, segment), paths(module) if profiler_enabled() else None)
    if found is None:
        return None
    if (
        cached is not None
        and cached.usual
        and key_of(x) == key  # another thread may have set something of torch meanwhile
        and cached.accept(key, found, external_layout(found.external), graph.cached.get(segment.number))
    ):
        graph.cached[segment.number] = cached
    return found.output


def _joined(last: BoundNode, projection: BoundConvolution, h: Tensor, x: Tensor) -> Tensor | None:
    """The last convolution and the projection as one kernel on a GPU; None where they have to be two."""
    assert isinstance(last, BoundConvolution)
    if last.is_live or projection.is_live or not launches.is_projection(projection.conv):
        return None
    sources = [t for node in (last, projection) for t in program.operand_of(node).sources]
    if not nobody_listens(h, x, *sources) or h.dtype != x.dtype or h.dtype != last.conv.weight.dtype:
        return None
    operands = [
        (node.conv.weight, node.conv.bias) if node.norm is None else folded(node.conv, node.norm, False, node.place)
        for node in (last, projection)
    ]
    conv = last.conv
    parameters = conv.stride, conv.padding, conv.dilation, conv.groups
    return joined(h, operands[0], parameters, x, operands[1], projection.conv.stride, last.relu)


def _convolution(
    node: BoundConvolution, x: Tensor, shortcut: Tensor | None, relu: bool, compiling: bool, trained: Training | None
) -> Tensor:
    """One convolution; ``shortcut`` only where the normalisation is not live and the operator can add it."""
    conv, norm = node.conv, node.norm
    if norm is None:
        weight, bias = conv.weight, conv.bias
    elif node.is_live:
        y: Tensor = norm(_before_live_norm(conv, x, compiling, trained))
        if not relu:
            return y
        if trained is None or type(y) is not Tensor or not y.requires_grad or y._is_view():
            return F.relu(y, inplace=True)
        return relu_(y, trained.rectified())
    else:
        weight, bias = folded(conv, norm, compiling, node.place)
    if trained is not None and not torch.is_autocast_enabled("cpu") and needs_grad(x, weight, bias, shortcut):
        return _in_training(trained, conv, x, weight, bias, shortcut, relu)
    return conv_bias_add_relu(x, weight, bias, shortcut, conv.stride, conv.padding, conv.dilation, conv.groups, relu)


def _before_live_norm(conv: nn.Conv2d, x: Tensor, compiling: bool, trained: Training | None) -> Tensor:
    """A convolution that nothing is fused to: by our kernels where training is faster so."""
    weight = conv.weight
    is_ours = not compiling and cpu is not None and type(x) is Tensor and x.is_cpu and weight.is_cpu
    if is_ours and x.dim() == 4 and x.shape[1] == weight.shape[1]:
        casts = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64  # which autocast leaves alone
        dtype = torch.get_autocast_dtype("cpu") if casts else x.dtype
        by = how_to_train(layout(x), weight.shape, conv.stride, conv.dilation, conv.groups, dtype)
        if by != "library" and (casts or x.dtype == weight.dtype):
            if trained is not None and needs_grad(x, weight, conv.bias):
                bias = None if conv.bias is None else conv.bias.to(dtype)
                return _in_training(trained, conv, x.to(dtype), weight.to(dtype), bias, None, False, by == "our gradients")
            if by == "ours":
                return conv_bias_add_relu(x, weight, conv.bias, None, conv.stride, conv.padding, conv.dilation, conv.groups, False)
    plain: Tensor = conv(x)
    return plain


def _in_training(
    trained: Training,
    conv: nn.Conv2d,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shortcut: Tensor | None,
    relu: bool,
    by_library: bool = False,
) -> Tensor:
    """A convolution one of whose operands wants a gradient. by_library: its forward."""
    geometry = geometry_of_call(weight, conv.stride, conv.padding, conv.dilation, conv.groups)
    role = trained.role(x, relu, by_library and geometry.padding.is_symmetric)
    found = convolution_in_block(role, x, weight, bias, shortcut, *geometry, relu)
    if role.forks:
        found, again = found
        trained.fork(again)
    output: Tensor = found
    return output


def _residual(
    node: BoundConvolution, addition: Addition, h: Tensor, shortcut: Tensor, compiling: bool, trained: Training | None
) -> Tensor:
    """A convolution, the addition behind it and the ReLU."""
    left_is_main = addition.left == "main"
    if node.is_live:
        y = _convolution(node, h, None, False, compiling, trained)
        if (
            y.dtype != shortcut.dtype
            or y.shape != shortcut.shape
            or not (left_is_main or _same_format(shortcut, is_channels_last(y)))
        ):
            return _add(node, addition, y, shortcut)
        ours = not compiling and cpu is not None and type(y) is Tensor and y.is_cpu  # elsewhere it would be a copy more
        if addition.inplace and left_is_main and ours and not y._is_view():
            return add_relu_(y, shortcut, node.relu)
        return bias_add_relu(y, None, shortcut, node.relu)

    dtype, device = h.dtype, h.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    if shortcut.dtype != dtype or not (
        left_is_main or _same_format(shortcut, is_channels_last(h) or is_channels_last(node.conv.weight))
    ):
        return _add(node, addition, _convolution(node, h, None, False, compiling, trained), shortcut)
    if compiling:
        return _convolution(node, h, shortcut, node.relu, compiling, trained)
    try:
        return _convolution(node, h, shortcut, node.relu, compiling, trained)
    except ValueError:
        # The operator does not broadcast; the block's own addition may. Nobody relies on the ReLU that was not made.
        y = _convolution(node, h, None, False, compiling, trained)
        if y.shape == shortcut.shape:
            raise
    return _add(node, addition, y, shortcut)


def _same_format(t: Tensor, channels_last: bool) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _add(node: BoundConvolution, addition: Addition, main: Tensor, shortcut: Tensor) -> Tensor:
    """The addition exactly as the block's author wrote it: for mixed dtypes, other memory formats and broadcasting."""
    left, right = (main, shortcut) if addition.left == "main" else (shortcut, main)
    total = left.add_(right) if addition.inplace else left + right
    return F.relu(total, inplace=True) if node.relu else total
