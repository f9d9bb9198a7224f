"""How the learning rates of `study depth` were chosen: every arm, depth and rate with a seed that no study uses.

    python bench/tune_study.py --json bench/results/study_tuning.json [--jobs 2]

Prints for each arm and depth the rate of the least training error (of equals: of the least final loss), as
fused_resnet/study/depth.py has them, and ends with status 1 where that file has another.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from fused_resnet import _machine
from fused_resnet.benchmark.output import progress, write_json
from fused_resnet.cli.arguments import positive, writable
from fused_resnet.study import _data, depth

SEED = 100
GRID = {False: (0.003, 0.01, 0.03), True: (0.03, 0.1)}  # with batch norm: True
DEPTHS = {2: (54, 34, 18, 10), 3: (56, 32, 20, 8)}


def run(case: tuple[str, int, float]) -> dict[str, Any]:
    torch.set_num_threads(1)
    name, layers, rate = case
    found = depth.perform(_data.load("digits"), name, layers, SEED, rate, _data.EPOCHS["digits"])
    loss = found["losses"][-1] if found["losses"] else None
    errors = {what: found[what] for what in ("training_error", "test_error")}
    return {"arm": name, "depth": layers, "rate": rate, "diverged": found["diverged"], "loss": loss, **errors}


def best(runs: list[dict[str, Any]]) -> float:
    """The rate of the least training error; of equals, of the least loss."""
    return float(min(runs, key=lambda r: (r["training_error"], float("inf") if r["loss"] is None else r["loss"]))["rate"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=writable, metavar="FILE")
    parser.add_argument("--jobs", type=positive, default=min(os.cpu_count() or 1, 2), help="processes (default: %(default)s)")
    arguments = parser.parse_args()
    arms = {name: kind.arm for name, kind in depth.ARMS.items()}
    cases = [(name, d, rate) for name, arm in arms.items() for d in DEPTHS[arm.layers] for rate in GRID[arm.norm]]
    results = []
    with progress(len(cases), "tuning") as advance, ProcessPoolExecutor(arguments.jobs) as pool:
        for result in pool.map(run, cases):
            results.append(result)
            advance(f"{result['arm']} {result['depth']}")
    other = False
    for name, arm in arms.items():
        for d in DEPTHS[arm.layers]:
            rate = best([r for r in results if (r["arm"], r["depth"]) == (name, d)])
            other = other or rate != depth.RATES[name].get(d)
            print(f"{name:<20} {d:>3} {rate:g}{'' if rate == depth.RATES[name].get(d) else '  (not in depth.py)'}")
    write_json(arguments.json, {"seed": SEED, "machine": _machine.describe(paths=False), "runs": results})
    return 1 if other else 0


if __name__ == "__main__":
    sys.exit(main())
