"""Recognises a network by what its own ``forward`` does: the stem (a convolution, batch norm and ReLU) if it has one, then one call after
another.

In the graph, what follows the stem stays as it is: calls of the children one after the other, as in the network's forward. Only a max pooling
to which nobody listens is a node of its own. Which children are looked through, and for how long, is ``runtime.inline``'s.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from . import calls
from .facts import Facts
from .ir import FUNCTIONS, Call, Graph, MaxPool, Node
from .match import Matcher, in_a_row, plain_value
from .trace import Operation, Refused, Trace

_CALLED = ("adaptive_avg_pool2d", "avg_pool2d", "flatten", "max_pool2d", "mean", "relu")  # of FUNCTIONS
_METHODS = ("flatten", "mean", "relu")  # of tensors, by the names of the functions that do the same


class NetworkReader:
    """What a network's trace says."""

    absorbs = False

    def is_leaf(self, module: nn.Module) -> bool:
        return True

    def looks_right(self, trace: Trace) -> bool:
        return False

    def graph(self, module: nn.Module, trace: Trace, facts: Facts) -> Graph:
        return _graph(module, trace, facts)


class _Matcher(Matcher):
    """For whom nothing is transparent: an identity is called as everything is, for somebody may listen there."""

    def is_transparent(self, op: Operation) -> bool:
        return False


def _graph(module: nn.Module, trace: Trace, facts: Facts) -> Graph:
    matcher = _Matcher(module, trace, facts, needs_shortcut=False)
    path = matcher.path(matcher.end(), trace.operations[0])
    for op in path:
        if op.kind == "module" and "." in str(op.target):
            raise matcher.refused(op, f"{matcher.say(op)} is not its own child")
    stem, count = _stem(matcher, path)
    nodes = [*stem, *[_node(matcher, op) for op in path[count:]]]
    return Graph(tuple(in_a_row(nodes)))


def _stem(matcher: Matcher, path: list[Operation]) -> tuple[Sequence[Node], int]:
    """The stem as a node, and how many operations it is; nothing where the forward begins with something else."""
    count = next((i for i in range(min(3, len(path))) if matcher.is_relu(path[i])), -1) + 1
    if not count or path[0].kind != "module" or not matcher.is_plain(path[0], nn.Conv2d):
        return (), 0
    stem = matcher.nodes(path[:count])
    for op in path[:count]:
        if op.kind == "module":
            calls.check_quiet(matcher.facts, str(op.target), matcher.at(op))
    return stem, count


def _node(matcher: Matcher, op: Operation) -> Node:
    if op.kind == "module" and matcher.is_plain(op, nn.MaxPool2d):
        try:
            calls.check_quiet(matcher.facts, str(op.target), matcher.at(op))
            return MaxPool(str(op.target))
        except Refused:
            pass
    return _call(matcher, op)


def _call(matcher: Matcher, op: Operation) -> Call:
    arguments = plain_value(op.args[1:]), tuple(plain_value(list(op.kwargs.items())))
    if op.kind == "module" and not any(arguments):
        return Call(str(op.target))
    if op.kind == "method" and op.target in _METHODS:
        return Call(str(op.target), True, *arguments)
    for name in _CALLED:
        if op.kind == "function" and op.target is FUNCTIONS[name]:
            return Call(name, True, *arguments)
    raise matcher.refused(op, f"it calls {matcher.say(op)}")
