"""Max pooling by our kernel beside the module itself: where is it slower?

    python bench/pooling.py --json bench/results/pooling.json [--threads 1 2]

A network's own pooling and others, in float32 and bfloat16 and both memory formats: the median time of ``nn.MaxPool2d`` over ours, taken
in turn. Prints every shape, and exits with status 1 if one is below --least.
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fused_resnet import _machine
from fused_resnet._settings import Plans
from fused_resnet.benchmark.output import progress, table, write_json
from fused_resnet.benchmark.timing import interleave
from fused_resnet.runtime.pooling import max_pool

# (channels, size, kernel, stride, padding): of ResNets, of networks for small images, and windows that overlap more
SHAPES = ((64, 112, 3, 2, 1), (64, 32, 2, 2, 0), (256, 28, 3, 2, 1), (64, 7, 2, 2, 0), (192, 28, 3, 1, 1), (64, 28, 5, 1, 2), (3, 224, 3, 3, 0))
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def measure(shape: tuple[int, ...], batch: int, dtype: str, memory_format: str, seconds: float) -> dict[str, Any]:
    """Times of one pooling in milliseconds; ``seconds``: at most, for it."""
    channels, size, kernel, stride, padding = shape
    module, plans = nn.MaxPool2d(kernel, stride, padding), Plans(1)
    x = torch.randn(batch, channels, size, size).to(DTYPES[dtype]).contiguous(memory_format=FORMATS[memory_format])

    def ours() -> torch.Tensor:
        y = max_pool(plans, module, x)
        return module(x) if y is None else y

    if not torch.equal(ours(), module(x)):
        raise SystemExit(f"wrong result: {shape} in {dtype}, {memory_format}")
    kernel_is_ours = max_pool(plans, module, x) is not None
    contenders = {"module": lambda: module(x), "ours": ours}
    timings = interleave(contenders, repeat=9, seconds=seconds, least=1e-3)
    times = {name: timing.as_dict()["median_ms"] for name, timing in timings.items()}
    contested = any(timing.as_dict()["contested"] for timing in timings.values())
    return {**times, "ratio": times["module"] / times["ours"], "contested": contested, "kernel": "ours" if kernel_is_ours else "module"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=(1, 8))
    parser.add_argument("--threads", type=int, nargs="+", default=(1, torch.get_num_threads()))
    parser.add_argument("--seconds", type=float, default=0.5, help="for each pooling, at most")
    parser.add_argument("--least", type=float, default=0.97)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results, rows = [], []
    cases = list(product(sorted(set(options.threads)), options.batch, SHAPES, DTYPES, FORMATS))
    with torch.no_grad(), progress(len(cases), "pooling") as step:
        for threads, batch, shape, dtype, memory_format in cases:
            step(f"{shape}, {dtype}")
            torch.set_num_threads(threads)
            found = measure(shape, batch, dtype, memory_format, options.seconds)
            case = {"threads": threads, "batch": batch, "shape": shape, "dtype": dtype, "memory_format": memory_format}
            results.append({**case, **found})
            rows.append([*case.values(), f"{found['module']:.3f}", f"{found['ours']:.3f}", f"{found['ratio']:.2f}", found["kernel"]])
    print(table(["threads", "N", "C, size, kernel, stride, padding", "dtype", "format", "module ms", "ours ms", "ratio", "kernel"], rows))
    print(_machine.short())
    write_json(options.json, {"machine": _machine.describe(paths=False), "results": results})
    return 1 if any(result["ratio"] < options.least for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
