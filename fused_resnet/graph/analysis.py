"""What a forward does, found by following its source through the objects that it names, without running any of it.

The language that is followed: assignments to names, ``if``, ``for`` over what is known, ``return``, ``assert``, expressions, calls of
modules, of tensors' methods and of functions, which are followed in turn (``interpreter.py``). Values that only a call knows are
operations; all others are read (``objects.py``), and what was read is a fact (``facts.py``). Whatever else a forward does is refused,
with its line.

The mode of a module (``training``) is no fact: each way that the modes can send a forward is followed, for all of them must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import fx, nn

from .facts import Facts
from .interpreter import Interpreter
from .ir import Graph
from .source import decorated
from .trace import Refused, Trace

_MOST_WAYS = 16  # four modules whose modes steer the forward


class Reader(Protocol):
    """What makes a graph of a trace (``match.BlockReader``, ``network.NetworkReader``).

    absorbs: whether a module that is one operation will not be called any more, and so must not be listened to.
    """

    @property
    def absorbs(self) -> bool: ...

    def is_leaf(self, module: nn.Module) -> bool:
        """Whether a module is one operation."""

    def looks_right(self, trace: Trace) -> bool:
        """Whether the user would want to know why it is refused."""

    def graph(self, module: nn.Module, trace: Trace, facts: Facts) -> Graph:
        """The graph, or Refused with the reason, if it is none or if running it fused could change the result."""


def graph_of(module: nn.Module, forward: Callable[..., Any], facts: Facts, reader: Reader) -> Graph:
    """What ``forward(module, x)`` does, the same in every mode; ``facts`` hear what it depends on.

    Raises:
        Refused: with the reason, and the line where there is one.
    """
    only_input(forward)
    if isinstance(module, (torch.jit.ScriptModule, fx.GraphModule)):  # which write into their classes
        raise Refused("it is a compiled TorchScript module or a graph of torch.fx", is_block=True)
    graph: Graph | None = None
    for trace, training in _ways(module, forward, facts, reader):
        is_block = reader.looks_right(trace)
        try:
            found = reader.graph(module, trace, facts)
        except Refused as error:
            error.is_block = is_block
            if training:
                error.reason = f"in training mode, {error.reason}"
            raise
        if graph is not None and found != graph:
            raise Refused("its forward does something else in training mode than in eval mode", is_block)
        graph = found
    assert graph is not None
    return graph


def only_input(forward: Callable[..., Any]) -> str:
    """The name of the one input that ``forward`` takes."""
    code = getattr(forward, "__code__", None)
    if code is None:
        raise Refused("its forward is not a plain Python function", is_block=True)
    where = decorated(forward)
    if where:
        raise Refused("its forward is decorated", is_block=True, where=where)
    names = list(code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount])
    if len(names) != 1 or code.co_kwonlyargcount or code.co_posonlyargcount or code.co_flags & 0x0C:  # *args, **kwargs
        raise Refused(f"its forward must take one input, got ({', '.join(names) or '...'})")
    return str(names[0])


def _ways(module: nn.Module, forward: Any, facts: Facts, reader: Reader) -> Iterator[tuple[Trace, bool]]:
    """The trace of ``forward(module, x)`` for each way that modules' modes can send it, and whether one of them is in training."""
    pending: list[tuple[bool, ...]] = [()]
    count = 0
    while pending:
        modes = pending.pop(0)
        count += 1
        if count > _MOST_WAYS:
            raise Refused("the modes of more than four of its modules steer its forward")
        run = Interpreter(module, facts, reader.is_leaf, reader.absorbs, modes)
        try:
            trace = run.trace_of(forward)
        except Refused as error:
            error.is_block = error.is_block or (run.adds() and not run.is_long())
            if any(run.modes):
                error.reason = f"in training mode, {error.reason}"
            raise
        yield trace, any(run.modes)
        chosen = tuple(run.modes)
        pending += [(*chosen[:i], True) for i in range(len(modes), len(chosen))]
