"""What the tests of modules and conversion share: randomised batch norms, the comparison, blocks as people write them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Batch norms as training leaves them and worse: negative scales, tiny and large variances, shifted means."""
    generator = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                if m.weight is not None:
                    m.weight.uniform_(-1, 1, generator=generator)
                    m.bias.normal_(generator=generator)
                if m.running_mean is not None:
                    assert m.running_var is not None
                    m.running_mean.normal_(generator=generator)
                    m.running_var.uniform_(0.5, 2, generator=generator)
                    m.running_var[0] = 1e-7  # below eps
    return model


def layers(model: nn.Module) -> int:
    return sum(isinstance(m, nn.Conv2d) for m in model.modules())


def assert_close(ours: Tensor, eager: Tensor, truth: Tensor, depth: int, magnitude: float = 0) -> None:
    """In the largest element, our error against float64 is bounded by eager's own and by the rounding of folding.

    Eager rounds a layer's result at least once; folding adds three roundings of the same size (scale, weight, bias):
    four times eager's error, and twice that because one sample's largest error scatters. Where eager happens to be
    exact, each layer may still be off by three units in the largest magnitude on the way (``truth_of`` finds it):
    3 u depth magnitude. A NaN fails. ``test_planted_faults`` shows that this is tight enough.

    Winograd is inside of these four: where F(4x4, 3x3) is chosen, its roundings are 2.9 times direct convolution's at 8
    channels and 1.6 times at 512 (``_winograd.norm_bound``), and those of folding, three units for each layer, do not grow
    with the channels, while eager's own error does. Measured over all conversion tests: at most half of the bound.
    """
    assert ours.dtype == eager.dtype
    assert ours.shape == eager.shape
    for memory_format in (torch.contiguous_format, torch.channels_last):
        if ours.dim() == 4:
            expected = eager.is_contiguous(memory_format=memory_format)
            assert ours.is_contiguous(memory_format=memory_format) == expected, memory_format
    if not truth.numel():
        return
    truth = truth.double()
    error = (ours.double() - truth).abs().max().item()
    peer = (eager.double() - truth).abs().max().item()
    unit = torch.finfo(ours.dtype).eps / 2
    bound = 2 * 4 * peer + 3 * unit * depth * max(magnitude, truth.abs().max().item())
    assert error <= bound, f"error {error:.3g}, bound {bound:.3g} (eager's own error {peer:.3g})"


def truth_of(model: nn.Module, x: Tensor) -> tuple[Tensor, float]:
    """``model`` in float64, on a copy: its output, and the largest magnitude among all its modules' outputs."""
    double = copy.deepcopy(model).double()
    largest = [0.0]
    for m in double.modules():
        m.register_forward_hook(lambda m, a, y: largest.append(y.detach().abs().max().item() if y.numel() else 0.0))
    output: Tensor = double(x.double())
    return output.detach(), max(largest)


def assert_same(converted: nn.Module, original: nn.Module, x: Tensor) -> None:
    """Both models on x, against the original in float64."""
    truth, magnitude = truth_of(original, x)
    ours, eager = converted(x), original(x)
    assert_close(ours.detach(), eager.detach(), truth, layers(original), magnitude)


# ---------------------------------------------------------------------------------------------------------------------
# Residual blocks in the spellings that people use
# ---------------------------------------------------------------------------------------------------------------------


def called(block: nn.Module) -> nn.Module:
    """After calls of two sizes, which differ in algorithms and packings, some of them repeated."""
    with torch.no_grad():
        for x in (torch.randn(1, 64, 14, 14), torch.randn(8, 64, 28, 28)):
            for _ in range(2):
                block(x)
    return block


class ConvNormAct(nn.Module):
    """The small wrapper that half of all code bases have."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, act: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.act = nn.ReLU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.norm(self.conv(x)))
        return y


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Base(nn.Module):
    """The parts; each subclass puts them together in its own way."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.a = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.na = nn.BatchNorm2d(channels)
        self.b = nn.Conv2d(channels, channels, 3, padding=1)
        self.nb = nn.BatchNorm2d(channels)
        self.act = nn.ReLU()
        self.channels = channels


class Functional(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.na(self.a(x)), inplace=True)
        return F.relu(x + self.nb(self.b(y)))


class Methods(Base):
    def forward(self, inputs: Tensor) -> Tensor:
        y = self.na(self.a(inputs)).relu_()
        return self.nb(self.b(y)).add_(inputs).relu()


class TorchAdd(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.na(self.a(x)))
        return torch.relu(torch.add(self.nb(self.b(y)), x, alpha=1))


class Reused(Base):
    """One ReLU module twice, dead reads of the shape, dropout that is off."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout2d(0.0)
        self.none = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x.size()
        skip = self.none(x)
        y = self.drop(self.act(self.na(self.a(x))))
        y = F.dropout(self.nb(self.b(y)), 0.0, self.training)
        y += skip
        return self.none(self.act(y))


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(ConvNormAct(8, 8, 1), ConvNormAct(8, 8), ConvNormAct(8, 16, 1, act=False))
        self.skip = ConvNormAct(8, 16, 1, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


class OptionA(nn.Module):
    """The zero-padding shortcut of the well-known CIFAR implementations: a lambda over slicing and F.pad."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 16, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.shortcut = Lambda(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4), "constant", 0))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class BiasOnly(Base):
    """No normalisation; the addition writes into a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.skip = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.skip(x)
        y += self.b(self.act(self.a(x)))
        return self.act(y)


class Residual(nn.Sequential):
    """A container with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input) + input)


class Pooled(Base):
    """CLIP's way of striding: average pooling inside the block, and in front of the projection."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(2)
        self.down = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(self.act(self.na(self.a(x))))
        return self.act(self.nb(self.b(y)) + self.down(x))


def _residual() -> nn.Module:
    return Residual(nn.Conv2d(8, 8, 3, padding="same"), nn.BatchNorm2d(8, affine=False), nn.ReLU(), nn.Conv2d(8, 8, 1))


SPELLINGS: dict[str, Callable[[], nn.Module]] = {
    "functional": Functional,
    "methods": Methods,
    "torch.add": TorchAdd,
    "reused": Reused,
    "wrapped": Wrapped,
    "option A": OptionA,
    "bias only": BiasOnly,
    "sequential": _residual,
    "pooled": Pooled,
}


def stats(model: nn.Module) -> dict[str, Any]:
    """A bitwise copy of the state_dict."""
    return {name: t.clone() for name, t in model.state_dict().items()}
