"""What a forward does, operation after operation, as it was followed. It imports nothing of this room."""

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


class Operation:
    """A value that exists only in a call, and the operation that makes it.

    kind: "input"; "output" (of what the forward returns); "constant" (a parameter, a buffer or another tensor); "module" (``target`` is its
    path); "function" (``target`` is the function); "method" (of a tensor, ``target`` is its name).
    users: the operations that read it, each once. within: the path of the module whose forward made it. where: as ``Refused.where``.
    """

    __slots__ = ("args", "kind", "kwargs", "target", "users", "where", "within")

    def __init__(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], where: str, within: str) -> None:
        self.kind, self.target, self.args, self.kwargs = kind, target, args, kwargs
        self.where, self.within = where, within
        self.users: dict[Operation, None] = {}

    @property
    def inputs(self) -> list[Operation]:
        """The operations that it reads, each once."""
        return list(dict.fromkeys(operations_in((self.args, self.kwargs))))


class Trace:
    """The operations of one forward, in order, from its input to its output."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []

    def add(self, operation: Operation) -> Operation:
        for read in operation.inputs:
            read.users[operation] = None
        self.operations.append(operation)
        return operation

    def remove(self, operation: Operation) -> None:
        for read in operation.inputs:
            del read.users[operation]
        self.operations.remove(operation)


def operations_in(value: Any) -> Iterator[Operation]:
    """The operations in nested arguments, as often as they stand there."""
    if isinstance(value, Operation):
        yield value
    elif isinstance(value, (tuple, list)):
        for v in value:
            yield from operations_in(v)
    elif isinstance(value, dict):
        yield from operations_in(list(value.values()))
    elif isinstance(value, slice):
        yield from operations_in((value.start, value.stop, value.step))


def name_of(target: Any) -> str:
    """A function in words."""
    return str(getattr(target, "__qualname__", None) or getattr(target, "__name__", None) or type(target).__name__)
