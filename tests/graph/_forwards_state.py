"""Forwards with a state of their own between calls, or that depend on the call; published spellings of them."""

from __future__ import annotations

import itertools
import os
import warnings
from typing import Any

import torch
from _forwards import WORLD, Parts, forward, to
from torch import Tensor, nn

# --- randomness ---


@forward("randomness", False)
class OwnGenerator(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand(1, generator=self.generator) < 0.5:  # here
            return x
        return self.relu(self.main(x) + x)


def drop_path(x: Tensor, drop_prob: float = 0.0, training: bool = False, scale_by_keep: bool = True) -> Tensor:
    """As published with timm."""
    if drop_prob == 0.0 or not training:
        return x
    keep_prob = 1 - drop_prob
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    random_tensor = x.new_empty(shape).bernoulli_(keep_prob)
    if keep_prob > 0.0 and scale_by_keep:
        random_tensor.div_(keep_prob)  # here
    return x * random_tensor


class DropPath(nn.Module):
    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        return drop_path(x, self.drop_prob, self.training, self.scale_by_keep)


@forward("randomness", False, off=to(drop__drop_prob=0.0), unscaled=to(drop__scale_by_keep=False))
class WithDropPath(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.drop = DropPath(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.drop(self.main(x)) + x)


@forward("randomness", True, on=to(drop__drop_prob=0.5))
class DropPathOff(Parts):
    """What most published blocks hold: a drop path with probability 0, which may be set later."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = DropPath(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.drop(self.main(x)) + x)


@forward("randomness", False)
class Seeds(Parts):
    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(0)  # here
        return self.relu(self.main(x) + x)


# --- side effects ---


@forward("side effects", False)
class HooksAModule(Parts):
    def forward(self, x: Tensor) -> Tensor:
        self.bn2.register_forward_hook(lambda module, args, output: output * 2)  # here
        return self.relu(self.main(x) + x)


@forward("side effects", False)
class RetainsGrad(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x.retain_grad()  # here
        return self.relu(self.main(x) + x)


@forward("side effects", False)
class WantsGradient(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x.requires_grad_()  # here
        return self.relu(self.main(x) + x)


@forward("side effects", False)
class FreezesNorm(Parts):
    """As frozen batch norms are published."""

    def forward(self, x: Tensor) -> Tensor:
        self.bn1.eval()  # here
        return self.relu(self.main(x) + x)


@forward("side effects", False)
class FreezesWeight(Parts):
    def forward(self, x: Tensor) -> Tensor:
        self.conv1.weight.requires_grad_(False)  # here
        return self.relu(self.main(x) + x)


@forward("side effects", False)
class SwitchesGradients(Parts):
    """No context: it stays switched."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        torch.set_grad_enabled(False)  # here
        return self.relu(y + x)


@forward("side effects", False)
class CountsInClass(Parts):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        CountsInClass.calls += 1  # here
        if CountsInClass.calls % 2 == 0:
            return x
        return self.relu(self.main(x) + x)


def _counter() -> Any:
    calls = 0

    def call() -> bool:
        nonlocal calls  # here
        calls += 1
        return calls % 2 == 0

    return call


_every_second = _counter()


@forward("side effects", False)
class CountsInCell(Parts):
    def forward(self, x: Tensor) -> Tensor:
        if _every_second():
            return x
        return self.relu(self.main(x) + x)


@forward("side effects", False)
class CountsInDefault(Parts):
    def skips(self, seen: Any = []) -> bool:  # noqa: B006
        seen.append(1)  # here
        return len(seen) % 2 == 0

    def forward(self, x: Tensor) -> Tensor:
        return x if self.skips() else self.relu(self.main(x) + x)


@forward("side effects", False)
class TakesNext(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = itertools.count()

    def forward(self, x: Tensor) -> Tensor:
        if next(self.numbers) % 2:  # here
            return x
        return self.relu(self.main(x) + x)


@forward("side effects", False)
class CachesByShape(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[Any, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        mask = self.cache.setdefault(x.shape, torch.ones_like(x[:, :1]))  # here
        return self.relu(self.main(x) * mask + x)


@forward("side effects", False)
class Warns(Parts):
    def forward(self, x: Tensor) -> Tensor:
        with warnings.catch_warnings(record=True) as caught:  # here
            warnings.simplefilter("always")
            warnings.warn("block", stacklevel=1)
        WORLD["calls"] += len(caught)
        return self.relu(self.main(x) + x)


@forward("side effects", False)
class WritesEnvironment(Parts):
    def forward(self, x: Tensor) -> Tensor:
        os.environ["FORWARDS_CALLED"] = "1"  # here
        return self.relu(self.main(x) + x)


# --- what depends on the call ---


@forward("depends on the call", False, on=lambda m: m.doubled.fill_(True))
class FlagInBuffer(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("doubled", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        if self.doubled:  # here
            y = y * 2
        return self.relu(y + x)


class DoublesInEval(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if self.training else x * 2  # here


@forward("depends on the call", False)
class WrapperByMode(Parts):
    """In mode "mixed" only the wrapper is in eval, and the block trains."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = DoublesInEval()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.drop(self.main(x)) + x)


class NormsByMode(nn.Module):
    """Both branches are the library's batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.norm(x)
        return self.norm(x)


@forward("depends on the call", None, wrapper=lambda m: m.drop.register_forward_hook(lambda module, args, output: output * 2))
class WrapperOfNorm(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.drop = NormsByMode()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.drop(self.conv1(x)) + x)
