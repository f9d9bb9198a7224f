"""Peak memory of a network, converted and not, each in a process of its own: in inference or, with --train, of steps of training.

    python bench/memory.py --model resnet50 --batch 1 8 32 --json bench/results/memory.json
    python bench/memory.py --train --model resnet18 resnet50 --batch 8 --repeat 5 --json bench/results/memory_train.json
    MALLOC_MMAP_THRESHOLD_=262144 python bench/memory.py ...           # a step's maps are pages of their own: what it needs

Prints the peak resident set of the whole process (ru_maxrss), which holds PyTorch itself and the parameters, and what lies above
the resident set just before the first forward pass: activations, workspaces, packed weights; in training gradients and the
optimizer's momentum too. Both in channels_last. The process that is not converted does not import this package: the network's source is
loaded by itself. The holes that glibc's heap has between a step's maps differ from process to process: with --repeat medians of several,
in turn.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import torch

MIB = 1024  # ru_maxrss is in KiB
MODELS = ("resnet18", "resnet50")
PLAIN = Path(__file__).parent.parent / "fused_resnet" / "_plain.py"


def plain_networks() -> ModuleType:
    """The networks' source, which needs torch alone, without the package around it."""
    spec = importlib.util.spec_from_file_location("plain_networks", PLAIN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def train(net: torch.nn.Module, x: torch.Tensor) -> None:
    """Some steps with SGD, after which the peak does not grow any more."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)
    for _ in range(5):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


def one(model: str, batch: int, fused: bool, trained: bool) -> dict[str, float]:
    torch.set_num_threads(2 if trained else 1)
    plain = plain_networks()
    net = plain.randomise(getattr(plain, model)(), torch.Generator().manual_seed(0)).train(trained).to(memory_format=torch.channels_last)
    if fused:
        import fused_resnet

        fused_resnet.fuse_(net)
    elif "fused_resnet" in sys.modules:
        raise SystemExit("the package is imported in the process without it")
    x = torch.randn(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    before = resident()
    if trained:
        train(net, x)
    else:
        with torch.inference_mode():
            for _ in range(3):
                net(x)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB
    return {"peak_mib": peak, "above_mib": peak - before}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, nargs="+", default=["resnet50"])
    parser.add_argument("--batch", type=int, nargs="+", default=(1, 8, 32))
    parser.add_argument("--train", action="store_true", help="steps of training, on two threads")
    parser.add_argument("--repeat", type=int, default=1, help="processes of each, in turn (default: 1)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=("eager", "fused"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.model[0], options.batch[0], options.one == "fused", options.train)))
        return 0
    from fused_resnet import _machine
    from fused_resnet.benchmark.output import table, write_json

    rows, results = [], []
    for model, batch in itertools.product(options.model, options.batch):
        runs: dict[str, list[dict[str, float]]] = {"eager": [], "fused": []}
        for name in ("eager", "fused") * options.repeat:
            command = [sys.executable, __file__, "--model", model, "--batch", str(batch), "--one", name, *["--train"] * options.train]
            runs[name].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        found = {name: {key: statistics.median([run[key] for run in several]) for key in several[0]} for name, several in runs.items()}
        ratio = found["fused"]["peak_mib"] / found["eager"]["peak_mib"]
        kind = {"mode": "train" if options.train else "inference", "repeat": options.repeat}
        results.append({"model": model, "batch": batch, **kind, **found, "ratio": ratio})
        above = [f"{found[name]['above_mib']:.0f}" for name in found]
        rows.append([model, batch, *(f"{found[name]['peak_mib']:.0f}" for name in found), f"{ratio:.2f}", *above])
    print(table(["model", "N", "eager MiB", "fused MiB", "ratio", "eager above", "fused above"], rows))
    print(_machine.short())
    write_json(options.json, {"machine": _machine.describe(paths=False), "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
