"""Residual blocks in the usual forms: each of them must run fused."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from _forwards import Parts, forward, to
from torch import Tensor, nn

use = forward("usual forms", True)


@forward("usual forms", True, projection=to(downsample=nn.Identity), keeps=("projection",))
class Torchvision(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.downsample: Any = None

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out


@use
class OneExpression(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True))))


@use
class Cloned(Parts):
    def forward(self, x: Tensor) -> Tensor:
        identity = x.clone()
        x = self.main(x)
        x += identity
        return self.relu(x)


@use
class ClonedByFunction(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.main(x) + torch.clone(x))


@use
class TorchFunctions(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(torch.add(self.main(x), x))


@use
class Keywords(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(input=self.bn1(input=self.conv1(input=x)), inplace=True)
        return F.relu(input=self.bn2(self.conv2(y)) + x, inplace=True)


@forward("usual forms", True, shortcut=to(downsample=None), keeps=("shortcut",))
class TruthOfShortcut(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.downsample = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.downsample(x) if self.downsample else x
        return self.relu(self.main(x) + shortcut)


@forward("usual forms", True, longer=lambda m: m.shortcut.append(nn.Conv2d(8, 8, 1).double()), keeps=("longer",))
class LengthOfShortcut(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.shortcut = nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        if len(self.shortcut) > 0:
            x = self.shortcut(x)
        return self.relu(y + x)


@forward("usual forms", True, shorter=lambda m: m.layers.__delitem__(1), longer=lambda m: m.layers.append(nn.ReLU()), keeps=())
class ListOfModules(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1)])

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.layers:
            y = layer(y)
        return self.relu(y + x)


@use
class IndexedModules(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1) for _ in range(2)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(8) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i in range(len(self.convs)):
            y = self.norms[i](self.convs[i](y))
            if i < len(self.convs) - 1:
                y = F.relu(y)
        return F.relu(y + x)


@use
class ZippedModules(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1) for _ in range(2)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(8) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(y))
            if i == 0:
                y = F.relu(y)
        return F.relu(y + x)


@use
class DictOfModules(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"conv": nn.Conv2d(8, 8, 3, padding=1), "norm": nn.BatchNorm2d(8)})

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layers["norm"](self.layers["conv"](x)) + x)


@use
class Super(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input) + input)


class Base(Parts):
    def features(self, x: Tensor) -> Tensor:
        return self.main(x)


@use
class SuperMethod(Base):
    def features(self, x: Tensor) -> Tensor:
        y = super().features(x)
        return y

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.features(x) + x)


@forward("usual forms", True, doubled=to(doubled=True))
class ConditionalExpression(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.doubled = False
        self.planes, self.inplanes = 8, 8

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.main(x)
        y = y * 2 if self.doubled else y
        if self.planes != self.inplanes or not y is not None:
            return y
        assert self.planes == 8, "eight"
        z = y + x
        del y
        return F.relu(z)


@use
class TwoAtOnce(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.skip = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.main(x), self.skip(x)
        return F.relu(left + right)


@use
class Static(Parts):
    @staticmethod
    def join(a: Tensor, b: Tensor) -> Tensor:
        return torch.relu(a + b)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.main(x), x)


@use
class ByFormattedName(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i in (1, 2):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = self.relu(y) if i == 1 else y
        return self.relu(y + x)


class Anything(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@use
class PassesOn(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = Anything(nn.Conv2d(8, 8, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.main(x) + x)


@use
class Walrus(Parts):
    def forward(self, x: Tensor) -> Tensor:
        if (y := self.main(x)) is not None:
            return self.relu(y + x)
        return x


@use
class MadeInForward(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return nn.ReLU(inplace=True)(self.main(x) + x)


@use
class LambdaInForward(Parts):
    def forward(self, x: Tensor) -> Tensor:
        add = lambda a, b=x: a + b  # noqa: E731
        return self.relu(add(self.main(x)))


@use
class Scripting(Parts):
    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return x
        return self.relu(self.main(x) + x)


@use
class ReadsShape(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x.size(), x.dim()
        y = self.main(x)
        return self.relu(y + x)


@use
class Private(Parts):
    """Python mangles __names."""

    def __init__(self) -> None:
        super().__init__()
        self.__conv = nn.Conv2d(8, 8, 1)

    def __body(self, x: Tensor) -> Tensor:
        __y = self.__conv(x)
        return __y

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.__body(x) + x)


@use
class Pools(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(2)
        self.skip = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(8, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(self.pool(self.relu(self.bn1(self.conv1(x)))))) + self.skip(x))
