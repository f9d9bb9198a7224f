"""Forwards that rest on a rule of Python's or PyTorch's: aliases, late binding, the order of base classes, what a class may hide."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from _forwards import Once, Parts, forward, to
from torch import Tensor, nn

HERE = __name__


def _conv() -> nn.Module:
    return nn.Conv2d(8, 8, 3, padding=1).double()


@forward("names", True, second=lambda m: setattr(m, "alias", _conv()), first=lambda m: setattr(m, "conv1", _conv()), keeps=("second", "first"))
class TwoNames(Parts):
    """One module under two names, called by the second."""

    def __init__(self) -> None:
        super().__init__()
        self.alias = self.conv1

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.alias(x))))) + x)


@forward("aliases", False)
class ReluOfAlias(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        z = y
        F.relu_(z)  # here
        return self.relu(self.bn2(self.conv2(y)) + x)


@forward("aliases", False)
class SumIntoAlias(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        z = y
        z += x  # here
        return F.relu(y)


@forward("aliases", False)
class ReluNotReturned(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x) + x
        y.relu_()  # here
        return y


@forward("aliases", False)
class ViewWritten(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        y.view(-1).zero_()  # here
        return self.relu(y + x)


@forward("aliases", False)
class WrittenBehind(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.main(x) + x)
        y.mul_(2)  # here
        return y


@forward("binding", True, grows=Once(lambda patch: patch.setattr(DefaultList.body, "__defaults__", ([torch.sigmoid],))))
class DefaultList(Parts):
    def body(self, x: Tensor, acts: Any = []) -> Tensor:  # noqa: B006
        y = self.main(x)
        for act in acts:
            y = act(y)
        return y

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + x)


@forward("binding", False)
class LateBinding(Parts):
    def forward(self, x: Tensor) -> Tensor:
        k = 0

        def times(y: Tensor) -> Tensor:
            return y if k == 0 else y * 2  # here

        k = 1
        return self.relu(times(self.main(x)) + x)


@forward("binding", True)
class LoopBinding(Parts):
    def forward(self, x: Tensor) -> Tensor:
        for norm in (self.bn1, self.bn2):
            apply = lambda y: norm(y)  # noqa: E731, B023  the last one
        return self.relu(apply(self.conv1(x)) + x)


@forward("binding", True)
class Shadowed(Parts):
    def forward(self, x: Tensor) -> Tensor:
        len = self.relu  # of Python's own name
        y = self.main(x)
        return len(y + x)


@forward("binding", True, of_class=Once(lambda patch: patch.setitem(ClassTable.TABLE, "doubled", True)))
class ClassTable(Parts):
    TABLE = {"doubled": False}  # noqa: RUF012

    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        return self.relu(y * 2 + x) if self.TABLE["doubled"] else self.relu(y + x)


class First(Parts):
    def part(self, x: Tensor) -> Tensor:
        return self.main(x)


class Second(First):
    pass


@forward("classes", True, between=Once(lambda patch: patch.setattr(Second, "part", lambda self, x: 2 * self.main(x), raising=False)))
class ThroughSuper(Second):
    def part(self, x: Tensor) -> Tensor:
        return super().part(x)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.part(x) + x)


@forward("classes", True, constant=Once(lambda patch: patch.setattr(ReadOnly, "flag", True)))
class ReadOnly(Parts):
    @property
    def flag(self) -> bool:
        return False

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.main(x) * 2 + x) if self.flag else self.relu(self.main(x) + x)


class Chosen(nn.Sequential):
    pass


@forward("classes", True, first=Once(lambda patch: patch.setattr(Chosen, "__iter__", lambda self: iter([self[0]]), raising=False)))
class IteratesOtherwise(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.body = Chosen(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + x)


class Scaled(nn.Conv2d):
    """Its weight is not what it keeps."""

    @property
    def weight(self) -> Any:
        return self._parameters["weight"] * 2  # type: ignore[operator]

    @weight.setter
    def weight(self, value: Any) -> None:
        self._parameters["weight"] = value


@forward("classes", False)
class HidesWeight(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.conv1.__class__ = Scaled

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)  # here


@forward("classes", True, hidden=Once(lambda patch: patch.setattr(Later, "eps", property(lambda self: 0.5), raising=False)))
class HidesLater(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.bn1 = Later(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.main(x) + x)


class Later(nn.BatchNorm2d):
    pass


def _into_dict(model: Any) -> None:
    del model.bn1
    model.bn1 = torch.sigmoid


@forward(
    "classes",
    True,
    deleted=_into_dict,
    direct=lambda m: m.bn1._forward_hooks.__setitem__(7, lambda module, args, output: output * 2),
    beside=lambda m: m.bn1.__dict__.update(forward=torch.sigmoid),
    attributes=lambda m: setattr(m.bn1, "__dict__", {**m.bn1.__dict__, "forward": torch.sigmoid}),
)
class InPlaceOf(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.main(x) + x)


@forward("classes", True, other=to(bn1=nn.Identity), keeps=("other",))
class ByType(Parts):
    def forward(self, x: Tensor) -> Tensor:
        if type(self.bn2) is not nn.BatchNorm2d:
            return x
        return self.relu(self.main(x) + x)


@forward("arguments", True)
class Stars(Parts):
    def join(self, *terms: Tensor, scale: Any = None) -> Tensor:
        return terms[0] + terms[1] if scale is None else terms[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.join(*(self.main(x), x), **{"scale": None}))


@forward("arguments", True, item=lambda m: m.pad.__setitem__(slice(4, 6), [8, 0]), list=to(pad=[0, 0, 0, 0, 8, 0]), keeps=("item", "list"))
class PadsByList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.pad = [0, 0, 0, 0, 4, 4]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + F.pad(x, self.pad))


@forward("arguments", True, on=to(drop__p=0.5), kind=lambda m: setattr(m.drop, "__class__", nn.AlphaDropout), keeps=("kind",))
class DropoutOff(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(F.dropout(self.drop(self.main(x)), 0.0, self.training) + x)


@forward("arguments", True)
class Compares(Parts):
    def forward(self, x: Tensor) -> Tensor:
        a, b = 1, (self.conv1.in_channels, self.conv2.out_channels)
        if not 0 < a <= 1 or b != (8, 8) or "conv" not in "conv1" or 3 in (1, 2):
            return x
        f = None or self.relu
        return f(self.main(x) + x)
