"""Facts as one native pass (csrc/facts.cpp), of some ten nanoseconds a fact, and as what torch.compile guards.

Nothing that is compared runs Python code.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from .._extension import cpu
from .facts import ABSENT, CONTENTS, EMPTY, FUNCTION, ITEM, KIND, LIST, LOOKUP, MISSING, TYPE, Facts, Row, attributes_of, lookup

_VALUES = (int, float, str)  # compared by value; bool and None have one object for each


class Checked:
    """Facts that are no longer added to. ``broken(owner.__dict__)`` gives the number of one that does not hold, or -1."""

    def __init__(self, facts: Facts) -> None:
        self.rows = rows = facts.rows()  # they keep alive what the native pass compares with
        reads = facts.reads()
        self.reads = tuple([path[1:] for path in reads if path[0] == ""])  # from the owner
        self.readers = _readers([path for path in reads if path[0] != ""])  # each from the globals of one file, or one cell
        self._pass: Any = _Plain(rows) if cpu is None else cpu.Facts(rows, MISSING)
        self._included: list[Any] = []  # alive: the native pass borrows them
        self.broken: Callable[[dict[str, Any]], int] = self._pass.broken

    def include(self, other: Checked, owner: dict[str, Any]) -> None:
        """To be checked with these: what a decision about another object was made on. owner: that object's ``__dict__``."""
        self._included.append((other, owner))
        self._pass.include(other._pass, owner)


def _readers(paths: list[tuple[Any, ...]]) -> list[Callable[[], Any]]:
    """Functions that read what ``paths`` lead to as the forward itself does: from the globals of its own file, or its closure."""
    by_root: dict[int, tuple[Any, list[str]]] = {}
    for root, *steps in paths:
        text = "cell" if isinstance(root, types.CellType) else steps.pop(0)
        for step in steps:
            if isinstance(step, str):
                text = f"getattr({text}, {step!r})"
            elif len(step) == 1:
                text = f"{text}[{step[0]!r}]"
            else:
                name = repr(step[0])
                text = {
                    "class": f"id(getattr(type({text}), {name}))",
                    "absent": f"hasattr({text}, {name})",
                    "missing": f"({name} in {text})",
                    "length": f"len({text})",
                }[step[1]]
        by_root.setdefault(id(root), (root, []))[1].append(f"{text} is None")
    return [_reader(root, texts) for root, texts in by_root.values()]


def _reader(root: Any, texts: list[str]) -> Callable[[], Any]:
    source = f"lambda cell: lambda: ({', '.join(texts)},)"
    outer = next(c for c in compile(source, "<facts>", "eval").co_consts if isinstance(c, types.CodeType))
    code = next(c for c in outer.co_consts if isinstance(c, types.CodeType))
    if isinstance(root, types.CellType):
        return types.FunctionType(code, globals(), "reader", None, (root,))
    return types.FunctionType(code, root, "reader")


class _Plain:
    """The pass in Python, for where there is no compiled module."""

    def __init__(self, rows: tuple[Row, ...]) -> None:
        self.rows = rows
        self.included: list[tuple[_Plain, dict[str, Any]]] = []

    def include(self, other: _Plain, owner: dict[str, Any]) -> None:
        self.included.append((other, owner))

    def broken(self, owner: dict[str, Any]) -> int:
        for i, (kind, place, name, value) in enumerate(self.rows):
            if not _holds(kind, owner if place is None else place, name, value):
                return i
        before = len(self.rows)
        for other, its_owner in self.included:
            found = other.broken(its_owner)
            if found >= 0:
                return before + found
            before += len(other.rows)
        return -1


def _holds(kind: int, place: Any, name: Any, value: Any) -> bool:
    if kind == ITEM:
        return _same(place.get(name, MISSING), value)
    if kind == ABSENT:
        return name not in place
    if kind == EMPTY:
        inner = place.get(name)
        return isinstance(inner, dict) and not inner
    if kind == CONTENTS:
        return _same(tuple(place), name) and _same(tuple(place.values()), value)
    if kind == LIST:
        return _same(tuple(place), value)
    if kind == TYPE:
        return type(place) is value and (name is None or attributes_of(place) is name)
    if kind == LOOKUP:
        return lookup(place, name) is value
    if kind == FUNCTION:
        return place.__code__ is name and place.__defaults__ is value[0] and place.__kwdefaults__ is value[1]
    if kind == KIND:
        return type(place.get(name, MISSING)) in value
    try:
        return place.cell_contents is value
    except ValueError:
        return False


def _same(a: Any, b: Any) -> bool:
    """One object, or equal and of one type whose equality runs no Python code."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if type(a) is tuple:
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) in _VALUES and bool(a == b)
