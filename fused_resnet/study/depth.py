"""Training error by depth, plain against residual.

Claim: from some depth on a plain network, a[l+1] = g(W a[l] + b), has a larger training error the deeper it is, though the deeper
one contains the shallower one; a residual network, a[l+2] = g(W2 g(W1 a[l] + b1) + b2 + a[l]), has not.
Source: He et al. 2015 (arXiv:1512.03385), figures 1 and 6; the lesson's two figures, training error by number of layers.
Refuted if: the deepest plain network trains as well as the shallowest one, or the deepest residual network does not.

The arms: both kinds with biases alone, as in the lesson, and with batch norm, as in He et al.; zero-padding and a learned projection
where the shape changes; blocks of two layers and of three. Two controls keep the claim honest: a residual network that does not
start at the identity, and a plain one that does (Dirac kernels). What they show is "make the identity the default".

He et al. (section 4.1) find it unlikely that vanishing gradients cause the degradation, because their plain networks have
batch norm, whose signals do not vanish. The bias-only plain arms here do start with vanishing signals (see ``gradients``); the arms
with batch norm do not, and degrade too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ._data import EPOCHS, Data
from ._network import Arm, Network, parameters
from ._protocol import Check, Report, Runs, Settings, Spread, Task, select, task
from ._training import train

TITLE = "Training error by depth"
WIDTH = 8
ALL, ENDS, ENDS_3 = (10, 18, 34, 54), (10, 54), (8, 56)  # 4n + 2; blocks of three layers: 6n + 2
QUICK, QUICK_SHALLOW, QUICK_DEEP, QUICK_3 = (10, 34), (10,), (34,), (8, 20)
QUICK_EPOCHS = {"digits": 30, "mnist5k": 3}
GAP, MOST, SLACK = 15.0, 2.0, 1.0  # points of training error: see _check


class Kind(NamedTuple):
    """An arm and how tables and figures name it."""

    label: str
    arm: Arm
    depths: tuple[int, ...]
    quick: tuple[int, ...]


ARMS = {
    "plain": Kind("plain, biases only", Arm(plain=True, start="he"), ALL, QUICK),
    "residual": Kind("residual, biases only", Arm(), ALL, QUICK),
    "plain_norm": Kind("plain, batch norm", Arm(plain=True, norm=True, start="he"), ALL, QUICK),
    "residual_norm": Kind("residual, batch norm", Arm(norm=True), ALL, QUICK),
    "residual_projection": Kind("residual, learned projection", Arm(shortcut="B"), ENDS, QUICK_SHALLOW),
    "plain_3": Kind("plain, blocks of 3 layers", Arm(plain=True, layers=3, start="he"), ENDS_3, QUICK_3),
    "residual_3": Kind("residual, blocks of 3 layers", Arm(layers=3), ENDS_3, QUICK_3),
    "residual_he": Kind("control: residual, no zero start", Arm(start="he"), ENDS, QUICK_DEEP),
    "plain_identity": Kind("control: plain, identity start", Arm(plain=True, start="identity"), ENDS, QUICK_DEEP),
}
# Tuned once on the digits, with a seed that no study uses (100), by bench/tune_study.py: the rate of the least final training error of
# {.003, .01, .03}, or {.03, .1} with batch norm, for each arm and depth on its own, so that no network is slighted by another's
# rate; of equals the one of the smaller loss. All runs: bench/results/study_tuning.json. Another depth takes the nearest one's rate.
RATES: dict[str, dict[int, float]] = {
    "plain": {10: 0.03, 18: 0.03, 34: 0.003, 54: 0.01},
    "residual": {10: 0.03, 18: 0.03, 34: 0.03, 54: 0.01},
    "plain_norm": {10: 0.1, 18: 0.1, 34: 0.03, 54: 0.03},
    "residual_norm": {10: 0.1, 18: 0.1, 34: 0.1, 54: 0.1},
    "residual_projection": {10: 0.03, 18: 0.01, 34: 0.03, 54: 0.01},
    "plain_3": {8: 0.03, 20: 0.03, 32: 0.03, 56: 0.01},
    "residual_3": {8: 0.03, 20: 0.03, 32: 0.03, 56: 0.03},
    "residual_he": {10: 0.01, 18: 0.003, 34: 0.01, 54: 0.003},
    "plain_identity": {10: 0.03, 18: 0.01, 34: 0.01, 54: 0.003},
}


def rate(name: str, depth: int) -> float:
    """The tuned learning rate of the nearest depth."""
    tuned = RATES[name]
    return tuned[min(tuned, key=lambda known: abs(known - depth))]


def depths(name: str, settings: Settings) -> list[int]:
    """The depths of an arm: the protocol's, or those asked for that its blocks can make."""
    kind = ARMS[name]
    if settings.depths is None:
        return list(kind.quick if settings.quick else kind.depths)
    return [depth for depth in settings.depths if fits(kind.arm, depth)]


def fits(arm: Arm, depth: int) -> bool:
    try:
        return arm.blocks(depth) > 0
    except ValueError:
        return False


def check_depths(wanted: Sequence[int]) -> None:
    """Refuse a depth that no arm can have.

    Raises:
        ValueError: with both rules.
    """
    for depth in wanted:
        if not any(fits(kind.arm, depth) for kind in ARMS.values()):
            raise ValueError(
                f"a depth must be 4n + 2 (blocks of 2 layers: 6, 10, 14, ...) or 6n + 2 (blocks of 3: 8, 14, 20, ...), got {depth}"
            )


def tasks(settings: Settings) -> list[Task]:
    epochs = (QUICK_EPOCHS if settings.quick else EPOCHS)[settings.data]
    return [
        task("depth", weight=depth * epochs, arm=name, depth=depth, seed=seed, rate=rate(name, depth), epochs=epochs)
        for name in ARMS
        for depth in depths(name, settings)
        for seed in range(settings.seeds)
    ]


def perform(data: Data, arm: str, depth: int, seed: int, rate: float, epochs: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    network = Network(ARMS[arm].arm, depth, WIDTH, generator)
    return {"parameters": parameters(network), **train(network, data, rate, epochs, generator)}


def report(runs: Runs, settings: Settings) -> Report:
    figures: dict[str, Any] = {}
    rows: list[Sequence[object]] = []
    for name, kind in ARMS.items():
        for depth in depths(name, settings):
            found = [run["result"] for run in select(runs, "depth", arm=name, depth=depth)]
            training = Spread.of([result["training_error"] for result in found])
            test = Spread.of([result["test_error"] for result in found])
            loss = [result["losses"][-1] for result in found if not result["diverged"]]
            diverged = sum(result["diverged"] for result in found)
            figures.setdefault(name, {})[str(depth)] = {
                "training_error": training._asdict(),
                "test_error": test._asdict(),
                "final_loss": Spread.of(loss)._asdict() if loss else None,
                "parameters": found[0]["parameters"],
                "rate": rate(name, depth),
                "diverged": diverged,
            }
            rows.append(
                (
                    kind.label,
                    depth,
                    f"{found[0]['parameters']:,}",
                    f"{rate(name, depth):g}",
                    training.words(),
                    test.words(),
                    f"{diverged} of {len(found)}" if diverged else "-",
                )
            )
    header = ("network", "depth", "parameters", "rate", "training error, %", "test error, %", "diverged")
    return Report(figures, [(TITLE, header, rows)], _check(figures, settings))


def _check(figures: dict[str, Any], settings: Settings) -> list[Check]:
    """The degradation: a statement about the full protocol, with its depths and three seeds."""
    if settings.quick or settings.depths is not None or settings.seeds < 3:
        return []
    checks = []
    for plain, residual, most in (("plain", "residual", MOST), ("plain_norm", "residual_norm", MOST), ("plain_3", "residual_3", math.inf)):
        first, last = ARMS[plain].depths[0], ARMS[plain].depths[-1]
        (shallow, deep), (shallow_residual, deep_residual) = (
            [figures[name][str(depth)]["training_error"]["median"] for depth in (first, last)] for name in (plain, residual)
        )
        checks.append(
            Check(
                f"{ARMS[plain].label}: the deepest at least {GAP:g} points above the shallowest",
                f"{shallow:.1f} % at {first} layers, {deep:.1f} % at {last}",
                deep - shallow >= GAP,
            )
        )
        limit = f"at most {most:g} % and " if most < math.inf else ""
        checks.append(
            Check(
                f"{ARMS[residual].label}: the deepest {limit}no worse than the shallowest plus {SLACK:g}",
                f"{shallow_residual:.1f} % at {first} layers, {deep_residual:.1f} % at {last}",
                deep_residual <= most and deep_residual <= shallow_residual + SLACK,
            )
        )
    return checks


def draw(runs: Runs, settings: Settings, folder: Path, machine: str) -> list[Path]:
    from . import _depth_figures

    arms = {name: _depth_figures.Arm(kind.label, depths(name, settings)) for name, kind in ARMS.items()}
    return _depth_figures.draw(runs, settings, folder, machine, arms)
