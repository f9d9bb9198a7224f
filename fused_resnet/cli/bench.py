"""Time the fused operators, blocks and networks beside the peers that are installed.

Peers: eager PyTorch, contiguous and channels_last, and torch.compile (where there is a C++ compiler). Ours: the same module,
converted, in both memory formats. All run in this process, their samples interleaved, so that the ratio is fair on a noisy
machine. Beside each time stands the largest error against float64, relative to the largest value of the result. The ratio is
the better eager peer's median over the better one of ours: above 1, ours is faster. Exit status 1 if a result is wrong.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .. import _extension, _machine, _timing, cases
from . import _contenders
from ._common import (
    DTYPES,
    Usage,
    add_json,
    milliseconds,
    need,
    picture,
    positive,
    positive_seconds,
    progress,
    seed,
    table,
    threads,
    write_json,
)

HELP = "the benchmark against the peers that are installed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--what", choices=("conv", "block", "network"), help="what to time (default: block)")
    parser.add_argument("--case", metavar="NAME", help="only the cases of this name, or whose name contains it")
    parser.add_argument("--model", choices=tuple(cases.NETWORKS), action="append", help="only of this network (repeatable)")
    parser.add_argument("--batch", type=positive, nargs="+", default=[1], help="batch sizes (default: 1)")
    parser.add_argument("--threads", type=positive, nargs="+", help="thread counts (default: torch's)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="default: float32")
    parser.add_argument(
        "--mode",
        choices=("forward", "train"),
        default="forward",
        help="forward: eval mode under inference_mode; train: forward and backward in train mode (default: forward)",
    )
    parser.add_argument(
        "--peers",
        metavar="A,B,...",
        help=f"of {', '.join(_contenders.CONTENDERS)} (default: all that are installed; compile is left out by --quick)",
    )
    parser.add_argument("--repeat", type=positive, default=30, help="samples of each contender (default: 30)")
    parser.add_argument("--seconds", type=positive_seconds, default=20.0, help="stop a case after this long (default: 20)")
    parser.add_argument("--quick", action="store_true", help="fewer samples, no torch.compile")
    parser.add_argument("--seed", type=seed, default=0, help="seed of the data (default: 0)")
    add_json(parser)
    parser.add_argument("--picture", type=picture, metavar="FILE", help="draw the times (needs matplotlib)")


def run(arguments: argparse.Namespace) -> int:
    chosen = _choose(arguments)
    peers = _peers(arguments)
    if arguments.picture is not None:
        need("matplotlib", "bench")
    counts = arguments.threads or [torch.get_num_threads()]
    jobs = [(case, batch, count) for count in counts for batch in arguments.batch for case in chosen]
    results: list[dict[str, Any]] = []
    with progress(len(jobs), "bench") as advance:
        for case, batch, count in jobs:
            with threads(count):
                results.append(_measure(case, batch, peers, arguments))
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
        "results": results,
        "geometric_mean": _mean(results),
        "warning": _contested(results),
    }
    _print(report, peers)
    write_json(arguments.json, report)
    if arguments.picture is not None:
        from ._pictures import draw_bench

        draw_bench(report, arguments.picture)
        print(f"picture: {arguments.picture}")
    return 0 if all(result["ok"] for result in results) else 1


def _choose(arguments: argparse.Namespace) -> Sequence[_contenders.Case]:
    """The cases that the options name, or the sentence that says which there are."""
    what = arguments.what or "block"
    models = arguments.model or list(cases.NETWORKS)
    available: list[Any]
    if what == "network":
        available = [_contenders.NetworkCase(name) for name in models]
    else:
        blocks = [block for block in cases.BLOCKS if block.network in models]
        available = blocks if what == "block" else [c for c in cases.CONVS if _belongs(c, blocks, models)]
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


def _peers(arguments: argparse.Namespace) -> list[str]:
    if arguments.peers is None:
        names = [name for name in _contenders.CONTENDERS if not _contenders.missing(name)]
        return [name for name in names if not (name == "compile" and arguments.quick)]
    names = [name for name in arguments.peers.split(",") if name]
    for name in names:
        if name not in _contenders.CONTENDERS:
            raise Usage(f"--peers: unknown peer {name!r}; there are {', '.join(_contenders.CONTENDERS)}")
        if _contenders.missing(name):
            raise Usage(f"--peers: {name} cannot run here: {_contenders.missing(name)}")
    if not names:
        raise Usage(f"--peers must name at least one of {', '.join(_contenders.CONTENDERS)}")
    return list(dict.fromkeys(names))


def _repeat(arguments: argparse.Namespace) -> int:
    return min(arguments.repeat, 7) if arguments.quick else int(arguments.repeat)


def _measure(case: _contenders.Case, batch: int, peers: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Build the contenders of one case, compare their results, then time them."""
    dtype = DTYPES[arguments.dtype]
    contest = _contenders.prepare(case, batch, dtype, arguments.mode, peers, arguments.seed)
    try:
        errors = contest.errors()
        timings = _timing.interleave(
            contest.calls, repeat=_repeat(arguments), seconds=arguments.seconds, least=5e-4 if arguments.quick else 2e-3
        )
    finally:
        contest.close()
    contenders = {name: {**timings[name].as_dict(), **errors[name]} for name in contest.calls}
    wrong = [name for name in contest.calls if not contest.ok(errors[name])]
    ours, eager = _best(contenders, _contenders.OURS), _best(contenders, _contenders.EAGER)
    return {
        "case": case.name,
        "batch": batch,
        "threads": torch.get_num_threads(),
        "gflop": case.flops(batch) * (3 if arguments.mode == "train" else 1) / 1e9,
        "contenders": contenders,
        "allowed_error": contest.allowed,
        "allowed_gradient_error": contest.allowed_gradient if arguments.mode == "train" else None,
        "wrong": wrong,
        "ok": not [name for name in wrong if name in _contenders.OURS],
        "best_eager": eager,
        "best_ours": ours,
        "ratio": contenders[eager]["median_ms"] / contenders[ours]["median_ms"] if eager and ours else None,
    }


def _is_contested(result: dict[str, Any]) -> bool:
    return any(timing["contested"] for timing in result["contenders"].values())


def _contested(results: list[dict[str, Any]]) -> str:
    """One sentence if cases were timed while other processes held the cores, or ''."""
    cases = [result["case"] for result in results if _is_contested(result)]
    if not cases:
        return ""
    return (
        f"other processes held the cores while {len(cases)} of {len(results)} cases were timed, whose ratios (?) are not to be "
        f"trusted: {', '.join(cases[:5])}{', ...' if len(cases) > 5 else ''}"
    )


def _best(contenders: dict[str, dict[str, Any]], names: tuple[str, ...]) -> str | None:
    there = [name for name in names if name in contenders]
    return min(there, key=lambda name: contenders[name]["median_ms"], default=None)


def _mean(results: list[dict[str, Any]]) -> float | None:
    ratios = [result["ratio"] for result in results if result["ratio"] is not None]
    return _timing.geometric_mean(ratios) if ratios else None


def _peak() -> float | None:
    """Multiply-adds that one core can do, in GFLOP/s, if the compiled module can measure it."""
    measure = getattr(_extension.cpu, "measure_fma_peak", None)
    return float(measure(0.2)) if measure is not None else None


def _print(report: dict[str, Any], peers: list[str]) -> None:
    results, peak = report["results"], report["fma_peak_gflops"]
    header = ["case", "N", "threads", *peers, "ratio"]
    header += ["% of FMA peak"] if peak and report["options"]["dtype"] == "float32" else []
    header += ["error ours", "error eager"]
    rows = []
    for result in results:
        row: list[object] = [result["case"], result["batch"], result["threads"]]
        row += [_cell(result["contenders"][name]) for name in peers]
        row.append("-" if result["ratio"] is None else f"{result['ratio']:.2f}{'?' if _is_contested(result) else ''}")
        if "% of FMA peak" in header:
            row.append(_share(result, peak))
        row += [_error(result, _contenders.OURS), _error(result, _contenders.EAGER)]
        rows.append(row)
    print(table(header, rows))
    print(
        "\nmilliseconds a call: median [20 % - 80 % quantile]; ratio: better eager / better of ours; error: largest, against "
        "float64, over the result's largest value"
    )
    for sentence in _remarks(report):
        print(sentence)
    if report["geometric_mean"] is not None:
        print(f"geometric mean of the ratios: {report['geometric_mean']:.2f} over {len(results)} cases")
    print(_machine.short())
    if report["warning"]:
        print(f"warning: {report['warning']}")


def _remarks(report: dict[str, Any]) -> Iterator[str]:
    for result in report["results"]:
        for name in result["wrong"]:
            for what in ("error", "gradient_error"):
                error = result["contenders"][name].get(what, 0.0)
                allowed = result[f"allowed_{what}"]
                if error is None or error > (allowed or 0.0):
                    got = "a NaN or an infinity" if error is None else f"{what} {error:.2g}"
                    yield f"WRONG  {result['case']}, {name}: {got}, allowed {allowed:.2g}"
    reason = _contenders.missing("compile")
    if reason:
        yield f"torch.compile was left out: {reason}"


def _cell(timing: dict[str, Any]) -> str:
    median, low, high = (milliseconds(timing[key] / 1e3) for key in ("median_ms", "q20_ms", "q80_ms"))
    return f"{median} [{low}-{high}]"


def _share(result: dict[str, Any], peak: float) -> str:
    """Arithmetic of a direct convolution in our time, over what the threads could do at most."""
    if result["best_ours"] is None:
        return "-"
    seconds = result["contenders"][result["best_ours"]]["median_ms"] / 1e3
    return f"{100 * result['gflop'] / seconds / (peak * result['threads']):.0f}"


def _error(result: dict[str, Any], names: tuple[str, ...]) -> str:
    there = [result["contenders"][name]["error"] for name in names if name in result["contenders"]]
    if not there:
        return "-"
    return "not finite" if None in there else f"{max(there):.1e}"
