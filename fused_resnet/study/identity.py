"""The identity is easy for a residual block, and not for a plain pair of layers.

Claim 1: with W[l+2] = 0 and b[l+2] = 0 a residual block is a[l+2] = g(0 + a[l]) = a[l], for every a[l] >= 0, bit for bit. Under batch
norm gamma = beta = 0 does it. A plain pair of layers with the same zeros gives 0: everything is lost.
Claim 2: a stack of plain layers, trained to hand its input through, fails, and the more the deeper it is; a residual stack of the
same depth and the same random start comes much closer, and one that starts at zero has nothing to learn at any depth.
Source: the lesson ("the identity function is easy for a residual block to learn"); He et al. 2015, section 3.1.
Refuted if: one bit differs, or a plain stack comes as close to the identity as the residual one of its depth.

The input of the second part is real: what a random stem makes of the digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._data import Data
from ._network import Arm, convolutions, last_norm, make_block, make_identity
from ._protocol import Check, Report, Runs, Settings, Spread, Task, select, task

TITLE = "The identity"
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
# Channels and map: multiples of a vector register and not, one pixel, maps that Winograd's algorithm takes and that it leaves.
SHAPES = ((4, 1, 1), (8, 8, 8), (12, 7, 5), (20, 9, 10), (32, 14, 14), (64, 8, 8), (64, 28, 28), (128, 7, 7))
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}

WIDTH, RATE = 8, 0.1  # of {.003, .01, .03, .1} the best for every stack
BLOCKS, QUICK_BLOCKS = (1, 2, 4, 8), (1, 4)
STEPS, QUICK_STEPS = 150, 100
STACKS = {
    "plain": ("plain pairs, He start", Arm(plain=True, start="he")),
    "residual": ("residual blocks, He start", Arm(start="he")),
    "residual_zero": ("residual blocks, zero start", Arm()),
}


def tasks(settings: Settings) -> list[Task]:
    exact = [task("identity", what="exact", dtype=dtype) for dtype in DTYPES]
    steps = QUICK_STEPS if settings.quick else STEPS
    return exact + [
        task("identity", weight=blocks * steps / 10, what="learn", stack=stack, blocks=blocks, seed=seed, steps=steps)
        for stack in STACKS
        for blocks in (QUICK_BLOCKS if settings.quick else BLOCKS)
        for seed in range(settings.seeds)
    ]


def perform(data: Data, what: str, **parameters: Any) -> dict[str, Any]:
    return exact(**parameters) if what == "exact" else learn(data, **parameters)


def zero_last(arm: Arm, channels: int, generator: torch.Generator) -> nn.Module:
    """A block of random weights whose last layer is zero: W = 0 and b = 0, or gamma = 0 and beta = 0."""
    block = make_block(arm, channels, channels, 1, nn.BatchNorm2d if arm.norm else nn.Identity)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(generator=generator)
        for parameter in (last_norm(block) if arm.norm else convolutions(block)[-1]).parameters():
            parameter.zero_()
    return block


@torch.no_grad()
def exact(dtype: str) -> dict[str, Any]:
    """Blocks of 2 and 3 layers, without norm and with batch norm in both modes, over SHAPES and FORMATS: through the fused kernels
    and as the block's definition says, for x >= 0; and the plain pair of the same weights."""
    generator = torch.Generator().manual_seed(0)
    cases, unequal, kept = 0, [], 0
    for layers in (2, 3):
        for norm in (False, True):
            for channels, height, width in SHAPES:
                x = torch.randn(3, channels, height, width, generator=generator).relu().to(DTYPES[dtype])
                for name, memory_format in FORMATS.items():
                    x = x.contiguous(memory_format=memory_format)
                    block = zero_last(Arm(layers=layers, norm=norm), channels, generator).to(x.dtype)
                    plain = zero_last(Arm(plain=True, layers=layers, norm=norm), channels, generator).to(x.dtype)
                    for training in (False, True) if norm else (False,):
                        block.train(training)
                        for way, y in (("fused", block(x)), ("definition", block._plain_forward(x))):  # type: ignore[operator]
                            cases += 1
                            if not torch.equal(y, x):
                                unequal.append(f"{layers} layers, {channels}x{height}x{width}, {name}, {way}")
                        kept += int(plain.train(training)(x).count_nonzero())
    return {"cases": cases, "unequal": unequal, "plain_values_kept": kept}


def learn(data: Data, stack: str, blocks: int, seed: int, steps: int) -> dict[str, Any]:
    """Train a stack of blocks to give what it gets: mean squared error, SGD with momentum 0.9 and a cosine schedule.

    errors: |y - x| / |x| in the 2-norm, every tenth of the steps, the start first. A stack that gives nothing has 1.
    """
    generator = torch.Generator().manual_seed(seed)
    arm = STACKS[stack][1]
    stem = torch.randn(WIDTH, 1, 3, 3, generator=generator) / 3
    x = F.conv2d(data.images[:512], stem, padding=1).relu()
    x = x / x.square().mean().sqrt()
    network = nn.Sequential(*(make_block(arm, WIDTH, WIDTH, 1, nn.Identity) for _ in range(blocks)))
    with torch.no_grad():
        for block in network:
            for layer in convolutions(block):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
                assert layer.bias is not None
                layer.bias.zero_()
            if arm.start == "identity":
                make_identity(block, arm)
    sgd = torch.optim.SGD(network.parameters(), RATE, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, steps)
    errors = [distance(network, x)]
    for step in range(1, steps + 1):
        chosen = x[torch.randperm(len(x), generator=generator)[:64]]
        loss = (network(chosen) - chosen).square().mean()
        sgd.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        # Eight residual blocks from He's start give some 2^4 times their input, and a step as long as that gradient would end the run.
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        sgd.step()
        schedule.step()
        if step % (steps // 10) == 0:
            errors.append(distance(network, x))
    return {"errors": errors}


@torch.no_grad()
def distance(network: nn.Module, x: Tensor) -> float:
    """|network(x) - x| / |x|."""
    return round(((network(x) - x).norm() / x.norm()).item(), 6)


def report(runs: Runs, settings: Settings) -> Report:
    found = [run["result"] for run in select(runs, "identity", what="exact")]
    cases, kept = sum(result["cases"] for result in found), sum(result["plain_values_kept"] for result in found)
    unequal = [case for result in found for case in result["unequal"]]
    figures: dict[str, Any] = {"cases": cases, "unequal": unequal, "plain_values_kept": kept, "learned": {}}
    rows: list[Sequence[object]] = []
    checks = [
        Check("the last layer zero: the block equals the identity, bit for bit", f"{cases - len(unequal)} of {cases} cases", not unequal),
        Check("a plain pair of layers with the same zeros keeps nothing", f"{kept} values of its output are not zero", kept == 0),
    ]
    blocks = QUICK_BLOCKS if settings.quick else BLOCKS
    ends = {name: [_ends(runs, name, count) for count in blocks] for name in STACKS}
    for name, (label, _) in STACKS.items():
        figures["learned"][name] = {str(count): end._asdict() for count, end in zip(blocks, ends[name], strict=True)}
        rows.append((label, *(end.words(".3f") for end in ends[name])))
    closer = all(r.median < p.median for r, p in zip(ends["residual"], ends["plain"], strict=True))
    measured = ", ".join(f"{r.median:.3f} against {p.median:.3f}" for r, p in zip(ends["residual"], ends["plain"], strict=True))
    checks.append(Check("from the same start residual blocks learn the identity better than plain pairs", measured, closer))
    header = ("|y - x| / |x| after training", *(f"{count} block{'s' if count > 1 else ''}" for count in blocks))
    return Report(figures, [(TITLE, header, rows)], checks)


def _ends(runs: Runs, stack: str, blocks: int) -> Spread:
    return Spread.of([run["result"]["errors"][-1] for run in select(runs, "identity", stack=stack, blocks=blocks)])


def draw(runs: Runs, settings: Settings, folder: Path, machine: str) -> list[Path]:
    from . import _figures

    blocks = QUICK_BLOCKS if settings.quick else BLOCKS
    with _figures.page(folder / "study_identity.png", 1, (6.4, 4.2), machine) as (figure, (axes,)):
        for name, (label, _) in STACKS.items():
            _figures.line(axes, blocks, [_ends(runs, name, count) for count in blocks], label, *_figures.STACKS[name])
        axes.set_xscale("log", base=2)
        axes.set_xticks(blocks, [str(count) for count in blocks])
        axes.set_ylim(-0.03, 1.05)
        axes.axhline(1, color="#9aa0a6", linewidth=0.8, linestyle=":")
        axes.text(blocks[-1], 1, "all is lost: y = 0", fontsize=8, color="#5f6368", ha="right", va="bottom")
        _figures.name_axes(axes, "blocks of two 3x3 layers in the stack", "distance to the identity, |y - x| / |x|")
        _figures.legend(axes, _figures.seeds(settings))
        figure.suptitle("How close stacks of layers come to y = x when they are trained to", fontsize=10, x=0.01, ha="left")
    return [folder / "study_identity.png"]
