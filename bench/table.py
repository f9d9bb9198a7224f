"""Puts the figures of bench/results/ into the README: `python bench/table.py`. Nothing there is typed by hand.

Writes what stands between the README's markers (`<!-- NAME: ... -->` and `<!-- end of NAME -->`) anew.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
# Column: the contenders of which it shows the best.
COLUMNS = {
    "eager": ("eager", "channels_last"),
    "torch.compile": ("compile",),
    "ONNX Runtime": ("onnxruntime",),
    "OpenVINO": ("openvino",),
    "ncnn": ("ncnn",),
    "MNN": ("mnn", "mnn_exact"),
    "ours, NCHW": ("fused",),
    "ours": ("fused_channels_last",),
}


def load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return content


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table; the first ``words`` columns are to the left, the others to the right."""
    rule = "| " + " | ".join("---" if i < words else "---:" for i in range(len(header))) + " |"
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, *rows)).replace("\n", f"\n{rule}\n", 1)


def best(result: dict[str, Any], names: Sequence[str]) -> float | None:
    """The shortest median of these contenders whose result was right."""
    times = [t["median_ms"] for name, t in result["contenders"].items() if name in names and name not in result["wrong"]]
    return min(times, default=None)


def trusted(result: dict[str, Any]) -> bool:
    """False where other processes held the cores for a contender."""
    return not any(t.get("contested") for t in result["contenders"].values()) and result["ratio"] is not None


def mean(ratios: Sequence[float]) -> str:
    return f"{math.exp(sum(map(math.log, ratios)) / len(ratios)):.2f}"


def machine(data: dict[str, Any]) -> str:
    found = data["machine"]
    return f"{found['cpu']}, {found['extension']['isa']} kernels, torch {found['torch']}"


MODES = {"forward": "forward", "train": "train", "frozen": "train with norms that keep their statistics"}


def times(name: str) -> str:
    """The medians of one run, with what was left out and the machine below."""
    data = load(name)
    what, options = data["options"]["what"], data["options"]
    clean = [r for r in data["results"] if trusted(r)]
    columns = {title: names for title, names in COLUMNS.items() if any(best(r, names) is not None for r in clean)}
    rows = []
    for r in clean:
        found = {title: best(r, names) for title, names in columns.items()}
        shortest = min(t for t in found.values() if t is not None)
        cells = ["-" if t is None else f"**{t:.2f}**" if t == shortest else f"{t:.2f}" for t in found.values()]
        rows.append([r["case"], str(r["batch"]), str(r["threads"]), *cells, f"{r['ratio']:.2f}"])
    ratios = [r["ratio"] for r in clean]
    left_out = len(data["results"]) - len(clean)
    contested = f" {left_out} more were timed while other processes held the cores, and are left out." if left_out else ""
    wrong = " A result outside of what rounding explains counts for nothing (MNN's default Winograd tiles)."
    text = (
        f"Milliseconds, medians of interleaved samples of one run, each contender in a process of its own; ratio: the best of the others "
        f"over the best of ours; geometric mean {mean(ratios)}, lowest {min(ratios):.2f}.{contested}"
        f"{wrong if any(r['wrong'] for r in clean) else ''} {options['dtype']}, {MODES[options['mode']]}; {machine(data)}, "
        f"FMA peak of one core {data['fma_peak_gflops']:.0f} GFLOP/s. (`bench/results/{name}`)"
    )
    return f"{markdown([what, 'batch', 'threads', *columns, 'ratio'], rows)}\n\n{text}"


def figures() -> str:
    parts = [times("blocks.json"), "![blocks beside the peers](bench/results/blocks.png)", times("networks.json")]
    parts += [times(name) for name in ("blocks_bf16.json", "networks_bf16.json") if (RESULTS / name).exists()]
    sweep, memory = load("sweep.json"), load("memory.json")
    below = [r for r in sweep["results"] if r["ratio"] < 1]
    largest = max(18 * r["channels"] ** 2 * r["size"] ** 2 * r["batch"] / 1e9 for r in sweep["results"])
    slow = max((r["fused"] - r["eager"] for r in below), default=0.0)
    parts.append(
        f"Square 3x3 convolutions over a grid of {len(sweep['results'])} shapes (3 to 512 channels, 4 to 112 pixels, batch 1 to 32, both "
        f"formats, of at most {largest:.1f} GFLOP, `bench/sweep.py`): "
        f"geometric mean {sweep['geometric_mean']:.2f} over eager; {len(below)} below 1.0, by at most "
        f"{1000 * slow:.0f} µs a call. ({machine(sweep)}, {sweep['threads']} thread, `bench/results/sweep.json`)"
    )
    peaks = "; ".join(f"batch {r['batch']}: {r['fused']['peak_mib']:.0f} over {r['eager']['peak_mib']:.0f} MiB" for r in memory["results"])
    parts.append(
        f"Peak resident memory of a process with a converted ResNet-50 over eager's: {peaks}. What is more is the packed weights, beside the "
        "parameters that a checkpoint needs. (`bench/memory.py`)"
    )
    parts.append(crowded())
    parts += [times(name) for name in ("training.json", "training_resnet50.json", "training_frozen.json")]
    parts += [memory_of_a_step(), times("blocks_train.json"), gradients("input"), gradients("weight")]
    return "\n\n".join(parts)


def memory_of_a_step() -> str:
    heap, mapped = load("memory_train.json"), load("memory_train_mapped.json")

    def ratios(data: dict[str, Any]) -> str:
        return ", ".join(f"{r['model']} {r['ratio']:.2f}" for r in data["results"])

    first = heap["results"][0]
    return (
        f"Peak resident memory of a process that trains in channels_last, with SGD and momentum, over eager's, batch {first['batch']}, "
        f"medians of {first['repeat']} processes: {ratios(heap)}; where each map has pages of its own (MALLOC_MMAP_THRESHOLD_=262144), so that "
        f"holes in glibc's heap do not count: {ratios(mapped)}. ({machine(heap)}, `bench/memory.py --train`, "
        "`bench/results/memory_train.json`, `memory_train_mapped.json`)"
    )


def gradients(operand: str) -> str:
    """Those of single convolutions beside the library's, in groups."""
    data = load(f"{operand}_gradients.json")
    clean = [r for r in data["results"] if trusted(r) and " 7x7 " not in r["case"] and " 3->" not in r["case"]]
    kinds = {"with stride 2": lambda name: "/2" in name, "3x3": lambda name: " 3x3 " in name, "1x1": lambda name: " 1x1 " in name}
    groups: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for r in clean:
        groups[next(kind for kind, fits in kinds.items() if fits(r["case"]))].append(r)
    threads = sorted({r["threads"] for r in clean})
    words = []
    for kind, found in groups.items():
        words.append(f"{kind} " + " / ".join(mean([r["ratio"] for r in found if r["threads"] == count]) for count in threads))
    lowest = min(clean, key=lambda r: r["ratio"])
    worst = f"{lowest['case'].removeprefix(f'{operand} gradient of ')}, {lowest['threads']} threads"
    return (
        f"Gradients of the ResNets' convolutions in their {operand} by themselves, but for the stems' (the library's), batch "
        f"{clean[0]['batch']}, the library's in its better memory format over ours in the better one, every weight written between calls, "
        f"geometric means on {' / '.join(map(str, threads))} threads: {', '.join(words)}; lowest {lowest['ratio']:.2f} ({worst}). "
        f"({machine(data)}, `python -m fused_resnet bench --what conv --mode train --case \"{operand} gradient\"`, "
        f"`bench/results/{operand}_gradients.json`)"
    )


def crowded() -> str:
    """What several processes on one machine compute together."""
    data = load("crowded.json")
    settings, medians = data["settings"], {name: statistics.median(found) for name, found in data["images"].items()}
    if settings["OMP_WAIT_POLICY"] is not None:
        raise SystemExit("crowded.json is not of a run with default settings: OMP_WAIT_POLICY was set")
    found = {title: max([medians[name] for name in names if name in medians], default=None) for title, names in COLUMNS.items()}
    counts = ", ".join(f"{title} {count:.0f}" for title, count in found.items() if count is not None)
    return (
        f"A crowded machine: {settings['processes']} processes of {settings['threads']} threads each on {data['machine']['cores']} cores, "
        f"{settings['model']}, batch 1, default settings, images of all of them in {settings['seconds']:g} s: {counts}. "
        f"({machine(data)}, medians of {settings['rounds']} rounds in turn, `bench/crowded.py`, `bench/results/crowded.json`)"
    )


def numerics() -> str:
    data = load("numerics.json")
    rows: dict[str, list[str]] = {}
    for r in data["results"]:
        rows.setdefault(r["case"], [r["case"]]).extend(f"{r[key]:.1e}" for key in ("eager", "strict", "fast"))
    header = ["block", "PyTorch", "strict", "fast", "PyTorch, bfloat16", "strict", "fast"]
    text = f"|error| / |result| in the 2-norm against float64, the largest of {data['seeds']} runs (`bench/numerics.py`; {machine(data)})."
    return f"{markdown(header, list(rows.values()))}\n\n{text}"


def spread(found: dict[str, float], form: str = ".1f") -> str:
    """Median and range over seeds."""
    median, least, most = (format(found[name], form) for name in ("median", "least", "most"))
    return median if least == most else f"{median} ({least} to {most})"


def study() -> str:
    """The lesson's experiments: errors by depth, rates at the start, and what was checked."""
    from fused_resnet.study import decay, depth, gradients, shortcut

    data = load("study.json")
    reports = {name: report["figures"] for name, report in data["reports"].items() if "figures" in report}
    columns = [(10, 8), (18,), (34,), (54, 56)]
    rows = []
    for name, arm in depth.ARMS.items():
        found = reports["depth"][name]
        cells = []
        for column in columns:
            here = [found[str(layers)] for layers in column if str(layers) in found]
            diverged = ", diverges" if here and here[0]["diverged"] else ""
            cells.append(spread(here[0]["training_error"]) + diverged if here else "")
        rows.append([arm.label, *cells])
    names = ["training error, %", *(f"{' or '.join(map(str, sorted(column)))} layers" for column in columns)]
    parts = [markdown(names, rows)]
    rows = []
    for name, kind in gradients.KINDS.items():
        found = reports["gradients"][name]
        cells = []
        for what in ("activations", "gradients"):
            theory = found[what]["theory"]
            cells += [spread(found[what]["factor"], ".3f"), "" if theory is None else f"{theory:.3f}"]
        rows.append([kind.label, *cells, f"{found['first_over_last_gradient']['median']:.1e}"])
    header = ["factor a layer, at the start", "activations", "theory", "gradients, backward", "theory", "gradient, first over last block"]
    parts.append(markdown(header, rows))
    rows = []
    for name, kind in shortcut.KINDS.items():
        found = reports["shortcut"]["kinds"][name]
        errors = [spread(found[what]) for what in ("training_error", "test_error")]
        rows.append([kind.label, f"{found['parameters']:,}", f"{found['multiply_adds'] / 1e6:.1f}", *errors])
    parts.append(markdown(["128 channels meet 256", "parameters", "10^6 multiply-adds", "training error, %", "test error, %"], rows))
    rows = []
    for name, arm in decay.ARMS.items():
        found = reports["decay"][name]
        distances = [f"{found[what]['median']:.2g}" for what in ("distance_at_start", "distance_at_end")]
        rows.append([arm.label, spread(found["norm_left_percent"], ".2f"), *distances, spread(found["training_error_after"])])
    header = [f"{decay.STEPS} steps of decay", "norm left, %", "distance to the identity, start", "end", "training error after, %"]
    parts.append(markdown(header, rows))
    checks = [check for report in data["reports"].values() for check in report["checks"]]
    parts.append("\n".join(f"- {'' if check['ok'] else '**does not hold** '}{check['claim']}: {check['measured']}." for check in checks))
    chaotic = max(data["reports"]["agreement"]["pairs"], key=lambda pair: pair["difference"] if pair["arm"] == "residual" else 0)
    parts.append(
        f"The bias-only residual network of {chaotic['depth']} layers is the one that rounding moves most: its runs end with a median loss "
        f"of {chaotic['mine']['median']:.2f} nats through the fused kernels, and {chaotic['other']['median']:.2f} through the reference."
    )
    seconds = sum(report["seconds"] for report in data["reports"].values() if "seconds" in report)
    seeds = data["reports"]["depth"]["seeds"]
    parts.append(
        f"Medians of {seeds} seeds, their range in brackets; {len(data['runs'])} runs, {seconds / 60:.0f} minutes of one thread each in all, "
        "two side by side on a machine that other work shared. "
        f"{machine(data)}. `python -m fused_resnet study`, `bench/results/study.json`."
    )
    return "\n\n".join(parts)


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    for name, content in (("figures", figures()), ("numerics", numerics()), ("study", study())):
        pattern = re.compile(rf"(<!-- {name}:[^\n]*-->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        text, count = pattern.subn(lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text)
        if count != 1:
            raise SystemExit(f"README.md must have one pair of markers for {name}, has {count}")
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
