"""What a forward does, found by following its source through the objects that it names, without running any of it.

The language that is followed: assignments to names, ``if``, ``for`` over what is known, ``return``, ``assert``, expressions, calls of
modules, of tensors' methods and of functions, which are followed in turn (``interpreter.py``). Values that only a call knows are
``Node``s; all others are read (``objects.py``), and what was read is a fact (``facts.py``). Whatever else a forward does is refused,
with its line.

The mode of a module (``training``) is no fact: each way that the modes can send a forward is followed, for all of them must agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from .facts import Facts
from .interpreter import Interpreter
from .ir import Graph, Refused
from .recorder import Leaf

_MOST_WAYS = 16  # four modules whose modes steer the forward


def ways(module: nn.Module, forward: Any, facts: Facts, leaf: Leaf, absorbs: bool) -> Iterator[tuple[Graph, bool]]:
    """The graph of ``forward(module, x)`` for each way that modules' modes can send it, and whether one of them is in training.

    leaf: whether a module is one operation. absorbs: whether such a module will not be called any more, and so must not be listened to.

    Raises:
        Refused: with the line, where the forward is not followed.
    """
    pending: list[tuple[bool, ...]] = [()]
    count = 0
    while pending:
        modes = pending.pop(0)
        count += 1
        if count > _MOST_WAYS:
            raise Refused("the modes of more than four of its modules steer its forward")
        run = Interpreter(module, facts, leaf, absorbs, modes)
        try:
            graph = run.graph_of(forward)
        except Refused as error:
            error.is_block = error.is_block or (run.adds() and not run.is_long())
            if any(run.modes):
                error.reason = f"in training mode, {error.reason}"
            raise
        yield graph, any(run.modes)
        chosen = tuple(run.modes)
        pending += [(*chosen[:i], True) for i in range(len(modes), len(chosen))]
