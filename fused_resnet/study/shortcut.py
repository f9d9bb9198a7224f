"""'Same' convolutions and Ws: what the shortcut is where shapes agree, and where they do not.

Claim: 'same' convolutions keep height and width, so that a[l] can be added to z[l+2] as it is. Where 128 channels meet 256,
a[l+2] = g(z[l+2] + Ws a[l]): Ws is a learned projection (a 1x1 convolution of 256 x 128 weights) or pads a[l] with zeros and has no
parameters. Both train.
Source: the lesson; He et al. 2015, equation 2 and section 4.1 (options A and B; B is slightly better there, and not essential).
Refuted if: a 'same' convolution changes the shape, a network with either kind of shortcut does not train, or one needs the other's
parameters for it.

The network is the lesson's example: a stem of 128 channels, a residual block, the block in which 128 meet 256 with stride 2, pooling
and a linear layer. The third contender has no shortcut in that block at all. Cost is counted in multiply-adds, which no other
process disturbs, and timed, which they do.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..nn import BasicBlock, ConvBiasAddReLU2d, PlainBlock, ZeroPadShortcut
from ..ops.api import conv_bias_add_relu
from ._data import Data
from ._network import Arm, make_identity, parameters
from ._protocol import Check, Report, Runs, Settings, Spread, Task, select, task
from ._training import train

TITLE = "Ws: where 128 channels meet 256"
INPUTS, OUTPUTS = 128, 256
RATE, BATCH = 0.03, 32
IMAGES, EPOCHS = 512, 5  # of the training set, 80 steps: these layers are 16 times as wide as those of the other experiments
QUICK_IMAGES, QUICK_EPOCHS = 256, 3
ROUNDS = 9  # of the timing; the first is not counted
TRAINS = 10.0  # % training error: a network that guesses has 90


class Kind(NamedTuple):
    label: str
    pad: str | None = None
    projects: bool = False


KINDS = {
    "pad_end": Kind("zero-padding, behind", "end"),
    "pad_both": Kind("zero-padding, both sides", "both"),
    "projection": Kind("learned projection Ws", projects=True),
    "none": Kind("no shortcut in this block"),
}


_COLOURS = ("#00796b", "#4a7fb5", "#8e5ea2", "#b5533c")


def tasks(settings: Settings) -> list[Task]:
    images, epochs = (QUICK_IMAGES, QUICK_EPOCHS) if settings.quick else (IMAGES, EPOCHS)
    runs = [
        task("shortcut", weight=images * epochs / 5, what="train", kind=name, seed=seed, epochs=epochs, images=images)
        for name in KINDS
        for seed in range(settings.seeds)
    ]
    return [task("shortcut", what="same"), task("shortcut", weight=300, what="cost"), *runs]


def perform(data: Data, what: str, **parameters: Any) -> dict[str, Any]:
    if what == "same":
        return {"kernels": [same(kernel) for kernel in (1, 3, 5)]}
    return cost(data) if what == "cost" else learn(data, **parameters)


def same(kernel: int) -> dict[str, Any]:
    """An 8x8 map under a 'same' and under a 'valid' convolution; whether the map itself can be added to the result."""
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    weight = torch.ones(4, 4, kernel, kernel)
    found: dict[str, Any] = {"kernel": kernel}
    for padding in ("same", "valid"):
        found[padding] = list(conv_bias_add_relu(x, weight, padding=padding).shape[2:])
        try:
            conv_bias_add_relu(x, weight, shortcut=x, padding=padding)
            found[f"{padding}_adds"] = True
        except ValueError:
            found[f"{padding}_adds"] = False
    return found


def widening(name: str) -> BasicBlock:
    """The block in which 128 channels meet 256."""
    kind = KINDS[name]
    skip: nn.Module | None = None
    if kind.pad is not None:
        skip = ZeroPadShortcut(INPUTS, OUTPUTS, 2, kind.pad)
    elif kind.projects:
        skip = nn.Conv2d(INPUTS, OUTPUTS, 1, 2)
    return (PlainBlock if name == "none" else BasicBlock)(INPUTS, OUTPUTS, 2, skip, norm_layer=nn.Identity)


class Example(nn.Module):
    """The lesson's example as a network of seven layers: x [N, 1, H, W] -> [N, 10]."""

    def __init__(self, name: str, generator: torch.Generator) -> None:
        super().__init__()
        self.stem = ConvBiasAddReLU2d(1, INPUTS, 3, padding=1)
        self.blocks = nn.Sequential(BasicBlock(INPUTS, INPUTS, norm_layer=nn.Identity), widening(name))
        self.linear = nn.Linear(OUTPUTS, 10)
        with torch.no_grad():  # He's start, and the identity for the block that can be it
            for parameter in self.parameters():
                if parameter.dim() == 1:
                    parameter.zero_()
                else:
                    nn.init.kaiming_normal_(parameter, nonlinearity="linear" if parameter.dim() == 2 else "relu", generator=generator)
            make_identity(self.blocks[0], Arm())

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(self.blocks(self.stem(x)).mean((2, 3)))
        return result


def learn(data: Data, kind: str, seed: int, epochs: int, images: int) -> dict[str, Any]:
    data = Data(data.images[:images], data.classes[:images], data.test_images, data.test_classes)
    generator = torch.Generator().manual_seed(seed)
    return train(Example(kind, generator), data, RATE, epochs, generator, BATCH)


def cost(data: Data) -> dict[str, Any]:
    """Of the widening block alone, for each kind: parameters, multiply-adds of an image's forward pass, and the median time of a
    forward and backward pass of 32 images on one thread, the kinds taking turns."""
    side = data.images.shape[-1]
    half = (side + 1) // 2
    x = torch.randn(32, INPUTS, side, side, generator=torch.Generator().manual_seed(0)).relu()
    blocks = {name: widening(name) for name in KINDS}
    times: dict[str, list[float]] = {name: [] for name in KINDS}
    for _ in range(ROUNDS):
        for name, block in blocks.items():
            start = time.perf_counter()
            block(x).sum().backward()
            times[name].append(time.perf_counter() - start)
    macs = 9 * half * half * OUTPUTS * (INPUTS + OUTPUTS)
    return {
        name: {
            "parameters": parameters(block),
            "multiply_adds": macs + half * half * OUTPUTS * INPUTS * KINDS[name].projects,
            "milliseconds": round(1e3 * statistics.median(times[name][1:]), 3),
        }
        for name, block in blocks.items()
    }


def report(runs: Runs, settings: Settings) -> Report:
    kernels = select(runs, "shortcut", what="same")[0]["result"]["kernels"]
    costs = select(runs, "shortcut", what="cost")[0]["result"]
    figures: dict[str, Any] = {"same": kernels, "kinds": {}}
    rows: list[Sequence[object]] = []
    for name, kind in KINDS.items():
        found = [run["result"] for run in select(runs, "shortcut", kind=name)]
        training, test = (Spread.of([result[what] for result in found]) for what in ("training_error", "test_error"))
        figures["kinds"][name] = {"training_error": training._asdict(), "test_error": test._asdict(), **costs[name]}
        rows.append(
            (
                kind.label,
                f"{costs[name]['parameters']:,}",
                f"{costs[name]['multiply_adds'] / 1e6:.1f}",
                f"{costs[name]['milliseconds']:.1f}",
                training.words(),
                test.words(),
            )
        )
    header = ("shortcut", "parameters", "10^6 multiply-adds", "ms, 32 images", "training error, %", "test error, %")
    keeps = all(found["same_adds"] and found["valid_adds"] == (found["kernel"] == 1) for found in kernels)
    extra = costs["projection"]["parameters"] - costs["pad_end"]["parameters"]
    checks = [
        Check(
            "'same' convolutions keep the shape, so that the input can be added; 'valid' ones above 1x1 do not",
            ", ".join(f"{k['kernel']}x{k['kernel']}: 8x8 -> {_size(k['same'])}, valid {_size(k['valid'])}" for k in kernels),
            keeps,
        ),
        Check("Ws is 256 x 128 weights and 256 biases; zero-padding is none", f"{extra:,}", extra == OUTPUTS * INPUTS + OUTPUTS),
    ]
    if not settings.quick:
        worst = {name: figures["kinds"][name]["training_error"]["median"] for name in KINDS if name != "none"}
        measured = ", ".join(f"{KINDS[name].label} {value:.1f} %" for name, value in worst.items())
        checks.append(Check(f"each kind of shortcut trains: under {TRAINS:g} % training error", measured, max(worst.values()) < TRAINS))
    return Report(figures, [(TITLE, header, rows)], checks)


def _size(sides: Sequence[int]) -> str:
    return "x".join(map(str, sides))


def draw(runs: Runs, settings: Settings, folder: Path, machine: str) -> list[Path]:
    from . import _figures

    costs = select(runs, "shortcut", what="cost")[0]["result"]
    with _figures.page(folder / "study_shortcut.png", 2, (10, 4.2), machine) as (figure, (left, right)):
        for i, (name, kind) in enumerate(KINDS.items()):
            curves = [run["result"]["losses"] for run in select(runs, "shortcut", kind=name)]
            values = [Spread.of(losses) for losses in zip(*curves, strict=False)]
            _figures.line(left, range(1, len(values) + 1), values, kind.label, _COLOURS[i], _figures.DASHES[i])
            right.barh(i, costs[name]["parameters"] / 1e3, color=_COLOURS[i])
            text = f" {costs[name]['parameters'] / 1e3:.0f} thousand, {costs[name]['multiply_adds'] / 1e6:.1f} million multiply-adds"
            right.text(0, i, text, va="center", fontsize=8, color="white")
        left.xaxis.set_major_locator(_figures.whole_numbers())
        left.set_yscale("log")
        _figures.name_axes(left, "epoch", "training loss, nats")
        right.set_yticks(range(len(KINDS)), [kind.label for kind in KINDS.values()], fontsize=8)
        right.invert_yaxis()
        _figures.name_axes(right, "parameters of the block, thousands", "")
        _figures.legend(left, _figures.seeds(settings))
        figure.suptitle("The block in which 128 channels meet 256: kinds of shortcut", fontsize=10, x=0.01, ha="left")
    return [folder / "study_shortcut.png"]
