"""What makes a module a fused block: a forward that runs the block's description while it holds, else the block's code.

The description is found by an analysis of the block's own forward (``graph``) and belongs to the block as it was then. Everything
that the analysis looked at is a fact, and each call checks the facts in about a microsecond. When one does not hold any more the block
is looked at again, and if it cannot run fused any more it runs as its author wrote it and says so.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, fx, nn

from ._compat import GLOBAL_HOOKS, TENSORS, constant_result, has_function_mode, is_traced, transformed
from ._residual import Bound, Residual, bind, execute
from ._stem import BoundStem, Stem, bind_stem, execute_stem, match_stem
from .graph.facts import Facts
from .graph.ir import Refused
from .graph.match import match, only_input
from .ops.derived import Store
from .ops.spec import LEGAL_DTYPES


class State:
    """What a fused block keeps in its ``__dict__``. Copies and pickles as the description alone."""

    def __init__(self, description: Residual | Stem | None) -> None:
        self.description = description
        self.current: Decision | None = None
        self.warned = False

    def __reduce__(self) -> Any:
        return State, (self.description,)


class Decision:
    """Whether a block runs fused: its description, or the refusal, and the facts that either was found from."""

    def __init__(self, block: Any, stem: bool = False) -> None:
        """Look at ``block``; ``stem``: at a network, for its stem only."""
        cls = type(block)
        self.description: Residual | Stem | None = None
        self.refusal: Refused | None = None
        self.bound: Bound | BoundStem | None = None
        facts = Facts(block)
        original = cls.__dict__.get("_fused_original")
        forward = facts.lookup(original or cls, "forward" if original or not isinstance(block, FusedBlock) else "_plain_forward")
        try:
            if stem:
                self.description = match_stem(block, forward, facts)
            else:
                self.description = match(block, forward, facts, getattr(cls, "_needs_shortcut", True))
        except Refused as error:
            self.refusal = Refused(error.reason, error.is_block, error.where)  # without what the other holds: frames, and so the block
        except Exception as error:  # a case that was not thought of stops neither fuse_ nor a call
            self.refusal = Refused(f"it cannot be looked at: {type(error).__name__}: {error}"[:200], is_block=True)
        self.facts = facts.checked()

    def bind(self, block: Any) -> None:
        if self.description is not None:
            self.bound = _bind(block, self.description, Store())

    def holds(self, block: Any) -> bool:
        """Whether nothing has changed since."""
        return self.facts.first_broken(block.__dict__) < 0


class FusedBlock:
    """Mixin in front of an ``nn.Module`` class whose own forward is kept as ``_plain_forward``."""

    _fx_leaf: ClassVar[bool] = True
    _fused_original: ClassVar[type[nn.Module] | None] = None  # the class before conversion; None: born as a fused block
    _fused_stem: ClassVar[bool] = False  # a network whose stem is fused, and no block
    _needs_shortcut: ClassVar[bool] = True
    _fused_resnet: State
    _plain_forward: Callable[..., Tensor]  # the author's

    def forward(self, x: Tensor) -> Tensor:
        """The block's forward: x [N, C, H, W] -> [N, K, P, Q]."""
        state = self._fused_resnet
        if torch.compiler.is_compiling():
            reads = _watched(self)
            if reads is not None and x.dim() == 4 and x.dtype in LEGAL_DTYPES.get(x.device.type, ()):
                _read(self, reads)
                for reader in state.current.facts.readers:  # type: ignore[union-attr]
                    reader()
                return _execute(_bind(self, state.description, None), x, True)
            return self._plain_forward(x)
        current = state.current
        if current is None or not current.holds(self):
            if _obstacle(x):
                # It is looked at when a call comes that can run fused: torch.jit.trace would record what is read of its tensors.
                return self._plain_forward(x)
            current = refresh(self, state)
        bound = current.bound
        if bound is not None:
            ready = bound.store.ready if type(bound) is Bound and bound.store is not None else None
            if ready is not None and type(x) is Tensor and not any(GLOBAL_HOOKS):
                y: Tensor | None = ready(x)
                if y is not None:
                    return y
            if not _obstacle(x):
                return _execute(bound, x, False)
        return self._plain_forward(x)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A class that ``fuse_`` makes is none of its author's subclasses, of which a class may keep a register."""
        if cls.__dict__.get("_fused_original") is None:
            super().__init_subclass__(**kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """What ``.to()``, ``.double()`` and their like call: the parameters will be others, so what is derived from them is given back."""
        state = self.__dict__.get("_fused_resnet")
        current = None if state is None else state.current
        if current is not None and current.bound is not None:
            current.bound.clear()
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
        return _rebuild, (original, function, plain, type(self)._fused_stem), *rest


def _rebuild(original: type[nn.Module], function: Callable[..., Any], args: tuple[Any, ...], stem: bool = False) -> Any:
    """Unpickles a converted block: the empty object of its original class, with the class of the converted one."""
    from .fusion import fused_class

    block = function(*args)
    object.__setattr__(block, "__class__", fused_class(original, stem))
    return block


def _bind(block: Any, description: Residual | Stem | None, store: Store | None) -> Bound | BoundStem:
    assert description is not None
    return bind_stem(block, description, store) if isinstance(description, Stem) else bind(block, description, store)


def _execute(bound: Bound | BoundStem, x: Tensor, compiling: bool) -> Tensor:
    return execute_stem(bound, x, compiling) if isinstance(bound, BoundStem) else execute(bound, x, compiling)


def forward_like(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``FusedBlock.forward`` with the name and default of forward's one argument, for calls by name and for its errors."""
    model: Any = FusedBlock.forward
    like: Any = forward
    name = only_input(forward)
    others = [f"{other}_" if other == name else other for other in model.__code__.co_varnames[2:]]
    code = model.__code__.replace(co_varnames=("self", name, *others))
    function: Any = types.FunctionType(code, model.__globals__, like.__name__, like.__defaults__)
    function.__qualname__, function.__doc__ = like.__qualname__, like.__doc__
    return function  # type: ignore[no-any-return]


def refresh(block: Any, state: State) -> Decision:
    """Look at the block again: describe it, or keep the reason why it runs as its author wrote it."""
    current = Decision(block, type(block)._fused_stem)
    current.bind(block)
    if current.description is not None:
        state.description = current.description
    elif not state.warned:
        state.warned = True
        warnings.warn(
            f"{type(block).__name__} runs unfused, as its own forward says: {current.refusal}", RuntimeWarning, stacklevel=4
        )
    state.current = current
    return current


@constant_result
def _watched(block: Any) -> tuple[tuple[Any, ...], ...] | None:
    """What the description depends on if it holds, decided once while torch.compile or torch.export traces the block."""
    state = block._fused_resnet
    current = state.current
    if current is None or not current.holds(block):
        current = refresh(block, state)
    return None if current.bound is None else current.facts.reads


def _read(block: Any, reads: tuple[tuple[Any, ...], ...]) -> None:
    """Read what the description depends on before the compiler's eyes, so that it guards it and compiles again after a change."""
    for path in reads:
        value = block
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


def _obstacle(x: Any) -> bool:
    """Whether this one call needs the block's own forward, whatever the block is."""
    if isinstance(x, Tensor):
        if x.is_nested:
            reason = "its input is a nested tensor"
        elif type(x) not in TENSORS:
            reason = f"its input is a {type(x).__name__}, which may compute otherwise"
        elif has_function_mode():
            reason = "a mode of torch.overrides wants to see its operations"
        elif x.dim() != 4 or x.layout is not torch.strided or x.dtype not in LEGAL_DTYPES.get(x.device.type, ()):
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
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"a fused block ran as its own forward says: {reason}", RuntimeWarning, stacklevel=4)
    return True
