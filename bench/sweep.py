"""Looks for shapes that fall off a cliff: square convolutions over a grid, fused against eager's separate calls.

    python bench/sweep.py --json bench/results/sweep.json [--batch 1 2 8 32] [--kernel 3 1] [--stride 1 2] [--most 60]

For each shape the median time of relu(conv2d(x) + shortcut) in eager PyTorch over ours, both in the same memory format, and
the algorithm that was chosen. Prints every shape below --least and exits with status 1 if there is one.
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import fused_resnet
from fused_resnet import _machine
from fused_resnet.benchmark.output import progress, write_json
from fused_resnet.benchmark.timing import geometric_mean, interleave
from fused_resnet.ops import plans, spec

CHANNELS = (3, 8, 16, 17, 32, 48, 64, 96, 128, 256, 512)
SIZES = (4, 7, 8, 14, 16, 28, 31, 56, 112)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def measure(n: int, c: int, size: int, kernel: int, stride: int, memory_format: torch.memory_format, most: float) -> dict[str, Any]:
    """Times of one shape in milliseconds; ``most``: seconds for it."""
    pad = kernel // 2
    out = (size + 2 * pad - kernel) // stride + 1
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, c, size, size, generator=generator).contiguous(memory_format=memory_format)
    w = (torch.randn(c, c, kernel, kernel, generator=generator) / (c * kernel * kernel) ** 0.5).contiguous(memory_format=memory_format)
    b = torch.randn(c, generator=generator)
    s = torch.randn(n, c, out, out, generator=generator).contiguous(memory_format=memory_format)

    def eager() -> torch.Tensor:
        return torch.relu_(F.conv2d(x, w, b, stride, pad).add_(s))

    def fused() -> torch.Tensor:
        return fused_resnet.conv_bias_add_relu(x, w, b, s, stride, pad)

    if not torch.allclose(eager(), fused(), rtol=1e-3, atol=1e-4):
        raise SystemExit(f"wrong result: {n} x {c} channels @ {size}, kernel {kernel}, stride {stride}")
    timings = interleave({"eager": eager, "fused": fused}, repeat=9, seconds=most, least=1e-3)
    plan = plans.find(spec.geometry_of_call, x, w, b, s, stride, pad, 1, 1, True)  # what the call above has used
    times = {name: timing.as_dict()["median_ms"] for name, timing in timings.items()}
    return {
        **times,
        "ratio": times["eager"] / times["fused"],
        "contested": any(timing.as_dict()["contested"] for timing in timings.values()),
        "algorithm": "library" if plan.kernel is None else plan.kernel.algorithm,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, nargs="+", default=CHANNELS)
    parser.add_argument("--size", type=int, nargs="+", default=SIZES)
    parser.add_argument("--batch", type=int, nargs="+", default=(1, 2, 8, 32))
    parser.add_argument("--kernel", type=int, nargs="+", default=(3,))
    parser.add_argument("--stride", type=int, nargs="+", default=(1,))
    parser.add_argument("--format", choices=tuple(FORMATS), nargs="+", default=tuple(FORMATS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--least", type=float, default=1.0, help="a ratio below this is reported (default: 1.0)")
    parser.add_argument("--most", type=float, default=20.0, help="seconds for one shape (default: 20)")
    parser.add_argument("--most-gflop", type=float, default=1e9, help="leave out shapes of more arithmetic than this")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    grid = [
        shape
        for shape in product(options.kernel, options.stride, options.format, options.batch, options.channels, options.size)
        if 2 * shape[3] * shape[4] ** 2 * shape[5] ** 2 * shape[0] ** 2 / shape[1] ** 2 <= options.most_gflop * 1e9
    ]
    results = []
    with torch.inference_mode(False), torch.no_grad(), progress(len(grid), "sweep") as advance:
        for kernel, stride, name, n, c, size in grid:
            found = measure(n, c, size, kernel, stride, FORMATS[name], options.most)
            if found["ratio"] < options.least or found["contested"]:
                found = measure(n, c, size, kernel, stride, FORMATS[name], options.most)  # was it the machine?
            results.append({"kernel": kernel, "stride": stride, "format": name, "batch": n, "channels": c, "size": size, **found})
            advance("")
    below = sorted((r for r in results if r["ratio"] < options.least), key=lambda r: float(r["ratio"]))
    for r in below:
        where = f"{r['batch']} x {r['channels']} @ {r['size']}, kernel {r['kernel']}, stride {r['stride']}, {r['format']}"
        times = f"eager {r['eager']:.3f} ms, fused {r['fused']:.3f} ms ({r['algorithm']})"
        print(f"{r['ratio']:.2f}{'?' if r['contested'] else ' '} {where}: {times}")
    mean = geometric_mean([r["ratio"] for r in results])
    lowest = min(r["ratio"] for r in results)
    print(f"{len(results)} shapes, {len(below)} below {options.least}; lowest {lowest:.2f}, geometric mean {mean:.2f}")
    print(_machine.short())
    report = {"machine": _machine.describe(paths=False), "threads": options.threads, "lowest": lowest, "geometric_mean": mean}
    write_json(options.json, {**report, "results": results})
    return 1 if below else 0


if __name__ == "__main__":
    sys.exit(main())
