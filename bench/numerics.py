"""Rounding errors: of each residual block, ours with fast and with strict numerics and PyTorch's own, against float64.

    python bench/numerics.py --json bench/results/numerics.json

The error is |result - truth| / |truth| in the 2-norm, the largest of --seeds runs; weights and input are rounded to the dtype
first, so that only the arithmetic counts.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import torch
from torch import nn

import fused_resnet
from fused_resnet import _machine, cases, testing
from fused_resnet.benchmark.output import table, write_json
from fused_resnet.cli.arguments import DTYPES

CASES = ("basic 64 @ 56x56", "basic 128 @ 28x28", "basic 256 @ 14x14", "basic 512 @ 7x7")
BOTTLENECKS = ("bottleneck 256 @ 56x56", "bottleneck 512 @ 28x28", "bottleneck 1024 @ 14x14", "bottleneck 2048 @ 7x7")


def errors(case: cases.BlockCase, dtype: torch.dtype, seeds: int, batch: int) -> dict[str, float]:
    worst = {"eager": 0.0, "strict": 0.0, "fast": 0.0}
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        low = case.eager(generator).to(dtype)
        given = case.make(batch, dtype, torch.channels_last, generator)
        truth = copy.deepcopy(low).double()(given.double())
        low = low.to(memory_format=torch.channels_last)
        fused = nn.Sequential(copy.deepcopy(low))
        fused_resnet.fuse_(fused)
        results = {"eager": low(given)}
        for numerics in ("strict", "fast"):
            fused_resnet.set_numerics(numerics)
            results[numerics] = fused(given)
        for name, result in results.items():
            worst[name] = max(worst[name], testing.norm_error(result, truth))
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows, results = [], []
    with torch.no_grad():
        for dtype in ("float32", "bfloat16"):
            for name in (*CASES, *BOTTLENECKS):
                (case,) = [c for c in cases.BLOCKS if c.name == name]
                found = errors(case, DTYPES[dtype], options.seeds, options.batch)
                results.append({"case": name, "dtype": dtype, **found})
                rows.append([name, dtype, *(f"{found[key]:.1e}" for key in ("eager", "strict", "fast"))])
    print(table(["case", "dtype", "PyTorch", "strict", "fast"], rows))
    print(_machine.short())
    write_json(options.json, {"machine": _machine.describe(paths=False), "batch": options.batch, "seeds": options.seeds, "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
