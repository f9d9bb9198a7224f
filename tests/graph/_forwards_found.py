"""Forwards by which a review broke the analysis, each by another rule of Python's or PyTorch's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from _forwards import Once, Parts, forward, to
from torch import Tensor, nn


@forward("found", True)
class IndexedByList(Parts):
    """A list and a tuple are different indices."""

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.main(x) + x[[2, 1, 0]])


@forward("found", True)
class ListOutOfOrder(Parts):
    """A ModuleList finds by name, whatever the order."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([self.bn2, self.conv2])
        self.layers._modules["0"] = self.layers._modules.pop("0")

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.layers[0](self.layers[-1](y)) + x)


@forward(
    "found",
    True,
    conv=Once(lambda patch: patch.setattr(F, "conv2d", lambda *a, **k: torch.conv2d(*a, **k) * 2)),
    relu=Once(lambda patch: patch.setattr(F, "relu", lambda x, inplace=False: torch.sigmoid(x))),
    norm=Once(lambda patch: patch.setattr(F, "batch_norm", lambda x, *a, **k: x * 2)),
)
class FunctionsOfLayers(Parts):
    """PyTorch's modules compute through globals of torch.nn.functional."""

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.main(x) + x)


@forward("found", True, relu=Once(lambda patch: patch.setattr(nn.ReLU, "forward", lambda self, x: x * 2)))
class MakesRelu(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return nn.ReLU()(y + x)


@forward("found", False)
class SumIntoRelu(Parts):
    """An error in PyTorch: the ReLU's gradient needs what is written over."""

    def __init__(self) -> None:
        super().__init__()
        self.skip = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        z = F.relu(self.skip(x))
        z += y  # here
        return F.relu(z)


@forward("found", False)
class ByIdentity(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.left = self.right = 1000

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.main(x) + x) if self.left is self.right else x  # here


@forward("found", False)
class OwnClass(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.main(x) + x) if type(self) is OwnClass else x  # here


@forward("found", False)
class ZipsUnequal(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer, _ in zip((self.conv1, self.bn1), (1,), strict=True):  # here
            y = layer(y)
        return self.relu(y + x)


@forward("found", False)
class FailsUnused(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x.size(7)  # here
        return self.relu(self.main(x) + x)


@forward("found", False)
class TwiceByName(Parts):
    def end(self, y: Tensor, scale: Any = None) -> Tensor:
        return self.relu(y)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.main(x) + x, scale=1, **{"scale": None})  # type: ignore[misc]  here


@forward("found", False)
class DeadDeclaration(Parts):
    def forward(self, x: Tensor) -> Tensor:
        k = 0

        def change() -> None:  # here
            nonlocal k
            k = 1

        change()
        return self.relu(self.main(x) + x) if k else x


@forward("found", False)
class DeadYield(Parts):
    def forward(self, x: Tensor) -> Tensor:
        def end(y: Tensor) -> Any:  # here
            return self.relu(y)
            yield y

        y: Tensor = end(self.main(x) + x)
        return y + x


@forward("found", True, none=to(downsample=None), keeps=("none",))
class UnequalToNone(Parts):
    """As older code asks, and names and numbers its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.downsample: Any = nn.Sequential(nn.Conv2d(8, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i, act in enumerate((self.relu, None), 1):
            y = getattr(self, "bn{}".format(i))(getattr(self, "conv{}".format(i))(y))  # noqa: UP032
            y = y if act == None else act(y)  # noqa: E711
        if self.downsample != None:  # noqa: E711
            for child in self.downsample.children():
                x = child(x)
        return self.relu(y + x)


@forward("found", False)
class HiddenByProperty(Parts):
    def __init__(self) -> None:
        super().__init__()
        self._modules["hidden"] = nn.Conv2d(8, 8, 1)

    @property
    def hidden(self) -> nn.Module:
        return nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self._modules["hidden"](x) + x)  # type: ignore[misc]  here


@forward(
    "found",
    True,
    weight=lambda m: m.conv1.__dict__.update(weight=torch.zeros(8, 8, 3, 3, dtype=torch.float64)),
    mean=lambda m: m.bn1.__dict__.update(running_mean=torch.ones(8, dtype=torch.float64)),
    width=lambda m: setattr(m.bn1, "running_mean", torch.zeros(1, dtype=torch.float64)),
    eps=to(bn1__eps=-10.0),
)
class HiddenTensors(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.main(x) + x)
