"""Forwards that read something: an attribute, a class, a global, a container. What was read may change after the conversion."""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from _forwards import Once, Parts, forward, to
from torch import Tensor, nn

HERE = __name__  # of this module, whose globals change


def twice(x: Tensor) -> Tensor:
    return x * 2


def _global(name: str, value: Any) -> Once:
    return Once(lambda patch: patch.setattr(f"{HERE}.{name}", value))


@forward("reads", True, silu=to(act=F.silu), relu=to(act=torch.relu), gone=to(act=twice), keeps=("relu",))
class ActAttribute(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.act = F.relu

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))) + x)


@forward("reads", True, silu=to(act=nn.SiLU), other=to(act=nn.ReLU), keeps=("other",))
class ActModule(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.main(x) + x)


@forward("reads", True, entry=lambda m: m.options.update(doubled=True), gone=lambda m: m.options.update(more=1), keeps=("gone",))
class DictEntry(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.options = {"doubled": False}

    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        if self.options["doubled"]:
            y = y * 2
        return self.relu(y + x)


@forward("reads", True, entry=lambda m: m.options.__setitem__("scale", 3.0))
class DictGet(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.options: dict[str, float] = {}

    def forward(self, x: Tensor) -> Tensor:
        scale = self.options.get("scale")
        y = self.main(x)
        return self.relu(y + x) if scale is None else self.relu(y * scale + x)


@dataclass
class Config:
    doubled: bool = False
    scale: float = 1.0


@forward("reads", True, entry=to(config__doubled=True), another=to(config=Config(True)), unread=to(config__scale=2.0), keeps=("unread",))
class DataclassEntry(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.config = Config()

    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        if self.config.doubled:
            y = y * 2
        return self.relu(y + x)


@forward("reads", True, entry=to(config__doubled=True))
class Namespace(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(doubled=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        return self.relu(y * 2 + x) if self.config.doubled else self.relu(y + x)


class Named(NamedTuple):
    doubled: bool


@forward("reads", None, entry=to(config=Named(True)))
class NamedTupleEntry(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.config = Named(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        return self.relu(y * 2 + x) if self.config.doubled else self.relu(y + x)


@forward("reads", True, of_class=Once(lambda patch: patch.setattr(ClassAttribute, "doubled", True)), of_object=to(doubled=True))
class ClassAttribute(Parts):
    doubled = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        return self.relu(y * 2 + x) if self.doubled else self.relu(y + x)


DOUBLE = False
ACTIVATIONS = {"relu": F.relu, "silu": F.silu}


@forward("reads", True, flag=_global("DOUBLE", True), builtin=Once(lambda patch: patch.setattr(f"{HERE}.bool", lambda v: True, raising=False)))
class GlobalFlag(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        return self.relu(y * 2 + x) if bool(DOUBLE) else self.relu(y + x)


@forward(
    "reads",
    True,
    name=to(name="silu"),
    entry=Once(lambda patch: patch.setitem(ACTIVATIONS, "relu", F.gelu)),
    dict=_global("ACTIVATIONS", {"relu": F.silu}),
)
class GlobalTable(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.name = "relu"

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.name](self.main(x) + x)


def conv_norm(x: Tensor, conv: nn.Module, norm: nn.Module, act: Any = F.relu) -> Tensor:
    y = norm(conv(x))
    return y if act is None else act(y)


def conv_norm_twice(x: Tensor, conv: nn.Module, norm: nn.Module, act: Any = None) -> Tensor:
    return 2 * norm(conv(x))


@forward(
    "reads",
    True,
    patched=_global("conv_norm", conv_norm_twice),
    code=Once(lambda patch: patch.setattr(conv_norm, "__code__", conv_norm_twice.__code__)),
    defaults=Once(lambda patch: patch.setattr(conv_norm, "__defaults__", (F.silu,))),
)
class Helper(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = conv_norm(x, self.conv1, self.bn1)
        return F.relu(conv_norm(y, self.conv2, self.bn2, act=None) + x)


def _other_forward(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.main(x) * 3 + x)


def _minus(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.main(x) - x)


@forward("reads", True, patched=Once(lambda patch: patch.setattr(Patched, "forward", _other_forward)))
class Patched(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.main(x) + x)


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


@forward(
    "reads",
    True,
    patched=Once(lambda patch: patch.setattr(Wrapper, "forward", lambda self, x: 2 * self.norm(self.conv(x)))),
    instance=lambda m: setattr(m.body, "forward", twice),
    call=Once(lambda patch: patch.setattr(Wrapper, "__call__", lambda self, x: twice(x), raising=False)),
)
class WrappedPart(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.body = Wrapper()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + x)


@forward(
    "reads",
    True,
    method=Once(lambda patch: patch.setattr(MethodPatched, "_body", lambda self, x: twice(self.main(x)))),
    instance=lambda m: setattr(m, "_body", twice),
)
class MethodPatched(Parts):
    def _body(self, x: Tensor) -> Tensor:
        return self.main(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self._body(x) + x)


@forward(
    "reads", True, relu=Once(lambda patch: patch.setattr(F, "relu", F.silu)), torch=Once(lambda patch: patch.setattr(torch, "relu", F.silu))
)
class FunctionPatched(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + x)


@forward(
    "reads",
    True,
    relu=Once(lambda patch: patch.setattr(Tensor, "relu", lambda x: x.sigmoid())),
    add=Once(lambda patch: patch.setattr(Tensor, "add", torch.sub)),
)
class TensorPatched(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.main(x).add(x).relu()


@forward(
    "reads",
    True,
    conv=Once(lambda patch: patch.setattr(nn.Conv2d, "forward", lambda self, x: 2 * self._conv_forward(x, self.weight, self.bias))),
)
class LayerPatched(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.main(x) + x)


@forward("reads", True, function=to(shortcut=lambda x: -x), same=to(shortcut=lambda x: x), keeps=("same",))
class LambdaAttribute(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.shortcut, self.other = (lambda x: x), (lambda x: -x)  # two on one line

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.main(x) + self.shortcut(x))


def _closure() -> tuple[Any, Any]:
    scale: Any = None

    def apply(y: Tensor) -> Tensor:
        return y if scale is None else y * scale

    def change(value: Any) -> None:
        nonlocal scale
        scale = value

    return apply, change


_apply, _change = _closure()


@forward("reads", True, cell=Once(lambda patch: _change(2.0)), back=Once(lambda patch: _change(None)))
class Closure(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(_apply(self.main(x)) + x)


@forward("reads", True, defaults=Once(lambda patch: patch.setattr(Defaults.body, "__defaults__", (3,))))
class Defaults(Parts):
    def body(self, x: Tensor, times: int = 1) -> Tensor:
        y = self.main(x)
        return y if times == 1 else y * times

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + x)


@forward("reads", True, name=to(norm2_name="relu"), module=to(norm2=nn.Identity), keeps=("module",))
class PropertyByName(nn.Module):
    """As mmcv names its norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm1_name, self.norm2_name = "norm1", "norm2"
        self.add_module(self.norm1_name, nn.BatchNorm2d(8))
        self.add_module(self.norm2_name, nn.BatchNorm2d(8))
        self.relu = nn.ReLU(inplace=True)
        self.with_cp = False

    @property
    def first(self) -> Any:
        return getattr(self, self.norm1_name)

    @property
    def second(self) -> Any:
        return getattr(self, self.norm2_name)

    def forward(self, x: Tensor) -> Tensor:
        def _inner_forward(x: Tensor) -> Tensor:
            identity = x
            out = self.relu(self.first(self.conv1(x)))
            out = self.second(self.conv2(out))
            out += identity
            return out

        if self.with_cp and x.requires_grad:  # noqa: SIM108  as it is published
            out = torch.utils.checkpoint.checkpoint(_inner_forward, x)
        else:
            out = _inner_forward(x)
        return self.relu(out)


@forward("reads", True, appears=to(scale=3.0))
class HasAttribute(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        if hasattr(self, "scale"):
            y = y * self.scale
        return self.relu(y + x)


@forward("reads", True, appears=to(scale=3.0), of_class=Once(lambda patch: patch.setattr(GetsAttribute, "scale", 2.0, raising=False)))
class GetsAttribute(Parts):
    def forward(self, x: Tensor) -> Tensor:
        scale = getattr(self, "scale", None)
        return self.relu(self.main(x) + x) if scale is None else self.relu(self.main(x) * scale + x)


@forward("reads", True, kind=to(last=nn.SiLU))
class ByClass(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x) + x
        return F.relu(y) if isinstance(self.last, nn.ReLU) else y * 2


@forward("reads", None, argument=to(act=functools.partial(F.leaky_relu, negative_slope=0.5)), same=to(act=functools.partial(F.relu)))
class Partial(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.act = functools.partial(F.relu, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.main(x) + x)


class Adder:
    """A callable that is no module."""

    def __init__(self) -> None:
        self.scale: Any = None

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b if self.scale is None else a + self.scale * b


@forward("reads", None, entry=to(add__scale=2.0))
class CallableObject(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.add = Adder()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.add(self.main(x), x))


@forward("reads", None, entry=lambda m: m.steps.append(twice), replaced=to(steps=[]))
class ListOfFunctions(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.steps = [F.relu]

    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x) + x
        for step in self.steps:
            y = step(y)
        return y


# --- hooks and structure ---


def _drop_hooks(model: Any) -> None:
    """The usual way to drop all hooks, and then a new one."""
    for module in model.modules():
        module._forward_hooks = OrderedDict()
    model.bn2.register_forward_hook(lambda module, args, output: output * 2)


def _hook_and_remove(model: Any) -> None:
    model.bn1.register_forward_hook(lambda module, args, output: output * 2).remove()


def _reorder(model: Any) -> None:
    model.body._modules.move_to_end("0") if hasattr(model.body._modules, "move_to_end") else model.body._modules.update(
        {"0": model.body._modules.pop("0")}
    )


@forward(
    "hooks",
    True,
    dropped=_drop_hooks,
    removed=_hook_and_remove,
    hook=lambda m: m.bn2.register_forward_hook(lambda module, args, output: output * 2),
    pre_hook=lambda m: m.conv2.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    backward=lambda m: m.bn1.register_full_backward_hook(lambda module, into, out: (into[0] * 2,)),
    keeps=("removed",),
)
class Hooked(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.main(x) + x)


@forward(
    "structure",
    True,
    hook=lambda m: m.body.register_forward_hook(lambda module, args, output: output * 2),
    longer=lambda m: m.body.append(nn.Sigmoid()),
    shorter=lambda m: m.body.__delitem__(1),
    order=_reorder,
    child=lambda m: m.body.__setitem__(
        0, nn.Conv2d(8, 8, 1, bias=False).double().requires_grad_(False).apply(lambda c: nn.init.ones_(c.weight))
    ),
    keeps=("shorter", "child"),
)
class Chain(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + x)


@forward(
    "structure",
    True,
    kind=lambda m: setattr(m.relu, "__class__", nn.SiLU),
    instance=lambda m: setattr(m.bn2, "forward", twice),
    padding=lambda m: [setattr(m.conv2, "padding_mode", "circular"), setattr(m.conv2, "_reversed_padding_repeated_twice", [1, 1, 1, 1])],
    eps=to(bn1__eps=0.5),
    stride=lambda m: [setattr(m.conv1, "padding", (2, 2)), setattr(m.conv1, "dilation", (2, 2))],
    keeps=("eps", "stride"),
)
class Plain(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.main(x) + x)
