"""What a module's forward does, as data: nodes in the order in which they run. The leaf of this room: it imports nothing of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class Refused(Exception):
    """Why a module is not converted, in one sentence.

    is_block: whether it looked like a residual block at all. where: the line that was not understood, "line 12 of model.py".
    """

    def __init__(self, reason: str, is_block: bool = False, where: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.is_block = is_block
        self.where = where

    def __str__(self) -> str:
        return f"{self.reason} ({self.where})" if self.where else self.reason


class Node:
    """A value that exists only in a call, and the operation that makes it.

    op: "input"; "output" (of what the forward returns); "constant" (a parameter, a buffer or another tensor); "module" (``target`` is its
    path); "function" (``target`` is the function); "method" (of a tensor, ``target`` is its name).
    users: the nodes that read it, each once. within: the path of the module whose forward made it. where: as ``Refused.where``.
    """

    __slots__ = ("args", "kwargs", "op", "target", "users", "where", "within")

    def __init__(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], where: str, within: str) -> None:
        self.op, self.target, self.args, self.kwargs = op, target, args, kwargs
        self.where, self.within = where, within
        self.users: dict[Node, None] = {}

    @property
    def inputs(self) -> list[Node]:
        """The nodes that it reads, each once."""
        return list(dict.fromkeys(nodes_in((self.args, self.kwargs))))


class Graph:
    """The nodes of one forward, in order, from its input to its output."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    def add(self, node: Node) -> Node:
        for read in node.inputs:
            read.users[node] = None
        self.nodes.append(node)
        return node

    def remove(self, node: Node) -> None:
        for read in node.inputs:
            del read.users[node]
        self.nodes.remove(node)


def nodes_in(value: Any) -> Iterator[Node]:
    """The nodes in nested arguments, as often as they stand there."""
    if isinstance(value, Node):
        yield value
    elif isinstance(value, (tuple, list)):
        for v in value:
            yield from nodes_in(v)
    elif isinstance(value, dict):
        yield from nodes_in(list(value.values()))
    elif isinstance(value, slice):
        yield from nodes_in((value.start, value.stop, value.step))


def name_of(target: Any) -> str:
    """A function in words."""
    return str(getattr(target, "__qualname__", None) or getattr(target, "__name__", None) or type(target).__name__)
