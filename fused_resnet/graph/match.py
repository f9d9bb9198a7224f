"""Recognises a residual block by what its ``forward`` does in eval and in training mode, and says why not."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .._compat import BATCH_OR_INSTANCE_NORM, TENSORS
from .facts import MISSING, Facts
from .ir import FUNCTIONS, Addition, Call, Convolution, Graph, Node
from .originals import computes_as_ever
from .recorder import ADDITIONS, find
from .trace import Operation, Refused, Trace, name_of
from .values import PLAIN

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
# Modules that write nowhere and make a new tensor.
_PURE = (nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.ZeroPad2d, nn.ConstantPad2d)
_CLONES = (torch.clone, "clone")
_RELUS = (F.relu, torch.relu, torch.relu_, F.relu_)
_IN_A_BLOCK = ("avg_pool2d", "getitem", "pad")  # of FUNCTIONS
_SHAPES = ("shape", "dtype", "device", "ndim", "layout", "requires_grad")


BlockNode = Convolution | Call  # what a block may hold


class BlockReader:
    """What a residual block's trace says; ``plain``: a block's without its shortcut."""

    absorbs = True

    def __init__(self, plain: bool = False) -> None:
        self.plain = plain

    def is_leaf(self, module: nn.Module) -> bool:
        return is_leaf(module)

    def looks_right(self, trace: Trace) -> bool:
        return self.plain or any(_is_add(op) for op in trace.operations)

    def graph(self, module: nn.Module, trace: Trace, facts: Facts) -> Graph:
        return Matcher(module, trace, facts, not self.plain).graph()


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is one operation: torch.nn's own modules, and what derives from those that matter here."""
    if issubclass(type(module), (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return False
    if issubclass(type(module), (nn.Conv2d, BATCH_OR_INSTANCE_NORM, nn.ReLU)):
        return True
    if getattr(type(module), "_fx_leaf", False):
        return True
    return type(module).__module__.startswith(("torch.nn.", "torch.ao."))


def _is_add(op: Operation) -> bool:
    return op.kind in ("function", "method") and op.target in ADDITIONS and len(op.inputs) == 2


def _is_harmless(op: Operation) -> bool:
    """Whether it only reads a shape, which then is not used, and cannot fail."""
    if op.target is getattr:
        return op.args[1:] in [(name,) for name in _SHAPES] and not op.kwargs
    return op.target in ("size", "dim") and len(op.args) + len(op.kwargs) <= 2 and all(a in range(4) for a in op.args[1:])


def _is_inplace_add(op: Operation) -> bool:
    return op.target is operator.iadd or op.target == "add_"


class Matcher:
    """Reads a trace as a residual block. ``facts`` hear which settings of its modules matter."""

    def __init__(self, module: nn.Module, trace: Trace, facts: Facts, needs_shortcut: bool) -> None:
        self.module = module
        self.trace = trace
        self.facts = facts
        self.needs_shortcut = needs_shortcut
        for op in reversed(trace.operations.copy()):
            if not op.users and op.kind != "output":
                if op.kind != "constant" and not _is_harmless(op):
                    known = self.is_relu(op) or self.is_transparent(op) or op.kind == "input"
                    raise self.refused(op, f"it does not use {self.say(op)}" if known else self.not_known(op))
                trace.remove(op)

    def refused(self, op: Operation, reason: str) -> Refused:
        return Refused(reason, where=op.where)

    def is_plain(self, op: Operation, base: type[nn.Module]) -> bool:
        """Whether a module computes exactly what torch's class does."""
        module = self.at(op)
        if not issubclass(type(module), base) or len(op.args) != 1 or op.kwargs:
            return False
        return computes_as_ever(self.facts, type(module), base)

    def at(self, op: Operation) -> nn.Module:
        return find(self.module, str(op.target))

    def say(self, op: Operation) -> str:
        """An operation in words: "se (SEModule)", "mul in se"."""
        if op.kind == "module":
            return f"{op.target} ({type(self.at(op)).__name__})"
        if op.kind == "input":
            return "the block's input"
        name = op.target if isinstance(op.target, str) else getattr(op.target, "__name__", name_of(op.target))
        within = op.within
        return f"{name} in {within} ({type(find(self.module, within)).__name__})" if within else str(name)

    def graph(self) -> Graph:
        """The block that the trace is."""
        end = self.end()
        try:
            return self._block(self.trace.operations[0], end)
        except Refused as error:
            error.where = error.where or end.where
            raise

    def end(self) -> Operation:
        """What the forward returns, if it is one tensor."""
        (end,) = self.trace.operations[-1].args
        if not isinstance(end, Operation):
            raise Refused("its forward does not return one tensor", where=self.trace.operations[-2].where)
        return end

    def _block(self, start: Operation, end: Operation) -> Graph:
        end = self.solid(end)
        if not self.needs_shortcut and not _is_add(self.solid(self.source(end))):
            nodes = self.nodes(self.path(end, start))
            if not nodes or not isinstance(nodes[-1], Convolution):
                raise Refused("it ends in no convolution")
            self.check_shared(nodes)
            return Graph(tuple(in_a_row(nodes)))
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

    def join(self, total: Operation, start: Operation) -> Graph:
        operands = [self.path(op, start) for op in total.args if isinstance(op, Operation)]
        if len(start.users) > 2:
            raise Refused(f"its input goes to {len(start.users)} operations, not to main path and shortcut only")
        paths = [self.nodes(path) for path in operands]
        counts = [sum(isinstance(node, Convolution) for node in nodes) for nodes in paths]
        if max(counts) == 0:
            raise Refused("neither operand of the addition has a convolution")
        left_is_main = counts[0] >= counts[1]
        main, shortcut = paths if left_is_main else reversed(paths)
        last = main[-1]
        if not isinstance(last, Convolution):
            raise Refused(f"the main path ends in {last.target}, not in a convolution")
        if last.relu:
            raise self.refused(total, "the main path has a ReLU before the addition")
        self.check_shared((*main, *shortcut))
        self.check_channels(main, shortcut)
        inplace = _is_inplace_add(total)
        if inplace and not left_is_main and shortcut and isinstance(shortcut[-1], Convolution) and shortcut[-1].relu:
            raise self.refused(total, "its addition writes into what a ReLU needs for its gradient")
        if inplace and not left_is_main and not (shortcut and isinstance(shortcut[-1], Convolution)):
            raise self.refused(total, "its addition writes into the shortcut, which may be the block's input")
        nodes = in_a_row(main[:-1])
        first = len(nodes)
        nodes += in_a_row(shortcut, first)
        addition = Addition(len(nodes) if shortcut else 0, "main" if left_is_main else "shortcut", inplace)
        return Graph((*nodes, replace(last, relu=True, addition=addition, input=first)))

    # --- walking ---

    def source(self, op: Operation) -> Operation:
        """The one value that an operation works on; all its other arguments must be constants."""
        ops = op.inputs
        values = [n for n in ops if n.kind != "constant"]
        if len(values) != 1 or not op.args or op.args[0] is not values[0]:
            raise self.refused(op, self.not_known(op))
        return values[0]

    def solid(self, op: Operation) -> Operation:
        """The operation itself, or what it passes on unchanged."""
        while self.is_transparent(op):
            self.check_used_once(op)
            op = self.source(op)
        return op

    def check_used_once(self, op: Operation) -> None:
        if len(op.users) != 1:
            raise self.refused(op, f"the result of {self.say(op)} is used {len(op.users)} times")

    def path(self, end: Operation, start: Operation) -> list[Operation]:
        """The operations from the block's input to ``end``, in order; each must feed the next one only."""
        ops: list[Operation] = []
        op = end
        while op is not start:
            self.check_used_once(op)
            if not self.is_transparent(op):
                ops.append(op)
            if _is_add(op):
                raise self.refused(op, f"its paths hold another addition, {self.say(op)}")
            op = self.source(op)
        return ops[::-1]

    def is_transparent(self, op: Operation) -> bool:
        if op.kind == "module":
            module = self.at(op)
            if self.is_plain(op, nn.Identity):
                return True
            if type(module) not in _DROPOUTS or not self.is_plain(op, type(module)):
                return False
            p = self.setting(str(op.target), "p")
            return type(p) in (int, float) and p == 0
        if op.kind in ("function", "method") and op.target in _CLONES and len(op.args) == 1 and not op.kwargs:
            # A copy of the input that is added on the right: nothing else sees it. In front of a convolution, which keeps it for the gradient,
            # behind the last ReLU, which keeps what it copies, and on the left, whose strides decide the sum's, a copy is not the original.
            users = [*op.users]
            return self.source(op).kind == "input" and all(_is_add(user) and user.args[1:] == (op,) for user in users)
        if op.kind == "function" and op.target is F.dropout:
            names = ("input", "p", "training", "inplace")
            given = {**dict(zip(names, op.args, strict=False)), **op.kwargs}
            p = given.get("p", 0.5)
            return type(p) in (int, float) and (p == 0 or (0 <= p <= 1 and given.get("training") is False))
        return False

    def is_relu(self, op: Operation) -> bool:
        if op.kind == "module":
            return self.is_plain(op, nn.ReLU)
        if op.kind == "function":
            return op.target in _RELUS and len(op.inputs) == 1
        return op.kind == "method" and op.target in ("relu", "relu_") and len(op.args) == 1 and not op.kwargs

    def is_norm(self, op: Operation) -> bool:
        return op.kind == "module" and any(self.is_plain(op, base) for base in _NORMS)

    def not_known(self, op: Operation) -> str:
        if op.kind == "module":
            module = self.at(op)
            for base in (nn.Conv2d, *_NORMS, nn.ReLU):
                if issubclass(type(module), base):
                    return f"{self.say(op)} overrides how {base.__name__} computes"
        return f"{self.say(op)} is not a convolution, a batch norm or a ReLU"

    # --- from operations to nodes ---

    def nodes(self, ops: list[Operation]) -> tuple[BlockNode, ...]:
        """The nodes that these operations make, each of the one before."""
        nodes: list[BlockNode] = []
        queue = list(ops)
        while queue:
            op = queue.pop(0)
            if op.kind == "module" and self.is_plain(op, nn.Conv2d):
                norm = str(queue.pop(0).target) if queue and self.is_norm(queue[0]) else None
                relu = bool(queue and self.is_relu(queue[0]) and queue.pop(0))
                self.check_convolution(op, norm)
                nodes.append(Convolution(str(op.target), norm, relu))
            else:
                nodes.append(self.call(op))
        return tuple(nodes)

    def call(self, op: Operation) -> Call:
        if op.kind == "module":
            module = self.at(op)
            if (type(module) in _PURE and self.is_plain(op, type(module))) or getattr(type(module), "_fx_pure", False):
                if len(op.args) == 1 and not op.kwargs and self.setting(str(op.target), "return_indices") in (MISSING, False):
                    return Call(str(op.target))
            elif self.is_relu(op) or self.is_norm(op):
                raise self.refused(op, f"{self.say(op)} does not follow a convolution")
        elif op.kind == "function":
            for name in _IN_A_BLOCK:
                if op.target is FUNCTIONS[name] and len(op.inputs) == 1:
                    return Call(name, True, plain_value(op.args[1:]), tuple(plain_value(list(op.kwargs.items()))))
            if self.is_relu(op):
                raise self.refused(op, f"{self.say(op)} does not follow a convolution")
        raise self.refused(op, self.not_known(op))

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

    def check_convolution(self, conv: Operation, norm_path: str | None) -> None:
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

    def check_shared(self, nodes: Iterable[BlockNode]) -> None:
        seen: dict[int, str] = {}
        for path in _paths(nodes):
            module = find(self.module, path)
            if id(module) in seen:
                raise Refused(f"{path} ({type(module).__name__}) is used twice in the block")
            seen[id(module)] = path

    def check_channels(self, main: tuple[BlockNode, ...], shortcut: tuple[BlockNode, ...]) -> None:
        """The operator does not broadcast, the + of the block would: refuse where the channels say so already."""
        first, last = main[0], main[-1]
        channels = None
        if isinstance(first, Convolution):
            conv: Any = find(self.module, first.conv)
            channels = conv.weight.shape[1] * conv.groups
        for node in shortcut:
            if isinstance(node, Convolution):
                channels = self.outputs(node)
            elif node.function:
                channels = channels if node.target == "avg_pool2d" else None
            else:
                channels = getattr(find(self.module, node.target), "out_channels", channels)
        assert isinstance(last, Convolution)
        outputs = self.outputs(last)
        if channels is not None and channels != outputs:
            raise Refused(f"its addition would broadcast: {channels} channels in the shortcut, {outputs} in the main path")

    def outputs(self, node: Convolution) -> int:
        conv: Any = find(self.module, node.conv)
        return int(conv.weight.shape[0])


def plain_value(value: Any) -> Any:
    """An operation's constant arguments."""
    if isinstance(value, Operation):
        raise Refused("an argument of it is a tensor", where=value.where)
    if isinstance(value, (list, tuple)):  # which are different indices
        return type(value)([plain_value(v) for v in value])
    return value


def in_a_row(nodes: Iterable[Node], before: int = 0) -> list[Node]:
    """The nodes one after the other from the input on, to stand behind ``before`` others."""
    return [replace(node, input=before + i if i else 0) for i, node in enumerate(nodes)]


def _paths(nodes: Iterable[BlockNode]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, Convolution):
            yield node.conv
            if node.norm is not None:
                yield node.norm
        elif not node.function:
            yield node.target
