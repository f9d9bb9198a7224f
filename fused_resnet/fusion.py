"""``fuse_`` converts a model's residual blocks in place, ``unfuse_`` undoes it, ``FusionReport`` says what happened.

A converted block is the same object with the same submodules, parameters, buffers and hooks; only its class changes, to
a subclass whose forward runs the block fused. ``state_dict``, ``isinstance``, deepcopy and pickle see no difference.
"""

from __future__ import annotations

import abc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ._block import Decision, FusedBlock, State, forward_like
from ._residual import Call, Layer, Residual
from .graph.ir import Refused
from .graph.recorder import find, walk
from .ops.plans import backends
from .ops.select import why_groups

__all__ = ["FusionEntry", "FusionReport", "fuse_", "unfuse_"]

_NO_BLOCK = (nn.Sequential.forward, nn.Module.forward)  # the forwards of modules that only hold others
# (original class, whether only its stem is fused) -> its fused subclass, as long as a module of it lives.
_classes: weakref.WeakValueDictionary[tuple[type, bool], type] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class FusionEntry:
    """One residual block of the model.

    name: its path in the model ("" is the model itself). type: its class.
    became: what it runs as, "" if refused. reason: why it was refused, with the line of the forward that stands against it, "" if fused.
    path: "hot" (our kernels), "general" (the library's convolution, then our pass), "" if refused. It is what is known
    without an input; ``fused_resnet.why_not`` asks for one call. path_reason: why "general".
    """

    name: str
    type: str
    fused: bool
    became: str = ""
    reason: str = ""
    path: str = ""
    path_reason: str = ""


@dataclass(frozen=True)
class FusionReport:
    """What ``fuse_`` did: an entry for each residual block, in the model's order. ``print`` shows it as a table.

    stems: the networks whose stem (the convolution, batch norm and ReLU in front of the blocks) is one layer too, by name.
    """

    entries: tuple[FusionEntry, ...]
    stems: tuple[str, ...] = ()

    @property
    def fused(self) -> list[FusionEntry]:
        return [entry for entry in self.entries if entry.fused]

    @property
    def refused(self) -> list[FusionEntry]:
        return [entry for entry in self.entries if not entry.fused]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, strings and bools, for ``json.dump``."""
        entries = [asdict(e) for e in self.entries]
        return {"entries": entries, "fused": len(self.fused), "refused": len(self.refused), "stems": list(self.stems)}

    def __str__(self) -> str:
        if not self.entries:
            return "no residual block found"
        rows = [("block", "class", "fused", "as, or why not", "path")]
        for e in self.entries:
            fused = "yes" if e.fused else "no"
            rows.append((e.name or "(the model)", e.type, fused, e.became or e.reason, e.path or "-"))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        rows.insert(1, tuple("-" * width for width in widths))  # type: ignore[arg-type]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        why = sorted({e.path_reason for e in self.entries if e.path_reason})
        notes = [f"general path: {reason}" for reason in why]
        stems = [f"stem of {name or 'the model'}: convolution, batch norm and ReLU as one layer" for name in self.stems]
        return "\n".join([*lines, f"{len(self.fused)} fused, {len(self.refused)} refused", *stems, *notes])


def fuse_(model: nn.Module, filter_fn: Callable[[str, nn.Module], bool] | None = None) -> FusionReport:
    """Convert the residual blocks of ``model`` in place.

    A block is recognised by what its forward computes, relu(main(x) + shortcut(x)), not by its class: its source is followed, nothing
    of the model runs and nothing of it is written. What is not understood, or would change the result, is not converted; whatever
    looks like a residual block and is not converted is in the report with the reason. What was read on the way (attributes, classes,
    globals, hooks, containers) is checked before each call: after a change the block is looked at again. The stem of a network with
    converted blocks (a convolution, batch norm and ReLU at the beginning of its own forward) becomes one layer too. Batch norm with
    running statistics (eval) is folded into the convolution, derived anew when a parameter changes; in training it stays as it is.

    Args:
        model: any module; it may be a block itself.
        filter_fn: ``filter_fn(name, module)`` returns False to leave a block alone; called for residual blocks only.

    Returns:
        The report.

    Raises:
        TypeError: if ``model`` is not a module or ``filter_fn`` not callable.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be callable or None, got {type(filter_fn).__name__}")
    stems: list[str] = []
    entries = tuple(_convert("", model, filter_fn or (lambda name, module: True), set(), stems))
    return FusionReport(entries, tuple(stems))


def unfuse_(model: nn.Module) -> nn.Module:
    """Give every block that ``fuse_`` converted its own class back, in place; returns ``model``.

    Blocks of ``fused_resnet.nn`` were never converted and stay.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for _, module in walk(model):
        original = getattr(type(module), "_fused_original", None)
        if original is not None:
            module.__dict__.pop("_fused_resnet", None)
            object.__setattr__(module, "__class__", original)
    return model


def fused_class(original: type[nn.Module], stem: bool = False) -> type:
    """The fused subclass of a module class, made on demand. ``stem``: of a network, for its stem only."""
    cls = _classes.get((original, stem))
    if cls is None:
        body = {
            "__module__": original.__module__,
            "__qualname__": f"Fused{original.__qualname__}",
            "__doc__": original.__doc__,
            "_fused_original": original,
            "_fused_stem": stem,
            "_fx_leaf": not stem,
            "_plain_forward": _as_written(original),
            "forward": forward_like(original.forward),
        }
        cls = type(f"Fused{original.__name__}", (FusedBlock, original), body)
        _classes[original, stem] = cls
    return cls


def _as_written(original: type[nn.Module]) -> Callable[..., Any]:
    """The forward that the class has when it is called: it may be patched after the conversion."""

    def forward(self: Any, x: Any) -> Any:
        return original.forward(self, x)

    return forward


def _convert(
    name: str, module: nn.Module, accept: Callable[[str, nn.Module], bool], seen: set[int], stems: list[str]
) -> Iterator[FusionEntry]:
    """Convert ``module`` or, if it is no block, what is in it and its stem."""
    if id(module) in seen:
        return
    seen.add(id(module))
    cls = type(module)
    if isinstance(module, FusedBlock) and not module._fused_stem:
        yield _already(name, module)
        return
    if not any(issubclass(type(m), nn.Conv2d) for _, m in walk(module)):
        return
    refusal = None
    own = cls.forward not in _NO_BLOCK and not cls.__module__.startswith("torch.nn.")
    if own and not isinstance(module, FusedBlock):
        refusal = _try(name, module, accept)
        if isinstance(refusal, FusionEntry) and refusal.fused:
            yield refusal
            return
    found, fused = False, False
    for child_name, child in module.__dict__["_modules"].items():
        if child is None:
            continue
        for entry in _convert(f"{name}.{child_name}" if name else child_name, child, accept, seen, stems):
            found, fused = True, fused or entry.fused
            yield entry
    if refusal is not None and not found:
        yield refusal
    if own and fused and _convert_stem(module):
        stems.append(name)


def _convert_stem(module: nn.Module) -> bool:
    """Whether the module runs with its stem fused: what its own forward does in front of and behind its blocks."""
    if isinstance(module, FusedBlock):
        return Decision(module, stem=True).refusal is None
    if "forward" in module.__dict__:
        return False
    decision = Decision(module, stem=True)
    if decision.refusal is not None:
        return False
    return _become(module, decision, stem=True) == ""


def _become(module: nn.Module, decision: Decision, stem: bool = False) -> str:
    """Give a module the class of a fused one, and what was found of it; why not, or ""."""
    if type(type(module)) not in (type, abc.ABCMeta):
        return f"it has the metaclass {type(type(module)).__name__}"
    try:
        object.__setattr__(module, "__class__", fused_class(type(module), stem))
    except TypeError as error:
        return str(error)
    decision.bind(module)
    state = State(decision.description)
    state.current = decision
    module.__dict__["_fused_resnet"] = state
    return ""


def _try(name: str, module: nn.Module, accept: Callable[[str, nn.Module], bool]) -> FusionEntry | None:
    """Convert one module: its entry, or None if it does not look like a residual block."""
    cls = type(module)
    decision = Decision(module)
    description, refusal = decision.description, decision.refusal
    if "forward" in module.__dict__:
        refusal = Refused("its forward was replaced on the instance", is_block=True)
    elif refusal is None and not accept(name, module):
        refusal = Refused("left out by filter_fn", is_block=True)
    elif refusal is None:
        why = _become(module, decision)
        refusal = Refused(f"its class cannot be extended: {why}", is_block=True) if why else None
    if refusal is not None:
        return FusionEntry(name, cls.__name__, False, reason=str(refusal)) if refusal.is_block else None
    assert isinstance(description, Residual)
    return _fused_entry(name, cls.__name__, module, description)


def _already(name: str, module: Any) -> FusionEntry:
    """The entry of a block that is fused before ``fuse_`` comes."""
    original = type(module)._fused_original
    shown = (original or type(module)).__name__
    decision = Decision(module)
    description = decision.description
    if decision.refusal is not None:
        return FusionEntry(name, shown, False, reason=f"a fused block that runs unfused now: {decision.refusal}")
    assert isinstance(description, Residual)
    entry = _fused_entry(name, shown, module, description)
    return FusionEntry(**{**asdict(entry), "became": f"already fused: {entry.became}"})


def _fused_entry(name: str, shown: str, module: nn.Module, description: Residual) -> FusionEntry:
    reason = _why_general(module, description)
    path = "general" if reason else "hot"
    return FusionEntry(name, shown, True, became(description), path=path, path_reason=reason)


def became(description: Residual) -> str:
    """A description in words: "2 convolutions, identity shortcut"."""
    count = sum(isinstance(step, Layer) for step in description.main)
    main = f"{count} convolution{'s' if count > 1 else ''}"
    if description.shortcut is None:
        return f"{main}, no shortcut"
    steps = description.shortcut
    if any(isinstance(step, Layer) for step in steps):
        others = any(isinstance(step, Call) for step in steps)
        return f"{main}, {'pooling and ' if others else ''}projection shortcut"
    return f"{main}, {'parameter-free' if steps else 'identity'} shortcut"


def _why_general(module: nn.Module, description: Residual) -> str:
    """What is known without an input about the convolutions that take the general path; "" if nothing is."""
    steps = [*description.main, *(description.shortcut or ())]
    convs: list[Any] = [find(module, step.conv) for step in steps if isinstance(step, Layer)]
    for weight in sorted([conv.weight for conv in convs], key=lambda weight: (weight.is_cpu, str(weight.device))):
        why = backends.of(weight).why_no_kernels(weight.device)
        if why:
            return why
    return "; ".join(why_groups(min({conv.groups for conv in convs} - {1}, default=1)))
