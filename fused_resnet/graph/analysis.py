"""What a forward does, found by following its source through the objects that it names, without running any of it.

The language that is followed: assignments to names, ``if``, ``for`` over what is known, ``return``, ``assert``, expressions, calls of
modules, of tensors' methods and of functions, which are followed in turn (``calls.py``). Values that only a call knows are
operations; all others are read (``objects.py``), and what was read is a fact (``facts.py``). Whatever else a forward does is refused,
with its line.

The mode of a module (``training``) is no fact: each way that the modes can send a forward is followed, for all of them must agree.
"""

from __future__ import annotations

import ast
import types
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import fx, nn

from . import calls, source
from .expressions import Expressions
from .facts import Facts
from .ir import Graph
from .objects import truth
from .recorder import ADDITIONS, Frame, shown
from .trace import Operation, Refused, Trace
from .values import Definition, FunctionNode, Known, Local

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
    where = source.decorated(forward)
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


_GENERATOR = 0x20 | 0x80 | 0x200  # the flags of generators, coroutines and asynchronous generators

class _Returned(Exception):
    def __init__(self, value: Any) -> None:
        self.value = value


class _Broke(Exception):
    pass


class _Continued(Exception):
    pass


class Interpreter(Expressions):
    """Follows a forward, and the functions that it calls, statement by statement."""

    MOST_CALLS = 40  # within each other

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._source: Definition | None = None

    def trace_of(self, forward: Any) -> Trace:
        """The operations of ``forward(owner, x)``."""
        if type(forward) is not types.FunctionType:
            raise Refused("its forward is not a plain Python function", is_block=True)
        self._source = source.definition(forward)
        x = self.trace.add(Operation("input", "", (), {}, "", ""))
        try:
            output = self.inline(forward, (Known(self.owner, ("",)), x), {})
        except RecursionError:
            raise Refused("its forward is nested too deeply") from None
        self.trace.add(Operation("output", "", (output,), {}, "", ""))
        return self.trace

    def adds(self) -> bool:
        """Whether the forward, followed or not, contains an addition, as a residual block's does."""
        if any(op.target in ADDITIONS for op in self.trace.operations if op.kind in ("function", "method")):
            return True
        if self._source is None:
            return True
        for node in ast.walk(self._source.node):
            if isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, ast.Add):
                return True
            if isinstance(node, ast.Attribute) and node.attr in ("add", "add_"):
                return True
        return False

    # --- calls ---

    def inline(self, function: types.FunctionType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Follow a call of a Python function."""
        path = self.facts.function(function)
        code = function.__code__
        definition = source.definition(function)
        if code.co_flags & _GENERATOR:
            raise Refused(f"it calls {function.__qualname__}, a generator")
        defaults = [Known(v, (*path, "__defaults__", (i,))) for i, v in enumerate(function.__defaults__ or ())]
        keywords = self.facts.contents(function.__kwdefaults__) if function.__kwdefaults__ else {}
        keyword_defaults = {k: Known(v, (*path, "__kwdefaults__", (k,))) for k, v in keywords.items()}
        frame = Frame(function, definition, {*code.co_varnames, *code.co_cellvars})
        try:
            return self._run(frame, definition.node, args, kwargs, defaults, keyword_defaults)
        except Refused as error:
            if error.where == frame.where():
                error.where = source.decorated(function) or error.where
            if calls.is_torchs(function) and error.where.endswith(f" of {frame.file}"):  # the user's line calls it
                raise Refused(f"it calls {function.__qualname__}, which is not followed") from None
            raise

    def inline_local(self, local: Local, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        outer = local.frame
        definition = Definition(local.node, outer.file, outer.class_name)
        frame = Frame(outer.function, definition, _names_of(local.node), outer)
        return self._run(frame, local.node, args, kwargs, local.defaults, local.keyword_defaults)

    def _run(
        self,
        frame: Frame,
        node: FunctionNode,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        defaults: list[Any],
        keyword_defaults: dict[str, Any],
    ) -> Any:
        if len(self.frames) >= self.MOST_CALLS:
            raise Refused("its calls are nested too deeply")
        frame.values = calls.bound(node.args, args, kwargs, defaults, keyword_defaults)
        self.frames.append(frame)
        try:
            if isinstance(node, ast.Lambda):
                return self.value(node.body)
            self.block(node.body)
        except _Returned as result:
            return result.value
        except Refused as error:
            error.where = error.where or frame.where()
            raise
        except (_Broke, _Continued, RecursionError):
            raise
        except Exception as error:  # a case that was not thought of stops neither fuse_ nor a call
            raise Refused(f"it is not followed: {type(error).__name__}: {error}"[:200], where=frame.where()) from error
        finally:
            self.frames.pop()
        return Known(None)

    # --- statements ---

    def block(self, body: list[ast.stmt]) -> None:
        frame = self.frames[-1]
        for statement in body:
            self._steps += 1
            if self._steps > self.MOST_STEPS:
                raise Refused("its forward is too long to be followed")
            frame.line = statement.lineno
            follow = getattr(self, f"_{type(statement).__name__}", None)
            if follow is None:
                raise Refused(f"it has a statement that is not followed: {shown(statement)}")
            follow(statement)

    def _Expr(self, s: ast.Expr) -> None:
        self.value(s.value)

    def _Pass(self, s: ast.Pass) -> None:
        pass

    def _Return(self, s: ast.Return) -> None:
        raise _Returned(Known(None) if s.value is None else self.value(s.value))

    def _Break(self, s: ast.Break) -> None:
        raise _Broke

    def _Continue(self, s: ast.Continue) -> None:
        raise _Continued

    def _Assign(self, s: ast.Assign) -> None:
        value = self.value(s.value)
        for target in s.targets:
            self.assign(target, value)

    def _AnnAssign(self, s: ast.AnnAssign) -> None:
        if s.value is not None:
            self.assign(s.target, self.value(s.value))

    def _AugAssign(self, s: ast.AugAssign) -> None:
        if not isinstance(s.target, ast.Name):
            raise Refused(f"it changes {shown(s.target)}")
        left, right = self.value(ast.copy_location(ast.Name(s.target.id, ast.Load()), s.target)), self.value(s.value)
        plain, in_place = self._operators(s.op)
        if isinstance(left, list):
            raise Refused(f"it changes the list {s.target.id}")
        value = self.function(in_place, (left, right)) if isinstance(left, Operation) else self.binary(plain, left, right)
        self.assign(s.target, value)

    def _If(self, s: ast.If) -> None:
        self.block(s.body if truth(self, self.value(s.test)) else s.orelse)

    def _For(self, s: ast.For) -> None:
        for value in self.values_in(self.value(s.iter)):
            self.assign(s.target, value)
            try:
                self.block(s.body)
            except _Broke:
                return
            except _Continued:
                continue
        self.block(s.orelse)

    def _Assert(self, s: ast.Assert) -> None:
        if not truth(self, self.value(s.test)):
            raise Refused("its assertion does not hold")

    def _Delete(self, s: ast.Delete) -> None:
        for target in s.targets:
            if not isinstance(target, ast.Name) or target.id not in self.frames[-1].values:
                raise Refused(f"it deletes {shown(target)}")
            del self.frames[-1].values[target.id]

    def _FunctionDef(self, s: ast.FunctionDef) -> None:
        if s.decorator_list:
            raise Refused(f"it decorates {s.name}")
        self.assign(ast.copy_location(ast.Name(s.name, ast.Store()), s), self._local(s))

    def _With(self, s: ast.With) -> None:
        raise Refused(f"it runs under `with {', '.join(shown(item) for item in s.items)}`, which is not followed")

    def _Raise(self, s: ast.Raise) -> None:
        raise Refused("it raises an error")

def _names_of(node: FunctionNode) -> set[str]:
    """The names that a function within another sets."""
    a = node.args
    names = {arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs, *([a.vararg] if a.vararg else []), *([a.kwarg] if a.kwarg else []))}
    pending: list[ast.AST] = [node.body] if isinstance(node, ast.Lambda) else list(node.body)
    while pending:
        n = pending.pop()
        if isinstance(n, ast.Name) and isinstance(n.ctx, (ast.Store, ast.Del)):
            names.add(n.id)
        if isinstance(n, (ast.FunctionDef, ast.Lambda)):
            names |= {n.name} if isinstance(n, ast.FunctionDef) else set()
        else:
            pending += ast.iter_child_nodes(n)
    return names
