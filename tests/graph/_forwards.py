"""What the forwards of _forwards_*.py share: the parts of a block, and the table in which each of them stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from torch import Tensor, nn

FORWARDS: dict[str, Forward] = {}
WORLD: dict[str, Any] = {"calls": 0}  # what forwards change outside of their module
Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Forward:
    """A block whose forward is one case.

    fuses: whether it must run fused, must not, or either may be (None). changes: what is then done to a model, or to the world
    (``Once``). keeps: the changes after which it still must run fused.
    """

    kind: str
    make: Callable[[], nn.Module]
    fuses: bool | None
    changes: dict[str, Any] = field(default_factory=dict)
    keeps: tuple[str, ...] = ()


class Once:
    """A change that is not of one model: of a class, a function, a global."""

    def __init__(self, change: Callable[[Patch], Any]) -> None:
        self.change = change


C = TypeVar("C", bound=type[nn.Module])


def forward(kind: str, fuses: bool | None, /, keeps: tuple[str, ...] = (), **changes: Any) -> Callable[[C], C]:
    """Puts a block's class into the table."""

    def enter(cls: C) -> C:
        assert cls.__name__ not in FORWARDS
        FORWARDS[cls.__name__] = Forward(kind, cls, fuses, changes, keeps)
        return cls

    return enter


def to(**attributes: Any) -> Callable[[nn.Module], None]:
    """A change: attributes, by dotted paths with __ for the dots; what is a class of modules is called first."""

    def change(model: Any) -> None:
        for path, value in attributes.items():
            *parents, name = path.split("__")
            owner = model
            for parent in parents:
                owner = getattr(owner, parent)
            setattr(owner, name, value() if isinstance(value, type) and issubclass(value, nn.Module) else value)

    return change


class Parts(nn.Module):
    """Two convolutions with norms, a ReLU, an identity shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()

    def main(self, x: Tensor) -> Tensor:
        """What every residual block of them adds to its shortcut."""
        y: Tensor = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return y
