"""Runs a graph with the modules of one object: the block with which it begins in one native call where that can be, else node by node.

Parameters are read from the modules at every call.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._compat import nobody_listens
from .._extension import cpu
from .._settings import Plans
from ..graph.ir import FUNCTIONS, Addition, Call, Convolution, Graph, MaxPool, Node
from ..ops.api import bias_add_relu, conv_bias_add_relu
from ..ops.derived import Store
from ..ops.plans import backends, joined
from ..ops.spec import is_channels_last
from . import whole
from .fold import folded, sources_of
from .pooling import max_pool

_MOST_PLANS = 256  # of one module: beyond, start over


class BoundConvolution(NamedTuple):
    conv: nn.Conv2d
    norm: Any  # a BatchNorm2d or SyncBatchNorm, or None
    relu: bool
    addition: Addition | None
    store: Store | None  # its module's; None while compiling, where nothing is kept


class BoundMaxPool(NamedTuple):
    module: nn.MaxPool2d
    plans: Plans | None  # None while compiling


class BoundCall(NamedTuple):
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


BoundNode = BoundConvolution | BoundMaxPool | BoundCall


class WholeBlock(NamedTuple):
    """The first nodes of a graph, where they are a block that can be executed as a whole.

    kind: of its shortcut, as ``whole.run`` has it. main: its convolutions. projection: where ``kind`` says so. external: what makes the
    shortcut of the input, where that is something else. end: the number of its nodes.
    """

    kind: str
    main: tuple[BoundConvolution, ...]
    projection: BoundConvolution | None
    external: tuple[BoundNode, ...]
    end: int

    @property
    def addition(self) -> Addition | None:
        return self.main[-1].addition


class Bound(NamedTuple):
    """A graph with the modules of one object in the place of their paths.

    inputs: the number of the value that each node reads. dead_after: for each node, the values that nothing reads any more.
    """

    nodes: tuple[BoundNode, ...]
    inputs: tuple[int, ...]
    dead_after: tuple[tuple[int, ...], ...]
    block: WholeBlock | None
    rest: tuple[BoundNode, ...]  # what follows the block, each of the one before
    plans: Plans
    store: Store | None  # None while compiling

    def clear(self) -> None:
        """Give back what is derived from the module's parameters."""
        if self.store is not None:
            self.store.clear()


def _find(module: nn.Module, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _bind_node(module: nn.Module, node: Node, store: Store | None, plans: Plans) -> BoundNode:
    if isinstance(node, MaxPool):
        return BoundMaxPool(_find(module, node.module), None if store is None else plans)
    if isinstance(node, Call):
        return BoundCall(FUNCTIONS[node.target] if node.function else _find(module, node.target), node.args, dict(node.kwargs))
    norm = None if node.norm is None else _find(module, node.norm)
    return BoundConvolution(_find(module, node.conv), norm, node.relu, node.addition, store)


def bind(module: nn.Module, graph: Graph, store: Store | None) -> Bound:
    """The graph with ``module``'s submodules filled in. store: where to keep what is derived from their parameters; None while
    torch.compile or torch.export traces, where nothing is kept and nothing runs as a whole."""
    plans = Plans(_MOST_PLANS)
    nodes = tuple([_bind_node(module, node, store, plans) for node in graph.nodes])
    inputs = tuple([node.input for node in graph.nodes])
    block = None if store is None else _block_of(graph, nodes)
    rest = () if block is None else nodes[block.end :]
    return Bound(nodes, inputs, _last_reads(graph.nodes), block, rest, plans, store)


def _reads(node: Node) -> tuple[int, ...]:
    addition = node.addition if isinstance(node, Convolution) else None
    return (node.input,) if addition is None else (node.input, addition.shortcut)


def _last_reads(nodes: tuple[Node, ...]) -> tuple[tuple[int, ...], ...]:
    last = {value: i for i, node in enumerate(nodes) for value in _reads(node)}
    return tuple([tuple([value for value in last if last[value] == i]) for i in range(len(nodes))])


def _block_of(graph: Graph, bound: tuple[BoundNode, ...]) -> WholeBlock | None:
    """The block with which a graph begins: all up to its last convolution, behind which there are only calls."""
    end = max([i + 1 for i, node in enumerate(graph.nodes) if isinstance(node, Convolution)], default=0)
    if not end:
        return None
    last = graph.nodes[end - 1]
    assert isinstance(last, Convolution)
    number = {id(node): i for i, node in enumerate(graph.nodes)}
    main = [bound[number[id(node)]] for node in graph.path_to(end)]
    if cpu is None or not all([isinstance(node, BoundConvolution) for node in main]):
        return None
    convolutions: tuple[Any, ...] = tuple(main)
    if last.addition is None:
        return WholeBlock("none", convolutions, None, (), end)
    external = tuple([bound[number[id(node)]] for node in graph.path_to(last.addition.shortcut)])
    if not external:
        return WholeBlock("identity", convolutions, None, (), end)
    if len(external) == 1 and isinstance(external[0], BoundConvolution) and not external[0].relu:
        return WholeBlock("projection", convolutions, external[0], (), end)
    return WholeBlock("external", convolutions, None, external, end)


def repeat(graph: Bound, x: Tensor) -> Tensor | None:
    """What the graph gives for a plain tensor ``x``, where its block's last call can be repeated; or None."""
    store = graph.store
    ready = None if store is None else store.ready
    y: Tensor | None = None if ready is None else ready(x)
    if y is None or not graph.rest:
        return y
    held = [y]
    del y
    return _run_chain(graph.rest, held)


def execute(graph: Bound, x: Tensor, compiling: bool) -> Tensor:
    """Run a bound graph. ``compiling``: inside torch.compile or torch.export, where nothing may be kept."""
    block = graph.block
    if block is not None:
        held = _execute_whole(graph, block, x)
        if held:
            return _run_chain(graph.rest, held)
    values: list[Any] = [x]
    joins = block is not None and block.kind == "projection" and backends.of(x).on_gpu
    for i, node in enumerate(graph.nodes):
        if joins and block is not None and node is block.projection:
            held = _joined(block, values[graph.inputs[block.end - 1]], x)
            if held:
                values.clear()
                return _run_chain(graph.rest, held)
        values.append(_run(node, values[graph.inputs[i]], values, compiling))
        for number in graph.dead_after[i]:
            values[number] = None
    output: Tensor = values[-1]
    return output


def _run_chain(nodes: Iterable[BoundNode], held: list[Tensor]) -> Tensor:
    """What the nodes make, each of the one before. held: the value of the first, which is taken away: nobody keeps it while the others run."""
    x = held.pop()
    for node in nodes:
        x = _run(node, x, [], False)
    return x


def _run(node: BoundNode, x: Tensor, values: list[Any], compiling: bool) -> Tensor:
    if isinstance(node, BoundCall):
        output: Tensor = node.function(x, *node.args, **node.kwargs)
        return output
    if isinstance(node, BoundMaxPool):
        pooled = None if node.plans is None else max_pool(node.plans, node.module, x)
        return node.module(x) if pooled is None else pooled
    if node.addition is None:
        return _convolution(node, x, None, node.relu, compiling)
    return _residual(node, node.addition, x, values[node.addition.shortcut], compiling)


def _joined(block: WholeBlock, h: Tensor, x: Tensor) -> list[Tensor]:
    """The last convolution and the projection as one kernel on a GPU, in a list as ``_execute_whole``; empty where they have to be two."""
    last, projection = block.main[-1], block.projection
    assert projection is not None
    if _is_live(last.norm) or _is_live(projection.norm) or not _is_projection(projection.conv):
        return []
    sources = [t for node in (last, projection) for t in _operand(node).sources]
    if not nobody_listens(h, x, *sources) or h.dtype != x.dtype or h.dtype != last.conv.weight.dtype:
        return []
    operands = [
        (node.conv.weight, node.conv.bias) if node.norm is None else folded(node.conv, node.norm, False, node.store)
        for node in (last, projection)
    ]
    conv = last.conv
    parameters = conv.stride, conv.padding, conv.dilation, conv.groups
    y = joined(h, operands[0], parameters, x, operands[1], projection.conv.stride, last.relu)
    return [] if y is None else [y]


def _is_projection(conv: nn.Conv2d) -> bool:
    return tuple(conv.kernel_size) == (1, 1) and conv.groups == 1 and conv.padding in (0, (0, 0), "valid") and conv.padding_mode == "zeros"


def _execute_whole(graph: Bound, block: WholeBlock, x: Tensor) -> list[Tensor]:
    """The block's output by one call, in a list from which the caller's caller can take it; empty where the block has to go node by node."""
    if not nobody_listens(x) or backends.of(x).on_gpu:
        return []
    ready = _ready(block, x)
    inside = [*block.main, *([] if block.projection is None else [block.projection])]
    if any([_is_live(node.norm) for node in inside]):
        return []
    # The statistics of a live norm must change once.
    if any([isinstance(node, BoundConvolution) and _is_live(node.norm) for node in block.external]):
        return []
    operands = [_operand(node) for node in inside]
    shortcut = _run_chain(block.external, [x]) if block.external else None
    left_is_main = block.addition is None or block.addition.left == "main"
    found = whole.run(graph.plans, graph.store, operands, x, shortcut, block.kind, left_is_main)
    if found is None:
        return []
    if ready is not None and ready.accept(found, shortcut):
        assert graph.store is not None
        graph.store.ready = ready
    return [found.output]


_CONV_SETTINGS = operator.itemgetter("stride", "padding", "dilation", "groups")
_NORM_SETTINGS = operator.itemgetter("training", "eps")


def _ready(block: WholeBlock, x: Tensor) -> whole.Ready | None:
    """What will repeat this call; None for tensors that are kept in unusual places."""
    places: list[tuple[dict[str, Any], str]] = []
    settings: list[tuple[dict[str, Any], Callable[[Any], Any]]] = []
    # An external shortcut is made anew each time; of its convolutions it matters only whether a norm is live.
    settings += [(n.norm.__dict__, _NORM_SETTINGS) for n in block.external if isinstance(n, BoundConvolution) and n.norm is not None]
    for node in (*block.main, *(() if block.projection is None else (block.projection,))):
        conv, norm = node.conv, node.norm
        places += [(conv._parameters, "weight"), (conv._parameters, "bias")]
        settings.append((conv.__dict__, _CONV_SETTINGS))
        if norm is not None:
            places += [(norm._parameters, "weight"), (norm._parameters, "bias")]
            places += [(norm._buffers, "running_mean"), (norm._buffers, "running_var")]
            settings.append((norm.__dict__, _NORM_SETTINGS))
    if any([name not in place for place, name in places]):
        return None
    external = block.external
    return whole.Ready(places, settings, x, (lambda x: _run_chain(external, [x])) if external else None)


def _operand(node: BoundConvolution) -> whole.Operand:
    conv, norm = node.conv, node.norm
    sources = (conv.weight, conv.bias) if norm is None else sources_of(conv, norm)
    return whole.Operand(
        sources, None if norm is None else norm.eps, conv.stride, conv.padding, conv.dilation, conv.groups, node.relu
    )


def _is_live(norm: Any) -> bool:
    """Whether a normalisation takes its statistics from the batch (``nn.BatchNorm2d.forward``'s own rule)."""
    return norm is not None and (norm.training or norm.running_mean is None)


def _convolution(node: BoundConvolution, x: Tensor, shortcut: Tensor | None, relu: bool, compiling: bool) -> Tensor:
    """One convolution; ``shortcut`` only where the normalisation is not live and the operator can add it."""
    conv, norm = node.conv, node.norm
    if norm is None:
        weight, bias = conv.weight, conv.bias
    elif _is_live(norm):
        y: Tensor = norm(conv(x))
        return F.relu(y, inplace=True) if relu else y
    else:
        weight, bias = folded(conv, norm, compiling, node.store)
    return conv_bias_add_relu(x, weight, bias, shortcut, conv.stride, conv.padding, conv.dilation, conv.groups, relu)


def _residual(node: BoundConvolution, addition: Addition, h: Tensor, shortcut: Tensor, compiling: bool) -> Tensor:
    """A convolution, the addition behind it and the ReLU."""
    left_is_main = addition.left == "main"
    if _is_live(node.norm):
        y = _convolution(node, h, None, False, compiling)
        if (
            y.dtype != shortcut.dtype
            or y.shape != shortcut.shape
            or not (left_is_main or _same_format(shortcut, is_channels_last(y)))
        ):
            return _add(node, addition, y, shortcut)
        return bias_add_relu(y, None, shortcut, node.relu)

    dtype, device = h.dtype, h.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    if shortcut.dtype != dtype or not (
        left_is_main or _same_format(shortcut, is_channels_last(h) or is_channels_last(node.conv.weight))
    ):
        return _add(node, addition, _convolution(node, h, None, False, compiling), shortcut)
    if compiling:
        return _convolution(node, h, shortcut, node.relu, compiling)
    try:
        return _convolution(node, h, shortcut, node.relu, compiling)
    except ValueError:
        # The operator does not broadcast; the block's own addition may.
        y = _convolution(node, h, None, False, compiling)
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
