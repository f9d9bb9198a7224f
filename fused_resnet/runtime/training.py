"""A step of training through one part of a graph: what its convolutions leave to one another.

Their gradients' passes over memory are fewer than the layers are (``ops.role.Role``): the gradient through a ReLU is the end of the next
convolution's, and the sum of two readers' gradients is the end of the first one's.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..ops.role import Rectified, Role
from .bound import Part


class Training:
    """The values of a part, as far as they have been computed, and the ReLUs that made some of them. Of one call."""

    def __init__(self, part: Part, values: list[Any]) -> None:
        self._part, self._values = part, values
        self._rectified: dict[int, Rectified] = {}  # by the number of the value
        self._node = 0

    def at(self, node: int) -> Training:
        """Node number ``node`` is next."""
        self._node = node
        return self

    def role(self, x: Tensor, relu: bool, by_library: bool) -> Role:
        """Of the node's convolution of ``x``: the node's input, or what that was cast to."""
        is_input = x is self._values[self._part.inputs[self._node]]
        forks = is_input and self._node in self._part.forks and x.requires_grad
        return Role(by_library, self.reads() if is_input else None, self.rectified() if relu else None, forks)

    def reads(self) -> Rectified | None:
        """The ReLU whose output the node alone reads, if it does."""
        return self._rectified.get(self._part.inputs[self._node]) if self._node in self._part.sole else None

    def fork(self, again: Tensor) -> None:
        """The node's input for whoever reads it behind the node."""
        self._values[self._part.inputs[self._node]] = again

    def rectified(self) -> Rectified:
        """Of a ReLU that makes the node's value."""
        made = self._rectified[self._node + 1] = Rectified()
        return made
