"""Prints the README's figures from bench/results/: `python bench/table.py`. Nothing in the README is typed by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
COLUMNS = ("eager", "channels_last", "compile", "fused", "fused_channels_last")


def time(contenders: dict[str, Any], name: str) -> str:
    return f"{contenders[name]['median_ms']:.2f}" if name in contenders else ""


def trusted(result: dict[str, Any]) -> bool:
    """False where other processes held the cores for a contender."""
    return not any(t.get("contested") for t in result["contenders"].values())


def table(file: Path) -> str:
    """The medians of one run as a Markdown table, with the machine and the geometric mean below."""
    data = json.loads(file.read_text(encoding="utf-8"))
    columns = [name for name in COLUMNS if any(name in r["contenders"] for r in data["results"])]
    titles = {"eager": "eager", "channels_last": "eager, channels_last", "compile": "torch.compile",
              "fused": "ours", "fused_channels_last": "ours, channels_last"}  # fmt: skip
    lines = [
        "| " + " | ".join([data["options"]["what"], "batch", "threads", *(titles[c] for c in columns), "ratio"]) + " |",
        "| --- |" + " ---: |" * (len(columns) + 3),
    ]
    clean = [r for r in data["results"] if trusted(r)]
    for r in clean:
        row = [r["case"], str(r["batch"]), str(r["threads"]), *(time(r["contenders"], c) for c in columns)]
        lines.append("| " + " | ".join([*row, f"{r['ratio']:.2f}"]) + " |")
    machine, ratios = data["machine"], [r["ratio"] for r in clean]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    dropped = len(data["results"]) - len(clean)
    lines += [
        "",
        f"Milliseconds, medians of interleaved samples of one run; ratio: the better eager over the better of ours. Geometric "
        f"mean {mean:.2f}, lowest {min(ratios):.2f}, over {len(ratios)} cases ({dropped} more were timed "
        f"while other processes held the cores, and are left out). {data['options']['dtype']}, "
        f"{data['options']['mode']}; {machine['cpu']}, {machine['cores']} cores, {machine['extension']['isa']} kernels, "
        f"FMA peak of one core {data['fma_peak_gflops']:.0f} GFLOP/s, torch {machine['torch']}. (`bench/results/{file.name}`)",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    for path in sorted(RESULTS.glob("*.json")):
        print(table(path))
