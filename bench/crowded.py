"""Several processes of several threads each on one machine, as servers are: how many images all of them compute together.

    python bench/crowded.py --model resnet18 --json bench/results/crowded.json

Default settings for every contender: whoever spins for a core that another process holds pays for it here, and so do the others. The
contenders take turns, round by round; a contender's processes begin together when all of them are ready. Results are not looked at here:
`fused-resnet bench --what network` compares them.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from fused_resnet import _machine
from fused_resnet.benchmark.contenders import CONTENDERS, OURS, missing, unsuitable
from fused_resnet.benchmark.contest import NetworkCase, Task, prepare
from fused_resnet.benchmark.output import progress, table, write_json
from fused_resnet.cli.arguments import positive, positive_seconds, writable

MODELS = ("resnet18", "resnet50", "cifar20")
SLOW = ("compile",)  # takes minutes to build in each process


def child(builder: str, folder: Path, threads: int, seconds: float) -> int:
    """Build, say so, wait to be told to begin, and count the calls until the time is over."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print
    torch.set_num_threads(threads)
    module, name = builder.split(":")
    task = Task.load(folder / "task.pt")
    built = getattr(importlib.import_module(module), name)(task, threads, folder)
    with built.context():
        for _ in range(3):
            built.call()
        print("ready", file=answers, flush=True)
        sys.stdin.readline()
        end, count = time.perf_counter() + seconds, 0
        while time.perf_counter() < end:
            built.call()
            count += 1
    print(count, file=answers, flush=True)
    return 0


def one_round(name: str, folder: Path, processes: int, threads: int, seconds: float) -> int:
    """Calls of all processes together."""
    own = [Path(tempfile.mkdtemp(dir=folder)) for _ in range(processes)]
    for place in own:
        (place / "task.pt").symlink_to(folder / "task.pt")
    numbers = ["--threads", str(threads), "--seconds", str(seconds)]
    command = [sys.executable, "-W", "ignore", __file__, "--child", CONTENDERS[name].builder, *numbers]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    started = [subprocess.Popen([*command, "--folder", str(place)], **pipes) for place in own]  # type: ignore[call-overload]
    try:
        for process in started:
            if process.stdout.readline() != "ready\n":
                raise SystemExit(f"{name} could not be built: run it in `fused-resnet bench` to see why")
        for process in started:
            process.stdin.write("go\n")
            process.stdin.flush()
        counts = [process.stdout.readline() for process in started]
        if not all(counts):
            raise SystemExit(f"{name} ended before its time was over")
        return sum(map(int, counts))
    finally:
        for process in started:
            process.kill()
            process.communicate()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="resnet18")
    parser.add_argument("--processes", type=positive, default=4)
    parser.add_argument("--threads", type=positive, default=2, help="of each process")
    parser.add_argument("--seconds", type=positive_seconds, default=6.0, help="of each round")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--json", type=writable)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.child, options.folder, options.threads, options.seconds)
    suits = [n for n in CONTENDERS if n not in SLOW and not missing(n) and not unsuitable(n, "float32", "forward")]
    counts: dict[str, list[int]] = {name: [] for name in suits}
    with tempfile.TemporaryDirectory() as name, progress(options.rounds * len(suits), "crowded") as advance:
        folder = Path(name)
        prepare(NetworkCase(options.model), 1, torch.float32, "forward", seed=0).task.save(folder / "task.pt")
        for _ in range(options.rounds):
            for contender in suits:
                counts[contender].append(one_round(contender, folder, options.processes, options.threads, options.seconds))
                advance(contender)
    medians = {contender: statistics.median(found) for contender, found in counts.items()}
    ours = max(medians[contender] for contender in suits if contender in OURS)
    peer = max([contender for contender in suits if contender not in OURS], key=medians.__getitem__)
    ratio = ours / medians[peer]
    rows = [[CONTENDERS[n].label, f"{medians[n]:.0f}", min(c), max(c)] for n, c in counts.items()]
    print(table(["contender", "images", "lowest", "highest"], rows))
    print(f"{options.model}, batch 1, {options.processes} processes of {options.threads} threads, {options.seconds:g} s:", end=" ")
    print(f"ours over the best peer ({CONTENDERS[peer].label}) {ratio:.2f}")
    print(_machine.short())
    settings = {key: getattr(options, key) for key in ("model", "processes", "threads", "seconds", "rounds")}
    waits = os.environ.get("OMP_WAIT_POLICY")
    write_json(
        options.json,
        {"machine": _machine.describe(paths=False), "settings": {**settings, "OMP_WAIT_POLICY": waits}, "images": counts, "ratio": ratio},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
