"""What a forward does, found by following its source through the objects that it names, without running any of it.

The language that is followed: assignments to names, ``if``, ``for`` over what is known, ``return``, ``assert``, expressions, calls of
modules, of tensors' methods and of functions, which are followed in turn. Values that only a call knows are ``Node``s; all others are
read (``objects.py``), and what was read is a fact (``facts.py``). Whatever else a forward does is refused, with its line.

The mode of a module (``training``) is no fact: each way that the modes can send a forward is followed, for all of them must agree.
"""

from __future__ import annotations

import ast
import operator
import os
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from . import calls, objects, source
from .facts import MISSING, Facts, lookup
from .ir import Graph, Node, Refused, name_of, nodes_in
from .objects import CONSTANTS, PLAIN, Known, Local, Method, Native, Super, truth

Leaf = Callable[[nn.Module], bool]
_GENERATOR = 0x20 | 0x80 | 0x200  # the flags of generators, coroutines and asynchronous generators
_MOST_WAYS = 16  # four modules whose modes steer the forward

_BINARY: dict[type[ast.operator], tuple[Callable[..., Any], Callable[..., Any]]] = {  # (a + b, a += b)
    ast.Add: (operator.add, operator.iadd),
    ast.Sub: (operator.sub, operator.isub),
    ast.Mult: (operator.mul, operator.imul),
    ast.Div: (operator.truediv, operator.itruediv),
    ast.FloorDiv: (operator.floordiv, operator.ifloordiv),
    ast.Mod: (operator.mod, operator.imod),
    ast.MatMult: (operator.matmul, operator.imatmul),
    ast.Pow: (operator.pow, operator.ipow),
    ast.BitAnd: (operator.and_, operator.iand),
    ast.BitOr: (operator.or_, operator.ior),
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
# What tensors' operators and methods are when this package is imported.
_TENSORS = {
    name: lookup(Tensor, name)
    for name in "__add__ __radd__ __iadd__ __getitem__ add add_ relu relu_ flatten mean size dim __getattribute__".split()
}
_OPERATORS = {operator.add: ("__add__", "__radd__"), operator.iadd: ("__iadd__",), operator.getitem: ("__getitem__",)}


class Frame:
    """One call of a function: its names, and the line that it is at. ``outer``: of a function within another, that one's."""

    def __init__(self, function: types.FunctionType, definition: source.Definition, names: set[str], outer: Frame | None = None) -> None:
        self.function, self.file, self.class_name = function, definition.file, definition.owner
        self.names, self.outer = names, outer
        self.values: dict[str, Any] = {}
        self.line = definition.node.lineno

    def where(self) -> str:
        return f"line {self.line} of {self.file}"


class _Returned(Exception):
    def __init__(self, value: Any) -> None:
        self.value = value


class _Broke(Exception):
    pass


class _Continued(Exception):
    pass


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
        run = Analysis(module, facts, leaf, absorbs, modes)
        try:
            graph = run.graph_of(forward)
        except Refused as error:
            error.is_block = error.is_block or run.adds()
            if any(run.modes):
                error.reason = f"in training mode, {error.reason}"
            raise
        yield graph, any(run.modes)
        chosen = tuple(run.modes)
        pending += [(*chosen[:i], True) for i in range(len(modes), len(chosen))]


class Analysis:
    """One way through one forward."""

    MOST_NODES = 256  # a residual block has about ten operations; a whole network is no candidate
    MOST_STEPS = 20_000
    MOST_CALLS = 40  # within each other

    def __init__(self, owner: nn.Module, facts: Facts, leaf: Leaf, absorbs: bool, modes: tuple[bool, ...]) -> None:
        self.owner, self.facts, self.leaf, self.absorbs = owner, facts, leaf, absorbs
        self.owner_class = getattr(type(owner), "_fused_original", None) or type(owner)
        self.graph = Graph()
        self.paths = dict(_paths(owner))
        self.frames: list[Frame] = []
        self.within: list[str] = []  # the paths of the modules whose forwards are followed
        self.modes: list[bool] = []
        self._planned, self._mode_of, self._steps = modes, {}, 0  # type: ignore[var-annotated]
        self._source: source.Definition | None = None

    def graph_of(self, forward: Any) -> Graph:
        if type(forward) is not types.FunctionType:
            raise Refused("its forward is not a plain Python function", is_block=True)
        self._source = source.definition(forward)
        x = self.graph.add(Node("input", "", (), {}, "", ""))
        try:
            output = self.inline(forward, (Known(self.owner, ("",)), x), {})
        except RecursionError:
            raise Refused("its forward is nested too deeply") from None
        self.graph.add(Node("output", "", (output,), {}, "", ""))
        return self.graph

    def adds(self) -> bool:
        """Whether the forward, followed or not, contains an addition, as a residual block's does."""
        if any(node.target in calls.ADDITIONS for node in self.graph.nodes if node.op in ("function", "method")):
            return True
        if self._source is None:
            return True
        for node in ast.walk(self._source.node):
            if isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, ast.Add):
                return True
            if isinstance(node, ast.Attribute) and node.attr in ("add", "add_"):
                return True
        return False

    # --- what is asked of the world ---

    def class_of(self, obj: Any) -> type:
        return self.owner_class if obj is self.owner else self.facts.type(obj)

    def read(self, known: Any) -> Any:
        """Something that was read: a tensor is a node from here on."""
        if not isinstance(known, Known):
            return known
        if known.path is not None:
            self.facts.read(known.path)
        return self.constant(known.value) if issubclass(type(known.value), Tensor) else known

    def training(self, module: Known) -> Known:
        """The mode of a module: as planned, else eval."""
        key = id(module.value)
        if key not in self._mode_of:
            mode = self._planned[len(self.modes)] if len(self.modes) < len(self._planned) else False
            self._mode_of[key] = mode
            self.modes.append(mode)
        return Known(self._mode_of[key])

    def kind(self, value: Any) -> type:
        """The class of a value."""
        if isinstance(value, Node) and value.op in ("input", "module"):
            return Tensor
        if isinstance(value, (tuple, list, dict)):
            return type(value)
        if isinstance(value, Known):
            return self.class_of(value.value)
        raise Refused("it asks for the class of a value that only a call knows")

    # --- nodes ---

    def node(self, op: str, target: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Node:
        if len(self.graph.nodes) >= self.MOST_NODES:
            raise Refused(f"its forward has more than {self.MOST_NODES} operations")
        where = self.frames[-1].where() if self.frames else ""
        return self.graph.add(Node(op, target, args, kwargs or {}, where, self.within[-1] if self.within else ""))

    def constant(self, value: Any) -> Node:
        return self.node("constant", getattr(value, "__name__", type(value).__name__))

    def argument(self, value: Any) -> Any:
        """A value as an argument of an operation: nodes and plain constants. What is neither becomes a node that no rule knows."""
        if isinstance(value, (Node, *CONSTANTS)) or value is None:
            return value
        if isinstance(value, (tuple, list)):
            return type(value)([self.argument(v) for v in value])
        if isinstance(value, slice):
            return value
        if isinstance(value, Known):
            kind = type(value.value)
            if kind in CONSTANTS:
                return value.value
            if kind in (tuple, list):
                return kind([self.argument(v) for v in objects.values_in(self, value)])
        return self.constant(value.value if isinstance(value, Known) else value)

    def function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Node:
        """An operation on values that only a call knows; which operations are known is for the matcher to say."""
        for name in _OPERATORS.get(target, ()):
            self.check_tensor(name)
        args, kwargs = self.argument(args), {name: self.argument(v) for name, v in (kwargs or {}).items()}
        if not args and "input" in kwargs:
            args = (kwargs.pop("input"),)
        if not any(node.op != "constant" for node in nodes_in((args, kwargs))):
            raise Refused(f"it calls {name_of(target)}, which is not followed")
        return self.node("function", target, args, kwargs)

    def method(self, node: Node, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        self.check_tensor(name)
        return self.node("method", name, (node, *self.argument(args)), {k: self.argument(v) for k, v in kwargs.items()})

    def check_tensor(self, name: str) -> None:
        found = self.facts.lookup(Tensor, name)
        if name in _TENSORS and found is not _TENSORS[name]:
            raise Refused(f"torch.Tensor.{name} was replaced")

    # --- calls ---

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return calls.call(self, function, args, kwargs)

    def inline(self, function: types.FunctionType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Follow a call of a Python function."""
        code = self.facts.function(function)
        definition = source.definition(function)
        if code.co_flags & _GENERATOR:
            raise Refused(f"it calls {function.__qualname__}, a generator")
        defaults = [Known(v) for v in function.__defaults__ or ()]
        keyword_defaults = {k: Known(v) for k, v in self.facts.contents(function.__kwdefaults__).items()} if function.__kwdefaults__ else {}
        frame = Frame(function, definition, {*code.co_varnames, *code.co_cellvars})
        try:
            return self._run(frame, definition.node, args, kwargs, defaults, keyword_defaults)
        except Refused as error:
            if error.where == frame.where():
                error.where = decorated(function) or error.where
            raise

    def inline_local(self, local: Local, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        outer = local.frame
        definition = source.Definition(local.node, outer.file, outer.class_name)
        frame = Frame(outer.function, definition, _names_of(local.node), outer)
        return self._run(frame, local.node, args, kwargs, local.defaults, local.keyword_defaults)

    def _run(
        self,
        frame: Frame,
        node: source.FunctionNode,
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
                raise Refused(f"it has a statement that is not followed: {_shown(statement)}")
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
            raise Refused(f"it changes {_shown(s.target)}")
        left, right = self.value(ast.copy_location(ast.Name(s.target.id, ast.Load()), s.target)), self.value(s.value)
        plain, in_place = self._operators(s.op)
        if isinstance(left, list):
            raise Refused(f"it changes the list {s.target.id}")
        value = self.function(in_place, (left, right)) if isinstance(left, Node) else self.binary(plain, left, right)
        self.assign(s.target, value)

    def assign(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Name):
            frame = self.frames[-1]
            name = _mangled(target.id, frame.class_name)
            if name not in frame.names:
                raise Refused(f"it sets the global {name}")
            frame.values[name] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            values = self.unpacked(value, len(target.elts))
            if len(values) != len(target.elts) or any(isinstance(t, ast.Starred) for t in target.elts):
                raise Refused("it unpacks in a way that is not followed")
            for t, v in zip(target.elts, values, strict=True):
                self.assign(t, v)
        else:
            raise Refused(f"it sets {_shown(target)}")

    def unpacked(self, value: Any, count: int) -> list[Any]:
        if isinstance(value, Node):
            return [self.function(operator.getitem, (value, Known(i))) for i in range(count)]
        return objects.values_in(self, value)

    def _If(self, s: ast.If) -> None:
        self.block(s.body if truth(self, self.value(s.test)) else s.orelse)

    def _For(self, s: ast.For) -> None:
        for value in objects.values_in(self, self.value(s.iter)):
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
                raise Refused(f"it deletes {_shown(target)}")
            del self.frames[-1].values[target.id]

    def _FunctionDef(self, s: ast.FunctionDef) -> None:
        if s.decorator_list:
            raise Refused(f"it decorates {s.name}")
        self.assign(ast.copy_location(ast.Name(s.name, ast.Store()), s), self._local(s))

    def _With(self, s: ast.With) -> None:
        raise Refused(f"it runs under `with {', '.join(_shown(item) for item in s.items)}`, which is not followed")

    def _Raise(self, s: ast.Raise) -> None:
        raise Refused("it raises an error")

    # --- expressions ---

    def value(self, e: ast.expr) -> Any:
        self._steps += 1
        if self._steps > self.MOST_STEPS:
            raise Refused("its forward is too long to be followed")
        follow = getattr(self, f"_{type(e).__name__}", None)
        if follow is None:
            raise Refused(f"it has an expression that is not followed: {_shown(e)}")
        return follow(e)

    def _Constant(self, e: ast.Constant) -> Any:
        return Known(e.value)

    def _Name(self, e: ast.Name) -> Any:
        frame: Frame = self.frames[-1]
        name = _mangled(e.id, frame.class_name)
        while True:
            if name in frame.names:
                if name not in frame.values:
                    raise Refused(f"it reads {name} before it is set")
                return frame.values[name]
            if frame.outer is None:
                break
            frame = frame.outer
        function = frame.function
        if name in function.__code__.co_freevars:
            cell = (function.__closure__ or ())[function.__code__.co_freevars.index(name)]
            value = self.facts.cell(cell)
            path = None
        else:
            scope = function.__globals__
            value, path = self.facts.item(scope, name), (scope, name)
            if value is MISSING:
                value = self.facts.item(function.__builtins__, name)  # type: ignore[attr-defined]
                path = None
        if value is MISSING:
            raise Refused(f"it reads {name}, which is not there")
        return self.read(Known(value, path))

    def _Attribute(self, e: ast.Attribute) -> Any:
        owner, name = self.value(e.value), _mangled(e.attr, self.frames[-1].class_name)
        if isinstance(owner, Node):
            return self.function(getattr, (owner, Known(name)))
        return objects.attribute(self, owner, name)

    def _Subscript(self, e: ast.Subscript) -> Any:
        owner, key = self.value(e.value), self.value(e.slice)
        if isinstance(owner, Node) or any(nodes_in(key if not isinstance(key, Known) else None)):
            return self.function(operator.getitem, (owner, key))
        return objects.item(self, owner, key)

    def _Slice(self, e: ast.Slice) -> slice:
        return slice(*[None if part is None else self.argument(self.value(part)) for part in (e.lower, e.upper, e.step)])

    def _Tuple(self, e: ast.Tuple) -> tuple[Any, ...]:
        return tuple(self.several(e.elts))

    def _List(self, e: ast.List) -> list[Any]:
        return self.several(e.elts)

    def several(self, elements: list[ast.expr]) -> list[Any]:
        values: list[Any] = []
        for element in elements:
            if isinstance(element, ast.Starred):
                values += objects.values_in(self, self.value(element.value))
            else:
                values.append(self.value(element))
        return values

    def _Dict(self, e: ast.Dict) -> dict[Any, Any]:
        made: dict[Any, Any] = {}
        for key, value in zip(e.keys, e.values, strict=True):
            k = None if key is None else self.value(key)
            if not isinstance(k, Known) or type(k.value) not in PLAIN:
                raise Refused("it makes a dictionary in a way that is not followed")
            made[k.value] = self.value(value)
        return made

    def _Call(self, e: ast.Call) -> Any:
        node, name = None, ""
        if isinstance(e.func, ast.Attribute):
            owner = self.value(e.func.value)
            name = _mangled(e.func.attr, self.frames[-1].class_name)
            if isinstance(owner, Node):
                node = owner
            else:
                function = objects.attribute(self, owner, name)
        else:
            function = self.value(e.func)
        args = tuple(self.several(e.args))
        kwargs: dict[str, Any] = {}
        for keyword in e.keywords:
            if keyword.arg is None:
                kwargs |= calls.keywords_in(self, self.value(keyword.value))
            else:
                kwargs[keyword.arg] = self.value(keyword.value)
        self.frames[-1].line = e.lineno
        if node is not None:
            return self.method(node, name, args, kwargs)
        if isinstance(function, Known) and function.value is super:
            return self._super(args)
        return self.call(function, args, kwargs)

    def _super(self, args: tuple[Any, ...]) -> Super:
        frame = self.frames[-1]
        if not args:
            names = frame.function.__code__.co_freevars
            if "__class__" not in names or frame.outer is not None:
                raise Refused("it uses super() in a way that is not followed")
            cls = self.facts.cell((frame.function.__closure__ or ())[names.index("__class__")])
            first = frame.function.__code__.co_varnames[0]
            args = Known(cls), frame.values.get(first)
        if len(args) != 2 or not all(isinstance(a, Known) for a in args) or type(args[0].value) is not type:
            raise Refused("it uses super() in a way that is not followed")
        return Super(args[0].value, args[1])

    def _BinOp(self, e: ast.BinOp) -> Any:
        left, right = self.value(e.left), self.value(e.right)
        self.frames[-1].line = e.lineno
        return self.binary(self._operators(e.op)[0], left, right)

    def _operators(self, op: ast.operator) -> tuple[Callable[..., Any], Callable[..., Any]]:
        found = _BINARY.get(type(op))
        if found is None:
            raise Refused(f"it uses the operator {type(op).__name__}, which is not followed")
        return found

    def binary(self, function: Callable[..., Any], left: Any, right: Any) -> Any:
        if isinstance(left, Node) or isinstance(right, Node):
            return self.function(function, (left, right))
        if isinstance(left, (tuple, list)) and type(left) is type(right) and function is operator.add:
            return left + right
        a, b = (v.value if isinstance(v, Known) else v for v in (left, right))
        if type(a) in PLAIN and type(b) in PLAIN and not (function is operator.pow and (type(b) is not int or abs(b) > 8)):
            try:
                return Known(function(a, b))
            except (TypeError, ValueError, ArithmeticError) as error:
                raise Refused(f"its arithmetic fails: {error}") from None
        raise Refused("its arithmetic is not followed")

    def _UnaryOp(self, e: ast.UnaryOp) -> Any:
        value = self.value(e.operand)
        if isinstance(e.op, ast.Not):
            return Known(not truth(self, value))
        function = {ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Invert: operator.invert}[type(e.op)]
        if isinstance(value, Node):
            return self.function(function, (value,))
        if isinstance(value, Known) and type(value.value) in (bool, int, float) and function is not operator.invert:
            return Known(function(value.value))
        raise Refused("its arithmetic is not followed")

    def _BoolOp(self, e: ast.BoolOp) -> Any:
        value: Any = None
        for operand in e.values:
            value = self.value(operand)
            if operand is not e.values[-1] and truth(self, value) == isinstance(e.op, ast.Or):
                return value
        return value

    def _IfExp(self, e: ast.IfExp) -> Any:
        return self.value(e.body if truth(self, self.value(e.test)) else e.orelse)

    def _NamedExpr(self, e: ast.NamedExpr) -> Any:
        value = self.value(e.value)
        self.assign(e.target, value)
        return value

    def _Lambda(self, e: ast.Lambda) -> Local:
        return self._local(e)

    def _local(self, node: source.FunctionNode) -> Local:
        defaults = [self.value(d) for d in node.args.defaults]
        named = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
        return Local(node, self.frames[-1], defaults, {a.arg: self.value(d) for a, d in named if d is not None})

    def _Compare(self, e: ast.Compare) -> Any:
        left = self.value(e.left)
        result: Any = Known(True)
        for op, comparator in zip(e.ops, e.comparators, strict=True):
            right = self.value(comparator)
            result = self.compare(op, left, right)
            if len(e.ops) > 1 and not truth(self, result):
                return result
            left = right
        return result

    def compare(self, op: ast.cmpop, left: Any, right: Any) -> Any:
        if isinstance(op, (ast.Is, ast.IsNot)):
            return Known(self.is_same(left, right) == isinstance(op, ast.Is))
        if isinstance(op, (ast.In, ast.NotIn)):
            if isinstance(left, Known) and type(left.value) in PLAIN:
                if isinstance(right, Known) and type(right.value) is str and type(left.value) is str:
                    return Known((left.value in right.value) == isinstance(op, ast.In))
                there = [v.value if isinstance(v, Known) else v for v in self._members(right)]
                if all(type(v) in PLAIN for v in there):
                    return Known((left.value in there) == isinstance(op, ast.In))
            raise Refused("it asks for membership in a way that is not followed")
        if isinstance(left, Node) or isinstance(right, Node):
            return self.function(_COMPARE[type(op)], (left, right))
        a, b = self._plain(left), self._plain(right)
        try:
            return Known(bool(_COMPARE[type(op)](a, b)))
        except TypeError as error:
            raise Refused(f"its comparison fails: {error}") from None

    def _members(self, value: Any) -> list[Any]:
        if objects.is_module(value):
            raise Refused("it asks for membership in a module")
        return objects.values_in(self, value)

    def _plain(self, value: Any) -> Any:
        """A value whose comparison runs no code of the user's."""
        if isinstance(value, (tuple, list)):
            return type(value)([self._plain(v) for v in value])
        if isinstance(value, Known):
            if type(value.value) in CONSTANTS:
                return value.value
            if type(value.value) in (tuple, list):
                return type(value.value)([self._plain(v) for v in objects.values_in(self, value)])
        raise Refused("its comparison is not followed")

    def is_same(self, left: Any, right: Any) -> bool:
        for a, b in ((left, right), (right, left)):
            if isinstance(a, Node):
                if isinstance(b, Known) and b.value is None and a.op in ("input", "module"):
                    return False
                raise Refused("it compares a value that only a call knows")
            if isinstance(a, (tuple, list, dict, Method, Native, Local)) and isinstance(b, Known):
                return False
        if isinstance(left, Known) and isinstance(right, Known):
            return left.value is right.value
        raise Refused("its comparison is not followed")

    def _JoinedStr(self, e: ast.JoinedStr) -> Known:
        parts = []
        for part in e.values:
            value = self.value(part.value if isinstance(part, ast.FormattedValue) else part)
            plain = isinstance(part, ast.Constant) or (isinstance(part, ast.FormattedValue) and part.conversion == -1 and not part.format_spec)
            if not plain or not isinstance(value, Known) or type(value.value) not in (int, str):
                raise Refused(f"it has an expression that is not followed: {_shown(e)}")
            parts.append(str(value.value))
        return Known("".join(parts))


def decorated(function: Any) -> str:
    """Where the function stands that ``function`` decorates; "" if it decorates none that it tells of."""
    inner = function.__dict__.get("__wrapped__")
    while type(inner) is types.FunctionType and "__wrapped__" in inner.__dict__:
        inner = inner.__dict__["__wrapped__"]
    code = getattr(inner, "__code__", None)
    return "" if code is None else f"line {code.co_firstlineno} of {os.path.basename(code.co_filename)}"


def _paths(module: nn.Module, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[int, str]]:
    """The modules in ``module`` and itself: (id, path), each by its first path."""
    seen = set() if seen is None else seen
    if id(module) not in seen:
        seen.add(id(module))
        yield id(module), path
        for name, child in module.__dict__["_modules"].items():
            if child is not None:
                yield from _paths(child, f"{path}.{name}" if path else name, seen)


def _names_of(node: source.FunctionNode) -> set[str]:
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


def _mangled(name: str, class_name: str) -> str:
    if class_name.strip("_") and name.startswith("__") and not name.endswith("__"):
        return f"_{class_name.lstrip('_')}{name}"
    return name


def _shown(node: ast.AST) -> str:
    text = ast.unparse(node).splitlines()[0]
    return text if len(text) <= 60 else f"{text[:57]}..."
