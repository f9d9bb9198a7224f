"""Sizes of activations and gradients by layer and depth, before the first step.

Claims, L the number of layers and B = L / 2 of blocks between a place and the loss (or the input):
- plain, PyTorch's default start (Var w = 1 / (3 fan_in)): a ReLU layer keeps 1/6 of the mean square, gradients shrink as 6^(-L/2);
- plain, He's start (Var w = 2 / fan_in): sizes keep; residual with He's start: each block adds as much as it is given, activations grow
  as 2^(B/2); a residual network that starts at the identity: sizes keep, exactly;
- plain with batch norm: activations keep, gradients grow by sqrt(pi / (pi - 1)) = 1.211 a layer on the way back (Yang et al. 2019,
  arXiv:1902.08129); residual with batch norm: much slower, since a block adds 1 to a variance that grows (De and Smith 2020,
  arXiv:2002.10444).
Source: those, and He et al. 2015 (arXiv:1502.01852). The lesson says that deep plain networks suffer from vanishing and exploding
gradients; He et al. 2015 (arXiv:1512.03385, section 4.1) that theirs, with batch norm, are unlikely to fail for that reason.
Refuted if: the measured rates are far from these.

Theory is for wide layers on a map without borders. A 3x3 'same' convolution on a map of side H sees only a share
s = ((3H - 2) / 3H)^2 of its taps, which takes as much of the mean square: 0.84 on 8x8; "theory" below has that factor where a plain
layer's size would keep. The residual rate is without it, for summands that are independent and no ReLU behind the addition.

The networks are one stage of 32 channels on the data's own map, in float64, where 10^-40 is still a number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._data import Data
from ._network import Arm, convolutions, make_block, make_identity
from ._protocol import Check, Report, Runs, Settings, Spread, Task, select, task

TITLE = "Sizes of gradients and activations at the start"
WIDTH, IMAGES = 32, 64
DEPTHS, QUICK_DEPTHS = (10, 18, 34, 54), (10, 34)
ROOM = 0.1  # between measured and predicted factor: layers are narrow, and maps have borders


class Kind(NamedTuple):
    """``activation`` and ``gradient``: theory's factors a layer, of the root mean square, forward and back, for a share s of taps."""

    label: str
    arm: Arm
    activation: str
    gradient: str


KINDS = {
    "plain_default": Kind("plain, PyTorch's start", Arm(plain=True, start="default"), "biases", "sqrt(s / 6)"),
    "plain_he": Kind("plain, He's start", Arm(plain=True, start="he"), "sqrt(s)", "sqrt(s)"),
    "residual_he": Kind("residual, He's start", Arm(start="he"), "2^(1/4)", "2^(1/4)"),
    "residual": Kind("residual, identity start", Arm(), "1", "1"),
    "plain_norm": Kind("plain, batch norm", Arm(plain=True, norm=True, start="he"), "1", "1.211"),
    "residual_norm": Kind("residual, batch norm", Arm(norm=True, start="he"), "slow", "slow"),
}


def theory(word: str, side: int) -> float | None:
    """The factor a layer that a word of ``Kind`` stands for, or None where theory has no one number."""
    share = ((3 * side - 2) / (3 * side)) ** 2
    return {
        "1": 1.0,
        "sqrt(s)": share**0.5,
        "sqrt(s / 6)": (share / 6) ** 0.5,
        "2^(1/4)": 2**0.25,
        "1.211": math.sqrt(math.pi / (math.pi - 1)),
    }.get(word)


def depths(settings: Settings) -> list[int]:
    """Those asked for that blocks of two layers can make."""
    if settings.depths is None:
        return list(QUICK_DEPTHS if settings.quick else DEPTHS)
    return [depth for depth in settings.depths if depth >= 6 and depth % 4 == 2]


def tasks(settings: Settings) -> list[Task]:
    return [
        task("gradients", weight=depth, kind=name, depth=depth, seed=seed)
        for name in KINDS
        for depth in depths(settings)
        for seed in range(settings.seeds)
    ]


def perform(data: Data, kind: str, depth: int, seed: int) -> dict[str, Any]:
    """activations, gradients: root mean squares of each block's output and of the loss's gradient there (times the images, of which
    the loss is a mean), behind the stem first. weights: of the gradient of each layer's weight, the stem's first."""
    generator = torch.Generator().manual_seed(seed)
    arm = KINDS[kind].arm
    stem, linear = nn.Conv2d(1, WIDTH, 3, padding=1), nn.Linear(WIDTH, 10)
    make_norm = nn.BatchNorm2d if arm.norm else nn.Identity
    blocks = nn.ModuleList(make_block(arm, WIDTH, WIDTH, 1, make_norm) for _ in range((depth - 2) // 2))
    layers = [stem, *(layer for block in blocks for layer in convolutions(block))]
    _start(layers, linear, arm, generator)
    if arm.start == "identity":
        for block in blocks:
            make_identity(block, arm)
    for module in (stem, blocks, linear):
        module.double()
    h = F.relu(stem(data.images[:IMAGES].double()))
    outputs = [h]
    for block in blocks:
        h = block(h)
        outputs.append(h)
    for output in outputs:
        output.retain_grad()
    loss = F.cross_entropy(linear(h.mean((2, 3))), data.classes[:IMAGES])
    loss.backward()  # type: ignore[no-untyped-call]
    return {
        "side": data.images.shape[-1],
        "activations": [_size(output) for output in outputs],
        "gradients": [_size(IMAGES * _gradient(output)) for output in outputs],
        "weights": [_size(_gradient(layer.weight)) for layer in layers],
    }


@torch.no_grad()
def _start(layers: Sequence[nn.Conv2d], linear: nn.Linear, arm: Arm, generator: torch.Generator) -> None:
    everything: list[nn.Conv2d | nn.Linear] = [*layers, linear]
    for layer in everything:
        if arm.start == "default":
            nn.init.kaiming_uniform_(layer.weight, 5**0.5, generator=generator)
        else:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
        if layer.bias is not None:
            bound = layer.weight[0].numel() ** -0.5 if arm.start == "default" else 0.0
            layer.bias.uniform_(-bound, bound, generator=generator)


def _gradient(t: Tensor) -> Tensor:
    assert t.grad is not None
    return t.grad


def _size(t: Tensor) -> float:
    """Root mean square, to six digits."""
    return float(f"{t.detach().square().mean().sqrt().item():.6g}")


def factor(sizes: Sequence[float]) -> float:
    """The factor a layer that fits best: least squares through the logarithms of the sizes, which are two layers apart."""
    x = [2.0 * i for i in range(len(sizes))]
    y = [math.log(size) for size in sizes]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    return math.exp(slope)


def report(runs: Runs, settings: Settings) -> Report:
    figures: dict[str, Any] = {}
    rows: list[Sequence[object]] = []
    if not depths(settings):
        return Report(figures, [], [], ["gradients: no depth of 4n + 2 was asked for"])
    deepest = max(depths(settings))
    for name, kind in KINDS.items():
        found = [run["result"] for run in select(runs, "gradients", kind=name, depth=deepest)]
        side = found[0]["side"]
        cells: list[str] = []
        for what, word in (("activations", kind.activation), ("gradients", kind.gradient)):
            # Gradients are fitted on their way back, from the last block to the first.
            rates = Spread.of([factor(result[what] if what == "activations" else result[what][::-1]) for result in found])
            expected = theory(word, side)
            figures.setdefault(name, {})[what] = {"factor": rates._asdict(), "theory": expected, "formula": word}
            cells += [rates.words(".3f"), "-" if expected is None else f"{expected:.3f}"]
        across = Spread.of([result["gradients"][0] / result["gradients"][-1] for result in found])
        figures[name]["first_over_last_gradient"] = across._asdict()
        rows.append((kind.label, *cells, f"{across.median:.1e}"))
    header = (
        f"factor a layer, {deepest} layers", "activations", "theory", "gradients, backward", "theory", "first / last gradient",
    )  # fmt: skip
    return Report(figures, [(TITLE, header, rows)], _check(figures))


def _check(figures: dict[str, Any]) -> list[Check]:
    checks = []
    for name, what in (
        ("plain_default", "gradients"),
        ("plain_he", "activations"),
        ("residual_he", "activations"),
        ("residual", "activations"),
        ("plain_norm", "gradients"),
    ):
        found = figures[name][what]
        measured, expected = found["factor"]["median"], found["theory"]
        claim = f"{KINDS[name].label}: {what} change by {expected:.3f} a layer, to a tenth"
        checks.append(Check(claim, f"{measured:.3f}", abs(measured / expected - 1) < ROOM))
    return checks


def draw(runs: Runs, settings: Settings, folder: Path, machine: str) -> list[Path]:
    from . import _figures

    if not depths(settings):
        return []
    deepest = max(depths(settings))
    with _figures.page(folder / "study_gradients.png", 2, (10.5, 4.8), machine) as (figure, panels):
        for axes, what in zip(panels, ("activations", "gradients"), strict=True):
            for i, (name, kind) in enumerate(KINDS.items()):
                found = [run["result"] for run in select(runs, "gradients", kind=name, depth=deepest)]
                values = [Spread.of(sizes) for sizes in zip(*(result[what] for result in found), strict=True)]
                layers = [1 + 2 * i for i in range(len(values))]
                _figures.line(axes, layers, values, kind.label, _figures.SERIES[i], _figures.DASHES[i], marker="")
                expected = theory(kind.activation if what == "activations" else kind.gradient, found[0]["side"])
                if expected is not None:
                    end = 0 if what == "activations" else -1
                    curve = [values[end].median * expected ** abs(layer - layers[end]) for layer in layers]
                    axes.plot(layers, curve, color=_figures.SERIES[i], linewidth=3.5, alpha=0.22)
            axes.set_yscale("log")
        _figures.name_axes(panels[0], "layer", "root mean square of the activations")
        _figures.name_axes(panels[1], "layer", "root mean square of the loss's gradient there")
        _figures.legend_below(figure, panels[0], f"broad and pale: theory; {_figures.seeds(settings)}")
        figure.suptitle(f"Signals forward and gradients back through {deepest} layers, before the first step", fontsize=10, x=0.01, ha="left")
    return [folder / "study_gradients.png"]
