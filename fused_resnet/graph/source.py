"""A function's syntax tree: from its source file, and only if that file still compiles to the function's own code."""

from __future__ import annotations

import ast
import functools
import linecache
import os
import types
import weakref
from collections.abc import Iterator
from typing import Any

from .trace import Refused
from .values import Definition, FunctionNode

_known: weakref.WeakKeyDictionary[types.FunctionType, tuple[types.CodeType, Definition]] = weakref.WeakKeyDictionary()


def definition(function: types.FunctionType) -> Definition:
    """The definition that ``function`` was compiled from.

    Raises:
        Refused: if its source cannot be read, or is not what runs.
    """
    code = function.__code__
    known = _known.get(function)
    if known is not None and known[0] is code:
        return known[1]
    found = _find(function, code)
    _known[function] = code, found
    return found


def decorated(function: Any) -> str:
    """Where the function stands that ``function`` decorates; "" if it decorates none that it tells of."""
    inner = function.__dict__.get("__wrapped__")
    while type(inner) is types.FunctionType and "__wrapped__" in inner.__dict__:
        inner = inner.__dict__["__wrapped__"]
    code = getattr(inner, "__code__", None)
    return "" if code is None else f"line {code.co_firstlineno} of {os.path.basename(code.co_filename)}"


def _find(function: types.FunctionType, code: types.CodeType) -> Definition:
    name = f"the source of {function.__qualname__}"
    linecache.checkcache(code.co_filename)
    text = "".join(linecache.getlines(code.co_filename, function.__globals__))
    if not text:
        raise Refused(f"{name} cannot be read")
    try:
        functions, codes = _index(code.co_filename, text)
    except (SyntaxError, ValueError, RecursionError):
        raise Refused(f"{name} is no Python any more") from None
    place = code.co_firstlineno, code.co_name
    found = functions.get(place, [])
    if len(found) > 1:  # lambdas of one line
        found = [entry for entry in found if _covers(entry.node, code)]
    if not found or not any(_same(code, other) for other in codes.get(place, ())):
        raise Refused(f"{name} has changed since it was compiled, or was rewritten")
    if len(found) > 1:
        raise Refused(f"{name} is one of several on its line")
    return found[0]


Place = tuple[int, str]


@functools.lru_cache(maxsize=8)  # a model's blocks stand in few files; a large file's tree takes megabytes
def _index(filename: str, text: str) -> tuple[dict[Place, list[Definition]], dict[Place, list[types.CodeType]]]:
    """A file's functions and their code, by first line and name."""
    tree = ast.parse(text, filename)
    functions: dict[Place, list[Definition]] = {}
    for node, owner in _functions(tree, ""):
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        entry = Definition(node, os.path.basename(filename), owner)
        functions.setdefault((first, getattr(node, "name", "<lambda>")), []).append(entry)
    codes: dict[Place, list[types.CodeType]] = {}
    pending = [compile(tree, filename, "exec", dont_inherit=True)]
    while pending:
        code = pending.pop()
        codes.setdefault((code.co_firstlineno, code.co_name), []).append(code)
        pending += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return functions, codes


def _functions(node: ast.AST, owner: str) -> Iterator[tuple[FunctionNode, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.Lambda)):
            yield child, owner
        yield from _functions(child, child.name if isinstance(child, ast.ClassDef) else owner)


def _covers(node: FunctionNode, code: types.CodeType) -> bool:
    """Whether all instructions that have a position lie within ``node``. Python 3.10 knows no positions within a line."""
    positions = getattr(code, "co_positions", None)
    if positions is None:
        return True
    spans = [(a, c, b, d) for a, b, c, d in positions() if None not in (a, b, c, d) and (c, d) != (0, 0)]
    start, end = (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)
    return all(start <= (a, c) and (b, d) <= end for a, c, b, d in spans)


_FIELDS = (
    *("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars"),
    *("co_argcount", "co_posonlyargcount", "co_kwonlyargcount", "co_flags"),
)


def _same(a: types.CodeType, b: types.CodeType) -> bool:
    """Whether two code objects compute the same, from the same lines."""
    if any(getattr(a, field) != getattr(b, field) for field in _FIELDS) or len(a.co_consts) != len(b.co_consts):
        return False
    if list(a.co_lines()) != list(b.co_lines()):
        return False
    for x, y in zip(a.co_consts, b.co_consts, strict=True):
        if isinstance(x, types.CodeType) and isinstance(y, types.CodeType):
            if not _same(x, y):
                return False
        elif type(x) is not type(y) or repr(x) != repr(y):  # repr: 0.0 and -0.0, 1 and True within tuples
            return False
    return True
