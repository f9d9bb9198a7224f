"""Following a call: of a module, of a Python function, of what Python and torch bring with them."""

from __future__ import annotations

import ast
import functools
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from .._compat import HOOKS
from . import objects
from .facts import MISSING, Facts, lookup
from .objects import attribute
from .originals import ORIGINAL, computes_as_ever
from .trace import Operation, Refused, name_of, operations_in
from .values import DICTS, PLAIN, Known, Local, Method, Native, Super, is_module

if TYPE_CHECKING:
    from .recorder import Recorder

_REPLACED = {
    "forward": "was replaced on the instance",
    "_call_impl": "is called in another way",
    "_compiled_call_impl": "is compiled by itself",
}


def call(run: Recorder, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a call gives, for a function that was read or made in this call."""
    if isinstance(function, Native):
        return function.call(run, args, kwargs)
    if isinstance(function, Local):
        return run.inline_local(function, args, kwargs)
    if isinstance(function, Method):
        return _call_method(run, function, args, kwargs)
    if not isinstance(function, Known):
        raise Refused("it calls a value that only a call knows")
    obj = function.value
    native = _NATIVES.get(id(obj))
    if native is not None:
        try:
            return native(run, *args, **kwargs)
        except TypeError:
            raise Refused(f"it calls {name_of(obj)} with arguments that do not fit") from None
    if is_module(function):
        return call_module(run, function, args, kwargs)
    if type(obj) is types.FunctionType:
        if obj is _SEQUENTIAL and args:
            return _sequence(run, args[0], args[1:], kwargs)
        if is_torchs(obj):
            return run.function(obj, args, kwargs)
        return run.inline(obj, args, kwargs)
    if type(obj) is types.MethodType and type(obj.__func__) is types.FunctionType:
        return _call_method(run, Method(obj.__func__, Known(obj.__self__)), args, kwargs)
    if type(obj) is functools.partial:
        more = {name: Known(v) for name, v in run.facts.contents(obj.keywords).items()}
        return call(run, Known(obj.func), (*[Known(v) for v in obj.args], *args), {**more, **kwargs})
    if any(operations_in((args, kwargs))):
        caller = lookup(type(obj), "__call__")
        if type(caller) is types.FunctionType and not is_torchs(type(obj)):
            return _call_method(run, Method(run.facts.lookup(run.class_of(obj), "__call__"), function), args, kwargs)
        return run.function(obj, args, kwargs)
    raise run.not_followed(obj)


def _call_method(run: Recorder, method: Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    owner = method.owner
    if is_module(owner):
        module = owner.value
        if method.function is _SEQUENTIAL:
            return _sequence(run, owner, args, kwargs)
        if (
            method.function is _CHILDREN
            and run.facts.lookup(run.class_of(module), "named_children") is _NAMED_CHILDREN
            and not (args or kwargs)
        ):
            return list({id(child.value): child for child in objects.modules_in(run, owner).values() if child.value is not None}.values())
        if module is not run.owner and run.leaf(module):
            if method.function is lookup(type(module), "forward"):
                if not run.absorbs:  # what is called as a module is heard by its hooks
                    raise Refused(f"it calls the forward of {_path(run, module)} itself")
                return _operation(run, _path(run, module), module, args, kwargs)
            if not str(type(module).__module__).startswith("torch."):
                raise Refused(f"it calls {method.function.__qualname__} of {_path(run, module)}, which is one operation")
    return run.inline(method.function, (owner, *args), kwargs)


# --- modules ---


def call_module(run: Recorder, owner: Known, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A module that is called as an operation, or whose forward is followed."""
    module = owner.value
    path = _path(run, module)
    cls = run.class_of(module)
    if run.leaf(module):
        return _operation(run, path, module, args, kwargs)
    check_quiet(run.facts, path, module)
    run.within.append(path)
    try:
        forward = run.facts.lookup(cls, "forward")
        if forward is _SEQUENTIAL:
            return _sequence(run, owner, args, kwargs)
        if type(forward) is not types.FunctionType:
            raise Refused(f"the forward of {path} is not a plain Python function")
        return run.inline(forward, (owner, *args), kwargs)
    finally:
        run.within.pop()


def _path(run: Recorder, module: nn.Module) -> str:
    path = run.paths.get(id(module))
    if not path:
        raise Refused(f"it calls {'itself' if path == '' else f'a {type(module).__name__} that is none of its submodules'}")
    parent: Any = run.owner  # a module with two names is found again by the first
    for name in path.split("."):
        hidden = run.facts.lookup(run.class_of(parent), name) is not MISSING or run.facts.item(parent.__dict__, name) is not MISSING
        if hidden:
            raise Refused(f"it calls {path}, which an attribute hides")
        parent = run.facts.item(parent.__dict__["_modules"], name)
    return path


def _operation(run: Recorder, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if run.absorbs:
        check_quiet(run.facts, path, module)
    if not args and kwargs.keys() == {"input"}:
        args, kwargs = (kwargs["input"],), {}
    if not any(operations_in((args, kwargs))):
        raise Refused(f"it calls {path} without a tensor that the call brings")
    return run.operation("module", path, run.argument(args), {name: run.argument(v) for name, v in kwargs.items()})


def _sequence(run: Recorder, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``nn.Sequential.forward``."""
    if len(args) + len(kwargs) != 1:
        raise Refused("a Sequential takes one input")
    (value,) = (*args, *kwargs.values())
    for child in objects.values_in(run, owner):
        value = call(run, child, (value,), {})
    return value


def check_quiet(facts: Facts, path: str, module: nn.Module) -> None:
    """Refuses a module that is called otherwise than by its class's forward alone, or to whose call somebody listens."""
    attributes = module.__dict__
    cls = facts.class_of(module)
    objects.check_plain_access(facts, cls)
    for name, function in ORIGINAL[nn.Module].items():
        found = facts.lookup(cls, name)
        # torch.export and torch.fx put a __call__ of their own into nn.Module while they trace.
        if found is not function and not (name == "__call__" and found is lookup(nn.Module, name) and is_torchs(found)):
            raise Refused(f"{path} ({cls.__name__}) overrides {name}")
    for name, words in _REPLACED.items():
        found = facts.item(attributes, name)
        if found is not MISSING and found is not None:
            raise Refused(f"{'the forward of ' if name == 'forward' else ''}{path} {words}")
    for name, words in HOOKS.items():
        if not facts.is_empty(attributes, name):
            raise Refused(f"{path} has {words}, which a fused block would not call")
    if "parametrizations" in attributes["_modules"]:
        raise Refused(f"{path} has a parametrization")


def is_torchs(function: Any) -> bool:
    """Whether PyTorch brings it."""
    return str(getattr(function, "__module__", "")).partition(".")[0] == "torch"


# --- arguments ---


def bound(
    a: ast.arguments, args: tuple[Any, ...], kwargs: dict[str, Any], defaults: list[Any], keyword_defaults: dict[str, Any]
) -> dict[str, Any]:
    """The values of a function's parameters."""
    names = [arg.arg for arg in (*a.posonlyargs, *a.args)]
    only = {arg.arg for arg in a.posonlyargs}
    values = dict(zip(names[len(names) - len(defaults) :], defaults, strict=True)) | keyword_defaults
    given = dict(zip(names, args, strict=False))
    rest = {name: v for name, v in kwargs.items() if name not in names or name in only}
    by_name = {name: v for name, v in kwargs.items() if name not in rest}
    keywords = {arg.arg for arg in a.kwonlyargs}
    values |= given | by_name | {name: v for name, v in rest.items() if name in keywords}
    rest = {name: v for name, v in rest.items() if name not in keywords}
    wanted = {*names, *keywords}
    if (
        given.keys() & by_name.keys()
        or (len(args) > len(names) and a.vararg is None)
        or (rest and a.kwarg is None)
        or not wanted <= values.keys()
    ):
        raise Refused("it calls a function with arguments that do not fit")
    if a.vararg is not None:
        values[a.vararg.arg] = args[len(names) :]
    if a.kwarg is not None:
        values[a.kwarg.arg] = rest
    return values


def keywords_in(run: Recorder, value: Any) -> dict[str, Any]:
    """What ``**value`` brings."""
    if isinstance(value, dict):
        return value
    if isinstance(value, Known) and type(value.value) in DICTS:
        values = {name: Known(v, value.step((name,))) for name, v in run.facts.contents(value.value).items()}
        objects.read_all(run, value, values.values())
        return values
    raise Refused("it passes keyword arguments that are not followed")


# --- what Python and torch bring ---


def _conversion(kind: Callable[..., Any]) -> Callable[..., Any]:
    def convert(run: Recorder, *args: Any) -> Known:
        values = [a.value if isinstance(a, Known) else a for a in args]
        if not all(type(v) in PLAIN for v in values):
            raise Refused(f"it calls {kind.__name__}() on something that is not followed")
        try:
            return Known(kind(*values))
        except (TypeError, ValueError, OverflowError) as error:
            raise Refused(f"it calls {kind.__name__}() in vain: {error}") from None

    return convert


def _name(value: Any) -> str:
    if not isinstance(value, Known) or type(value.value) is not str:
        raise Refused("it reads an attribute whose name is not followed")
    return value.value


def _getattr(run: Recorder, owner: Any, name: Any, *default: Any) -> Any:
    if not isinstance(owner, (Known, Super)):
        return run.function(getattr, (owner, name, *default))
    return attribute(run, owner, _name(name), *default)


def _hasattr(run: Recorder, owner: Any, name: Any) -> Known:
    if not isinstance(owner, Known):
        raise Refused("it calls hasattr() on something that is not followed")
    return Known(attribute(run, owner, _name(name), None) is not None)


def _numbers(run: Recorder, *args: Any) -> Known:
    values: list[Any] = [a.value if isinstance(a, Known) else None for a in args]
    if not all(type(v) in (int, bool) for v in values):
        raise Refused("it calls range() on something that is not followed")
    return Known(range(*values))


def _sequence_of(kind: Callable[[list[Any]], Any]) -> Callable[..., Any]:
    return lambda run, *args: kind(objects.values_in(run, args[0]) if args else [])


def _reversed(run: Recorder, values: Any) -> list[Any]:
    if is_module(values):
        raise Refused("it reverses a module")
    return objects.values_in(run, values)[::-1]


def _type(run: Recorder, value: Any) -> Known:
    if isinstance(value, Operation) or (isinstance(value, Known) and value.value is run.owner):  # whose class will be another
        raise Refused("it asks for a class that is not followed")
    return Known(run.kind(value))


def _enumerate(run: Recorder, values: Any, start: Any = None) -> list[Any]:
    first = start.value if isinstance(start, Known) else 0
    if type(first) is not int:
        raise Refused("it enumerates from something that is not followed")
    return [(Known(i), v) for i, v in enumerate(objects.values_in(run, values), first)]


def _zip(run: Recorder, *several: Any, strict: Any = None) -> list[Any]:
    values = [objects.values_in(run, v) for v in several]
    if strict is not None and len({len(v) for v in values}) > 1:
        raise Refused("it zips sequences of several lengths")
    return list(zip(*values, strict=False))


def _relu_module(run: Recorder, inplace: Any = None) -> Native:
    if not computes_as_ever(run.facts, nn.ReLU, nn.ReLU) or run.facts.lookup(nn.ReLU, "__init__") is not _RELU_INIT:
        raise Refused("nn.ReLU was replaced")
    return Native("ReLU", lambda run, args, kwargs: run.function(F.relu, args, kwargs))


_RELU_INIT = lookup(nn.ReLU, "__init__")
_CHILDREN, _NAMED_CHILDREN = lookup(nn.Module, "children"), lookup(nn.Module, "named_children")
_SEQUENTIAL = ORIGINAL[nn.Sequential]["forward"]
_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **{kind: _conversion(kind) for kind in (int, float, bool, str, abs, min, max)},
    len: lambda run, owner: Known(objects.length(run, owner)),
    isinstance: lambda run, value, classes: Known(objects.is_instance(run, value, classes)),
    type: _type,
    getattr: _getattr,
    hasattr: _hasattr,
    range: _numbers,
    list: _sequence_of(list),
    tuple: _sequence_of(tuple),
    reversed: _reversed,
    enumerate: _enumerate,
    zip: _zip,
    # A fused block does not run where they are true: see ``runtime.fused._obstacle``.
    torch.jit.is_scripting: lambda run: Known(False),  # type: ignore[attr-defined]
    torch.jit.is_tracing: lambda run: Known(False),  # type: ignore[attr-defined]
    nn.ReLU: _relu_module,
}
_NATIVES = {id(function): native for function, native in _FUNCTIONS.items()}  # what is looked for may not be hashable
