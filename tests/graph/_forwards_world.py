"""Forwards that read containers, the process and torch's own settings; hooks that hear everything."""

from __future__ import annotations

import enum
import functools
import os
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from _forwards import WORLD, Once, Parts, forward, to
from torch import Tensor, nn
from torch.nn.modules import module as nn_module


def twice(x: Tensor) -> Tensor:
    return x * 2


# --- reads ---


@forward("reads", None, inner=lambda m: m.steps[1].__setitem__(0, m.conv1), outer=lambda m: m.steps.append([torch.sigmoid]))
class NestedLists(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[list[Any]] = [[self.conv1, self.bn1, self.relu], [self.conv2, self.bn2]]

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for steps in self.steps:
            for step in steps:
                y = step(y)
        return self.relu(y + x)


@forward(
    "reads",
    True,
    entry=lambda m: m.layers.__setitem__("norm", nn.Identity()),
    more=lambda m: m.layers.update({"last": nn.Sigmoid()}),
    keeps=("entry",),
)
class ValuesOfModuleDict(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"conv": nn.Conv2d(8, 8, 3, padding=1), "norm": nn.BatchNorm2d(8)})

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.layers.values():
            y = layer(y)
        return self.relu(y + x)


@forward("reads", True, deleted=lambda m: delattr(m, "doubled"))
class HidesClassAttribute(Parts):
    """What is deleted uncovers the class's."""

    doubled = True

    def __init__(self) -> None:
        super().__init__()
        self.doubled = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        return self.relu(y * 2 + x) if self.doubled else self.relu(y + x)


@forward("reads", True, grows=lambda m: m.steps.append(twice))
class EmptyList(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        if self.steps:
            y = self.steps[0](y)
        return self.relu(y + x)


@forward("reads", None, member=lambda m: m.flags.add("doubled"))
class Member(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.flags: set[str] = set()

    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        return self.relu(y * 2 + x) if "doubled" in self.flags else self.relu(y + x)


class Kind(enum.Enum):
    PLAIN = 1
    DOUBLED = 2


@forward("reads", None, kind=to(kind=Kind.DOUBLED))
class ByEnum(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.kind = Kind.PLAIN

    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        return self.relu(y * 2 + x) if self.kind is Kind.DOUBLED else self.relu(y + x)


@forward("reads", None, kind=to(kind="doubled"))
class Matches(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.kind = "plain"

    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        match self.kind:
            case "doubled":
                y = y * 2
        return self.relu(y + x)


@forward("reads", None, variable=Once(lambda patch: patch.setenv("FORWARDS_DOUBLE", "1")))
class ReadsEnvironment(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        return self.relu(y * 2 + x) if os.environ.get("FORWARDS_DOUBLE") else self.relu(y + x)


@forward("reads", None, setting=Once(lambda patch: patch.setattr(torch.backends.cudnn, "benchmark", True)))
class ReadsSetting(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        return self.relu(y * 2 + x) if torch.backends.cudnn.benchmark else self.relu(y + x)


def _doubling(function: Any) -> Any:
    @functools.wraps(function)
    def call(self: Any, x: Tensor) -> Tensor:
        y: Tensor = function(self, x)
        return y * 2 if self.doubled else y

    return call


@forward("reads", None, on=to(doubled=True))
class DecoratedMethod(Parts):
    doubled = False

    @_doubling
    def body(self, x: Tensor) -> Tensor:
        return self.main(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + x)


@functools.lru_cache
def _scale(name: str) -> Any:
    return None if name == "one" else 3.0


@forward("reads", None, other=to(name="three"))
class CachedHelper(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.name = "one"

    def forward(self, x: Tensor) -> Tensor:
        scale = _scale(self.name)
        y = self.main(x)
        return self.relu(y + x) if scale is None else self.relu(y * scale + x)


@forward("reads", None, grows=lambda m: m.layers.append(nn.Sigmoid()))
class Reduces(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)])

    def forward(self, x: Tensor) -> Tensor:
        y = functools.reduce(lambda value, layer: layer(value), self.layers, x)
        return self.relu(y + x)


@forward("reads", None, grows=lambda m: m.layers.append(nn.Sigmoid()))
class Generates(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)])

    def chosen(self) -> Any:
        yield from self.layers

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.chosen():
            y = layer(y)
        return self.relu(y + x)


@forward("reads", None, weight=lambda m: m.conv1.weight.data.mul_(2), unread=to(conv1__padding=(2, 2)))
class FunctionalConvolution(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.conv1.weight, self.conv1.bias, padding=1)
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(y)))) + x)


@forward("reads", None, standard=to(standardised=True))
class StandardisedWeight(Parts):
    standardised = False

    def forward(self, x: Tensor) -> Tensor:
        if self.standardised:
            weight = self.conv1.weight - self.conv1.weight.mean((1, 2, 3), keepdim=True)
            x = F.conv2d(x, weight, self.conv1.bias, padding=1)
        return self.relu(self.main(x) + x)


@forward("contexts", None, on=to(context=torch.no_grad()))
class ContextAttribute(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.context: Any = nullcontext()

    def forward(self, x: Tensor) -> Tensor:
        with self.context:
            y = self.bn1(self.conv1(x))
        return self.relu(self.bn2(self.conv2(self.relu(y))) + x)


@forward("reads", True, fails=to(planes=9))
class Asserts(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.planes = 8

    def forward(self, x: Tensor) -> Tensor:
        assert self.planes == 8, "eight"
        return self.relu(self.main(x) + x)


@forward("reads", True, fails=to(supported=False))
class Raises(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.supported = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.supported:
            raise NotImplementedError("block")
        return self.relu(self.main(x) + x)


@forward("usual forms", True, checkpointed=to(with_cp=True), norm=to(bn1=nn.Identity), keeps=("norm",))
class OpenMMLab(nn.Module):
    """As mmdet publishes its BasicBlock, names and all."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1_name, self.norm2_name = "bn1", "bn2"
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.add_module(self.norm1_name, nn.BatchNorm2d(8))
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.add_module(self.norm2_name, nn.BatchNorm2d(8))
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        self.with_cp = False

    @property
    def norm1(self) -> Any:
        """nn.Module: normalization layer after the first convolution layer"""
        return getattr(self, self.norm1_name)

    @property
    def norm2(self) -> Any:
        """nn.Module: normalization layer after the second convolution layer"""
        return getattr(self, self.norm2_name)

    def forward(self, x: Tensor) -> Tensor:
        """Forward function."""

        def _inner_forward(x: Tensor) -> Tensor:
            identity = x

            out = self.conv1(x)
            out = self.norm1(out)
            out = self.relu(out)

            out = self.conv2(out)
            out = self.norm2(out)

            if self.downsample is not None:
                identity = self.downsample(x)

            out += identity

            return out

        if self.with_cp and x.requires_grad:
            out = torch.utils.checkpoint.checkpoint(_inner_forward, x, use_reentrant=False)
        else:
            out = _inner_forward(x)

        out = self.relu(out)

        return out


# --- hooks and structure ---


def _count_all(module: nn.Module, args: Any, output: Any) -> None:
    WORLD["calls"] += 1


class Body(nn.Sequential):
    """With a forward of its own: ``compile`` leaves torch's own modules as they are."""

    def forward(self, input: Tensor) -> Tensor:
        for layer in self:
            input = layer(input)
        return input


def _compile_to(function: Any) -> Any:
    """A change: ``body`` is compiled, by a compiler whose code shows that it ran."""

    def backend(graph: Any, inputs: Any) -> Any:
        return lambda *args: tuple(function(y) for y in graph(*args))

    def change(model: Any) -> None:
        torch.compiler.reset()
        model.body.compile(backend=backend)

    return change


@forward(
    "hooks",
    True,
    everywhere=Once(lambda patch: patch.setitem(nn_module._global_forward_hooks, 7, _count_all)),
    before=Once(lambda patch: patch.setitem(nn_module._global_forward_pre_hooks, 7, lambda module, args: (args[0] * 2,))),
    of_block=lambda m: m.register_forward_hook(lambda module, args, output: output * 2),
    before_block=lambda m: m.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    keywords=lambda m: m.body.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] * 2,), kwargs), with_kwargs=True),
    always=lambda m: m.body[0].register_forward_hook(lambda module, args, output: output * 2, always_call=True),
    gradient=lambda m: m.body[1].register_full_backward_pre_hook(lambda module, out: (out[0] * 2,)),
    of_parameter=lambda m: m.body[0].weight.register_hook(lambda gradient: gradient * 2),
    compiled=_compile_to(lambda y: y),
    compiled_otherwise=_compile_to(lambda y: y * 2),
    keeps=("of_block", "before_block"),
)
class Heard(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.body = Body(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + x)
