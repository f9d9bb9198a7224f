"""A graph with the modules of one object in the place of their paths, cut into parts: those that may run natively, and calls.

Parameters and settings are not here: they are read from the modules at every call.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import nn

from .._settings import Plans
from ..graph.checked import Checked
from ..graph.ir import FUNCTIONS, Addition, Call, Convolution, Graph, MaxPool, Node
from ..ops.store import Place, Store
from ..zero_pad import ZeroPad, combined, zero_pad_of

_MOST_PLANS = 64  # of one module: beyond, start over


class BoundConvolution(NamedTuple):
    """place: where what is derived for it is kept; None while compiling, where nothing is."""

    conv: nn.Conv2d
    norm: Any  # a BatchNorm2d or SyncBatchNorm, or None
    relu: bool
    addition: Addition | None
    place: Place | None

    @property
    def main_is_left(self) -> bool:
        return self.addition is None or self.addition.left == "main"

    @property
    def is_live(self) -> bool:
        """Whether the normalisation takes its statistics from the batch (``nn.BatchNorm2d.forward``'s own rule)."""
        return self.norm is not None and (self.norm.training or self.norm.running_mean is None)


class BoundMaxPool(NamedTuple):
    module: nn.MaxPool2d
    plans: Plans | None  # None while compiling


class BoundCall(NamedTuple):
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class BoundZeroPad(NamedTuple):
    """Calls in a row that together are a zero-padded shortcut."""

    calls: tuple[BoundCall, ...]

    def now(self) -> ZeroPad | None:
        """What they do as they are now; None where that is something else."""
        return combined([zero_pad_of(*call) for call in self.calls])


class BoundMeanPool(NamedTuple):
    """The mean of each channel: a call of an adaptive average pooling to one pixel."""


class BoundFlatten(NamedTuple):
    """A map of one pixel as a matrix: a call of ``torch.flatten(x, 1)``."""


class BoundLinear(NamedTuple):
    """place: as a convolution's."""

    module: nn.Linear
    place: Place | None


BoundNode = BoundConvolution | BoundMaxPool | BoundCall
# What a step of a native call may be.
StepNode = BoundConvolution | BoundMaxPool | BoundZeroPad | BoundMeanPool | BoundFlatten | BoundLinear

INPUT, EXTERNAL, STEPS = 0, 1, 2  # numbers of a segment's values: its input, a shortcut that calls made of it, the steps' from here on


class Step(NamedTuple):
    """A node of a segment. value, shortcut: numbers of the values that it reads; shortcut None: it adds nothing. begins: a section."""

    node: StepNode
    value: int
    shortcut: int | None
    begins: bool


class Segment(NamedTuple):
    """What may run as one native call: one residual block, or several sections, each of the value before. The last step is the output.

    external: what makes the value ``EXTERNAL`` of the input, one call after the other; empty where no step reads it.
    number: another one for each segment that is made.
    """

    steps: tuple[Step, ...]
    external: tuple[BoundNode, ...] = ()
    number: int = -1

    @property
    def convolutions(self) -> list[BoundConvolution]:
        return [step.node for step in self.steps if isinstance(step.node, BoundConvolution)]

    @property
    def layers(self) -> list[BoundConvolution | BoundLinear]:
        """The nodes that have weights."""
        return [step.node for step in self.steps if isinstance(step.node, (BoundConvolution, BoundLinear))]


_numbers = itertools.count()


def segment(steps: Sequence[Step], external: tuple[BoundNode, ...] = ()) -> Segment:
    return Segment(tuple(steps), external, next(_numbers))


class Part(NamedTuple):
    """Nodes that follow one another in a graph.

    inputs: the number of the value that each node reads; value 0 is the part's input, value i + 1 is what node i makes. dead_after: for
    each node, the values that nothing reads any more. segment: the same as one native call, if there may be one. projection: the number of
    the node whose result the last one adds, where that is a convolution of the input alone. sole, forks: the numbers of the nodes that
    alone read their input; and of those whose input is read again behind them, by convolutions and additions that do not write over it.
    """

    nodes: tuple[BoundNode, ...]
    inputs: tuple[int, ...]
    dead_after: tuple[tuple[int, ...], ...]
    segment: Segment | None = None
    projection: int | None = None
    sole: frozenset[int] = frozenset()
    forks: frozenset[int] = frozenset()


class Bound(NamedTuple):
    """The parts of a module's graph, one after the other, and what is kept for them.

    facts: what the parts were made on besides the graph (``inline.inline``); None: nothing. cached: the calls that can be repeated
    (``cached.CachedCalls``), by the number of the segment; of its own for each that is made, so that what a superseded one adds dies with it.
    """

    parts: tuple[Part, ...]
    plans: Plans
    store: Store | None  # None while compiling
    cached: dict[int, Any]
    facts: Checked | None = None

    def holds(self, module: Any) -> bool:
        """Whether the parts are still what ``module`` does, if the graph is."""
        return self.facts is None or self.facts.broken(module.__dict__) < 0

    def clear(self) -> None:
        """Give back what is derived from the module's parameters."""
        self.cached.clear()
        if self.store is not None:
            self.store.clear()


def bind(module: nn.Module, graph: Graph, store: Store | None) -> Bound:
    """The graph with ``module``'s submodules filled in. store: where to keep what is derived from their parameters; None while
    torch.compile or torch.export traces, where nothing is kept and nothing runs natively."""
    plans = Plans(_MOST_PLANS)
    nodes = tuple([_bind_node(module, node, i, store, plans) for i, node in enumerate(graph.nodes)])
    first = None if store is None else _block_of(graph, nodes)
    if first is None:
        reads = [(node.input, *_added(node)) for node in graph.nodes]
        all_of_it = _part(nodes, tuple([node.input for node in graph.nodes]), reads)
        return Bound((all_of_it,), plans, store, {} if store is None else store.cached)
    assert store is not None
    end = len(first.nodes)
    return Bound((first, *([chain(nodes[end:])] if nodes[end:] else [])), plans, store, store.cached)


def chain(nodes: Sequence[BoundNode], native: Segment | None = None) -> Part:
    """A part whose nodes each read the value before."""
    return _part(tuple(nodes), tuple(range(len(nodes))), [(i,) for i in range(len(nodes))], native)


def _part(
    nodes: tuple[BoundNode, ...],
    inputs: tuple[int, ...],
    reads: Sequence[tuple[int, ...]],
    native: Segment | None = None,
    projection: int | None = None,
) -> Part:
    """reads: all values that each node reads."""
    readers = Counter([value for values in reads for value in set(values)])
    sole = frozenset([i for i, value in enumerate(inputs) if readers[value] == 1 and reads[i].count(value) == 1])
    forks = []
    for i, value in enumerate(inputs):
        later = [node for node, values in zip(nodes[i + 1 :], reads[i + 1 :], strict=True) if value in values]
        if later and all([isinstance(node, BoundConvolution) and _keeps(node) for node in later]) and reads[i].count(value) == 1:
            forks.append(i)
    return Part(nodes, inputs, _last_reads(reads), native, projection, sole, frozenset(forks))


def _keeps(node: BoundConvolution) -> bool:
    """Whether a convolution's addition leaves its shortcut as it is."""
    return node.addition is None or node.main_is_left or not node.addition.inplace


def _find(module: nn.Module, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _bind_node(module: nn.Module, node: Node, number: int, store: Store | None, plans: Plans) -> BoundNode:
    if isinstance(node, MaxPool):
        return BoundMaxPool(_find(module, node.module), None if store is None else plans)
    if isinstance(node, Call):
        return BoundCall(FUNCTIONS[node.target] if node.function else _find(module, node.target), node.args, dict(node.kwargs))
    norm = None if node.norm is None else _find(module, node.norm)
    place = None if store is None else Place(store, number)
    return BoundConvolution(_find(module, node.conv), norm, node.relu, node.addition, place)


def _added(node: Node) -> tuple[int, ...]:
    addition = node.addition if isinstance(node, Convolution) else None
    return () if addition is None else (addition.shortcut,)


def _last_reads(reads: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    last = {value: i for i, values in enumerate(reads) for value in values}
    return tuple([tuple([value for value in last if last[value] == i]) for i in range(len(reads))])


def _block_of(graph: Graph, bound: tuple[BoundNode, ...]) -> Part | None:
    """The block with which a graph begins: all up to its last convolution, behind which there are only calls."""
    end = max([i + 1 for i, node in enumerate(graph.nodes) if isinstance(node, Convolution)], default=0)
    if not end:
        return None
    last = graph.nodes[end - 1]
    assert isinstance(last, Convolution)
    number = {id(node): i for i, node in enumerate(graph.nodes)}
    main = [bound[number[id(node)]] for node in graph.path_to(end)]
    convolutions: list[BoundConvolution] = [node for node in main if isinstance(node, BoundConvolution)]
    if len(convolutions) < len(main):
        return None
    external: tuple[BoundNode, ...] = ()
    projection = None
    shortcut: int | None = None
    steps: list[Step] = []
    if last.addition is not None:
        path = [number[id(node)] for node in graph.path_to(last.addition.shortcut)]
        external = tuple([bound[i] for i in path])
        shortcut = EXTERNAL if external else INPUT
        calls = tuple([node for node in external if isinstance(node, BoundCall)])
        if len(external) == 1 and isinstance(external[0], BoundConvolution) and not external[0].relu:
            steps.append(Step(external[0], INPUT, None, True))
            external, projection, shortcut = (), path[0], STEPS
        elif len(calls) == len(external) and BoundZeroPad(calls).now() is not None:
            steps.append(Step(BoundZeroPad(calls), INPUT, None, True))
            external, shortcut = (), STEPS
    for node in convolutions:
        value = INPUT if node is convolutions[0] else STEPS + len(steps) - 1
        steps.append(Step(node, value, shortcut if node is convolutions[-1] else None, not steps))
    nodes = graph.nodes[:end]
    reads = [(node.input, *_added(node)) for node in nodes]
    inputs = tuple([node.input for node in nodes])
    return _part(bound[:end], inputs, reads, segment(steps, external), projection)
