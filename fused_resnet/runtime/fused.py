"""What makes a module a fused one: a forward that runs the module's graph while it holds, else the author's code.

The graph is found by an analysis of the module's own forward (``graph``) and belongs to the module as it was then. Everything that the
analysis looked at is a fact, and each call checks the facts in about a microsecond. When one does not hold any more the module is looked
at again, and if it cannot run fused any more it runs as its author wrote it and says so.
"""

from __future__ import annotations

import abc
import sys
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, fx, nn

from .._compat import GLOBAL_HOOKS, TENSORS, constant_result, has_function_mode, is_traced, transformed
from ..graph.analysis import Reader, graph_of, only_input
from ..graph.checked import Checked
from ..graph.facts import Facts
from ..graph.ir import Convolution, Graph
from ..graph.match import BlockReader
from ..graph.network import NetworkReader
from ..graph.trace import Refused
from ..ops.spec import LEGAL_DTYPES
from ..ops.store import Store
from .bound import Bound, bind
from .executor import execute, repeat
from .inline import inline, may_inline


class State:
    """What a fused module keeps in its ``__dict__``. A copy or a pickle of it holds no decision: the copy is looked at when it is called.

    only_calls: of a network without a convolution of its own: what its children are given need not be images, and its own forward runs
    without a warning, for its blocks stay fused by themselves.
    """

    def __init__(self, only_calls: bool = False) -> None:
        self.current: Decision | None = None
        self.warned = False
        self.only_calls = only_calls

    def __reduce__(self) -> Any:
        return State, (self.only_calls,)

    def keep(self, decision: Decision) -> None:
        self.current = decision
        if decision.graph is not None:
            self.only_calls = not any(isinstance(node, Convolution) for node in decision.graph.nodes)


class Decision:
    """Whether a module runs fused: its graph, or the refusal, and the facts that either was found from."""

    def __init__(self, module: Any, network: bool = False) -> None:
        """Look at ``module`` as a residual block; ``network``: for its stem and calls of its children."""
        cls = type(module)
        self.network = network
        self.graph: Graph | None = None
        self.refusal: Refused | None = None
        self.bound: Bound | None = None
        self.inlined: Bound | None = None  # of a network
        facts = Facts(module)
        original = cls.__dict__.get("_fused_original")
        forward = facts.lookup(original or cls, "forward" if original or not isinstance(module, FusedModule) else "_plain_forward")
        try:
            reader: Reader = NetworkReader() if network else BlockReader(plain=not getattr(cls, "_needs_shortcut", True))
            self.graph = graph_of(module, forward, facts, reader)
        except Refused as error:
            self.refusal = Refused(error.reason, error.is_block, error.where)  # without what the other holds: frames, and so the module
        except Exception as error:  # a case that was not thought of stops neither fuse_ nor a call
            self.refusal = Refused(f"it cannot be looked at: {type(error).__name__}: {error}"[:200], is_block=True)
        self.facts = Checked(facts)

    def bind(self, module: Any) -> None:
        if self.graph is not None:
            self.bound = bind(module, self.graph, Store())
            self.network = self.network and may_inline(self.bound)

    def whole(self, module: Any) -> Bound | None:
        """The bound graph; of a network, with its blocks as sections of native calls. None where that has to be made anew (``inline``)."""
        if self.bound is None or not self.network:
            return self.bound
        inlined = self.inlined
        return inlined if inlined is not None and inlined.holds(module) else None

    def inline(self, module: Any) -> Bound:
        assert self.bound is not None
        self.inlined = inlined = inline(module, self.bound, _current)
        return inlined

    def holds(self, module: Any) -> bool:
        """Whether nothing has changed since."""
        return self.facts.broken(module.__dict__) < 0


class FusedModule:
    """Mixin in front of an ``nn.Module`` class whose own forward is kept as ``_plain_forward``."""

    _fx_leaf: ClassVar[bool] = True
    _fused_original: ClassVar[type[nn.Module] | None] = None  # the class before conversion; None: born as a fused block
    _fused_network: ClassVar[bool] = False  # a network, and no block
    _needs_shortcut: ClassVar[bool] = True
    _fused_resnet: State
    _plain_forward: Callable[..., Tensor]  # the author's

    def forward(self, x: Tensor) -> Tensor:
        """The module's forward: x [N, C, H, W] -> [N, K, P, Q], or what a network gives."""
        state = self._fused_resnet
        if torch.compiler.is_compiling():
            reads = _watched(self)
            if reads is not None and isinstance(x, Tensor) and x.dim() == 4 and x.dtype in LEGAL_DTYPES.get(x.device.type, ()):
                _read(self, reads)
                for reader in state.current.facts.readers:  # type: ignore[union-attr]
                    reader()
                return execute(self, bind(self, state.current.graph, None), x, True)  # type: ignore[union-attr, arg-type]
            return self._plain_forward(x)
        current = state.current
        if current is None or not current.holds(self):
            if _obstacle(x, state.only_calls):
                # It is looked at when a call comes that can run fused: torch.jit.trace would record what is read of its tensors.
                return self._plain_forward(x)
            current = refresh(self, state)
        if current.bound is not None:
            bound = current.whole(self)
            if bound is not None and type(x) is Tensor and not any(GLOBAL_HOOKS):
                y = repeat(self, bound, x)
                if y is not None:
                    return y
            if not _obstacle(x, state.only_calls):
                return execute(self, bound or current.inline(self), x, False)
        return self._plain_forward(x)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A class that ``fuse_`` makes is none of its author's subclasses, of which a class may keep a register."""
        if cls.__dict__.get("_fused_original") is None:
            super().__init_subclass__(**kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """What ``.to()``, ``.double()`` and their like call: the parameters will be others, so what is derived from them is given back."""
        state = self.__dict__.get("_fused_resnet")
        current = None if state is None else state.current
        for bound in () if current is None else (current.bound, current.inlined):
            if bound is not None:
                bound.clear()
        return super()._apply(*args, **kwargs)  # type: ignore[misc]

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script asks first: raises, before anything is changed."""
        way = "convert the model back with fused_resnet.unfuse_" if type(self)._fused_original is not None else "use torch.export"
        raise RuntimeError(f"torch.jit.script compiles a module's own source, which is not what {type(self).__name__} runs: {way}")

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A converted block pickles as its original class, to be converted again, because its own class has no name."""
        reduced = super().__reduce_ex__(protocol)
        original = type(self)._fused_original
        if original is None or isinstance(reduced, str):
            return reduced
        function, args, *rest = reduced
        plain = tuple(original if a is type(self) else a for a in args)
        return _rebuild, (original, function, plain, type(self)._fused_network), *rest


def _rebuild(original: type[nn.Module], function: Callable[..., Any], args: tuple[Any, ...], network: bool = False) -> Any:
    """Makes the empty object for unpickling a converted module: of its original class, with the class of the converted one."""
    module = function(*args)
    object.__setattr__(module, "__class__", fused_class(original, network))
    return module


# (original class, whether as a network) -> its fused subclass, as long as a module of it lives.
_classes: weakref.WeakValueDictionary[tuple[type, bool], type] = weakref.WeakValueDictionary()


def fused_class(original: type[nn.Module], network: bool = False) -> type:
    """The fused subclass of a module class, made on demand."""
    cls = _classes.get((original, network))
    if cls is None:
        body = {
            "__module__": original.__module__,
            "__qualname__": f"Fused{original.__qualname__}",
            "__doc__": original.__doc__,
            "_fused_original": original,
            "_fused_network": network,
            "_fx_leaf": not network,
            "_plain_forward": _as_written(original),
            "forward": _forward_like(original.forward),
        }
        cls = type(f"Fused{original.__name__}", (FusedModule, original), body)
        _classes[original, network] = cls
    return cls


def become_fused(module: nn.Module, decision: Decision, network: bool = False) -> str:
    """Give a module the class of a fused one, and what was found of it; why not, or ""."""
    if type(type(module)) not in (type, abc.ABCMeta):
        return f"it has the metaclass {type(type(module)).__name__}"
    try:
        object.__setattr__(module, "__class__", fused_class(type(module), network))
    except TypeError as error:
        return str(error)
    decision.bind(module)
    state = State()
    state.keep(decision)
    module.__dict__["_fused_resnet"] = state
    return ""


def become_original(module: nn.Module) -> None:
    """Give a converted module its own class back."""
    original = getattr(type(module), "_fused_original", None)
    if original is not None:
        module.__dict__.pop("_fused_resnet", None)
        object.__setattr__(module, "__class__", original)


def _as_written(original: type[nn.Module]) -> Callable[..., Any]:
    """The forward that the class has when it is called: it may be patched after the conversion."""

    def forward(self: Any, x: Any) -> Any:
        return original.forward(self, x)

    return forward


def _forward_like(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``FusedModule.forward`` with the name and default of forward's one argument, for calls by name and for its errors."""
    model: Any = FusedModule.forward
    like: Any = forward
    name = only_input(forward)
    others = [f"{other}_" if other == name else other for other in model.__code__.co_varnames[2:]]
    code = model.__code__.replace(co_varnames=("self", name, *others))
    function: Any = types.FunctionType(code, model.__globals__, like.__name__, like.__defaults__)
    function.__qualname__, function.__doc__ = like.__qualname__, like.__doc__
    return function  # type: ignore[no-any-return]


def _stacklevel() -> int:
    """For a warning of the caller: the first frame outside of this package and of PyTorch's way of calling a module."""
    frame: types.FrameType | None = sys._getframe(1)
    level = 1
    while frame is not None and str(frame.f_globals.get("__name__")).startswith(("fused_resnet.", "torch.nn.modules.")):
        frame, level = frame.f_back, level + 1
    return level


def refresh(module: Any, state: State) -> Decision:
    """Look at the module again: find its graph, or keep the reason why it runs as its author wrote it."""
    current = Decision(module, type(module)._fused_network)
    current.bind(module)
    had_convolutions = not state.only_calls
    state.keep(current)
    if had_convolutions and not state.warned and (current.graph is None or state.only_calls):
        state.warned = True
        why = current.refusal or "it does not begin with a convolution, a batch norm and a ReLU any more"
        warnings.warn(f"{type(module).__name__} runs unfused, as its own forward says: {why}", RuntimeWarning, stacklevel=_stacklevel())
    return current


_NONE: Any = (lambda: None).__code__


def _current(module: Any) -> Decision | None:
    """What holds for a converted block now; None where its class has another forward than ours."""
    if getattr(type(module).forward, "__code__", _NONE).co_code != FusedModule.forward.__code__.co_code:
        return None
    state = module._fused_resnet
    current = state.current
    return current if current is not None and current.holds(module) else refresh(module, state)


@constant_result
def _watched(module: Any) -> tuple[tuple[Any, ...], ...] | None:
    """What the graph depends on if it holds, decided once while torch.compile or torch.export traces the module."""
    state = module._fused_resnet
    current = state.current
    if current is None or not current.holds(module):
        current = refresh(module, state)
    return None if current.bound is None else current.facts.reads


def _read(module: Any, reads: tuple[tuple[Any, ...], ...]) -> None:
    """Read what the graph depends on before the compiler's eyes, so that it guards it and compiles again after a change."""
    for path in reads:
        value = module
        for step in path:
            if isinstance(step, str):
                value = getattr(value, step)
            elif len(step) == 1:
                value = value[step[0]]
            elif step[1] == "class":
                value = id(getattr(type(value), step[0]))
            elif step[1] == "absent":
                value = hasattr(value, step[0])
            else:
                value = step[0] in value if step[1] == "missing" else len(value)
        value is None  # noqa: B015  a value that is not used is not guarded


_warned: set[str] = set()


def _obstacle(x: Any, only_calls: bool) -> bool:
    """Whether this one call needs the module's own forward, whatever the module is. only_calls: as ``State.only_calls``."""
    if isinstance(x, Tensor):
        if x.is_nested:
            reason = "its input is a nested tensor"
        elif type(x) not in TENSORS:
            reason = f"its input is a {type(x).__name__}, which may compute otherwise"
        elif has_function_mode():
            reason = "a mode of torch.overrides wants to see its operations"
        elif not only_calls and (x.dim() != 4 or x.layout is not torch.strided or x.dtype not in LEGAL_DTYPES.get(x.device.type, ())):
            reason = f"its input is {x.dim()}-dimensional, {x.dtype}, {x.layout} on {x.device.type}"
        elif transformed():
            reason = "torch.func transforms and forward-mode gradients need it"
        elif any(GLOBAL_HOOKS):
            reason = "a global module hook wants to see its submodules"
        elif is_traced():
            reason = "torch.jit.trace records its own operations, which run without this package"
        else:
            return False
    elif isinstance(x, fx.Proxy):
        return True  # symbolic tracing wants the block's operations
    else:
        reason = f"its input is a {type(x).__name__}"
    if not only_calls and reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"a fused block ran as its own forward says: {reason}", RuntimeWarning, stacklevel=_stacklevel())
    return True
