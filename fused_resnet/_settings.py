"""What a process can set for all its calls: numerics, and for tests and benchmarks the instruction set and the algorithm.

==========  ==========================================================================================================
numerics    how much rounding error a faster algorithm may cost
fast        (the default) 3x3 convolutions with stride 1 may use Winograd F(4x4, 3x3), whose error is about twice direct convolution's
strict      no F(4x4, 3x3). F(2x2, 3x3), whose error is smaller than direct convolution's, stays
==========  ==========================================================================================================

The README has measured errors. float64 is always computed directly.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from ._extension import cpu

NUMERICS = ("fast", "strict")


class Settings(NamedTuple):
    """One value for each thing that can be set, and all that a plan depends on besides its call.

    algorithm: auto, direct, winograd2 or winograd4, on the CPU. cuda_algorithm: auto, general, or a tile's name (``ops.cuda.tiles``).
    cuda_gradients: whether gradients on a GPU are ours where there is a kernel. cuda_dependent: whether a kernel for Hopper may start while
    the one before it ends; off until a GPU has shown what it gains.
    backends: another number for each time that a test has put other kernels in the place of a device's; 0: none are there.
    """

    numerics: str
    isa: str = ""
    algorithm: str = "auto"
    cuda_algorithm: str = "auto"
    cuda_gradients: bool = True
    cuda_dependent: bool = False
    backends: int = 0


def _from_environment() -> str:
    name = os.environ.get("FUSED_RESNET_NUMERICS") or NUMERICS[0]
    if name not in NUMERICS:
        raise ValueError(f"FUSED_RESNET_NUMERICS must be {' or '.join(NUMERICS)}, got {name!r}")
    return name


current = Settings(_from_environment(), "" if cpu is None else cpu.isa())
number = 0  # of the current settings: the same whenever they are back
# Raised before and after something is set, so odd while it is: what is made meanwhile may be of either settings, and is not kept.
changes = 0
_numbers = {current: 0}
_lock = threading.Lock()
UNKNOWN: Any = object()  # of ``Plans.kept``, where None is a plan too


def change(also: Callable[[], object] | None = None, /, **values: Any) -> None:
    """Set something, by the names of ``Settings``: plans that were made with other settings are not used meanwhile.

    also: sets what the values stand for.
    """
    global current, number, changes
    with _lock:
        changes += 1
        try:
            if also is not None:
                also()
            current = current._replace(**values)
            number = _numbers.setdefault(current, len(_numbers))
        finally:
            changes += 1


@contextmanager
def using(**values: Any) -> Iterator[None]:
    """``change`` for a while."""
    before = {name: getattr(current, name) for name in values}
    change(**values)
    try:
        yield
    finally:
        change(**before)


def set_numerics(name: str) -> None:
    """Choose between speed and rounding error for every later call in this process.

    Args:
        name: "fast" or "strict". The environment variable FUSED_RESNET_NUMERICS sets it at import.

    Raises:
        ValueError: for another name.
    """
    if name not in NUMERICS:
        raise ValueError(f"numerics must be {' or '.join(repr(n) for n in NUMERICS)}, got {name!r}")
    change(numerics=name)


def get_numerics() -> str:
    """"fast" or "strict"."""
    return current.numerics


def use_isa(name: str) -> None:
    """Compute with this instruction set from now on. For tests and benchmarks; users set FUSED_RESNET_ISA."""
    assert cpu is not None
    change(lambda: cpu.set_isa(name), isa=name)


class Plans:
    """What was made for calls of one kind, by what they depend on and the settings; starts over beyond ``most`` of them.

    A key is a tuple whose last item is the settings' ``number``. A caller asks ``kept`` first, which is all that a repeated call costs,
    then ``make``.
    """

    __slots__ = ("kept", "most")

    def __init__(self, most: int) -> None:
        self.most = most
        self.kept: dict[Any, Any] = {}

    def make(self, key: tuple[Any, ...], maker: Callable[[], Any]) -> Any:
        """What ``maker`` makes, kept unless a setting was changed meanwhile. ``key`` was formed before."""
        before = changes
        plan = maker()
        if len(self.kept) >= self.most:
            self.kept.clear()
        if before == changes and before % 2 == 0 and key[-1] == number:
            self.kept[key] = plan
        return plan
