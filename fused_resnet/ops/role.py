"""What a convolution does for its neighbours in a step of training."""

from __future__ import annotations

from typing import NamedTuple


class Rectified:
    """The output of one ReLU in one step of training. ``reader_masks``: the only operation that reads it gives back the gradient in front of
    the ReLU, so that nothing is left to do in the ReLU's own. That is known only after the reader's forward."""

    __slots__ = ("reader_masks",)

    def __init__(self) -> None:
        self.reader_masks = False


class Role(NamedTuple):
    """What a convolution does for its neighbours in the same block while it has their values in its registers.

    by_library: its forward is the library's. reads: it alone reads this ReLU's output. makes: its own ReLU's. forks: its input is read again
    by another operation, for which it is returned as a second output; that one's gradient is added to the input's.
    """

    by_library: bool = False
    reads: Rectified | None = None
    makes: Rectified | None = None
    forks: bool = False


ALONE = Role()
