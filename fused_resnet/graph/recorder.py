"""What an analysis has seen so far: the operations, the facts, the modes that it chose."""

from __future__ import annotations

import abc
import ast
import operator
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .facts import Facts, lookup
from .trace import Operation, Refused, Trace, name_of, operations_in
from .values import CONSTANTS, Definition, Known, Local

Leaf = Callable[[nn.Module], bool]
ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
# What tensors' operators and methods are when this package is imported.
_TENSORS = {
    name: lookup(Tensor, name)
    for name in (
        *("__add__", "__radd__", "__iadd__", "__getitem__", "__getattribute__"),
        *("add", "add_", "relu", "relu_", "clone", "flatten", "mean", "size", "dim"),
    )
}
_OPERATORS = {operator.add: ("__add__", "__radd__"), operator.iadd: ("__iadd__",), operator.getitem: ("__getitem__",)}


class Frame:
    """One call of a function: its names, and the line that it is at. ``outer``: of a function within another, that one's."""

    def __init__(self, function: types.FunctionType, definition: Definition, names: set[str], outer: Frame | None = None) -> None:
        self.function, self.file, self.class_name = function, definition.file, definition.owner
        self.names, self.outer = names, outer
        self.values: dict[str, Any] = {}
        self.line = definition.node.lineno
        self.expression: ast.expr | None = None  # the call or read that is followed

    def where(self) -> str:
        return f"line {self.line} of {self.file}"


class Recorder(abc.ABC):
    """One way through one forward, as far as it was followed."""

    MOST_OPERATIONS = 256  # a residual block has about ten operations; a whole network is no candidate
    MOST_STEPS = 20_000  # statements and expressions

    def __init__(self, owner: nn.Module, facts: Facts, leaf: Leaf, absorbs: bool, modes: tuple[bool, ...]) -> None:
        self.owner, self.facts, self.leaf, self.absorbs = owner, facts, leaf, absorbs
        self.owner_class = getattr(type(owner), "_fused_original", None) or type(owner)
        self.trace = Trace()
        self.paths = {id(module): path for path, module in walk(owner)}
        self.frames: list[Frame] = []
        self.within: list[str] = []  # the paths of the modules whose forwards are followed
        self.modes: list[bool] = []
        self._planned = modes
        self._mode_of: dict[int, bool] = {}

    def class_of(self, obj: Any) -> type:
        return self.owner_class if obj is self.owner else self.facts.class_of(obj)

    def read(self, known: Any) -> Any:
        """Something that was read: a tensor is an operation from here on."""
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
        if isinstance(value, Operation) and value.kind in ("input", "module"):
            return Tensor
        if isinstance(value, (tuple, list, dict)):
            return type(value)
        if isinstance(value, Known):
            return self.class_of(value.value)
        raise Refused("it asks for the class of a value that only a call knows")

    # --- what is followed: ``Interpreter`` says how ---

    @abc.abstractmethod
    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a call gives."""

    @abc.abstractmethod
    def inline(self, function: types.FunctionType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Follow a call of a Python function."""

    @abc.abstractmethod
    def inline_local(self, local: Local, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Follow a call of a function that the forward itself defines."""

    @abc.abstractmethod
    def values_in(self, owner: Any) -> list[Any]:
        """The items of a container."""

    # --- operations ---

    def operation(self, kind: str, target: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Operation:
        if self.is_long():
            raise Refused(f"its forward has more than {self.MOST_OPERATIONS} operations")
        where = self.frames[-1].where() if self.frames else ""
        return self.trace.add(Operation(kind, target, args, kwargs or {}, where, self.within[-1] if self.within else ""))

    def is_long(self) -> bool:
        """Whether it is as long as a whole network, and so no block."""
        return len(self.trace.operations) >= self.MOST_OPERATIONS

    def constant(self, value: Any) -> Operation:
        return self.operation("constant", getattr(value, "__name__", type(value).__name__))

    def argument(self, value: Any) -> Any:
        """A value as an argument of an operation: operations and plain constants. What is neither becomes an operation that no rule knows."""
        if isinstance(value, (Operation, *CONSTANTS)) or value is None:
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
                return kind([self.argument(v) for v in self.values_in(value)])
        return self.constant(value.value if isinstance(value, Known) else value)

    def function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Operation:
        """An operation on values that only a call knows; which operations are known is for the matcher to say."""
        if type(target) not in (types.FunctionType, types.BuiltinFunctionType):  # what answers == by itself could pass for another
            raise self.not_followed(target)
        for name in _OPERATORS.get(target, ()):
            self.check_tensor(name)
        args, kwargs = self.argument(args), {name: self.argument(v) for name, v in (kwargs or {}).items()}
        if not args and "input" in kwargs:
            args = (kwargs.pop("input"),)
        if not any(op.kind != "constant" for op in operations_in((args, kwargs))):
            raise self.not_followed(target)
        return self.operation("function", target, args, kwargs)

    def not_followed(self, function: Any) -> Refused:
        """A call, or what Python makes one of, whose effects are not known."""
        e = self.frames[-1].expression
        if isinstance(e, ast.Call):
            return Refused(f"it calls {shown(e.func)}, which is not followed")
        return Refused(f"it reads {shown(e)}, which is not followed" if e is not None else f"it calls {name_of(function)}")

    def method(self, tensor: Operation, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation:
        self.check_tensor(name)
        return self.operation("method", name, (tensor, *self.argument(args)), {k: self.argument(v) for k, v in kwargs.items()})

    def check_tensor(self, name: str) -> None:
        found = self.facts.lookup(Tensor, name)
        if name in _TENSORS and found is not _TENSORS[name]:
            raise Refused(f"torch.Tensor.{name} was replaced")


def walk(module: nn.Module, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """The modules in ``module`` and itself, each once, by its first path. As ``named_modules``, which a class may override."""
    seen = set() if seen is None else seen
    if id(module) not in seen:
        seen.add(id(module))
        yield path, module
        for name, child in module.__dict__.get("_modules", {}).items():
            if child is not None:
                yield from walk(child, f"{path}.{name}" if path else name, seen)


def find(module: nn.Module, path: str) -> Any:
    """A module by its path. As ``get_submodule``, which a class may override."""
    for name in path.split("."):
        module = module.__dict__["_modules"][name]
    return module


def shown(node: ast.AST) -> str:
    text = ast.unparse(node).splitlines()[0]
    return text if len(text) <= 60 else f"{text[:57]}..."
