"""Inputs for gradcheck and gradgradcheck: float64, tiny, with every pre-activation kept away from the ReLU's kink.

gradcheck moves one element by STEP and compares the change with the gradient; across the kink the two differ without anything
being wrong. Operands are therefore drawn again until all |z| >= MARGIN, a thousand steps: one step moves z by at most STEP times
the largest operand, a few steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from .. import ops, reference
from .data import LAYOUTS
from .devices import moved

STEP = 1e-6  # gradcheck's own default for float64
MARGIN = 1000 * STEP

SHORTCUTS = ("none", "tensor", "input", "view", "expanded")
_PADDED = {"padding": 1}

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class GradientCase:
    """One function to check, and which of its tensors require a gradient (``needs``).

    ``shortcut``: none; tensor: a tensor of its own; input: the input itself; view: shares memory with the input, one channel
    further; expanded: one value for each channel, stride 0. ``incoming`` is the layout of the gradient that arrives.
    """

    shortcut: str = "tensor"
    layout: str = "contiguous"
    needs: tuple[str, ...] = ("input", "weight", "bias", "shortcut")
    parameters: tuple[tuple[str, Any], ...] = tuple(_PADDED.items())
    size: tuple[int, int, int, int] = (2, 2, 3, 4)
    outputs: int = 2
    kernel: tuple[int, int] = (3, 3)
    bias: bool = True
    incoming: str = "plain"
    operator: str = "conv_bias_add_relu"

    @property
    def name(self) -> str:
        parameters = ", ".join(f"{key}={value}" for key, value in self.parameters)
        kernel = "x".join(map(str, self.kernel))
        shape = f"{list(self.size)} -> {self.outputs}"
        return (
            f"{self.operator} {shape} {kernel} ({parameters}), shortcut {self.shortcut}, {self.layout}, "
            f"{'bias' if self.bias else 'no bias'}, gradient {self.incoming}, needs {'+'.join(self.needs)}"
        )

    def build(
        self, seed: int = 0, reference_only: bool = False, device: torch.device | str = "cpu"
    ) -> tuple[Function, tuple[Tensor, ...]]:
        """The function and its leaf tensors on a device, for ``torch.autograd.gradcheck(function, leaves)``."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            leaves = self._draw(generator)
            z = self._apply(reference, leaves, relu=False)
            if z.abs().min() >= MARGIN and z.max() > 0:  # some of the gradient must pass
                break
        for name, t in leaves.items():
            t.requires_grad_(name in self.needs)
        names = tuple(leaves)
        module = reference if reference_only else ops

        def function(*tensors: Tensor) -> Tensor:
            output = self._apply(module, dict(zip(names, tensors, strict=True)))
            return _INCOMING[self.incoming](output)

        here = tuple(leaves.values())
        return function, here if torch.device(device).type == "cpu" else moved(device, *here)

    def compare(self, seed: int = 0, device: torch.device | str = "cpu") -> str:
        """Why value or gradients on a device differ from those of the reference on the CPU, or ''. gradcheck compares a
        function with itself only.

        The largest sum has L terms of at most M^2, M being the largest operand, and any order of its additions errs by at most
        u L times the sum of their absolute values; two such results differ by at most 2 u L^2 M^2.
        """
        values: list[list[Tensor | None]] = []
        for reference_only in (False, True):
            function, leaves = self.build(seed, reference_only, "cpu" if reference_only else device)
            output = function(*leaves)
            generator = torch.Generator().manual_seed(seed)
            grad = torch.randn(output.shape, dtype=output.dtype, generator=generator)
            wanted = [t for t in leaves if t.requires_grad]
            found = torch.autograd.grad(output, wanted, grad.to(output.device), allow_unused=True)
            values.append([None if t is None else t.detach().cpu() for t in (output, *found)])
        largest = max(float(t.detach().abs().max()) for t in (*leaves, grad))
        terms = max(2 + self.kernel[0] * self.kernel[1] * max(self.size[1], self.outputs), grad.numel())
        allowed = 2 * (torch.finfo(torch.float64).eps / 2) * terms**2 * largest**2
        for name, ours, expected in zip(("value", *self.needs), *values, strict=True):
            if ours is None or expected is None:
                return f"{name}: a gradient in only one of the two"
            error = float((ours - expected).abs().max())
            if not error <= allowed:
                return f"{name}: differs from the reference's by {error:.3g}, allowed {allowed:.3g}"
        return ""

    def _draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        groups = dict(self.parameters).get("groups", 1)
        n, c, h, w = self.size
        if self.shortcut == "view":
            c += 1  # the leaf is the buffer that both share
        shapes: dict[str, tuple[int, ...]] = {"input": (n, c, h, w)}
        if self.operator == "conv_bias_add_relu":
            shapes["weight"] = (self.outputs, self.size[1] // groups, *self.kernel)
        if self.bias:
            shapes["bias"] = (self.outputs,)
        drawn = {name: torch.randn(shape, dtype=torch.float64, generator=generator) for name, shape in shapes.items()}
        if self.shortcut in ("tensor", "expanded"):
            shape = self._apply(reference, drawn, relu=False, bare=True).shape
            if self.shortcut == "expanded":
                shape = torch.Size((1, self.outputs, 1, 1))
            drawn["shortcut"] = torch.randn(shape, dtype=torch.float64, generator=generator)
        return {name: LAYOUTS[self.layout](t).detach() for name, t in drawn.items()}

    def _apply(self, module: Any, leaves: dict[str, Tensor], bare: bool = False, **changes: Any) -> Tensor:
        input, shortcut = leaves["input"], leaves.get("shortcut")
        if self.shortcut == "input":
            shortcut = input
        elif self.shortcut == "view":
            input, shortcut = input[:, :-1], input[:, 1:]
        parameters = {**dict(self.parameters), **changes}
        if self.operator == "bias_add_relu":
            if self.shortcut == "expanded" and shortcut is not None:
                shortcut = shortcut.expand(input.shape)
            output: Tensor = module.bias_add_relu(input, leaves.get("bias"), None if bare else shortcut, **parameters)
            return output
        weight, bias = leaves["weight"], leaves.get("bias")
        if self.shortcut == "expanded" and shortcut is not None:
            shape = reference.conv_bias_add_relu(input.detach(), weight.detach(), **parameters).shape
            shortcut = shortcut.expand(shape)
        output = module.conv_bias_add_relu(input, weight, bias, None if bare else shortcut, **parameters)
        return output


# How the gradient reaches the operator's backward: as it comes; height and width exchanged; one value for each channel,
# stride 0; channels_last.
_INCOMING: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda y: y,
    "transposed": lambda y: y.mT * 1.0,
    "expanded": lambda y: y.sum((2, 3)),
    "channels_last": lambda y: y.permute(0, 2, 3, 1) * 1.0,
}


def _subsets(names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for count in range(1, len(names) + 1):
        yield from combinations(names, count)


def gradient_cases(quick: bool = False) -> list[GradientCase]:
    """Every shortcut kind x subset of the tensors that require a gradient, x layout; then geometry, incoming layouts and
    ``bias_add_relu`` with everything required. ``quick``: one subset and one layout each."""
    cases = []
    layouts = ("contiguous",) if quick else ("contiguous", "channels_last", "sliced")
    for shortcut in SHORTCUTS:
        names = ("input", "weight", "bias") + (("shortcut",) if shortcut in ("tensor", "expanded") else ())
        for layout in layouts:
            for needs in (names,) if quick else _subsets(names):
                cases.append(GradientCase(shortcut, layout, needs))
    whole = ("input", "weight", "bias", "shortcut")
    for incoming in _INCOMING:
        cases.append(GradientCase(incoming=incoming))
        cases.append(GradientCase(layout="channels_last", incoming=incoming))
    for shape in (
        {"parameters": (("stride", 2), ("padding", 1))},
        {"parameters": (("stride", (2, 1)), ("padding", (0, 1)))},
        {"parameters": (("padding", 2), ("dilation", 2))},
        {"parameters": (("padding", "same"),), "kernel": (2, 4)},
        {"parameters": (("padding", "valid"),), "kernel": (2, 3)},
        {"parameters": (), "kernel": (1, 1)},
        {"parameters": (("stride", 2),), "kernel": (1, 1)},
        {"parameters": (("padding", 1), ("groups", 2)), "outputs": 4},
        {"parameters": (("padding", 1), ("relu", False))},
        {"parameters": (("padding", 1),), "bias": False, "needs": ("input", "weight", "shortcut")},
        {"parameters": (("padding", 1),), "size": (1, 1, 1, 1), "outputs": 1},
        {"parameters": (("padding", 1),), "size": (1, 3, 3, 3), "outputs": 5},
    ):
        cases.append(GradientCase(**{"needs": whole, **shape}))  # type: ignore[arg-type]
    for shortcut in SHORTCUTS:
        names = ("input", "bias") + (("shortcut",) if shortcut in ("tensor", "expanded") else ())
        for layout in layouts:
            for needs in (names,) if quick else _subsets(names):
                cases.append(GradientCase(shortcut, layout, needs, parameters=(), kernel=(1, 1), operator="bias_add_relu"))
    return list(dict.fromkeys(cases))
