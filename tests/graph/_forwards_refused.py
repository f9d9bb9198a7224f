"""Forwards that must run as they are written: contexts, coins, side effects. The line that stops the analysis ends in "# here"."""

from __future__ import annotations

import random

import numpy as np
import torch
import torch.nn.functional as F
from _forwards import WORLD, Parts, forward, to
from torch import Tensor, nn

# --- contexts ---


@forward("contexts", False)
class NoGrad(Parts):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():  # here
            y = self.bn1(self.conv1(x))
        return self.relu(self.bn2(self.conv2(self.relu(y))) + x)


@forward("contexts", False)
class NoGradHelper(Parts):
    def frozen(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(False):  # here
            return self.bn1(self.conv1(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(self.relu(self.frozen(x)))) + x)


class FrozenLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    @torch.no_grad()  # here
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@forward("contexts", False)
class NoGradDecorated(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = FrozenLayer()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.main(x) + x)


@forward("contexts", False)
class NoGradBlock(Parts):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.main(x) + x)


@forward("contexts", False)
class NoAutocast(Parts):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):  # here
            return self.relu(self.main(x) + x)


@forward("contexts", False)
class Inference(Parts):
    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():  # here
            y = self.main(x)
        return self.relu(y.clone() + x)


@forward("side effects", False)
class ReluOfClone(Parts):
    def forward(self, x: Tensor) -> Tensor:
        identity = x.clone()
        y = self.main(x)
        identity.relu_()  # here
        return self.relu(y + identity)


@forward("side effects", False)
class ReluBehindClone(Parts):
    def forward(self, x: Tensor) -> Tensor:
        identity = x.clone()
        x.relu_()  # here
        return self.relu(self.main(x) + identity)


@forward("side effects", False)
class ConvolvesClone(Parts):
    """Whose caller may write into the input afterwards: what the gradient needs is the copy."""

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.main(x.clone()) + x)  # here


@forward("side effects", False)
class ReturnsClone(Parts):
    """Whose caller may write into the output: what the gradient needs is the original."""

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.main(x) + x).clone()  # here


@forward("side effects", False)
class CloneOnTheLeft(Parts):
    """The copy of an expanded input has other strides than the input, and the sum has those of its left operand."""

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x.clone() + self.main(x))  # here


@forward("side effects", None)
class IntoClone(Parts):
    def forward(self, x: Tensor) -> Tensor:
        identity = x.clone()
        identity += self.main(x)
        return self.relu(identity)


@forward("side effects", False)
class CloneOfFormat(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.main(x) + x.clone(memory_format=torch.channels_last))  # here


@forward("contexts", False)
class Recorded(Parts):
    def forward(self, x: Tensor) -> Tensor:
        with torch.profiler.record_function("block"):  # here
            return self.relu(self.main(x) + x)


@forward("contexts", False)
class Tries(Parts):
    def forward(self, x: Tensor) -> Tensor:
        try:  # here
            return self.relu(self.main(x) + x)
        finally:
            WORLD["calls"] += 1


@forward("contexts", False)
class Detached(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).detach()  # here
        return self.relu(self.bn2(self.conv2(self.relu(y))) + x)


# --- randomness ---


@forward("randomness", False, p=to(p=1.0))
class Coin(Parts):
    p = 0.5

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand(1) < self.p:  # here
            return x
        return self.relu(self.main(x) + x)


@forward("randomness", False)
class PythonCoin(Parts):
    def forward(self, x: Tensor) -> Tensor:
        if random.random() < 0.5:  # here
            return x
        return self.relu(self.main(x) + x)


@forward("randomness", False)
class NumpyCoin(Parts):
    def forward(self, x: Tensor) -> Tensor:
        if np.random.rand() < 0.5:  # here
            return x
        return self.relu(self.main(x) + x)


class StochasticDepth(nn.Module):
    """As published with torchvision: the noise of whole rows."""

    def __init__(self, p: float, mode: str) -> None:
        super().__init__()
        self.p = p
        self.mode = mode

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return input
        survival_rate = 1.0 - self.p
        size = [input.shape[0]] + [1] * (input.ndim - 1) if self.mode == "row" else [1] * input.ndim
        noise = torch.empty(size, dtype=input.dtype, device=input.device)
        noise = noise.bernoulli_(survival_rate)
        return input * noise  # here


@forward("randomness", False, batch=to(drop__mode="batch"))
class WithStochasticDepth(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.drop = StochasticDepth(0.5, "row")

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.drop(self.main(x)) + x)


class LayerDrop(nn.Module):
    """A published stochastic depth that drops whole blocks by a coin."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            if torch.rand(1).item() < self.p:  # here
                return x * 0
            return x / (1 - self.p)
        return x


@forward("randomness", False)
class WithLayerDrop(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.drop = LayerDrop(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.drop(self.main(x)) + x)


@forward("randomness", False)
class Dropped(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(self.main(x), 0.3, self.training)  # here
        return self.relu(y + x)


@forward("randomness", False, off=to(drop__p=0.0))
class DropModule(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.drop(self.main(x)) + x)  # here


@forward("randomness", False)
class Noisy(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        if self.training:
            y = y + 0.1 * torch.randn_like(y)
        return self.relu(y + x)


# --- side effects ---
