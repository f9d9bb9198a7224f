"""Weight decay drives a residual block to the identity.

Claim: where the rest of a network does the work, L2 regularisation lambda / 2 |theta|^2 shrinks W[l+2] and b[l+2] to zero, so
that a[l+2] = g(W[l+2] a[l+1] + b[l+2] + a[l]) becomes g(a[l]) = a[l]. Under batch norm decay of W alone does nothing of the kind:
gamma (W a - mean) / deviation + beta does not change with |W|. There gamma and beta must decay.
Source: the lesson ("if you apply weight decay that will shrink the value of W[l+2]"); that batch norm takes the scale of W away:
van Laarhoven 2017 (arXiv:1706.05350).
Refuted if: the norm of the decaying branch does not fall monotonically to under 1 % of its start, or the block's output keeps its
distance to its input; or decay of W alone brings a block with batch norm to the identity.

A network of ten layers is trained on the data first. Then one more residual block, from He's start, is put in front of its pooling,
and everything is trained on, the branch of that block with decay ``lambda`` on W and b. The decay is strong on purpose: the usual
1e-4, the last arm, would take a thousand times as many steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._data import Data
from ._network import Arm, Network, convolutions, last_norm, make_block
from ._protocol import Check, Report, Runs, Settings, Spread, Task, select, task
from ._training import batches, error, train

TITLE = "Weight decay"
WIDTH, DEPTH = 8, 10
FIRST_RATE, FIRST_EPOCHS = 0.03, {"digits": 20, "mnist5k": 7}
RATE, DECAY = 0.02, 1.0  # SGD without momentum: each step takes 2 % of what decays
STEPS = 300
LIMIT = 0.01  # of the branch's norm at the start


class Kind(NamedTuple):
    label: str
    norm: bool
    what: str  # decays: "all" of the branch, its "weights", or "gamma and beta" of its last norm
    decay: float


ARMS = {
    "bias": Kind("biases only: W and b decay", False, "all", DECAY),
    "norm_gamma": Kind("batch norm: gamma and beta decay", True, "gamma and beta", DECAY),
    "norm_weights": Kind("batch norm: only W decays", True, "weights", DECAY),
    "none": Kind("biases only: no decay", False, "all", 0.0),
    "usual": Kind("biases only: the usual decay, 1e-4", False, "all", 1e-4),
}


def tasks(settings: Settings) -> list[Task]:
    return [task("decay", weight=400, arm=name, seed=seed) for name in ARMS for seed in range(settings.seeds)]


def perform(data: Data, arm: str, seed: int) -> dict[str, Any]:
    """norms: of what decays, after every tenth step, the start first. distances: |block(x) - x| / |x| of the block's output, in train
    mode, over 512 images; errors: training error of the network, %, at the start and at the end."""
    generator = torch.Generator().manual_seed(seed)
    kind = ARMS[arm]
    network = Network(Arm(norm=kind.norm), DEPTH, WIDTH, generator)
    train(network, data, FIRST_RATE, FIRST_EPOCHS[_name(data)], generator)
    before = error(network, data.images, data.classes)
    block = make_block(Arm(norm=kind.norm), 2 * WIDTH, 2 * WIDTH, 1, nn.BatchNorm2d if kind.norm else nn.Identity)
    with torch.no_grad():
        for layer in convolutions(block):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
            if layer.bias is not None:
                layer.bias.normal_(0, 0.1, generator=generator)
    network.blocks.append(block)
    decaying = branch(block, kind.what)
    rest = [p for p in network.parameters() if not any(p is d for d in decaying)]
    sgd = torch.optim.SGD([{"params": decaying, "weight_decay": kind.decay}, {"params": rest, "weight_decay": 0.0}], RATE)
    norms, distances, step = [norm(decaying)], [distance(network, block, data)], 0
    while step < STEPS:
        for images, classes in batches(data, generator):
            loss = F.cross_entropy(network(images), classes)
            sgd.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            sgd.step()
            step += 1
            if step % 10 == 0:
                norms.append(norm(decaying))
                distances.append(distance(network, block, data))
            if step == STEPS:
                break
    after = error(network, data.images, data.classes)
    return {"norms": norms, "distances": distances, "errors": [round(before, 3), round(after, 3)]}


def _name(data: Data) -> str:
    return "digits" if data.images.shape[-1] == 8 else "mnist5k"


def branch(block: nn.Module, what: str) -> list[Tensor]:
    """The parameters that decay."""
    layers = convolutions(block)
    if what == "gamma and beta":
        return list(last_norm(block).parameters())
    if what == "weights":
        return [layer.weight for layer in layers]
    return [p for layer in layers for p in layer.parameters()]


def norm(parameters: Sequence[Tensor]) -> float:
    return float(f"{sum(p.detach().square().sum().item() for p in parameters) ** 0.5:.6g}")


@torch.no_grad()
def distance(network: Network, block: nn.Module, data: Data) -> float:
    x = network.blocks[:-1](network.stem(data.images[:512]))
    return float(f"{((block(x) - x).norm() / x.norm()).item():.6g}")


def _falls(norms: Sequence[float]) -> bool:
    return all(later < earlier for earlier, later in itertools.pairwise(norms)) and norms[-1] < LIMIT * norms[0]


def report(runs: Runs, settings: Settings) -> Report:
    figures: dict[str, Any] = {}
    rows: list[Sequence[object]] = []
    monotone: dict[str, bool] = {}
    for name, kind in ARMS.items():
        found = [run["result"] for run in select(runs, "decay", arm=name)]
        monotone[name] = all(_falls(result["norms"]) for result in found)
        left = Spread.of([100 * result["norms"][-1] / result["norms"][0] for result in found])
        start, end = (Spread.of([result["distances"][i] for result in found]) for i in (0, -1))
        error_before, error_after = (Spread.of([result["errors"][i] for result in found]) for i in (0, 1))
        figures[name] = {
            "norm_left_percent": left._asdict(),
            "falls_under_1_percent": monotone[name],
            "distance_at_start": start._asdict(),
            "distance_at_end": end._asdict(),
            "training_error_before": error_before._asdict(),
            "training_error_after": error_after._asdict(),
        }
        rows.append((kind.label, left.words(".2f"), start.words(".3f"), end.words(".2g"), error_before.words(), error_after.words()))
    header = (f"{STEPS} steps, lambda {DECAY}", "norm left, %", "|y - x| / |x|, start", "end", "training error, %, before", "after")

    def end_of(name: str) -> float:
        return float(figures[name]["distance_at_end"]["median"])

    checks = [
        Check(
            f"{ARMS[name].label}: the norm falls monotonically to under {LIMIT:.0%} of its start",
            f"{figures[name]['norm_left_percent']['most']:.2f} % left at most, distance to the identity {end_of(name):.1e}",
            monotone[name],
        )
        for name in ("bias", "norm_gamma")
    ]
    checks.append(
        Check(
            "batch norm: decay of W alone leaves the block away from the identity",
            f"distance {end_of('norm_weights'):.2f}, with gamma and beta decaying {end_of('norm_gamma'):.1e}",
            end_of("norm_weights") > 10 * end_of("norm_gamma"),
        )
    )
    return Report(figures, [(TITLE, header, rows)], checks)


def draw(runs: Runs, settings: Settings, folder: Path, machine: str) -> list[Path]:
    from . import _figures

    steps = range(0, STEPS + 1, 10)
    with _figures.page(folder / "study_decay.png", 2, (10, 4.4), machine) as (figure, (left, right)):
        for i, (name, kind) in enumerate(ARMS.items()):
            found = [run["result"] for run in select(runs, "decay", arm=name)]
            shares = [Spread.of([result["norms"][t] / result["norms"][0] for result in found]) for t in range(len(steps))]
            distances = [Spread.of([result["distances"][t] for result in found]) for t in range(len(steps))]
            for axes, values in ((left, shares), (right, distances)):
                _figures.line(axes, steps, values, kind.label, _figures.SERIES[i], _figures.DASHES[i], marker="")
        left.axhline(LIMIT, color="#9aa0a6", linewidth=0.8, linestyle=":")
        left.text(0, LIMIT, "1 %", fontsize=8, color="#5f6368", va="bottom")
        for axes, words in ((left, "norm of what decays, of its start"), (right, "distance to the identity, |block(x) - x| / |x|")):
            axes.set_yscale("log")
            _figures.name_axes(axes, "steps of SGD since the block was added", words)
        _figures.legend_below(figure, left, _figures.seeds(settings))
        figure.suptitle(
            f"A residual block added to a trained network, weight decay {DECAY} on its branch: it becomes the identity",
            fontsize=10, x=0.01, ha="left",
        )  # fmt: skip
    return [folder / "study_decay.png"]
