"""The networks of the study: a 3x3 stem, two stages of n blocks, average pooling, a linear layer; every block a fused one.

The stages have C and 2C channels; the second halves the map. ``depth`` counts the layers with weights: 4n + 2 with blocks of two
layers, 6n + 2 with blocks of three. Plain and residual networks of one depth have the same layers and, with zero-padding, the
same number of parameters: the addition is the only difference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..nn import BasicBlock, Bottleneck, ConvBiasAddReLU2d, NormLayer, PlainBlock, PlainBottleneck, ZeroPadShortcut

Block = BasicBlock | Bottleneck


@dataclass(frozen=True)
class Arm:
    """What a network is made of, but for its depth and width.

    plain: without shortcuts. layers: of a block, 2 (3x3, 3x3) or 3 (1x1, 3x3, 1x1, all of the stage's width).
    norm: batch norm; without it convolutions have biases. shortcut: where the shape changes, "A" zero-padding or "B" a projection.
    start: "he" draws every weight by He's rule. "identity" makes each block that can be one the identity: the last layer (its
    gamma, under batch norm) at zero where there is a shortcut, Dirac kernels where there is none. "default" is PyTorch's own.
    """

    plain: bool = False
    layers: int = 2
    norm: bool = False
    shortcut: str = "A"
    start: str = "identity"

    def blocks(self, depth: int) -> int:
        """Blocks of each of the two stages.

        Raises:
            ValueError: for a depth that these blocks cannot make.
        """
        per_stage = 2 * self.layers
        count, rest = divmod(depth - 2, per_stage)
        if count < 1 or rest:
            raise ValueError(
                f"depth must be {per_stage}n + 2 with n at least 1 ({per_stage + 2}, {2 * per_stage + 2}, "
                f"{3 * per_stage + 2}, ...) for blocks of {self.layers} layers, got {depth}"
            )
        return count


class Network(nn.Module):
    """x [N, inputs, H, W] -> [N, 10]; ``width`` is C. Weights are drawn from ``generator``."""

    def __init__(self, arm: Arm, depth: int, width: int, generator: torch.Generator, inputs: int = 1) -> None:
        super().__init__()
        count = arm.blocks(depth)
        norm: NormLayer = nn.BatchNorm2d if arm.norm else nn.Identity
        self.stem: nn.Module = ConvBiasAddReLU2d(inputs, width, 3, padding=1)
        if arm.norm:
            self.stem = nn.Sequential(nn.Conv2d(inputs, width, 3, padding=1, bias=False), norm(width), nn.ReLU(inplace=True))
        shapes = [(width, width, 1)] * count + [(width, 2 * width, 2)] + [(2 * width, 2 * width, 1)] * (count - 1)
        self.blocks = nn.Sequential(*(make_block(arm, *shape, norm) for shape in shapes))
        self.linear = nn.Linear(2 * width, 10)
        _initialise(self, arm, generator)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(self.blocks(self.stem(x)).mean((2, 3)))
        return result


def make_block(arm: Arm, inputs: int, outputs: int, stride: int, norm: NormLayer) -> Block:
    """One block; its shortcut is the identity wherever that fits."""
    skip: nn.Module | None = None
    if not arm.plain and (stride != 1 or inputs != outputs):
        if arm.shortcut == "A":
            skip = ZeroPadShortcut(inputs, outputs, stride)
        else:
            skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=not arm.norm), norm(outputs))
    if arm.layers == 2:
        return (PlainBlock if arm.plain else BasicBlock)(inputs, outputs, stride, skip, norm_layer=norm)
    if outputs % Bottleneck.expansion:
        raise ValueError(f"width must be a multiple of {Bottleneck.expansion} for blocks of three layers, got {outputs}")
    # base_width 256 undoes the bottleneck: all three layers are as wide as the stage, which is narrow enough.
    return (PlainBottleneck if arm.plain else Bottleneck)(
        inputs, outputs // Bottleneck.expansion, stride, skip, base_width=64 * Bottleneck.expansion, norm_layer=norm
    )


def convolutions(block: nn.Module) -> list[nn.Conv2d]:
    """The layers of a block, from the input on, without those of its shortcut."""
    return [m for name, m in block.named_children() if name.startswith("conv") and isinstance(m, nn.Conv2d)]


def last_norm(block: nn.Module) -> nn.Module:
    """The batch norm (or ``nn.Identity``) behind a block's last layer."""
    return block.get_submodule(f"bn{len(convolutions(block))}")


@torch.no_grad()
def _initialise(network: Network, arm: Arm, generator: torch.Generator) -> None:
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            if arm.start == "default":  # nn.Conv2d's and nn.Linear's: Var(weight) = 1 / (3 inputs), biases alike
                nn.init.kaiming_uniform_(module.weight, 5**0.5, generator=generator)
                if module.bias is not None:
                    bound = module.weight[0].numel() ** -0.5
                    module.bias.uniform_(-bound, bound, generator=generator)
                continue
            gain = 2**0.5 if isinstance(module, nn.Conv2d) else 1.0  # a ReLU follows, and takes half of the mean square
            module.weight.normal_(0, gain * module.weight[0].numel() ** -0.5, generator=generator)
            if module.bias is not None:
                module.bias.zero_()
    if arm.start == "identity":
        for block in network.blocks:
            make_identity(block, arm)


@torch.no_grad()
def make_identity(block: nn.Module, arm: Arm) -> None:
    """Make a block the identity for x >= 0, if it is one that can be.

    The block that changes the shape is left as it is: behind zero-padding its new channels would be exactly zero, where ReLU
    passes no gradient, and stay so for ever.
    """
    layers = convolutions(block)
    if layers[0].in_channels != layers[-1].out_channels:
        return
    if arm.plain:
        for layer in layers:
            nn.init.dirac_(layer.weight)
    elif arm.norm:
        last = last_norm(block)
        assert isinstance(last, nn.BatchNorm2d)
        nn.init.zeros_(last.weight)
    else:
        nn.init.zeros_(layers[-1].weight)


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())
