"""How much rounding error a faster algorithm may cost: "fast" (the default) or "strict".

==========  ==========================================================================================================
fast        3x3 convolutions with stride 1 may use Winograd F(4x4, 3x3), whose error is about twice direct convolution's
strict      no F(4x4, 3x3). F(2x2, 3x3), whose error is smaller than direct convolution's, stays
==========  ==========================================================================================================

The README has measured errors. float64 is always computed directly.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

NUMERICS = ("fast", "strict")


def _from_environment() -> str:
    name = os.environ.get("FUSED_RESNET_NUMERICS") or NUMERICS[0]
    if name not in NUMERICS:
        raise ValueError(f"FUSED_RESNET_NUMERICS must be {' or '.join(NUMERICS)}, got {name!r}")
    return name


current = _from_environment()
epoch = 0  # counts the changes of whatever a plan depends on besides its arguments


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
    changed()


@contextmanager
def using(name: str) -> Iterator[None]:
    """``set_numerics(name)`` for a while."""
    before = current
    set_numerics(name)
    try:
        yield
    finally:
        set_numerics(before)


def changed() -> None:
    """Plans that were made before are not to be used again."""
    global epoch
    epoch += 1


def get_numerics() -> str:
    """"fast" or "strict"."""
    return current
