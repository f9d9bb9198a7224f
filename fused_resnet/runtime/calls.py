"""What running a segment natively gives: ``program.py`` on the CPU, ``launches.py`` on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ..ops.store import Entry


class Call(Protocol):
    """Repeats a call for an input of the same layout, with the values of ``entries``, which it keeps alive."""

    @property
    def entries(self) -> Sequence[Entry]: ...

    def __call__(self, x: Tensor, external: int = 0) -> Tensor:
        """external: the address of the external shortcut, where there is one."""

    def if_holds(self, guard: Any, x: Tensor) -> Tensor | None:
        """The output, if a ``Guard`` of the sources' bytes holds; None if it does not, or this input is for another way."""


class Result(NamedTuple):
    """A segment's output, what repeats the call, and the external shortcut that it read."""

    output: Tensor
    call: Call
    external: Tensor | None
