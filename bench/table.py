"""Prints the README's figures from bench/results/: `python bench/table.py`. Nothing in the README is typed by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
TITLES = {
    "eager": "eager",
    "channels_last": "eager, channels_last",
    "compile": "torch.compile",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "ncnn": "ncnn",
    "mnn": "MNN",
    "mnn_exact": "MNN, smaller tiles",
    "fused": "ours",
    "fused_channels_last": "ours, channels_last",
}
OURS = ("fused", "fused_channels_last")


def time(result: dict[str, Any], name: str, best: str | None) -> str:
    """A cell: the median, bold if it is the best of all, with a mark if the result was wrong."""
    if name in result.get("failed", {}):
        return "failed"
    if name not in result["contenders"]:
        return ""
    median = f"{result['contenders'][name]['median_ms']:.2f}"
    return f"{median} (!)" if name in result["wrong"] else f"**{median}**" if name == best else median


def trusted(result: dict[str, Any]) -> bool:
    """False where other processes held the cores for a contender."""
    return not any(t.get("contested") for t in result["contenders"].values())


def fastest(result: dict[str, Any]) -> str | None:
    """Of the contenders whose result is right."""
    right = {name: t["median_ms"] for name, t in result["contenders"].items() if name not in result["wrong"]}
    return min(right, key=lambda name: right[name], default=None)


def mean(ratios: list[float]) -> str:
    return f"{math.exp(sum(map(math.log, ratios)) / len(ratios)):.2f}" if ratios else "-"


def table(file: Path) -> str:
    """The medians of one run as a Markdown table, with the machine and the geometric means below."""
    data = json.loads(file.read_text(encoding="utf-8"))
    columns = [name for name in TITLES if any(name in r["contenders"] for r in data["results"])]
    lines = [
        "| " + " | ".join([data["options"]["what"], "batch", "threads", *(TITLES[c] for c in columns), "ratio", "to eager"]) + " |",
        "| --- |" + " ---: |" * (len(columns) + 4),
    ]
    clean = [r for r in data["results"] if trusted(r) and r["ratio"] is not None]
    for r in clean:
        cells = [time(r, c, fastest(r)) for c in columns]
        to_eager = r.get("ratio_eager", r["ratio"])
        ratios = [f"{r['ratio']:.2f}", "" if to_eager is None else f"{to_eager:.2f}"]
        lines.append("| " + " | ".join([r["case"], str(r["batch"]), str(r["threads"]), *cells, *ratios]) + " |")
    machine, ratios = data["machine"], [r["ratio"] for r in clean]
    to_eagers = [r["ratio_eager"] for r in clean if r.get("ratio_eager") is not None]
    won = sum(fastest(r) in OURS for r in clean)
    dropped = len(data["results"]) - len(clean)
    marked = any(r["wrong"] for r in clean)
    wrong = " (!): the result was outside what rounding explains; such a time counts in no ratio." if marked else ""
    lines += [
        "",
        f"Milliseconds, medians of interleaved samples of one run, each contender in a process of its own; ratio: the best peer over "
        f"the better of ours; to eager: the better eager over the better of ours. Geometric means {mean(ratios)} and "
        f"{mean(to_eagers)}; ours is the fastest in {won} of {len(clean)} cases ({dropped} more were timed while other processes held "
        f"the cores, and are left out).{wrong} {data['options']['dtype']}, {data['options']['mode']}; {machine['cpu']}, "
        f"{machine['cores']} cores, {machine['extension']['isa']} kernels, FMA peak of one core {data['fma_peak_gflops']:.0f} GFLOP/s, "
        f"torch {machine['torch']}. (`bench/results/{file.name}`)",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    for path in sorted(RESULTS.glob("*.json")):
        print(table(path))
