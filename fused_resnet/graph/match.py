"""Recognises a residual block by what its ``forward`` does in eval and in training mode, and says why not."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .._compat import BATCH_OR_INSTANCE_NORM, TENSORS
from .._residual import FUNCTIONS, Call, Layer, Residual, Step
from . import analysis
from .facts import MISSING, Facts
from .ir import Graph, Node, Refused, name_of
from .objects import PLAIN, computes_as_ever
from .recorder import ADDITIONS, find
from .source import decorated

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
# Modules that write nowhere and make a new tensor.
_PURE = (nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.ZeroPad2d, nn.ConstantPad2d)
_CLONES = (torch.clone, "clone")
_RELUS = (F.relu, torch.relu, torch.relu_, F.relu_)
_SHAPES = ("shape", "dtype", "device", "ndim", "layout", "requires_grad")


def match(module: nn.Module, forward: Callable[..., Any], facts: Facts, needs_shortcut: bool = True) -> Residual:
    """What ``forward(module, x)`` does as a residual block; ``facts`` hear what it depends on.

    Raises:
        Refused: with the reason, if it is none or if running it fused could change the result.
    """
    only_input(forward)
    if isinstance(module, (torch.jit.ScriptModule, fx.GraphModule)):  # which write into their classes
        raise Refused("it is a compiled TorchScript module or a graph of torch.fx", is_block=True)
    description: Residual | None = None
    for graph, training in analysis.ways(module, forward, facts, is_leaf, absorbs=True):
        is_block = not needs_shortcut or any(_is_add(node) for node in graph.nodes)
        try:
            found = Matcher(module, graph, facts, needs_shortcut).description()
        except Refused as error:
            error.is_block = is_block
            if training:
                error.reason = f"in training mode, {error.reason}"
            raise
        if description is not None and found != description:
            raise Refused("its forward does something else in training mode than in eval mode", is_block)
        description = found
    assert description is not None
    return description


def only_input(forward: Callable[..., Any]) -> str:
    """The name of the one input that ``forward`` takes."""
    code = getattr(forward, "__code__", None)
    if code is None:
        raise Refused("its forward is not a plain Python function", is_block=True)
    where = decorated(forward)
    if where:
        raise Refused("its forward is decorated", is_block=True, where=where)
    names = list(code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount])
    if len(names) != 1 or code.co_kwonlyargcount or code.co_posonlyargcount or code.co_flags & 0x0C:  # *args, **kwargs
        raise Refused(f"its forward must take one input, got ({', '.join(names) or '...'})")
    return str(names[0])


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is one operation: torch.nn's own modules, and what derives from those that matter here."""
    if issubclass(type(module), (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return False
    if issubclass(type(module), (nn.Conv2d, BATCH_OR_INSTANCE_NORM, nn.ReLU)):
        return True
    if getattr(type(module), "_fx_leaf", False):
        return True
    return type(module).__module__.startswith(("torch.nn.", "torch.ao."))


def _is_add(node: Node) -> bool:
    return node.op in ("function", "method") and node.target in ADDITIONS and len(node.inputs) == 2


def _is_harmless(node: Node) -> bool:
    """Whether it only reads a shape, which then is not used, and cannot fail."""
    if node.target is getattr:
        return node.args[1:] in [(name,) for name in _SHAPES] and not node.kwargs
    return node.target in ("size", "dim") and len(node.args) + len(node.kwargs) <= 2 and all(a in range(4) for a in node.args[1:])


def _is_inplace_add(node: Node) -> bool:
    return node.target is operator.iadd or node.target == "add_"


class Matcher:
    """Reads a graph as a residual block. ``facts`` hear which settings of its modules matter."""

    def __init__(self, module: nn.Module, graph: Graph, facts: Facts, needs_shortcut: bool) -> None:
        self.module = module
        self.graph = graph
        self.facts = facts
        self.needs_shortcut = needs_shortcut
        for node in reversed(graph.nodes.copy()):
            if not node.users and node.op != "output":
                if node.op != "constant" and not _is_harmless(node):
                    known = self.is_relu(node) or self.is_transparent(node) or node.op == "input"
                    raise self.refused(node, f"it does not use {self.say(node)}" if known else self.not_known(node))
                graph.remove(node)

    def refused(self, node: Node, reason: str) -> Refused:
        return Refused(reason, where=node.where)

    def is_plain(self, node: Node, base: type[nn.Module]) -> bool:
        """Whether a module computes exactly what torch's class does."""
        module = self.at(node)
        if not issubclass(type(module), base) or len(node.args) != 1 or node.kwargs:
            return False
        return computes_as_ever(self.facts, type(module), base)

    def at(self, node: Node) -> nn.Module:
        return find(self.module, str(node.target))

    def say(self, node: Node) -> str:
        """A node in words: "se (SEModule)", "mul in se"."""
        if node.op == "module":
            return f"{node.target} ({type(self.at(node)).__name__})"
        if node.op == "input":
            return "the block's input"
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", name_of(node.target))
        within = node.within
        return f"{name} in {within} ({type(find(self.module, within)).__name__})" if within else str(name)

    def description(self) -> Residual:
        """The block that the graph is."""
        end = self.end()
        try:
            return self._description(self.graph.nodes[0], end)
        except Refused as error:
            error.where = error.where or end.where
            raise

    def end(self) -> Node:
        """What the forward returns, if it is one tensor."""
        (end,) = self.graph.nodes[-1].args
        if not isinstance(end, Node):
            raise Refused("its forward does not return one tensor", where=self.graph.nodes[-2].where)
        return end

    def _description(self, start: Node, end: Node) -> Residual:
        end = self.solid(end)
        if not self.needs_shortcut and not _is_add(self.solid(self.source(end))):
            path = self.path(end, start)
            steps = self.steps(path)
            last = steps[-1] if steps else None
            if not isinstance(last, Layer):
                raise Refused("it ends in no convolution")
            self.check_shared(steps)
            main = (*steps[:-1], Layer(last.conv, last.norm, False))
            return Residual(main, None, relu=last.relu)
        if _is_add(end):
            raise self.refused(end, "it has no ReLU after the addition")
        if not self.is_relu(end):
            if end.inputs and _is_add(self.solid(self.source(end))):
                raise self.refused(end, f"the activation after the addition is {self.say(end)}, not ReLU")
            raise self.refused(end, f"it ends in {self.say(end)}, not in a ReLU behind an addition")
        total = self.solid(self.source(end))
        self.check_used_once(end)
        if not _is_add(total):
            raise self.refused(total, f"its last ReLU follows {self.say(total)}, not an addition")
        self.check_used_once(total)
        if len(total.args) != 2 or {k: v for k, v in total.kwargs.items() if k != "alpha" or type(v) not in (int, float) or v != 1}:
            raise self.refused(total, "its addition has other arguments than its two operands")
        return self.join(total, start)

    def join(self, total: Node, start: Node) -> Residual:
        operands = [self.path(node, start) for node in total.args if isinstance(node, Node)]
        if len(start.users) > 2:
            raise Refused(f"its input goes to {len(start.users)} operations, not to main path and shortcut only")
        paths = [self.steps(path) for path in operands]
        counts = [sum(isinstance(step, Layer) for step in steps) for steps in paths]
        if max(counts) == 0:
            raise Refused("neither operand of the addition has a convolution")
        left_is_main = counts[0] >= counts[1]
        main, shortcut = paths if left_is_main else reversed(paths)
        last = main[-1]
        if not isinstance(last, Layer):
            raise Refused(f"the main path ends in {last.target}, not in a convolution")
        if last.relu:
            raise self.refused(total, "the main path has a ReLU before the addition")
        self.check_shared((*main, *shortcut))
        self.check_channels(main, shortcut)
        inplace = _is_inplace_add(total)
        if inplace and not left_is_main and shortcut and isinstance(shortcut[-1], Layer) and shortcut[-1].relu:
            raise self.refused(total, "its addition writes into what a ReLU needs for its gradient")
        if inplace and not left_is_main and not (shortcut and isinstance(shortcut[-1], Layer)):
            raise self.refused(total, "its addition writes into the shortcut, which may be the block's input")
        return Residual(tuple(main), tuple(shortcut), "main" if left_is_main else "shortcut", inplace)

    # --- walking ---

    def source(self, node: Node) -> Node:
        """The one value that a node works on; all its other arguments must be constants."""
        nodes = node.inputs
        values = [n for n in nodes if n.op != "constant"]
        if len(values) != 1 or not node.args or node.args[0] is not values[0]:
            raise self.refused(node, self.not_known(node))
        return values[0]

    def solid(self, node: Node) -> Node:
        """The node itself, or what it passes on unchanged."""
        while self.is_transparent(node):
            self.check_used_once(node)
            node = self.source(node)
        return node

    def check_used_once(self, node: Node) -> None:
        if len(node.users) != 1:
            raise self.refused(node, f"the result of {self.say(node)} is used {len(node.users)} times")

    def path(self, end: Node, start: Node) -> list[Node]:
        """The nodes from the block's input to ``end``, in order; each must feed the next one only."""
        nodes: list[Node] = []
        node = end
        while node is not start:
            self.check_used_once(node)
            if not self.is_transparent(node):
                nodes.append(node)
            if _is_add(node):
                raise self.refused(node, f"its paths hold another addition, {self.say(node)}")
            node = self.source(node)
        return nodes[::-1]

    def is_transparent(self, node: Node) -> bool:
        if node.op == "module":
            module = self.at(node)
            if self.is_plain(node, nn.Identity):
                return True
            if type(module) not in _DROPOUTS or not self.is_plain(node, type(module)):
                return False
            p = self.setting(str(node.target), "p")
            return type(p) in (int, float) and p == 0
        if node.op in ("function", "method") and node.target in _CLONES and len(node.args) == 1 and not node.kwargs:
            # A copy of the input that is added on the right: nothing else sees it. In front of a convolution, which keeps it for the gradient,
            # behind the last ReLU, which keeps what it copies, and on the left, whose strides decide the sum's, a copy is not the original.
            users = [*node.users]
            return self.source(node).op == "input" and all(_is_add(user) and user.args[1:] == (node,) for user in users)
        if node.op == "function" and node.target is F.dropout:
            names = ("input", "p", "training", "inplace")
            given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
            p = given.get("p", 0.5)
            return type(p) in (int, float) and (p == 0 or (0 <= p <= 1 and given.get("training") is False))
        return False

    def is_relu(self, node: Node) -> bool:
        if node.op == "module":
            return self.is_plain(node, nn.ReLU)
        if node.op == "function":
            return node.target in _RELUS and len(node.inputs) == 1
        return node.op == "method" and node.target in ("relu", "relu_") and len(node.args) == 1 and not node.kwargs

    def is_norm(self, node: Node) -> bool:
        return node.op == "module" and any(self.is_plain(node, base) for base in _NORMS)

    def not_known(self, node: Node) -> str:
        if node.op == "module":
            module = self.at(node)
            for base in (nn.Conv2d, *_NORMS, nn.ReLU):
                if issubclass(type(module), base):
                    return f"{self.say(node)} overrides how {base.__name__} computes"
        return f"{self.say(node)} is not a convolution, a batch norm or a ReLU"

    # --- from nodes to steps ---

    def steps(self, nodes: list[Node]) -> tuple[Step, ...]:
        steps: list[Step] = []
        queue = list(nodes)
        while queue:
            node = queue.pop(0)
            if node.op == "module" and self.is_plain(node, nn.Conv2d):
                norm = str(queue.pop(0).target) if queue and self.is_norm(queue[0]) else None
                relu = bool(queue and self.is_relu(queue[0]) and queue.pop(0))
                self.check_layer(node, norm)
                steps.append(Layer(str(node.target), norm, relu))
            else:
                steps.append(self.call(node))
        return tuple(steps)

    def call(self, node: Node) -> Call:
        if node.op == "module":
            module = self.at(node)
            if (type(module) in _PURE and self.is_plain(node, type(module))) or getattr(type(module), "_fx_pure", False):
                if len(node.args) == 1 and not node.kwargs and self.setting(str(node.target), "return_indices") in (MISSING, False):
                    return Call(str(node.target))
            elif self.is_relu(node) or self.is_norm(node):
                raise self.refused(node, f"{self.say(node)} does not follow a convolution")
        elif node.op == "function":
            for name, function in FUNCTIONS.items():
                if node.target is function and len(node.inputs) == 1:
                    return Call(name, True, plain_value(node.args[1:]), tuple(plain_value(list(node.kwargs.items()))))
            if self.is_relu(node):
                raise self.refused(node, f"{self.say(node)} does not follow a convolution")
        raise self.refused(node, self.not_known(node))

    def setting(self, path: str, name: str) -> Any:
        """A module's attribute that the decision depends on."""
        value = self.facts.item(find(self.module, path).__dict__, name)
        if value is not MISSING:
            self.facts.read(("", *path.split("."), name))
        return value

    def tensor(self, module: nn.Module, name: str) -> Any:
        """A module's parameter, buffer or, as in replicas, attribute of this name; MISSING if there are none or several, of which one would
        hide the others. That a later one is None or not, and of a known class, are facts; which tensor it is may change."""
        attributes = module.__dict__
        places = [attributes, *(self.facts.item(attributes, place) for place in ("_parameters", "_buffers"))]
        kept = []
        for place in places:
            value = place.get(name, MISSING)
            kept.append(self.facts.kind(place, name, (type(None),) if value is None else TENSORS))
        found = [value for value in kept if value is not MISSING]
        return found[0] if len(found) == 1 else MISSING

    def check_layer(self, conv: Node, norm_path: str | None) -> None:
        padding = self.setting(str(conv.target), "padding_mode")
        if type(padding) not in PLAIN or padding != "zeros":
            raise self.refused(conv, f"{conv.target} has padding_mode={padding!r}, not 'zeros'")
        for path in (str(conv.target), norm_path):
            if path is None:
                continue
            module = find(self.module, path)
            names = ("weight", "bias") if path != norm_path else ("weight", "bias", "running_mean", "running_var")
            for name in names:
                value = self.tensor(module, name)
                if value is not None and type(value) not in TENSORS:
                    what = "missing, or there more than once" if value is MISSING else f"a {type(value).__name__}, not a plain tensor"
                    raise self.refused(conv, f"the {name} of {path} is {what}")
        weight = self.tensor(self.at(conv), "weight")
        if weight is None or weight.dim() != 4:
            raise self.refused(conv, f"the weight of {conv.target} has not four dimensions")
        if norm_path is not None:
            norm: Any = find(self.module, norm_path)
            if (norm.running_mean is None) != (norm.running_var is None):
                raise self.refused(conv, f"{norm_path} has only one of running_mean and running_var")

    def check_shared(self, steps: tuple[Step, ...]) -> None:
        seen: dict[int, str] = {}
        for path in _paths(steps):
            module = find(self.module, path)
            if id(module) in seen:
                raise Refused(f"{path} ({type(module).__name__}) is used twice in the block")
            seen[id(module)] = path

    def check_channels(self, main: tuple[Step, ...], shortcut: tuple[Step, ...]) -> None:
        """The operator does not broadcast, the + of the block would: refuse where the channels say so already."""
        first, last = main[0], main[-1]
        channels = None
        if isinstance(first, Layer):
            conv: Any = find(self.module, first.conv)
            channels = conv.weight.shape[1] * conv.groups
        for step in shortcut:
            if isinstance(step, Layer):
                channels = self.outputs(step)
            elif step.function:
                channels = channels if step.target == "avg_pool2d" else None
            else:
                channels = getattr(find(self.module, step.target), "out_channels", channels)
        assert isinstance(last, Layer)
        outputs = self.outputs(last)
        if channels is not None and channels != outputs:
            raise Refused(f"its addition would broadcast: {channels} channels in the shortcut, {outputs} in the main path")

    def outputs(self, layer: Layer) -> int:
        conv: Any = find(self.module, layer.conv)
        return int(conv.weight.shape[0])


def plain_value(value: Any) -> Any:
    """An operation's constant arguments."""
    if isinstance(value, Node):
        raise Refused("an argument of it is a tensor", where=value.where)
    if isinstance(value, (list, tuple)):  # which are different indices
        return type(value)([plain_value(v) for v in value])
    return value


def _paths(steps: tuple[Step, ...]) -> Iterator[str]:
    for step in steps:
        if isinstance(step, Layer):
            yield step.conv
            if step.norm is not None:
                yield step.norm
        elif not step.function:
            yield step.target
