"""Forwards that write, or read what is computed: attributes, buffers, globals, their input. See ``_forwards.py``."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from _forwards import WORLD, Parts, forward
from torch import Tensor, nn


@forward("side effects", False)
class KeepsFeature(Parts):
    def forward(self, x: Tensor) -> Tensor:
        out = self.main(x)
        self.feature = out  # here
        return self.relu(out + x)


@forward("side effects", False)
class Counts(Parts):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1  # here
        return self.relu(self.main(x) + x)


@forward("side effects", False)
class CountsInBuffer(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counter", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.counter.add_(1)  # here
        return self.relu(self.main(x) + x)


@forward("side effects", False)
class RebindsBuffer(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counter", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.counter += 1  # here
        return self.relu(self.main(x) + x)


@forward("side effects", False)
class Clamps(Parts):
    def forward(self, x: Tensor) -> Tensor:
        self.conv1.weight.data.clamp_(-0.05, 0.05)  # here
        return self.relu(self.main(x) + x)


@forward("side effects", False)
class Normalises(Parts):
    def forward(self, x: Tensor) -> Tensor:
        torch.nn.utils.clip_grad_norm_(self.conv1.weight, 1.0)  # here
        return self.relu(self.main(x) + x)


@forward("side effects", False)
class Prints(Parts):
    def forward(self, x: Tensor) -> Tensor:
        print("block", x.shape)  # here
        return self.relu(self.main(x) + x)


@forward("side effects", False)
class PrintsNothing(Parts):
    def forward(self, x: Tensor) -> Tensor:
        print("block")  # here
        return self.relu(self.main(x) + x)


@forward("side effects", False)
class Appends(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(1)  # here
        return self.relu(self.main(x) + x)


@forward("side effects", False)
class WritesItem(Parts):
    def forward(self, x: Tensor) -> Tensor:
        WORLD["calls"] = WORLD["calls"] + 1  # here
        return self.relu(self.main(x) + x)


CALLS = 0


@forward("side effects", False)
class WritesGlobal(Parts):
    def forward(self, x: Tensor) -> Tensor:
        global CALLS  # here
        CALLS += 1
        return self.relu(self.main(x) + x)


@forward("side effects", False)
class SetsByName(Parts):
    def forward(self, x: Tensor) -> Tensor:
        setattr(self, "last", 1)  # noqa: B010  here
        return self.relu(self.main(x) + x)


@forward("side effects", False)
class WritesDict(Parts):
    def forward(self, x: Tensor) -> Tensor:
        self.__dict__["mark"] = 1  # here
        return self.relu(self.main(x) + x)


def note(module: Any) -> None:
    module.noted = True  # here


@forward("side effects", False)
class HelperWrites(Parts):
    def forward(self, x: Tensor) -> Tensor:
        note(self)
        return self.relu(self.main(x) + x)


@forward("side effects", False)
class Hooks(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        if y.requires_grad:  # here
            y.register_hook(lambda g: g * 2)
        return self.relu(y + x)


@forward("side effects", False)
class IntoInput(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(0.5)  # here
        return self.relu(self.main(x) + x)


@forward("side effects", False)
class AddsToInput(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        x += y  # here
        return self.relu(x)


@forward("side effects", False)
class ReluOfInput(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = self.main(F.relu(x, inplace=True))
        return self.relu(y + x)


@forward("side effects", False)
class IntoSlice(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        y[:, 0] = 0  # here
        return self.relu(y + x)


@forward("side effects", False)
class Deletes(Parts):
    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "once"):
            del self.once
        setattr(self, "once", True)  # noqa: B010  here
        return self.relu(self.main(x) + x)


@forward("side effects", False)
class Caches(Parts):
    @functools.cached_property
    def scale(self) -> float:
        WORLD["calls"] += 1
        return 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.main(x) * self.scale + x)  # here


class Counting(nn.Module):
    """Keeps what passes."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.kept = x  # here
        return x


@forward("side effects", False)
class WrapperKeeps(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.spy = Counting()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.spy(self.main(x)) + x)


class Property(Parts):
    """A property with a side effect."""

    @property
    def gate(self) -> bool:
        WORLD["calls"] += 1  # here
        return True


@forward("side effects", False)
class ReadsProperty(Property):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.main(x) + x) if self.gate else x


class GetAttr(Parts):
    def __getattr__(self, name: str) -> Any:
        if name == "counted":
            WORLD["calls"] += 1
            return True
        return super().__getattr__(name)


@forward("side effects", False)
class OwnGetAttr(GetAttr):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.main(x) + x) if self.counted else x  # here


# --- what depends on the call ---


@forward("depends on the call", False)
class ByValue(Parts):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # here
            return self.relu(self.main(x) + x)
        return x


@forward("depends on the call", False)
class ByShape(Parts):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 1:  # here
            return self.relu(self.main(x) + x)
        return x


@forward("depends on the call", False)
class ByGradMode(Parts):
    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # here
            return self.relu(self.main(x) + x)
        return x


@forward("depends on the call", False)
class ByMode(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        return self.relu(y + x) if self.training else self.relu(y * 2 + x)


@forward("depends on the call", False)
class ByPartsMode(Parts):
    """Either mode of all modules gives the same; a mixture does not."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        if self.training != self.relu.training:
            y = y * 2  # here
        return self.relu(y + x)


@forward("depends on the call", False)
class Loops(Parts):
    def forward(self, x: Tensor) -> Tensor:
        n = 0
        while n < 1:  # here
            n += 1
        return self.relu(self.main(x) + x)
