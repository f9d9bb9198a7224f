"""A network's blocks as sections of one native call: its children looked through, as long as nobody listens to them.

A child that cannot be looked through (a block with a hook, a layer that is no block) is called as the network's forward does, and the
segments end before it and begin behind it. A block that is looked through still runs by itself when it is called by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._extension import cpu
from ..graph.calls import check_quiet
from ..graph.checked import Checked
from ..graph.facts import MISSING, Facts, lookup
from ..graph.originals import ORIGINAL, computes_as_ever
from ..graph.trace import Refused
from ..ops.store import Place, Store
from .bound import (
    INPUT,
    STEPS,
    Bound,
    BoundCall,
    BoundConvolution,
    BoundFlatten,
    BoundLinear,
    BoundMaxPool,
    BoundMeanPool,
    BoundNode,
    Part,
    Segment,
    Step,
    StepNode,
    chain,
    segment,
)

_FLATTEN = lookup(Tensor, "flatten")  # as it is when this package is imported
Decide = Callable[[Any], Any]  # of a converted block: the decision (``fused.Decision``) that holds for it now


def inline(module: nn.Module, bound: Bound, decide: Decide) -> Bound:
    """A network's bound graph with native segments, and the facts that they were made on: of the children that were looked through or
    into, and all that their own decisions were made on."""
    assert bound.store is not None
    looking = _Looking(module, decide, bound.store)
    parts = looking.parts([node for part in bound.parts for node in part.nodes])
    facts = Checked(looking.facts)
    for decision, owner in looking.decisions:
        facts.include(decision.facts, owner)
    bound.store.cached = {}  # the calls of the segments before go with them
    return bound._replace(parts=parts, facts=facts, cached=bound.store.cached)


class _Looking:
    """Looks into a network's children, and writes down what it saw."""

    def __init__(self, module: nn.Module, decide: Decide, store: Store) -> None:
        self.facts = Facts(module)
        self.decisions: list[tuple[Any, dict[str, Any]]] = []
        self._decide = decide
        self._store = store
        self._linears = 0
        self._open: set[int] = set()  # the containers that are being looked into

    def parts(self, nodes: Sequence[BoundNode]) -> tuple[Part, ...]:
        """The nodes in a row, cut where the native ones end."""
        parts: list[Part] = []
        native: list[tuple[BoundNode, list[Segment]]] = []  # consecutive nodes that may run natively, and what each is made of
        called: list[BoundNode] = []

        def end_native() -> None:
            ours = [*native]
            poolings: list[BoundNode] = []
            native.clear()
            while ours and isinstance(ours[-1][0], BoundMaxPool):  # an output as PyTorch lays it out: for the kernel by itself
                poolings.insert(0, ours.pop()[0])
            if sum([len(found) for _, found in ours]) > 1 and any([isinstance(node, BoundCall) for node, _ in ours]):
                end_called()
                parts.append(chain([node for node, _ in ours], concatenated([s for _, found in ours for s in found])))
            else:
                called.extend([node for node, _ in ours])
            called.extend(poolings)

        def end_called() -> None:
            if called:
                parts.append(chain(called))
                called.clear()

        for node in nodes:
            found = self._segments(node, native[-1][1][-1] if native else None)
            if found is None or (isinstance(node, BoundMaxPool) and not native):
                end_native()
                called.append(node)
            else:
                native.append((node, found))
        end_native()
        end_called()
        return tuple(parts)

    def _segments(self, node: BoundNode, before: Segment | None) -> list[Segment] | None:
        """What a node is made of, each of the value before; None where it has to be called. before: what made that value."""
        if isinstance(node, BoundCall):
            head = None if before is None else self._head(node, before.steps[-1].node)
            if head is not None:
                return [segment([Step(head, INPUT, None, True)])]
            if not isinstance(node.function, nn.Module) or node.args or node.kwargs:
                return None
            return self._look_into(node.function)
        if isinstance(node, BoundConvolution) and node.addition is not None:
            return None
        return [segment([Step(node, INPUT, None, True)])]

    def _head(self, node: BoundCall, before: StepNode) -> StepNode | None:
        """A call in a network's head: the mean of each channel, behind it a flattening, behind that linear layers."""
        function, args = node.function, node.args
        if isinstance(before, BoundMeanPool):
            by_function = function is torch.flatten and args == (1,) and not node.kwargs
            by_module = self._is_plain(node, nn.Flatten, start_dim=(1,), end_dim=(-1,)) and self.facts.lookup(Tensor, "flatten") is _FLATTEN
            return BoundFlatten() if by_function or by_module else None
        if isinstance(before, (BoundFlatten, BoundLinear)):
            if not self._is_plain(node, nn.Linear):
                return None
            attributes: Any = function.__dict__  # type: ignore[union-attr]
            self.facts.item(attributes, "_parameters")
            places = [attributes, self.facts.item(attributes, "_buffers")]
            if any([self.facts.item(place, name) is not MISSING for place in places for name in ("weight", "bias")]):
                return None
            self._linears += 1
            assert isinstance(function, nn.Linear)
            return BoundLinear(function, Place(self._store, -self._linears))
        by_function = function is F.adaptive_avg_pool2d and args in ((1,), ((1, 1),)) and not node.kwargs
        return BoundMeanPool() if by_function or self._is_plain(node, nn.AdaptiveAvgPool2d, output_size=(1, (1, 1))) else None

    def _is_plain(self, node: BoundCall, base: type[nn.Module], **settings: tuple[Any, ...]) -> bool:
        """Whether a call computes what torch's class does, with one of these settings each, and nobody listens."""
        module: Any = node.function
        if type(module) is not base or node.args or node.kwargs:
            return False
        try:
            check_quiet(self.facts, base.__name__, module)
        except Refused:
            return False
        found = [(self.facts.item(module.__dict__, name), values) for name, values in settings.items()]
        return all([type(value) in (int, tuple) and value in values for value, values in found]) and computes_as_ever(self.facts, base, base)

    def _look_into(self, module: Any) -> list[Segment] | None:
        if module is None or id(module) in self._open:
            return None
        self._open.add(id(module))
        try:
            check_quiet(self.facts, type(module).__name__, module)
            if self._is_sequence(module):
                children = [self._look_into(child) for child in self.facts.contents(self.facts.item(module.__dict__, "_modules")).values()]
                return None if not children or None in children else [s for child in children if child is not None for s in child]
            return self._block(module)
        except Refused:
            return None
        finally:
            self._open.discard(id(module))

    def _is_sequence(self, module: nn.Module) -> bool:
        cls = type(module)
        names = ("forward", "__iter__")
        return issubclass(cls, nn.Sequential) and all([self.facts.lookup(cls, name) is ORIGINAL[nn.Sequential][name] for name in names])

    def _block(self, module: Any) -> list[Segment] | None:
        """A converted block's own segment, where it is all that the block does."""
        state = self.facts.item(module.__dict__, "_fused_resnet")
        if state is MISSING:
            return None
        self.facts.lookup(type(module), "forward")  # ``decide`` asks whether it is ours
        decision = self._decide(module)
        if decision is None:
            return None
        self.facts.item(state.__dict__, "current")
        self.decisions.append((decision, module.__dict__))
        bound = decision.bound
        found = None if bound is None or len(bound.parts) != 1 else bound.parts[0].segment
        if found is None or found.external:
            return None
        # Groups are the library's: asked here, for a network's plan would be refused at each call.
        return [found] if all([self.facts.item(node.conv.__dict__, "groups") == 1 for node in found.convolutions]) else None


def concatenated(segments: Sequence[Segment]) -> Segment:
    """Several segments as one, each of the output of the one before."""
    steps: list[Step] = []
    for each in segments:
        first = len(steps)
        value = INPUT if first == 0 else STEPS + first - 1

        def at(v: int | None, first: int = first, value: int = value) -> Any:
            return v if v is None else value if v == INPUT else v + first

        steps += [Step(step.node, at(step.value), at(step.shortcut), step.begins) for step in each.steps]
    return segment(steps)


def may_inline(bound: Bound) -> bool:
    """Whether a network's bound graph has calls that could be looked into."""
    return cpu is not None and any([isinstance(node, BoundCall) for part in bound.parts for node in part.nodes])
