"""``fuse_`` converts a model's residual blocks in place, ``unfuse_`` undoes it, ``FusionReport`` says what happened.

A converted block is the same object with the same submodules, parameters, buffers and hooks; only its class changes, to
a subclass whose forward runs the block fused. ``state_dict``, ``isinstance``, deepcopy and pickle see no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from torch import nn

from .graph.ir import Call, Convolution, Graph, MaxPool
from .graph.recorder import find, walk
from .graph.trace import Refused
from .ops.plans import backends
from .ops.select import why_groups
from .report import FusionEntry, FusionReport
from .runtime.fused import Decision, FusedModule, become_fused, become_original

__all__ = ["FusionEntry", "FusionReport", "fuse_", "unfuse_"]

_NO_BLOCK = (nn.Sequential.forward, nn.Module.forward)  # the forwards of modules that only hold others


def fuse_(model: nn.Module, filter_fn: Callable[[str, nn.Module], bool] | None = None) -> FusionReport:
    """Convert the residual blocks of ``model`` in place.

    A block is recognised by what its forward computes, relu(main(x) + shortcut(x)), not by its class: its source is followed, nothing
    of the model runs and nothing of it is written. What is not understood, or would change the result, is not converted; whatever
    looks like a residual block and is not converted is in the report with the reason. What was read on the way (attributes, classes,
    globals, hooks, containers) is checked before each call: after a change the block is looked at again. The stem of a network with
    converted blocks (a convolution, batch norm and ReLU at the beginning of its own forward) becomes one layer too, and an
    ``nn.MaxPool2d`` that such a network calls itself runs by our own kernel (with a gradient, in float32 and channels_last). On a CPU,
    without gradients and in eval, such a network is one native call, with its head (the mean of each channel and a linear layer) if it has
    one; a child to which somebody listens is called as ever. Batch norm with running statistics (eval) is folded into the convolution,
    derived anew when a parameter changes; in training it stays as it is.

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
    networks: dict[str, Graph] = {}
    entries = tuple(_convert("", model, filter_fn or (lambda name, module: True), set(), networks))
    stems = tuple(name for name, graph in networks.items() if isinstance(graph.nodes[0], Convolution))
    pools = tuple(_path(name, node.module) for name, graph in networks.items() for node in graph.nodes if isinstance(node, MaxPool))
    return FusionReport(entries, stems, pools)


def unfuse_(model: nn.Module) -> nn.Module:
    """Give every block and network that ``fuse_`` converted its own class back, in place; returns ``model``.

    Blocks of ``fused_resnet.nn`` were never converted and stay.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for _, module in walk(model):
        become_original(module)
    return model


def _convert(
    name: str, module: nn.Module, accept: Callable[[str, nn.Module], bool], seen: set[int], networks: dict[str, Graph]
) -> Iterator[FusionEntry]:
    """Convert ``module`` or, if it is no block, what is in it and its stem."""
    if id(module) in seen:
        return
    seen.add(id(module))
    cls = type(module)
    if isinstance(module, FusedModule) and not module._fused_network:
        yield _already(name, module)
        return
    if not any(issubclass(type(m), nn.Conv2d) for _, m in walk(module)):
        return
    refusal = None
    own = cls.forward not in _NO_BLOCK and not cls.__module__.startswith("torch.nn.")
    if own and not isinstance(module, FusedModule):
        refusal = _try(name, module, accept)
        if isinstance(refusal, FusionEntry) and refusal.fused:
            yield refusal
            return
    found, fused = False, False
    for child_name, child in module.__dict__["_modules"].items():
        if child is None:
            continue
        for entry in _convert(_path(name, child_name), child, accept, seen, networks):
            found, fused = True, fused or entry.fused
            yield entry
    if refusal is not None and not found:
        yield refusal
    if own and fused:
        graph = _convert_network(module)
        if graph is not None:
            networks[name] = graph


def _path(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def _convert_network(module: nn.Module) -> Graph | None:
    """What the module runs: calls of its children, with its stem and its max poolings as nodes; None where it stays as it is."""
    if "forward" in module.__dict__:
        return None
    decision = Decision(module, network=True)
    if isinstance(module, FusedModule):
        return decision.graph
    if decision.graph is None or all(isinstance(node, Call) for node in decision.graph.nodes):
        return None
    return None if become_fused(module, decision, network=True) else decision.graph


def _try(name: str, module: nn.Module, accept: Callable[[str, nn.Module], bool]) -> FusionEntry | None:
    """Convert one module: its entry, or None if it does not look like a residual block."""
    cls = type(module)
    decision = Decision(module)
    graph, refusal = decision.graph, decision.refusal
    if "forward" in module.__dict__:
        refusal = Refused("its forward was replaced on the instance", is_block=True)
    elif refusal is None and not accept(name, module):
        refusal = Refused("left out by filter_fn", is_block=True)
    elif refusal is None:
        why = become_fused(module, decision)
        refusal = Refused(f"its class cannot be extended: {why}", is_block=True) if why else None
    if refusal is not None:
        return FusionEntry(name, cls.__name__, False, reason=str(refusal)) if refusal.is_block else None
    assert graph is not None
    return _fused_entry(name, cls.__name__, module, graph)


def _already(name: str, module: Any) -> FusionEntry:
    """The entry of a block that is fused before ``fuse_`` comes."""
    original = type(module)._fused_original
    shown = (original or type(module)).__name__
    decision = Decision(module)
    if decision.refusal is not None:
        return FusionEntry(name, shown, False, reason=f"a fused block that runs unfused now: {decision.refusal}")
    assert decision.graph is not None
    entry = _fused_entry(name, shown, module, decision.graph)
    return FusionEntry(**{**asdict(entry), "became": f"already fused: {entry.became}"})


def _fused_entry(name: str, shown: str, module: nn.Module, graph: Graph) -> FusionEntry:
    reason = _why_general(module, graph)
    path = "general" if reason else "hot"
    return FusionEntry(name, shown, True, became(graph), path=path, path_reason=reason)


def became(graph: Graph) -> str:
    """A block in words: "2 convolutions, identity shortcut"."""
    count = sum(isinstance(node, Convolution) for node in graph.main())
    main = f"{count} convolution{'s' if count > 1 else ''}"
    shortcut = graph.shortcut()
    if shortcut is None:
        return f"{main}, no shortcut"
    if any(isinstance(node, Convolution) for node in shortcut):
        others = any(isinstance(node, Call) for node in shortcut)
        return f"{main}, {'pooling and ' if others else ''}projection shortcut"
    return f"{main}, {'parameter-free' if shortcut else 'identity'} shortcut"


def _why_general(module: nn.Module, graph: Graph) -> str:
    """What is known without an input about the convolutions that take the general path; "" if nothing is."""
    convs: list[Any] = [find(module, node.conv) for node in graph.nodes if isinstance(node, Convolution)]
    for weight in sorted([conv.weight for conv in convs], key=lambda weight: (weight.is_cpu, str(weight.device))):
        why = backends.of(weight).why_no_kernels(weight.device)
        if why:
            return why
    return "; ".join(why_groups(min({conv.groups for conv in convs} - {1}, default=1)))
