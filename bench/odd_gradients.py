"""Gradients of convolutions of random shapes beside the library's: where there is no table to be tuned to.

    python bench/odd_gradients.py --json bench/results/odd_gradients.json [--count 100] [--seed 0] [--threads 2]

Shapes are drawn from a seed: batch 1 to 32, 8 to 300 channels, maps of 4 to 60 pixels a side, half of them 3x3 with stride 1, the others
1x1, strided, dilated, 5x5 and 7x7. For each, and for the gradient in its input and in its weight, the library's median time in its better
memory format over our operator's in the better one. Where the operator takes the library's (``ops/select.py``), it does so here. Prints the
lowest ratios.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from fused_resnet import _machine
from fused_resnet.benchmark.output import progress, write_json
from fused_resnet.benchmark.timing import geometric_mean, interleave
from fused_resnet.cases import ConvCase
from fused_resnet.ops.functions import gradient
from fused_resnet.ops.gradients import gradient_of, library_gradient
from fused_resnet.ops.plans import backends
from fused_resnet.ops.spec import Operand, geometry_of_call, spec_of
from fused_resnet.testing import norm_error

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Kernel, stride, padding, dilation, and how often.
KINDS = (
    ((3, 1, 1, 1), 6),
    ((1, 1, 0, 1), 3),
    ((3, 2, 1, 1), 1),
    ((1, 2, 0, 1), 1),
    ((3, 1, 2, 2), 1),
    ((5, 1, 2, 1), 1),
    ((7, 2, 3, 1), 1),
)
LARGEST = 3e7  # elements of an input or output: larger ones are drawn again


def shapes(seed: int) -> Iterator[ConvCase]:
    """Without end."""
    draw = random.Random(seed)

    def number(least: int, most: int) -> int:
        return round(math.exp(draw.uniform(math.log(least), math.log(most))))

    kinds, weights = zip(*KINDS, strict=True)
    while True:
        batch, channels, outputs, height = number(1, 32), number(8, 300), number(8, 300), number(4, 60)
        width = min(max(height + draw.randint(-3, 3), 4), 60)
        ((kernel, stride, padding, dilation),) = draw.choices(kinds, weights)
        pairs = (kernel, kernel), (stride, stride), (padding, padding), (dilation, dilation)
        if batch * max(channels, outputs) * height * width <= LARGEST:
            yield ConvCase(channels, outputs, (height, width), *pairs, batch=batch, bias=False, relu=False)


def measure(case: ConvCase, operand: Operand, most: float) -> dict[str, Any]:
    """Times of one gradient in milliseconds; ``most``: seconds for it."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(shape, generator=generator) for shape in (case.input_shape, case.weight_shape))
    dy = torch.randn(case.output_shape, generator=generator)
    geometry = geometry_of_call(w, case.stride, case.padding, case.dilation)
    calls, whose = {}, {}
    for name, memory_format in FORMATS.items():
        grad, input, weight = (t.contiguous(memory_format=memory_format) for t in (dy, x, w))
        other, size = (weight, x.shape) if operand == "input" else (input, w.shape)
        calls[f"library {name}"] = partial(library_gradient, operand, grad, other, size, memory_format, geometry)
        calls[name] = partial(gradient, operand, grad, other, size, name == "channels_last", geometry)
        spec = gradient_of(operand, spec_of(input, weight, None, None, geometry, False))
        whose[name] = "library" if backends.cpu.why_general_gradient(operand, spec) else "ours"
    with torch.no_grad():
        found = {name: call() for name, call in calls.items()}
        for name, result in found.items():
            if not norm_error(result, found["library contiguous"].double()) <= 1e-5:
                raise SystemExit(f"wrong result: {operand} gradient of {case.name}, {name}")
        timings = interleave(calls, repeat=9, seconds=most, least=1e-3)
    times = {name: timing.as_dict()["median_ms"] for name, timing in timings.items()}
    library, ours = (min(t for name, t in times.items() if name.startswith("library") is theirs) for theirs in (True, False))
    return {
        "case": f"{operand} gradient of {case.name}",
        **times,
        "ratio": library / ours,
        "contested": any(timing.as_dict()["contested"] for timing in timings.values()),
        "whose": whose,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="shapes (default: 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--most", type=float, default=1.0, help="seconds for one gradient (default: 1)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results, drawn = [], shapes(options.seed)
    with progress(options.count, "shapes") as step:
        for _ in range(options.count):
            case = next(drawn)
            results += [measure(case, operand, options.most) for operand in get_args(Operand)]
            step(case.name)
    clean = [r for r in results if not r["contested"]]
    summary = {}
    for operand in get_args(Operand):
        ratios = sorted(r["ratio"] for r in clean if r["case"].startswith(operand))
        summary[operand] = {"geometric_mean": geometric_mean(ratios), "below_0.95": sum(r < 0.95 for r in ratios), "shapes": len(ratios)}
        print(f"{operand} gradient: {summary[operand]}")
    for r in sorted(clean, key=lambda r: r["ratio"])[:12]:
        print(f"{r['ratio']:.2f}  {r['case']}  {r['whose']}")
    print(_machine.short())
    report = {"machine": _machine.describe(paths=False), "threads": options.threads, "seed": options.seed, "summary": summary}
    write_json(options.json, {**report, "results": results})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
