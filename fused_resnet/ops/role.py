"""What a convolution does for its neighbours in a step of training.

A block of two layers, y = relu(conv2(h) + x) with h = relu(conv1(x)), as PyTorch goes back:

    g = dy where not (y <= 0)      a pass: the shortcut's gradient
    dh = gradient of conv2, of g
    dh = dh where not (h <= 0)     a pass
    dx = gradient of conv1, of dh
    dx = dx + g                    a pass

Here conv2 ``reads`` what conv1's ReLU ``makes``, and nobody else does: it masks dh before it is stored. conv1 ``forks`` x: it gives x back
for the addition, so that g comes to conv1's backward, which adds it to dx before that is stored. One pass is left. With a norm in between
it is the same. All this is about who reads a value forward. A backward that is itself differentiated reads the values once more, which
``functions`` sees to.
"""

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
