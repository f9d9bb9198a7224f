"""What a module's forward does, as a graph, without touching the module.

A copy of the module without its hooks is called once with a ``torch.fx`` proxy: modules of ``torch.nn`` record
themselves as one node, wrappers of the user's are traced through. Unlike ``torch.fx.symbolic_trace`` nothing global is
patched: other threads may run models meanwhile.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.proxy import TracerBase
from torch.nn.utils import parametrize

_MOST_NODES = 256  # a residual block has about ten operations; a whole network is no candidate
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Hooks by where a module keeps them.
HOOKS = {
    "_forward_pre_hooks": "a forward pre-hook",
    "_forward_hooks": "a forward hook",
    "_backward_hooks": "a backward hook",
    "_backward_pre_hooks": "a backward pre-hook",
}


class Refused(Exception):
    """Why a module is not converted, in one sentence. ``is_block``: whether it looked like a residual block at all."""

    def __init__(self, reason: str, is_block: bool = False) -> None:
        super().__init__(reason)
        self.is_block = is_block


def is_plain(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether ``module`` computes exactly what ``base`` does: a subclass must not override how it is called."""
    cls = type(module)
    if not isinstance(module, base) or parametrize.is_parametrized(module):
        return False
    names = ("forward", "_conv_forward", "__call__", "__getattr__")
    return cls is base or all(getattr(cls, name, None) is getattr(base, name, None) for name in names)


def is_leaf(module: nn.Module) -> bool:
    """Whether tracing stops at ``module``: torch.nn's own modules, and what derives from those that matter here."""
    if isinstance(module, _CONTAINERS):
        return False
    if isinstance(module, (nn.Conv2d, nn.modules.batchnorm._NormBase, nn.ReLU)):
        return True
    if getattr(type(module), "_fx_leaf", False):
        return True
    return type(module).__module__.startswith(("torch.nn.", "torch.ao."))


class _Proxy(fx.Proxy):
    """fx records ``a += b`` as ``a + b``; here the difference matters."""

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(TracerBase):
    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.stack: list[str] = []  # the wrappers whose forward is running

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if len(self.graph.nodes) >= _MOST_NODES:
            raise Refused(f"its forward has more than {_MOST_NODES} operations")
        node = self.graph.create_node(*args, **kwargs)
        node.meta["within"] = self.stack[-1] if self.stack else ""
        return node

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, (Tensor, nn.Module)):
            return self.create_node("get_attr", "constant", (), {})
        return super().create_arg(a)


def _twin(
    module: nn.Module, path: str, training: bool, tracer: _Tracer, memo: dict[int, nn.Module], leaf: Callable[[nn.Module], bool]
) -> nn.Module:
    """A shallow copy of ``module`` in the given mode, without hooks, whose leaves record their calls."""
    if id(module) in memo:
        return memo[id(module)]
    cls = type(module)
    twin: nn.Module = cls.__new__(cls)
    memo[id(module)] = twin
    d = dict(module.__dict__)
    d.update({name: {} for name in HOOKS})
    d["training"] = training
    d["_modules"] = {
        name: child and _twin(child, f"{path}.{name}" if path else name, training, tracer, memo, leaf)
        for name, child in module._modules.items()
    }
    if path:

        def forward(*args: Any, **kwargs: Any) -> Any:
            if leaf(module):
                return tracer.create_proxy("call_module", path, args, kwargs)
            tracer.stack.append(path)
            output = cls.forward(twin, *args, **kwargs)
            tracer.stack.pop()
            return output

        d["forward"] = forward
    twin.__dict__.update(d)
    return twin


def trace(
    module: nn.Module, forward: Callable[..., Any], training: bool, leaf: Callable[[nn.Module], bool] = is_leaf
) -> fx.Graph:
    """The operations of ``forward(module, x)`` in the given mode; modules for which ``leaf`` holds are one operation each.

    Raises:
        Refused: if it cannot be traced, takes other inputs than one or is as long as a whole network.
    """
    tracer = _Tracer()
    name = only_input(forward)
    twins: dict[int, nn.Module] = {}
    try:
        x = tracer.create_proxy("placeholder", name, (), {})
        output = forward(_twin(module, "", training, tracer, twins, leaf), x)
        tracer.create_node("output", "output", (tracer.create_arg(output),), {})
    except Refused:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Refused(f"its forward cannot be traced: {first}", is_block=True) from None
    finally:
        # A twin and its forward refer to each other: the parameters would live until the garbage collector comes.
        for twin in twins.values():
            twin.__dict__.clear()
    return tracer.graph


def only_input(forward: Callable[..., Any]) -> str:
    """The name of the one input that ``forward`` takes."""
    code = getattr(forward, "__code__", None)
    if code is None:
        raise Refused("its forward is not a plain Python function", is_block=True)
    names = list(code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount])
    if len(names) != 1 or code.co_kwonlyargcount or code.co_posonlyargcount or code.co_flags & 0x0C:  # *args, **kwargs
        raise Refused(f"its forward must take one input, got ({', '.join(names) or '...'})")
    return str(names[0])
