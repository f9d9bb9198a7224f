"""What makes a module a fused block: a forward that runs the block's description while it holds, else the block's code.

The description is found by tracing (``_match``) and belongs to the block as it was then. Each call compares a snapshot
of everything the description depends on (submodules, their classes and hooks, plain attributes) in about a microsecond.
When something changed the block is looked at again, and if it cannot run fused any more it runs as its author wrote it
and says so.
"""

from __future__ import annotations

import operator
import types
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

from ._arguments import DTYPES
from ._derived import Store
from ._match import match
from ._residual import Bound, Residual, bind, execute
from ._stem import BoundStem, Stem, bind_stem, execute_stem, match_stem
from ._trace import HOOKS, Refused, is_leaf, only_input

_PLAIN = (type(None), bool, int, float, str)
_IGNORED = {"training", "_is_full_backward_hook", "_non_persistent_buffers_set"}


class State:
    """What a fused block keeps in its ``__dict__``. Copies and pickles as the description alone."""

    def __init__(self, description: Residual | Stem | None) -> None:
        self.description = description
        self.current: Snapshot | None = None
        self.warned = False

    def __reduce__(self) -> Any:
        return State, (self.description,)


class Snapshot:
    """The state of a block on which the decision to run it fused was made, and the decision: ``bound``, or a reason.

    Of a network with a fused stem, only its own children of torch.nn: it calls the others, whatever is in them.
    """

    def __init__(self, block: nn.Module) -> None:
        self.bound: Bound | BoundStem | None = None
        self.reason = ""
        stem = getattr(type(block), "_fused_stem", False)
        inner = [m for m in block.children() if is_leaf(m)] if stem else [m for name, m in block.named_modules() if name]
        self.modules = inner
        self.types = [type(m) for m in inner]
        # Lengths change when a hook comes or goes, or an attribute (a replaced forward) is set.
        self.sized = [getattr(m, name) for m in inner for name in HOOKS] + [m.__dict__ for m in inner]
        self.lengths = [*map(len, self.sized)]
        parents = [block, *(m for m in inner if m._modules)]
        self.trees = [(m._modules, dict(m._modules)) for m in parents]
        # Nothing here refers to the block itself, which would then live until the garbage collector comes.
        self.own = [(get, get(block.__dict__)) for get in _plain_attributes(block, True)]
        self.plain = [(m.__dict__, get, get(m.__dict__)) for m in inner for get in _plain_attributes(m, False)]

    def holds(self, block: nn.Module) -> bool:
        """Whether nothing has changed since."""
        if self.trees[0][0] is not block._modules or [*map(len, self.sized)] != self.lengths:
            return False
        if [*map(type, self.modules)] != self.types:
            return False
        for children, before in self.trees:
            if children != before:
                return False
        try:
            for get, value in self.own:
                if get(block.__dict__) != value:
                    return False
            for attributes, get, value in self.plain:
                if get(attributes) != value:
                    return False
        except KeyError:
            return False
        return True


def _plain_attributes(module: nn.Module, is_block: bool) -> list[Callable[[Any], Any]]:
    """What reads the flags and numbers that may steer a Python forward; of torch.nn's modules, the two that do."""
    names: list[str]
    if is_leaf(module) and not is_block:
        names = [name for name in ("padding_mode", "p") if name in module.__dict__]
    else:
        names = [k for k, v in module.__dict__.items() if k not in _IGNORED and isinstance(v, _PLAIN)]
    return [operator.itemgetter(*names)] if names else []


class FusedBlock:
    """Mixin in front of an ``nn.Module`` class whose own forward is kept as ``_plain_forward``."""

    _fx_leaf: ClassVar[bool] = True
    _fused_original: ClassVar[type[nn.Module] | None] = None  # the class before conversion; None: born as a fused block
    _fused_stem: ClassVar[bool] = False  # a network whose stem is fused, and no block
    _needs_shortcut: ClassVar[bool] = True
    _fused_resnet: State
    _plain_forward: Callable[..., Tensor]

    def forward(self, x: Tensor) -> Tensor:
        """The block's forward: x [N, C, H, W] -> [N, K, P, Q]."""
        state = self._fused_resnet
        if torch.compiler.is_compiling():
            if _is_valid(self) and x.dim() == 4 and x.dtype in DTYPES.get(x.device.type, ()):
                return _execute(_bind(self, state.description, None), x, True)
            return self._plain_forward(x)
        current = state.current
        if current is None or not current.holds(self):  # type: ignore[arg-type]
            if isinstance(x, fx.Proxy):
                return self._plain_forward(x)  # somebody traces a twin of it, whose state is not its own
            current = refresh(self, state)
        bound = current.bound
        if bound is not None:
            ready = bound.store.ready if type(bound) is Bound and bound.store is not None else None
            if ready is not None and type(x) is Tensor and not any(_GLOBAL_HOOKS):
                y: Tensor | None = ready(x)
                if y is not None:
                    return y
            if not _obstacle(x):
                return _execute(bound, x, False)
        return self._plain_forward(x)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """What ``.to()``, ``.double()`` and their like call: the parameters will be others, so what is derived from them is given back."""
        state = self.__dict__.get("_fused_resnet")
        current = None if state is None else state.current
        if current is not None and current.bound is not None:
            current.bound.clear()
        return super()._apply(*args, **kwargs)  # type: ignore[misc]

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
    block.__class__ = fused_class(original, stem)
    return block


def look_at(block: Any) -> Residual | Stem:
    """What a fused block does as its own forward says.

    Raises:
        Refused: with the reason, if it cannot run fused (any more).
    """
    cls = type(block)
    return match_stem(block, cls._plain_forward) if cls._fused_stem else match(block, cls._plain_forward, cls._needs_shortcut)


def _bind(block: Any, description: Residual | Stem | None, store: Store | None) -> Bound | BoundStem:
    assert description is not None
    return bind_stem(block, description, store) if isinstance(description, Stem) else bind(block, description, store)


def _execute(bound: Bound | BoundStem, x: Tensor, compiling: bool) -> Tensor:
    return execute_stem(bound, x, compiling) if isinstance(bound, BoundStem) else execute(bound, x, compiling)


def forward_like(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``FusedBlock.forward`` with the name and default of forward's one argument, for calls by name and for its errors."""
    model: Any = FusedBlock.forward
    like: Any = forward
    code = model.__code__.replace(co_varnames=("self", only_input(forward), *model.__code__.co_varnames[2:]))
    function: Any = types.FunctionType(code, model.__globals__, like.__name__, like.__defaults__)
    function.__qualname__, function.__doc__ = like.__qualname__, like.__doc__
    return function  # type: ignore[no-any-return]


def refresh(block: Any, state: State) -> Snapshot:
    """Look at the block again: describe it, or keep the reason why it runs as its author wrote it."""
    current = Snapshot(block)
    try:
        description = look_at(block)
        current.bound = _bind(block, description, Store())
        state.description = description
    except Refused as error:
        current.reason = str(error)
        if not state.warned:
            state.warned = True
            warnings.warn(
                f"{type(block).__name__} runs unfused, as its own forward says: {error}", RuntimeWarning, stacklevel=4
            )
    state.current = current
    return current


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_valid(block: Any) -> bool:
    """Whether the description holds, decided once while torch.compile or torch.export traces the block."""
    state = block._fused_resnet
    current = state.current
    if current is None or not current.holds(block):
        current = refresh(block, state)
    return current.bound is not None


_warned: set[str] = set()
# torch's own registries: one of them is not empty as long as a global module hook is registered.
_GLOBAL_HOOKS = (
    nn_module._global_forward_pre_hooks,
    nn_module._global_forward_hooks,
    nn_module._global_backward_pre_hooks,
    nn_module._global_backward_hooks,
)


def _obstacle(x: Any) -> bool:
    """Whether this one call needs the block's own forward, whatever the block is."""
    if isinstance(x, Tensor):
        if x.is_nested:
            reason = "its input is a nested tensor"
        elif x.dim() != 4 or x.layout is not torch.strided or x.dtype not in DTYPES.get(x.device.type, ()):
            reason = f"its input is {x.dim()}-dimensional, {x.dtype}, {x.layout} on {x.device.type}"
        elif forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
            reason = "torch.func transforms and forward-mode gradients need it"
        elif any(_GLOBAL_HOOKS):
            reason = "a global module hook wants to see its submodules"
        elif torch._C._is_tracing():
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
