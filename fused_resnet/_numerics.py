"""How much rounding error a faster algorithm may cost: "fast" (the default) or "strict".

==========  ==========================================================================================================
fast        3x3 convolutions with stride 1 may use Winograd F(4x4, 3x3), whose error is about twice direct convolution's
strict      no F(4x4, 3x3). F(2x2, 3x3), whose error is smaller than direct convolution's, stays
==========  ==========================================================================================================

The README has measured errors. float64 is always computed directly.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

NUMERICS = ("fast", "strict")


def _from_environment() -> str:
    name = os.environ.get("FUSED_RESNET_NUMERICS") or NUMERICS[0]
    if name not in NUMERICS:
        raise ValueError(f"FUSED_RESNET_NUMERICS must be {' or '.join(NUMERICS)}, got {name!r}")
    return name


current = _from_environment()

# What a plan depends on besides its arguments, by name; ``setting`` is the number of such a combination, the same whenever it is back.
_settings: dict[str, Hashable] = {"numerics": current}
_numbers: dict[Hashable, int] = {}
setting = 0
changes = 0  # how often one was set: what is made meanwhile may be of either setting, and is not kept


def set_numerics(name: str) -> None:
    """Choose between speed and rounding error for every later call in this process.

    Args:
        name: "fast" or "strict". The environment variable FUSED_RESNET_NUMERICS sets it at import.

    Raises:
        ValueError: for another name.
    """
    global current
    if name not in NUMERICS:
        raise ValueError(f"numerics must be {' or '.join(repr(n) for n in NUMERICS)}, got {name!r}")
    current = name
    record("numerics", name)


@contextmanager
def using(name: str) -> Iterator[None]:
    """``set_numerics(name)`` for a while."""
    before = current
    set_numerics(name)
    try:
        yield
    finally:
        set_numerics(before)


def record(name: str, value: Hashable) -> None:
    """Something is set to ``value`` now that a plan depends on: plans that were made with another value are not used meanwhile."""
    global setting, changes
    changes += 1
    _settings[name] = value
    setting = _numbers.setdefault(tuple(sorted(_settings.items(), key=lambda item: item[0])), len(_numbers))


record("numerics", current)


def get_numerics() -> str:
    """"fast" or "strict"."""
    return current
