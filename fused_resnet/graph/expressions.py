"""Follows the expressions of a forward's syntax tree. Whatever it does not know is refused."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

from . import calls, objects
from .facts import MISSING
from .objects import truth
from .recorder import Frame, Recorder, shown
from .trace import Operation, Refused, operations_in
from .values import PLAIN, FunctionNode, Known, Local, Super

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


class Expressions(Recorder):
    """Values are operations, ``Known`` objects, and what the forward itself makes: tuples, lists, dictionaries, slices, functions."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._steps = 0

    def values_in(self, owner: Any) -> list[Any]:
        return objects.values_in(self, owner)

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return calls.call(self, function, args, kwargs)

    def value(self, e: ast.expr) -> Any:
        self._steps += 1
        if self._steps > self.MOST_STEPS:
            raise Refused("its forward is too long to be followed")
        follow = getattr(self, f"_{type(e).__name__}", None)
        if follow is None:
            raise Refused(f"it has an expression that is not followed: {shown(e)}")
        return follow(e)

    def at(self, e: ast.expr) -> None:
        self.frames[-1].line, self.frames[-1].expression = e.lineno, e

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
        path: tuple[Any, ...] | None
        if name in function.__code__.co_freevars:
            cell = (function.__closure__ or ())[function.__code__.co_freevars.index(name)]
            value, path = self.facts.cell(cell), (cell,)
        else:
            scope = function.__globals__
            value, path = self.facts.item(scope, name), (scope, name)
            if value is MISSING:
                value, path = self.facts.item(function.__builtins__, name), None  # type: ignore[attr-defined]
        if value is MISSING:
            raise Refused(f"it reads {name}, which is not there")
        return self.read(Known(value, path))

    def _Attribute(self, e: ast.Attribute) -> Any:
        owner, name = self.value(e.value), _mangled(e.attr, self.frames[-1].class_name)
        self.at(e)
        if isinstance(owner, Operation):
            return self.function(getattr, (owner, Known(name)))
        return objects.attribute(self, owner, name)

    def _Subscript(self, e: ast.Subscript) -> Any:
        owner, key = self.value(e.value), self.value(e.slice)
        if isinstance(owner, Operation) or any(operations_in(key if not isinstance(key, Known) else None)):
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
                values += self.values_in(self.value(element.value))
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
        tensor, name = None, ""
        if isinstance(e.func, ast.Attribute):
            owner = self.value(e.func.value)
            name = _mangled(e.func.attr, self.frames[-1].class_name)
            if isinstance(owner, Operation):
                tensor = owner
            else:
                function = objects.attribute(self, owner, name)
        else:
            function = self.value(e.func)
        args = tuple(self.several(e.args))
        kwargs: dict[str, Any] = {}
        for keyword in e.keywords:
            if keyword.arg is None:
                more = calls.keywords_in(self, self.value(keyword.value))
                if kwargs.keys() & more.keys():
                    raise Refused("it passes a keyword argument twice")
                kwargs |= more
            else:
                kwargs[keyword.arg] = self.value(keyword.value)
        self.at(e)
        if tensor is not None:
            return self.method(tensor, name, args, kwargs)
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
        self.at(e)
        return self.binary(self._operators(e.op)[0], left, right)

    def _operators(self, op: ast.operator) -> tuple[Callable[..., Any], Callable[..., Any]]:
        found = _BINARY.get(type(op))
        if found is None:
            raise Refused(f"it uses the operator {type(op).__name__}, which is not followed")
        return found

    def binary(self, function: Callable[..., Any], left: Any, right: Any) -> Any:
        if isinstance(left, Operation) or isinstance(right, Operation):
            return self.function(function, (left, right))
        if function is operator.add:
            if isinstance(left, tuple) and isinstance(right, tuple):
                return left + right
            if isinstance(left, list) and isinstance(right, list):
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
        function: Callable[[Any], Any] = operator.neg if isinstance(e.op, ast.USub) else operator.pos
        if isinstance(e.op, ast.Invert):
            raise Refused("it uses the operator ~, which is not followed")
        if isinstance(value, Operation):
            return self.function(function, (value,))
        if isinstance(value, Known) and type(value.value) in (bool, int, float):
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

    def _local(self, node: FunctionNode) -> Local:
        for inner in ast.walk(node):
            if isinstance(inner, (ast.Nonlocal, ast.Global, ast.Yield, ast.YieldFrom, ast.Await)):
                raise Refused(f"it defines a function that is not followed: {shown(inner)}")
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
            return Known(objects.is_same(left, right) == isinstance(op, ast.Is))
        if isinstance(op, (ast.In, ast.NotIn)):
            return Known(objects.is_in(self, left, right) == isinstance(op, ast.In))
        if isinstance(left, Operation) or isinstance(right, Operation):
            return self.function(_COMPARE[type(op)], (left, right))
        if isinstance(op, (ast.Eq, ast.NotEq)) and objects.is_equal_by_identity(self, left, right):
            return Known((left.value is right.value) == isinstance(op, ast.Eq))
        try:
            return Known(bool(_COMPARE[type(op)](objects.plain(self, left), objects.plain(self, right))))
        except TypeError as error:
            raise Refused(f"its comparison fails: {error}") from None

    def _JoinedStr(self, e: ast.JoinedStr) -> Known:
        parts = []
        for part in e.values:
            value = self.value(part.value if isinstance(part, ast.FormattedValue) else part)
            plain = isinstance(part, ast.Constant) or (isinstance(part, ast.FormattedValue) and part.conversion == -1 and not part.format_spec)
            if not plain or not isinstance(value, Known) or type(value.value) not in (int, str):
                raise Refused(f"it has an expression that is not followed: {shown(e)}")
            parts.append(str(value.value))
        return Known("".join(parts))

    # --- targets of assignments ---

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
            raise Refused(f"it sets {shown(target)}")

    def unpacked(self, value: Any, count: int) -> list[Any]:
        if isinstance(value, Operation):
            return [self.function(operator.getitem, (value, Known(i))) for i in range(count)]
        return self.values_in(value)


def _mangled(name: str, class_name: str) -> str:
    if class_name.strip("_") and name.startswith("__") and not name.endswith("__"):
        return f"_{class_name.lstrip('_')}{name}"
    return name
