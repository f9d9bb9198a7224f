"""Recognises a residual block by what its ``forward`` does in eval and in training mode, and says why not."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.utils import parametrize

from ._residual import FUNCTIONS, Call, Layer, Residual, Step
from ._trace import HOOKS, Refused, is_plain, only_input, trace

# Fake tensors: torch.export runs a block with them. Other subclasses (quantised, distributed, ...) compute otherwise.
_TENSORS = (Tensor, nn.Parameter, nn.Buffer, type(None), FakeTensor, FunctionalTensor)
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
# Modules that write nowhere and make a new tensor.
_PURE = (nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.ZeroPad2d, nn.ConstantPad2d)
_ADDS = (operator.add, operator.iadd, torch.add)
_RELUS = (F.relu, torch.relu, torch.relu_, F.relu_)
_HARMLESS_UNUSED = (getattr, "size", "dim")  # reading a shape without using it


def match(module: nn.Module, forward: Callable[..., Any], needs_shortcut: bool = True) -> Residual:
    """What ``forward(module, x)`` does as a residual block.

    Raises:
        Refused: with the reason, if it is none or if running it fused could change the result.
    """
    only_input(forward)
    if isinstance(module, torch.jit.ScriptModule):
        raise Refused("it is a compiled TorchScript module", is_block=True)
    graph = trace(module, forward, training=False)
    is_block = not needs_shortcut or any(_is_add(node) for node in graph.nodes)
    try:
        _check_tree(module)
        description = Matcher(module, graph, needs_shortcut).description()
        try:
            other = Matcher(module, trace(module, forward, training=True), needs_shortcut).description()
        except Refused as error:
            raise Refused(f"in training mode, {error}") from None
        if other != description:
            raise Refused("its forward does something else in training mode than in eval mode")
    except Refused as error:
        raise Refused(str(error), is_block) from None
    return description


def _check_tree(module: nn.Module) -> None:
    """Whatever is absorbed loses its own call: refuse what listens to that call or replaces it."""
    for name, child in module.named_modules():
        if name:
            check_heard(name, child)


def check_heard(name: str, child: nn.Module) -> None:
    """One module that would be absorbed."""
    for attribute, words in HOOKS.items():
        if getattr(child, attribute):
            raise Refused(f"{name} has {words}, which a fused block would not call")
    if "forward" in child.__dict__:
        raise Refused(f"the forward of {name} was replaced on the instance")
    if parametrize.is_parametrized(child):
        raise Refused(f"{name} has a parametrization")


def _is_add(node: fx.Node) -> bool:
    named = node.op == "call_function" and node.target in _ADDS
    return (named or (node.op == "call_method" and node.target in ("add", "add_"))) and len(node.all_input_nodes) == 2


def _is_inplace_add(node: fx.Node) -> bool:
    return node.target is operator.iadd or node.target == "add_"


class Matcher:
    def __init__(self, module: nn.Module, graph: fx.Graph, needs_shortcut: bool) -> None:
        self.module = module
        self.graph = graph
        self.needs_shortcut = needs_shortcut
        for node in reversed(list(graph.nodes)):
            if not node.users and node.op != "output":
                if node.op != "get_attr" and node.target not in _HARMLESS_UNUSED:
                    known = self.is_relu(node) or self.is_transparent(node) or node.op == "placeholder"
                    raise Refused(f"it does not use {self.say(node)}" if known else self.not_known(node))
                graph.erase_node(node)

    def at(self, node: fx.Node) -> nn.Module:
        return self.module.get_submodule(str(node.target))

    def say(self, node: fx.Node) -> str:
        """A node in words: "se (SEModule)", "mul in se"."""
        if node.op == "call_module":
            return f"{node.target} ({type(self.at(node)).__name__})"
        if node.op == "placeholder":
            return "the block's input"
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        within = node.meta["within"]
        return f"{name} in {within} ({type(self.module.get_submodule(within)).__name__})" if within else str(name)

    def description(self) -> Residual:
        start = next(iter(self.graph.nodes))
        (end,) = (node.args[0] for node in self.graph.nodes if node.op == "output")
        if not isinstance(end, fx.Node):
            raise Refused("its forward does not return one tensor")
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
            raise Refused("it has no ReLU after the addition")
        if not self.is_relu(end):
            if end.all_input_nodes and _is_add(self.solid(self.source(end))):
                raise Refused(f"the activation after the addition is {self.say(end)}, not ReLU")
            raise Refused(f"it ends in {self.say(end)}, not in a ReLU behind an addition")
        total = self.solid(self.source(end))
        self.check_used_once(end)
        if not _is_add(total):
            raise Refused(f"its last ReLU follows {self.say(total)}, not an addition")
        self.check_used_once(total)
        if len(total.args) != 2 or {k: v for k, v in total.kwargs.items() if (k, v) != ("alpha", 1)}:
            raise Refused("its addition has other arguments than its two operands")
        return self.join(total, start)

    def join(self, total: fx.Node, start: fx.Node) -> Residual:
        operands = [self.path(node, start) for node in total.args if isinstance(node, fx.Node)]
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
            raise Refused("the main path has a ReLU before the addition")
        self.check_shared((*main, *shortcut))
        self.check_channels(main, shortcut)
        inplace = _is_inplace_add(total)
        if inplace and not left_is_main and not (shortcut and isinstance(shortcut[-1], Layer)):
            raise Refused("its addition writes into the shortcut, which may be the block's input")
        return Residual(tuple(main), tuple(shortcut), "main" if left_is_main else "shortcut", inplace)

    # --- walking ---

    def source(self, node: fx.Node) -> fx.Node:
        """The one value that a node works on; all its other arguments must be constants."""
        nodes = node.all_input_nodes
        values = [n for n in nodes if n.op != "get_attr"]
        if len(values) != 1 or not node.args or node.args[0] is not values[0]:
            raise Refused(self.not_known(node))
        return values[0]

    def solid(self, node: fx.Node) -> fx.Node:
        """The node itself, or what it passes on unchanged."""
        while self.is_transparent(node):
            self.check_used_once(node)
            node = self.source(node)
        return node

    def check_used_once(self, node: fx.Node) -> None:
        if len(node.users) != 1:
            raise Refused(f"the result of {self.say(node)} is used {len(node.users)} times")

    def path(self, end: fx.Node, start: fx.Node) -> list[fx.Node]:
        """The nodes from the block's input to ``end``, in order; each must feed the next one only."""
        nodes: list[fx.Node] = []
        node = end
        while node is not start:
            self.check_used_once(node)
            if not self.is_transparent(node):
                nodes.append(node)
            if _is_add(node):
                raise Refused(f"its paths hold another addition, {self.say(node)}")
            node = self.source(node)
        return nodes[::-1]

    def is_transparent(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self.at(node)
            if is_plain(module, nn.Identity):
                return True
            return type(module) in _DROPOUTS and getattr(module, "p", 1) == 0
        if node.op == "call_function" and node.target is F.dropout:
            return bool(node.kwargs.get("p") == 0 or node.kwargs.get("training") is False)
        return False

    def is_relu(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return is_plain(self.at(node), nn.ReLU)
        if node.op == "call_function":
            return node.target in _RELUS
        return node.op == "call_method" and node.target in ("relu", "relu_")

    def is_norm(self, node: fx.Node) -> bool:
        return node.op == "call_module" and any(is_plain(self.at(node), base) for base in _NORMS)

    def not_known(self, node: fx.Node) -> str:
        if node.op == "call_module":
            module = self.at(node)
            for base in (nn.Conv2d, *_NORMS, nn.ReLU):
                if isinstance(module, base):
                    return f"{self.say(node)} overrides how {base.__name__} computes"
        return f"{self.say(node)} is not a convolution, a batch norm or a ReLU"

    # --- from nodes to steps ---

    def steps(self, nodes: list[fx.Node]) -> tuple[Step, ...]:
        steps: list[Step] = []
        queue = list(nodes)
        while queue:
            node = queue.pop(0)
            if node.op == "call_module" and is_plain(self.at(node), nn.Conv2d):
                norm = str(queue.pop(0).target) if queue and self.is_norm(queue[0]) else None
                relu = bool(queue and self.is_relu(queue[0]) and queue.pop(0))
                self.check_layer(str(node.target), norm)
                steps.append(Layer(str(node.target), norm, relu))
            else:
                steps.append(self.call(node))
        return tuple(steps)

    def call(self, node: fx.Node) -> Call:
        if node.op == "call_module":
            module = self.at(node)
            if type(module) in _PURE or getattr(type(module), "_fx_pure", False):
                if len(node.args) == 1 and not node.kwargs and not getattr(module, "return_indices", False):
                    return Call(str(node.target))
            elif self.is_relu(node) or self.is_norm(node):
                raise Refused(f"{self.say(node)} does not follow a convolution")
        elif node.op == "call_function":
            for name, function in FUNCTIONS.items():
                if node.target is function and len(node.all_input_nodes) == 1:
                    return Call(name, True, plain_value(node.args[1:]), tuple(plain_value(list(node.kwargs.items()))))
            if self.is_relu(node):
                raise Refused(f"{self.say(node)} does not follow a convolution")
        raise Refused(self.not_known(node))

    def check_layer(self, conv_path: str, norm_path: str | None) -> None:
        conv = self.module.get_submodule(conv_path)
        if getattr(conv, "padding_mode", "") != "zeros":
            raise Refused(f"{conv_path} has padding_mode={conv.padding_mode!r}, not 'zeros'")
        for path in (conv_path, norm_path):
            if path is None:
                continue
            module = self.module.get_submodule(path)
            for name in ("weight", "bias"):
                kind = type(getattr(module, name))
                if kind not in _TENSORS:
                    raise Refused(f"the {name} of {path} is a {kind.__name__}, not a plain tensor")
        if norm_path is not None:
            norm: Any = self.module.get_submodule(norm_path)
            if (norm.running_mean is None) != (norm.running_var is None):
                raise Refused(f"{norm_path} has only one of running_mean and running_var")

    def check_shared(self, steps: tuple[Step, ...]) -> None:
        seen: dict[int, str] = {}
        for path in _paths(steps):
            module = self.module.get_submodule(path)
            if id(module) in seen:
                raise Refused(f"{path} ({type(module).__name__}) is used twice in the block")
            seen[id(module)] = path

    def check_channels(self, main: tuple[Step, ...], shortcut: tuple[Step, ...]) -> None:
        """The operator does not broadcast, the + of the block would: refuse where the channels say so already."""
        first, last = main[0], main[-1]
        channels = None
        if isinstance(first, Layer):
            conv: Any = self.module.get_submodule(first.conv)
            channels = conv.weight.shape[1] * conv.groups
        for step in shortcut:
            if isinstance(step, Layer):
                channels = self.outputs(step)
            elif step.function:
                channels = channels if step.target == "avg_pool2d" else None
            else:
                channels = getattr(self.module.get_submodule(step.target), "out_channels", channels)
        assert isinstance(last, Layer)
        outputs = self.outputs(last)
        if channels is not None and channels != outputs:
            raise Refused(f"its addition would broadcast: {channels} channels in the shortcut, {outputs} in the main path")

    def outputs(self, layer: Layer) -> int:
        conv: Any = self.module.get_submodule(layer.conv)
        return int(conv.weight.shape[0])


def plain_value(value: Any) -> Any:
    """fx's immutable lists as tuples, so that a description holds nothing of fx."""
    return tuple(plain_value(v) for v in value) if isinstance(value, (list, tuple)) else value


def _paths(steps: tuple[Step, ...]) -> Iterator[str]:
    for step in steps:
        if isinstance(step, Layer):
            yield step.conv
            if step.norm is not None:
                yield step.norm
        elif not step.function:
            yield step.target
