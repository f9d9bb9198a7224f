"""A network's stem: the convolution, batch norm and ReLU with which its own forward begins, as one layer.

What follows stays as it is: the children are called one after the other, as the network's forward does, so that hooks, modes and
replaced modules behave as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._residual import Bound, BoundCall, BoundLayer, Call, Layer, Residual, Step, bind, bind_step, execute, run_steps
from .graph import analysis, calls
from .graph.facts import Facts
from .graph.ir import Graph, Node, Refused
from .graph.match import Matcher, only_input, plain_value
from .ops.derived import Store

# Functions of one tensor and constants, by the name under which a description keeps them; methods of tensors under the same.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "flatten": torch.flatten,
    "mean": torch.mean,
    "relu": torch.relu,
    "avg_pool2d": F.avg_pool2d,
    "max_pool2d": F.max_pool2d,
    "adaptive_avg_pool2d": F.adaptive_avg_pool2d,
}
_METHODS = ("flatten", "mean", "relu")


@dataclass(frozen=True)
class Stem:
    """``rest(relu(norm(conv(x))))``, where the rest is one call after another."""

    layer: Layer
    rest: tuple[Step, ...]


class BoundStem(NamedTuple):
    layer: Bound  # a block of one layer
    rest: tuple[BoundLayer | BoundCall, ...]

    def clear(self) -> None:
        """As ``Bound.clear``."""
        self.layer.clear()


def match_stem(module: nn.Module, forward: Callable[..., Any], facts: Facts) -> Stem:
    """What ``forward(module, x)`` does as a stem and calls of the module's children; ``facts`` hear what it depends on.

    Raises:
        Refused: with the reason, if it does something else or if running it fused could change the result.
    """
    only_input(forward)
    description: Stem | None = None
    for graph, _ in analysis.ways(module, forward, facts, leaf=lambda child: True, absorbs=False):
        found = _description(module, graph, facts)
        if description is not None and found != description:
            raise Refused("its forward does something else in training mode than in eval mode")
        description = found
    assert description is not None
    return description


class _Matcher(Matcher):
    """For whom nothing is transparent: an identity behind the stem is called as everything is, for somebody may listen there."""

    def is_transparent(self, node: Node) -> bool:
        return False


def _description(module: nn.Module, graph: Graph, facts: Facts) -> Stem:
    matcher = _Matcher(module, graph, facts, needs_shortcut=False)
    start, end = graph.nodes[0], matcher.end()
    path = matcher.path(matcher.solid(end), start)
    absorbed = next((i for i in range(min(3, len(path))) if matcher.is_relu(path[i])), -1) + 1
    first = matcher.steps(path[:absorbed])
    if len(first) != 1 or not isinstance(first[0], Layer):
        raise Refused("it does not begin with a convolution, a batch norm and a ReLU")
    for node in path[:absorbed]:
        if node.op == "module":
            calls.check_quiet(facts, str(node.target), matcher.at(node))
    for node in path:
        if node.op == "module" and "." in str(node.target):
            raise matcher.refused(node, f"{matcher.say(node)} is not its own child")
    return Stem(first[0], tuple([_call(matcher, node) for node in path[absorbed:]]))


def _call(matcher: Matcher, node: Node) -> Call:
    arguments = plain_value(node.args[1:]), tuple(plain_value(list(node.kwargs.items())))
    if node.op == "module" and not any(arguments):
        return Call(str(node.target))
    if node.op == "method" and node.target in _METHODS:
        return Call(str(node.target), True, *arguments)
    for name, function in FUNCTIONS.items():
        if node.op == "function" and node.target is function:
            return Call(name, True, *arguments)
    raise matcher.refused(node, f"after its stem it calls {matcher.say(node)}")


def bind_stem(module: nn.Module, description: Stem, store: Store | None) -> BoundStem:
    """The description with ``module``'s children filled in, and where to keep what is derived from their parameters."""
    layer = bind(module, Residual((replace(description.layer, relu=False),), None, relu=description.layer.relu), store)
    return BoundStem(layer, tuple([bind_step(module, step, store, FUNCTIONS) for step in description.rest]))


def execute_stem(stem: BoundStem, x: Tensor, compiling: bool) -> Tensor:
    """Execute a bound stem and what follows it."""
    ready = None if compiling or stem.layer.store is None else stem.layer.store.ready
    y = ready(x) if ready is not None and type(x) is Tensor else None
    x = execute(stem.layer, x, compiling) if y is None else y
    return run_steps(stem.rest, x, compiling)
