"""Windows and maps for the tests of max pooling."""

from __future__ import annotations

from typing import Any

WINDOWS: dict[str, dict[str, Any]] = {
    "a network's": {"kernel_size": 3, "stride": 2, "padding": 1},
    "a network's, ceil mode": {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    "side by side": {"kernel_size": 2},
    "overlapping": {"kernel_size": 5, "stride": 1, "padding": 2},
    "rectangular": {"kernel_size": (3, 2), "stride": (1, 3), "padding": (1, 0)},
    "with gaps": {"kernel_size": 1, "stride": 3},
    "of 64": {"kernel_size": 8, "stride": 3, "padding": 4, "ceil_mode": True},
}
SHAPES = ((2, 5, 9, 11), (1, 33, 8, 40), (3, 16, 21, 8), (1, 1, 8, 8), (2, 3, 16, 1))
