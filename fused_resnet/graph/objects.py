"""Reading the Python objects that a forward names: modules, classes, functions, containers. No code of theirs runs.

What is found is a ``Known``. How Python would find it is repeated step by step, and each step is a fact (``facts.py``). Where Python
would call something of the user's on the way (a property, a ``__getattr__``, a ``__bool__``), that is followed as the forward itself
is, or refused.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .facts import MISSING, Facts, attributes_of, lookup
from .originals import ORIGINAL
from .trace import Operation, Refused
from .values import CONSTANTS, DICTS, PLAIN, Known, Local, Method, Native, Super, is_module

if TYPE_CHECKING:
    from .recorder import Recorder

# Places where a module keeps what its __getattr__ finds, in its order.
_PLACES = ("_parameters", "_buffers", "_modules")


def attribute(run: Recorder, owner: Any, name: str, default: Any = MISSING) -> Any:
    """What ``owner.name`` is; ``default`` if it has none."""
    if isinstance(owner, Super):
        return _of_super(run, owner, name)
    if not isinstance(owner, Known):
        raise Refused(f"it reads {name} of something that is not followed")
    obj = owner.value
    found: Any
    if type(obj) is types.ModuleType:
        value = run.facts.item(obj.__dict__, name)
        found = MISSING if value is MISSING else Known(value, owner.step(name))
    elif issubclass(type(obj), type):
        found = _of_class(run, owner, name)
    elif issubclass(type(obj), Tensor):
        return run.function(getattr, (run.constant(obj), name))
    elif type(obj) in DICTS and name in ("items", "keys", "values", "get"):
        return Native(name, functools.partial(_of_dict, owner, name))
    elif type(obj) is str and name == "format":
        return Native(name, lambda run, args, kwargs: _format(run, obj, args, kwargs))
    elif type(obj) in (list, tuple, *DICTS, *PLAIN) or issubclass(type(obj), types.ModuleType):
        raise Refused(f"it reads {name} of a {type(obj).__name__}")
    else:
        found = _of_instance(run, owner, name)
    if found is not MISSING:
        return run.read(found)
    if default is MISSING:
        raise Refused(f"it reads {name}, which is not there")
    if owner.path is not None:
        run.facts.read((*owner.path, (name, "absent")))
    return default


def _of_class(run: Recorder, owner: Known, name: str) -> Any:
    cls = owner.value
    if type(cls) is not type or name in type.__dict__:
        raise Refused(f"it reads {name} of {cls.__name__}, which has a metaclass")
    found = run.facts.lookup(cls, name)
    if isinstance(found, staticmethod):
        found = found.__func__
    elif found is not MISSING and not isinstance(found, types.FunctionType) and hasattr(type(found), "__get__"):
        raise Refused(f"it reads {name} of {cls.__name__}, a {type(found).__name__}")
    return MISSING if found is MISSING else Known(found, owner.step(name))


def _of_instance(run: Recorder, owner: Known, name: str) -> Any:
    obj = owner.value
    cls = run.class_of(obj)
    in_module = issubclass(cls, nn.Module)
    check_plain_access(run.facts, cls)
    found = run.facts.lookup(cls, name)
    if isinstance(found, property):
        if type(found.fget) is not types.FunctionType:
            raise Refused(f"it reads {name}, a property that is not followed")
        _read_of_class(run, owner, name)  # to read the property itself would run it, where the forward perhaps does not
        return run.call(Method(found.fget, owner), (), {})
    if hasattr(type(found), "__set__") or hasattr(type(found), "__delete__"):
        raise Refused(f"it reads {name} of {cls.__name__}, a {type(found).__name__}")
    attributes = attributes_of(obj)
    if attributes is not None:
        if in_module and name == "training":
            return run.training(owner)
        value = run.facts.item(attributes, name)
        if value is not MISSING:
            return Known(value, owner.step(name))
    if found is not MISSING:
        if isinstance(found, types.FunctionType) and owner.path is not None:
            _read_of_class(run, owner, name)
            run.facts.read((*owner.path, name))
        return _bound(run, owner, name, found)
    if in_module:
        assert attributes is not None
        for place in _PLACES:
            if not isinstance(attributes.get(place), dict):
                raise Refused(f"a {cls.__name__} is no whole module: its __init__ did not run")
            if not attributes[place] and run.facts.is_empty(attributes, place):
                continue
            value = run.facts.item(run.facts.item(attributes, place), name)
            if value is not MISSING:
                return Known(value, owner.step(name))
    return MISSING


def _read_of_class(run: Recorder, owner: Known, name: str) -> None:
    """Remember, for torch.compile, what an object's class has under this name."""
    if owner.path is not None:
        run.facts.read((*owner.path, (name, "class")))


def check_plain_access(facts: Facts, cls: type) -> None:
    """Refuses an object that decides by itself what its attributes are."""
    in_module = issubclass(cls, nn.Module)
    expected = lookup(nn.Module, "__getattr__") if in_module else MISSING
    # SimpleNamespace has a __getattribute__ of its own that does what object's does.
    usual = (object.__getattribute__, types.SimpleNamespace.__getattribute__)
    if facts.lookup(cls, "__getattr__") is not expected or facts.lookup(cls, "__getattribute__") not in usual:
        raise Refused(f"{cls.__name__} decides by itself what its attributes are (__getattr__)")


def _bound(run: Recorder, owner: Known, name: str, found: Any) -> Any:
    """What a class's attribute is, read from an instance."""
    if isinstance(found, types.FunctionType):
        return Method(found, owner)
    if isinstance(found, staticmethod):
        return Known(found.__func__, owner.step(name))
    if isinstance(found, classmethod) and isinstance(found.__func__, types.FunctionType):
        return Method(found.__func__, Known(type(owner.value)))
    if hasattr(type(found), "__get__"):
        raise Refused(f"it reads {name}, a {type(found).__name__} of {type(owner.value).__name__}")
    return Known(found, owner.step(name))


def _of_super(run: Recorder, owner: Super, name: str) -> Any:
    cls = run.class_of(owner.owner.value)
    mro = cls.__mro__
    if owner.cls not in mro:
        raise Refused("its super() is of a class that it is not derived from")
    for base in mro[mro.index(owner.cls) + 1 :]:
        found = run.facts.lookup(base, name)
        if name in base.__dict__:
            return _bound(run, owner.owner, name, found)
    raise Refused(f"it reads {name} of super(), which is not there")


def _of_dict(owner: Known, name: str, run: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``items()``, ``keys()``, ``values()`` and ``get()`` of a dictionary, at once."""
    if name == "get":
        if kwargs or not 1 <= len(args) <= 2:
            raise Refused("it calls a dictionary's get in an unusual way")
        return item(run, owner, args[0], args[1] if len(args) == 2 else Known(None))
    entries = run.facts.contents(owner.value)
    keys, values = [Known(k) for k in entries], [Known(v, owner.step((k,))) for k, v in entries.items()]
    read_all(run, owner, values)
    return {"keys": keys, "values": values, "items": list(zip(keys, values, strict=True))}[name]


def item(run: Recorder, owner: Any, key: Any, default: Any = MISSING) -> Any:
    """What ``owner[key]`` is, for a key that is known."""
    index = key.value if isinstance(key, Known) else key
    if isinstance(owner, (tuple, list, dict)):  # made in this call
        values: Any = owner
        whole = type(index) in (int, bool) or type(index) is slice if not isinstance(owner, dict) else type(index) in PLAIN
        try:
            if whole:
                return values[index]
        except (LookupError, TypeError, ValueError) as error:
            raise Refused(f"it reads an item that is not there: {error}") from None
        raise Refused("it reads an item by a key that is not followed")
    if not isinstance(owner, Known):
        raise Refused("it reads an item of something that is not followed")
    obj = owner.value
    try:
        if type(obj) in DICTS and type(index) is str:
            value = run.facts.item(obj, index)
            if value is MISSING:
                if default is MISSING:
                    raise KeyError(index)
                if owner.path is not None:
                    run.facts.read((*owner.path, (index, "missing")))
                return default
            return run.read(Known(value, owner.step((index,))))
        if type(obj) in DICTS and type(index) in PLAIN:
            return run.read(Known(run.facts.contents(obj)[index], owner.step((index,))))
        if type(obj) in (list, tuple, str) and type(index) in (int, bool):
            values = run.facts.listed(obj) if type(obj) is list else obj
            return run.read(Known(values[index], owner.step((index,))))
        if type(obj) in (list, tuple) and type(index) is slice:
            return [Known(v) for v in run.facts.listed(obj)[index]] if type(obj) is list else Known(obj[index])
        if is_module(owner):
            return _of_container(run, owner, index)
    except (LookupError, TypeError, ValueError) as error:
        raise Refused(f"it reads an item that is not there: {error}") from None
    raise Refused(f"it reads an item of a {type(obj).__name__}")


def _of_container(run: Recorder, owner: Known, index: Any) -> Any:
    cls = run.class_of(owner.value)
    for base, kinds in ((nn.ModuleDict, (str,)), (nn.ModuleList, (int, slice)), (nn.Sequential, (int,))):
        if issubclass(cls, base) and type(index) in kinds:
            check_inherits(run, cls, base, "__getitem__")
            children = modules_in(run, owner)
            if type(index) is slice:
                if cls is not nn.ModuleList:
                    raise Refused(f"it slices a {cls.__name__}")
                return [*children.values()][index]
            if base is nn.ModuleList:  # which finds by name
                at = index + len(children) if index < 0 else index
                return children[str(at)]
            return children[index] if base is nn.ModuleDict else [*children.values()][index]
    raise Refused(f"it reads an item of a {cls.__name__}")


def check_inherits(run: Recorder, cls: type, base: type, name: str) -> None:
    if run.facts.lookup(cls, name) is not ORIGINAL[base][name]:
        raise Refused(f"{cls.__name__} overrides {name} of {base.__name__}")


def modules_in(run: Recorder, owner: Known) -> dict[str, Known]:
    """A container's children, by name and in order."""
    check_plain_access(run.facts, run.class_of(owner.value))
    modules = run.facts.item(owner.value.__dict__, "_modules")
    children = {name: Known(child, owner.step(name)) for name, child in run.facts.contents(modules).items()}
    read_all(run, owner, children.values())
    return children


def read_all(run: Recorder, owner: Known, values: Iterable[Known]) -> None:
    """Remember, for torch.compile, that a container's values and their number were read."""
    for value in values:
        if value.path is not None:
            run.facts.read(value.path)
    if owner.path is not None:
        run.facts.read((*owner.path, ("", "length")))


def values_in(run: Recorder, owner: Any) -> list[Any]:
    """What iterating gives."""
    if isinstance(owner, (tuple, list)):
        return list(owner)
    if isinstance(owner, dict):
        return [Known(key) for key in owner]
    obj = owner.value if isinstance(owner, Known) else None
    if type(obj) is range:
        if len(obj) > run.MOST_STEPS:
            raise Refused("it has a range that is too long to be followed")
        return [Known(i) for i in obj]
    if type(obj) is tuple:
        return [Known(v, owner.step((i,))) for i, v in enumerate(obj)]
    if type(obj) is list:
        values = [Known(v, owner.step((i,))) for i, v in enumerate(run.facts.listed(obj))]
        read_all(run, owner, values)
        return values
    if type(obj) in DICTS:
        assert obj is not None
        read_all(run, owner, ())
        return [Known(key) for key in run.facts.contents(obj)]
    if is_module(owner):
        cls = run.class_of(obj)
        for base in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
            if issubclass(cls, base):
                check_inherits(run, cls, base, "__iter__")
                children = modules_in(run, owner)
                return [Known(name) for name in children] if base is nn.ModuleDict else [*children.values()]
    raise Refused("it iterates over something that is not followed")


def length(run: Recorder, owner: Any) -> int:
    if is_module(owner):
        cls = run.class_of(owner.value)
        for base in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
            if issubclass(cls, base):
                check_inherits(run, cls, base, "__len__")
                return len(modules_in(run, owner))
    if isinstance(owner, Known) and type(owner.value) is str:
        return len(owner.value)
    return len(values_in(run, owner))


def truth(run: Recorder, value: Any) -> bool:
    """What ``bool(value)`` is."""
    if isinstance(value, (tuple, list, dict)):
        return bool(value)
    if isinstance(value, (Local, Method, Native)):
        return True
    if not isinstance(value, Known):
        raise Refused("its branch depends on a value that only a call knows")
    obj = value.value
    if type(obj) in PLAIN:
        return bool(obj)
    if type(obj) in (list, tuple, range, *DICTS):
        return length(run, value) > 0
    if type(obj) in (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, type):
        return True
    cls = run.class_of(obj)
    if run.facts.lookup(cls, "__bool__") is MISSING:
        if run.facts.lookup(cls, "__len__") is MISSING:
            return True
        if issubclass(cls, nn.Module):
            return length(run, value) > 0
    raise Refused(f"its branch depends on what a {cls.__name__} says of itself")


def is_same(left: Any, right: Any) -> bool:
    """What ``left is right`` is."""
    for a, b in ((left, right), (right, left)):
        if isinstance(a, Operation):
            if isinstance(b, Known) and b.value is None and a.kind in ("input", "module", "constant"):
                return False
            raise Refused("it compares a value that only a call knows")
        if isinstance(a, (tuple, list, dict, Local, Method, Native)) and isinstance(b, Known) and b.value is None:
            return False
    if isinstance(left, Known) and isinstance(right, Known):
        if type(left.value) is type(right.value) and type(left.value) in (int, float, str, tuple):
            raise Refused(f"it compares two values of type {type(left.value).__name__} by identity")
        return left.value is right.value
    raise Refused("its comparison is not followed")


def is_equal_by_identity(run: Recorder, left: Any, right: Any) -> bool:
    """Whether one is None and the other an object that equals itself alone, as ``module == None`` has it."""
    if not isinstance(left, Known) or not isinstance(right, Known) or (left.value is None) == (right.value is None):
        return False
    cls = run.class_of(left.value if right.value is None else right.value)
    return run.facts.lookup(cls, "__eq__") is object.__eq__ and run.facts.lookup(cls, "__ne__") is object.__ne__


def _format(run: Recorder, text: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Known:
    """``str.format`` with numbers and texts."""
    values = [plain(run, v) for v in args]
    if kwargs or any(type(v) not in (int, str) for v in values):
        raise Refused("it formats something that is not followed")
    try:
        return Known(text.format(*values))
    except (LookupError, ValueError, AttributeError) as error:
        raise Refused(f"its format fails: {error}") from None


def is_in(run: Recorder, left: Any, right: Any) -> bool:
    """What ``left in right`` is."""
    if isinstance(left, Known) and type(left.value) in PLAIN and not is_module(right):
        if isinstance(right, Known) and type(right.value) is str:
            if type(left.value) is str:
                return left.value in right.value
        else:
            return left.value in [plain(run, v) for v in values_in(run, right)]
    raise Refused("it asks for membership in a way that is not followed")


def plain(run: Recorder, value: Any) -> Any:
    """A value whose comparison runs no code of the user's."""
    if isinstance(value, (tuple, list)):
        return type(value)([plain(run, v) for v in value])
    if isinstance(value, Known):
        if type(value.value) in CONSTANTS:
            return value.value
        if type(value.value) in (tuple, list):
            return type(value.value)([plain(run, v) for v in values_in(run, value)])
    raise Refused("its comparison is not followed")


def is_instance(run: Recorder, value: Any, classes: Any) -> bool:
    """``isinstance``, for classes that do not answer by themselves."""
    wanted = [c.value if isinstance(c, Known) else c for c in (values_in(run, classes) if _is_tuple(classes) else [classes])]
    for cls in wanted:
        answers = not issubclass(type(cls), type) or lookup(type(cls), "__instancecheck__") is not type.__instancecheck__
        if answers and cls is not Tensor and cls is not nn.Parameter:
            raise Refused("it asks isinstance() in a way that is not followed")
    if isinstance(value, Operation) and any(issubclass(cls, Tensor) and cls is not Tensor for cls in wanted):
        raise Refused("it asks for the class of a value that only a call knows")
    return issubclass(run.kind(value), tuple(wanted))


def _is_tuple(value: Any) -> bool:
    return isinstance(value, tuple) or (isinstance(value, Known) and type(value.value) is tuple)
