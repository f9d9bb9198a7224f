"""Time the fused operators, blocks and networks beside the peers that are installed.

Peers: eager PyTorch, contiguous and channels_last, torch.compile with freezing, ONNX Runtime, OpenVINO, ncnn and MNN. Ours: the
same module, converted, in both memory formats. Each runs in a process of its own; the processes take turns, sample by sample,
so that one at a time computes and a ratio is fair on a noisy machine. Results are compared with float64 before anything is
timed. The ratio is the best right peer's median over the better one of ours: above 1, ours is faster. Exit status 1 if a
result of ours is wrong or missing.

--device cuda: eager, torch.compile with max-autotune, cuDNN's own fusion, and ours, in one process; time by CUDA events, buffers
rotated, called from Python and in CUDA graphs. bfloat16 by default.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from .. import _extension, _machine, cases
from ..benchmark import contenders
from ..benchmark.contest import BACKWARD, Case, GradientCase, NetworkCase, prepare
from ..benchmark.output import progress, write_json
from ..benchmark.team import Team
from ..benchmark.timing import geometric_mean
from ..ops.spec import Operand
from . import _bench_table
from .arguments import CUDA_DTYPES, DTYPES, Usage, add_device, add_json, device, need, picture, positive, positive_seconds, seed, threads

HELP = "the benchmark against the peers that are installed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--what", choices=("conv", "block", "network"), help="what to time (default: block)")
    parser.add_argument("--case", metavar="NAME", help="only the cases of this name, or whose name contains it")
    parser.add_argument("--model", choices=tuple(cases.NETWORKS), action="append", help="only of this network (repeatable)")
    parser.add_argument("--batch", type=positive, nargs="+", default=[1], help="batch sizes (default: 1)")
    parser.add_argument("--threads", type=positive, nargs="+", help="thread counts (default: torch's)")
    add_device(parser)
    parser.add_argument("--dtype", choices=tuple(CUDA_DTYPES), help="default: float32, on --device cuda bfloat16")
    parser.add_argument(
        "--mode",
        choices=("forward", "train", "frozen"),
        default="forward",
        help="forward: eval mode under inference_mode; train: forward and backward in train mode, every weight written between calls, "
        "and with --what conv also each gradient by itself; frozen: as train, with norms that keep their statistics, in eval mode "
        "(default: forward)",
    )
    parser.add_argument(
        "--peers",
        metavar="A,B,...",
        help=f"of {', '.join(contenders.CONTENDERS)} (default: all that are installed and suit; compile is left out by --quick)",
    )
    parser.add_argument("--repeat", type=positive, default=30, help="samples of each contender (default: 30)")
    parser.add_argument("--seconds", type=positive_seconds, default=20.0, help="stop a case after this long (default: 20)")
    parser.add_argument("--quick", action="store_true", help="fewer samples, no torch.compile")
    parser.add_argument("--seed", type=seed, default=0, help="seed of the data (default: 0)")
    add_json(parser)
    parser.add_argument("--picture", type=picture, metavar="FILE", help="draw the speedups (needs matplotlib), 20 cases a file")


def run(arguments: argparse.Namespace) -> int:
    where = device(arguments.device)
    arguments.dtype = arguments.dtype or ("bfloat16" if where.type == "cuda" else "float32")
    if where.type == "cuda":
        from . import _gpu_bench

        given = _gpu_bench.check(arguments)
        return _gpu_bench.run(arguments, _choose(arguments), given, where)
    if arguments.dtype not in DTYPES:
        raise Usage(f"--dtype: {arguments.dtype} is for --device cuda")
    chosen = _choose(arguments)
    names = _names(arguments)
    if arguments.picture is not None:
        need("matplotlib", "bench")
    counts = arguments.threads or [torch.get_num_threads()]
    results: list[dict[str, Any]] = []
    with progress(len(counts) * len(arguments.batch) * len(chosen), "bench") as advance:
        for count in counts:
            with threads(count), Team({name: contenders.CONTENDERS[name].builder for name in names}, count) as team:
                for batch in arguments.batch:
                    for case in chosen:
                        results.append(_measure(case, batch, team, names, arguments))
                        advance(case.name)
    report = {
        "machine": _machine.describe(paths=False),
        "fma_peak_gflops": _peak(),
        "options": {
            "what": arguments.what or "block",
            "dtype": arguments.dtype,
            "mode": arguments.mode,
            "repeat": _repeat(arguments),
            "seconds": arguments.seconds,
            "seed": arguments.seed,
        },
        "remarks": [] if arguments.peers else contenders.remarks(arguments.dtype, arguments.mode),
        "results": results,
        "geometric_mean": _mean(results, "ratio"),
        "geometric_mean_eager": _mean(results, "ratio_eager"),
        "warning": _contested(results),
    }
    _bench_table.show(report, names)
    write_json(arguments.json, report)
    if arguments.picture is not None:
        from ._pictures import draw_bench

        for path in draw_bench(report, arguments.picture):
            print(f"picture: {path}")
    return 0 if all(result["ok"] for result in results) else 1


def _choose(arguments: argparse.Namespace) -> Sequence[Any]:
    """The cases that the options name, or the sentence that says which there are."""
    what = arguments.what or "block"
    models = arguments.model or list(cases.NETWORKS)
    available: list[Any]
    if what == "network":
        available = [NetworkCase(name) for name in models]
    else:
        blocks = [block for block in cases.BLOCKS if block.network in models]
        convs = [c for c in cases.CONVS if _belongs(c, blocks, models)]
        available = blocks if what == "block" else convs
        if what == "conv" and arguments.mode == "train":
            bare = dict.fromkeys(replace(c, bias=False, shortcut=False, relu=False) for c in convs)
            operands: tuple[Operand, ...] = ("input", "weight")
            available = [*convs, *(GradientCase(operand, conv) for operand in operands for conv in bare)]
    if arguments.case is None:
        return available
    found: Sequence[Any] = cases.find(arguments.case, available)
    if not found:
        names = "; ".join(case.name for case in available)
        raise Usage(f"--case: no {what} case is called or contains {arguments.case!r}; there are: {names}")
    return found


def _belongs(conv: cases.ConvCase, blocks: list[cases.BlockCase], models: list[str]) -> bool:
    stems = {"resnet18": cases.STEMS[0], "resnet50": cases.STEMS[0], "cifar20": cases.STEMS[1]}
    return conv in {stems[model] for model in models} or any(conv in block.convs() for block in blocks)


def _names(arguments: argparse.Namespace) -> list[str]:
    """The contenders that the options name, or all that are installed and suit."""
    dtype, mode = arguments.dtype, arguments.mode
    if arguments.peers is None:
        fit = [name for name in contenders.CONTENDERS if not contenders.missing(name) and not contenders.unsuitable(name, dtype, mode)]
        return [name for name in fit if not (name == "compile" and arguments.quick)]
    names = [name for name in arguments.peers.split(",") if name]
    for name in names:
        if name not in contenders.CONTENDERS:
            raise Usage(f"--peers: unknown peer {name!r}; there are {', '.join(contenders.CONTENDERS)}")
        reason = contenders.unsuitable(name, dtype, mode) or contenders.missing(name)
        if reason:
            raise Usage(f"--peers: {name} cannot run here: {reason}")
    if not names:
        raise Usage(f"--peers must name at least one of {', '.join(contenders.CONTENDERS)}")
    return list(dict.fromkeys(names))


def _repeat(arguments: argparse.Namespace) -> int:
    return min(arguments.repeat, 7) if arguments.quick else int(arguments.repeat)


def _measure(case: Case, batch: int, team: Team, names: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Build the contenders of one case one after the other, compare their results, then time them side by side."""
    contest = prepare(case, batch, DTYPES[arguments.dtype], arguments.mode, arguments.seed)
    team.open(contest.task)
    errors: dict[str, dict[str, float | None]] = {}
    for name in names:
        results = team.build(name, least=5e-4 if arguments.quick else 2e-3, warmup=2 if arguments.quick else 4)
        if results is not None:
            errors[name] = contest.errors(results)
    timings = team.time(_repeat(arguments), arguments.seconds)
    timed = {name: {**timing.as_dict(), **errors[name]} for name, timing in timings.items()}
    wrong = [name for name in timed if not contest.ok(errors[name])]
    right = {name: timing for name, timing in timed.items() if name not in wrong}
    ours, eager, peer = (_best(right, kind) for kind in (contenders.OURS, contenders.EAGER, contenders.peers()))
    mine = timed[ours]["median_ms"] if ours else None
    return {
        "case": case.name,
        "batch": batch,
        "threads": torch.get_num_threads(),
        "gflop": case.flops(batch) * (3 if contest.task.mode in BACKWARD else 1) / 1e9,
        "contenders": timed,
        "failed": dict(team.failed),
        "allowed_error": contest.allowed,
        "allowed_gradient_error": max(contest.allowed_gradients, default=None),
        "wrong": wrong,
        "ok": not [name for name in (*wrong, *team.failed) if name in contenders.OURS],
        "best_eager": eager,
        "best_peer": peer,
        "best_ours": ours,
        "ratio": timed[peer]["median_ms"] / mine if peer and mine else None,
        "ratio_eager": timed[eager]["median_ms"] / mine if eager and mine else None,
    }


def _contested(results: list[dict[str, Any]]) -> str:
    """One sentence if cases were timed while other processes held the cores, or ''."""
    cases = [result["case"] for result in results if _bench_table.is_contested(result)]
    if not cases:
        return ""
    return (
        f"other processes held the cores while {len(cases)} of {len(results)} cases were timed, whose ratios (?) are not to be "
        f"trusted: {', '.join(cases[:5])}{', ...' if len(cases) > 5 else ''}"
    )


def _best(timed: dict[str, dict[str, Any]], names: Sequence[str]) -> str | None:
    there = [name for name in names if name in timed]
    return min(there, key=lambda name: timed[name]["median_ms"], default=None)


def _mean(results: list[dict[str, Any]], what: str) -> float | None:
    ratios = [result[what] for result in results if result[what] is not None]
    return geometric_mean(ratios) if ratios else None


def _peak() -> float | None:
    """Multiply-adds that one core can do, in GFLOP/s, if the compiled module can measure it."""
    measure = getattr(_extension.cpu, "measure_fma_peak", None)
    return float(measure(0.2)) if measure is not None else None
