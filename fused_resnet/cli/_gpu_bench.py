"""``fused-resnet bench --device cuda``: the same cases on a GPU, contenders in one process, calls from Python and CUDA graphs.

``bench/gpu_report.py`` runs the same contests over whole tables, and much else.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from .. import _machine
from ..benchmark import gpu_contest, gpu_modules, gpu_peers
from ..benchmark.contest import NetworkCase
from ..benchmark.gpu_timing import release
from ..benchmark.output import milliseconds, progress, table, write_json
from ..benchmark.timing import geometric_mean
from ..cases import BlockCase, ConvCase
from .arguments import CUDA_DTYPES, Usage

Case = ConvCase | BlockCase | NetworkCase


def check(arguments: argparse.Namespace) -> list[str]:
    """The contenders that the options name; or what is wrong with the options."""
    what = arguments.what or "block"
    if arguments.mode == "train" and what != "network":
        raise Usage("--mode train: on --device cuda it is for --what network")
    if arguments.mode == "frozen":
        raise Usage("--mode frozen: it is for --device cpu")
    if arguments.picture is not None:
        raise Usage("--picture: on --device cuda there is none yet; --json has the figures")
    if arguments.threads is not None:
        raise Usage("--threads: it is for --device cpu")
    known: tuple[str, ...] = gpu_peers.CONVOLUTION if what == "conv" else gpu_peers.MODULE
    if arguments.mode == "train":
        known = ("channels_last", "compile", "ours")
    if arguments.peers is None:
        return [name for name in known if not (name == "compile" and arguments.quick)]
    names = [name for name in arguments.peers.split(",") if name]
    for name in names:
        if name not in known:
            raise Usage(f"--peers: unknown peer {name!r}; on --device cuda there are {', '.join(known)}")
    if not names:
        raise Usage(f"--peers must name at least one of {', '.join(known)}")
    return names


def run(arguments: argparse.Namespace, chosen: Sequence[Case], names: Sequence[str], device: torch.device) -> int:
    dtype = CUDA_DTYPES[arguments.dtype]
    repeat, seconds = (min(arguments.repeat, 7), min(arguments.seconds, 1.0)) if arguments.quick else (arguments.repeat, arguments.seconds)
    effort = gpu_contest.Effort(repeat, seconds / 2)
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    results = []
    try:
        with progress(len(arguments.batch) * len(chosen), "bench") as advance:
            for batch in arguments.batch:
                for case in chosen:
                    torch.manual_seed(arguments.seed)
                    results.append(_measure(case, batch, dtype, device, names, arguments.mode, effort))
                    release(device)
                    advance(results[-1]["case"])
    finally:
        torch.backends.cudnn.benchmark = before
    means = {kind: _mean(results, f"ratio_{kind}") for kind in ("times", "graphs")}
    _show(results, names, means, device)
    options = {key: getattr(arguments, key) for key in ("what", "batch", "dtype", "mode", "seed", "device")}
    report = {"machine": _machine.describe(paths=False), "options": {**options, "what": arguments.what or "block"}, "results": results}
    write_json(arguments.json, {**report, "geometric_means": means})
    return 0 if all(result["ok"] for result in results) else 1


def _measure(
    case: Case, batch: int, dtype: torch.dtype, device: torch.device, names: Sequence[str], mode: str, effort: gpu_contest.Effort
) -> dict[str, Any]:
    if isinstance(case, ConvCase):
        return gpu_contest.convolution(case.at(batch), dtype, device, names, effort)
    if isinstance(case, BlockCase):
        return gpu_modules.block(case, batch, dtype, device, names, effort)
    if mode == "train":
        return gpu_modules.training("bias only", case.name, batch, dtype, False, device, names, effort)
    return gpu_modules.network(case.name, batch, dtype, device, names, effort)


def _mean(results: Sequence[dict[str, Any]], key: str) -> float | None:
    ratios = [result[key] for result in results if result.get(key)]
    return geometric_mean(ratios) if ratios else None


def _show(results: Sequence[dict[str, Any]], names: Sequence[str], means: dict[str, float | None], device: torch.device) -> None:
    rows = []
    for result in results:
        for kind, how in (("times", "Python"), ("graphs", "graph")):
            if kind in result:
                times = [result[kind].get(name) for name in names]
                ratio = result[f"ratio_{kind}"]
                cells = ["-" if t is None else milliseconds(t["median_ms"] / 1e3) for t in times]
                rows.append((result["case"], result["batch"], how, *cells, "-" if ratio is None else f"{ratio:.2f}"))
    print(table(("case", "N", "called from", *names, "ratio"), rows))
    print("\nmedian milliseconds a call on rotated buffers (--json has the quantiles); ratio: best peer / better of ours")
    for result in results:
        for name, why in (*result["failed"].items(), *result["left_out"].items()):
            print(f"{'FAILED' if name in result['failed'] else 'left out'}  {result['case']}, {name}: {why}")
        for name in result["wrong"]:
            print(f"WRONG  {result['case']}, {name}: error {result['errors'][name]}, allowed {result['allowed_error']:.2g}")
    for kind, how in (("times", "called from Python"), ("graphs", "in CUDA graphs")):
        mean = means[kind]
        if mean is not None:
            print(f"geometric mean of the ratios, {how}: {mean:.2f} over {len(results)} cases")
    print(_machine.short(device))
