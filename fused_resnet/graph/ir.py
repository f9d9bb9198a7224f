"""A graph: what a module's forward does, as data. It imports nothing of this package.

Modules are named by their path, functions by a name in ``FUNCTIONS``: a graph holds no tensors and no modules, and so belongs to every
copy of its module. Parameters and settings are read from the modules when it runs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

# Functions of one tensor and constants without side effects, by the name under which a graph keeps them.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "adaptive_avg_pool2d": F.adaptive_avg_pool2d,
    "avg_pool2d": F.avg_pool2d,
    "flatten": torch.flatten,
    "getitem": operator.getitem,
    "max_pool2d": F.max_pool2d,
    "mean": torch.mean,
    "pad": F.pad,
    "relu": torch.relu,
}


@dataclass(frozen=True)
class Addition:
    """The addition behind a convolution, whose other operand is the value number ``shortcut``.

    left: the operand on the left of the +, "main" (the convolution) or "shortcut", which decides the sum's memory format.
    inplace: the addition writes into its left operand, whose dtype the sum then has.
    """

    shortcut: int
    left: str = "main"
    inplace: bool = False


@dataclass(frozen=True)
class Convolution:
    """``relu(norm(conv(value number input)) + shortcut)``. norm: a batch normalisation, if there is one. relu: whether there is one."""

    conv: str
    norm: str | None
    relu: bool
    addition: Addition | None = None
    input: int = 0


@dataclass(frozen=True)
class Call:
    """A module without side effects (by path), or one of FUNCTIONS (by name), of one value and constants."""

    target: str
    function: bool = False
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()
    input: int = 0


@dataclass(frozen=True)
class MaxPool:
    """A plain ``nn.MaxPool2d``, by path."""

    module: str
    input: int = 0


Node = Convolution | MaxPool | Call


@dataclass(frozen=True)
class Graph:
    """Nodes in the order in which they run. Value 0 is the input, value i + 1 is what node i makes; the last value is the output."""

    nodes: tuple[Node, ...]

    def path_to(self, value: int) -> tuple[Node, ...]:
        """The nodes from the input to a value; where there is an addition, along its convolution."""
        return tuple(self._back_from(value))[::-1]

    def _back_from(self, value: int) -> Iterator[Node]:
        while value > 0:
            node = self.nodes[value - 1]
            yield node
            value = node.input

    def main(self) -> tuple[Node, ...]:
        """A residual block's main path."""
        return self.path_to(len(self.nodes))

    def shortcut(self) -> tuple[Node, ...] | None:
        """A residual block's shortcut: no nodes is the identity, None is no addition."""
        addition = self.nodes[-1].addition if isinstance(self.nodes[-1], Convolution) else None
        return None if addition is None else self.path_to(addition.shortcut)
