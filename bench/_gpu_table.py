"""The last stage of gpu_report.py: the other stages' files in one, what was wanted beside what was measured, and each layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import _gpu_smoke
from _gpu_stages import convolutions, read

from fused_resnet.benchmark.gpu_peers import DEPENDENT, TILE
from fused_resnet.benchmark.output import finite
from fused_resnet.benchmark.timing import geometric_mean

STAGES = ("build", "tests", "sanitize", "ceilings", "tiles", "operators", "compiled_operators",
          "blocks", "networks", "training", "graphs", "check")  # fmt: skip
TIMED = ("tiles", "operators", "compiled_operators", "blocks", "networks", "training", "graphs")
Data = dict[str, dict[str, Any]]  # stage -> its file


def load(folder: Path) -> Data:
    found = {stage: read(folder / f"{stage}.json") for stage in STAGES}
    return {stage: content for stage, content in found.items() if content is not None}


def _results(data: Data, stage: str, **wanted: Any) -> list[dict[str, Any]]:
    """The results of a stage that have these values, without those that raised."""
    results = data.get(stage, {}).get("results", {}).values()
    return [r for r in results if "error" not in r and all(r.get(key) == value for key, value in wanted.items())]


def _median(result: dict[str, Any], kind: str, name: str) -> float | None:
    """Milliseconds."""
    timing = result.get(kind, {}).get(name)
    return None if timing is None else float(timing["median_ms"])


def ceiling(data: Data, name: str, what: str) -> float | None:
    value = data.get("ceilings", {}).get("results", {}).get(name, {}).get(what)
    return None if value is None else float(value)


def operators(data: Data) -> list[dict[str, Any]]:
    """One result for each convolution, batch and dtype: that with torch.compile among the peers where there is one."""
    found = {(r["case"], r["dtype"]): r for stage in ("operators", "compiled_operators") for r in _results(data, stage)}
    return list(found.values())


def of_network(data: Data, network: str) -> list[dict[str, Any]]:
    """Operator results of a network's own table. A smoke run's few shapes are all of every network."""
    names = {case.at(batch).name for batch in {r["batch"] for r in operators(data)} for case in convolutions(network, False)}
    return [r for r in operators(data) if r["case"] in names] or operators(data)


def _mean(ratios: Iterable[float | None]) -> tuple[float | None, int]:
    there = [ratio for ratio in ratios if ratio]
    return finite(geometric_mean(there)), len(there)


def copy_share(result: dict[str, Any], data: Data, kind: str = "graphs") -> float | None:
    """Least bytes over our time, over the measured copy's rate."""
    copied, ours = ceiling(data, "copy", "bytes_a_second"), _median(result, kind, "ours")
    return None if copied is None or not ours else result["megabytes"] * 1e9 / ours / copied


def arithmetic_share(result: dict[str, Any], data: Data, kind: str = "graphs") -> float | None:
    peak, ours = ceiling(data, f"product {result['dtype']}", "flops"), _median(result, kind, "ours")
    return None if peak is None or not ours else result["gflop"] * 1e12 / ours / peak


def memory_bound(result: dict[str, Any]) -> bool:
    """1x1 with the addition, in stages 1 and 2: maps of 56 and 28 pixels."""
    return result["kernel"] == [1, 1] and result["shortcut"] and result["height"] in (56, 28)


def _line(what: str, measured: float | None, wanted: float, of: int, form: str = "{:.2f}", note: str = "") -> dict[str, Any]:
    verdict = "not measured" if measured is None else "holds" if measured >= wanted else "does not hold"
    return {
        "what": what, "wanted": form.format(wanted), "measured": "-" if measured is None else form.format(measured),
        "value": measured, "cases": of, "verdict": verdict, "note": note,
    }  # fmt: skip


def demands(data: Data) -> list[dict[str, Any]]:
    """What must hold, each with what was measured. Ratios of operators in CUDA graphs, where Python's share is not in them; the same
    for calls from Python beside it."""
    lines = []
    for stage, what in (("tests", "every CUDA test green"), ("sanitize", "compute-sanitizer clean"), ("check", "check and demo on the GPU")):
        results = data.get(stage, {}).get("results", {})
        good = sum(bool(r.get("ok")) for r in results.values())
        bad = ", ".join(name for name, r in results.items() if not r.get("ok"))
        lines.append(_line(what, good / len(results) if results else None, 1.0, len(results), "{:.0%}", f"not so: {bad}" if bad else ""))
    timed = [r for stage in TIMED for r in _results(data, stage)]
    wrong = [r["case"] for r in timed if not r.get("ok", not r["wrong"])]
    right = 1 - len(wrong) / len(timed) if timed else None
    lines.append(_line("benchmarked cases in which ours is right", right, 1.0, len(timed), "{:.0%}", ", ".join(wrong[:5])))
    table = [r for r in of_network(data, "resnet50") if r["dtype"] == "bfloat16" and r["batch"] != 1]
    for kind, how in (("graphs", "in CUDA graphs"), ("times", "calls from Python")):
        mean, count = _mean(r.get(f"ratio_{kind}") for r in table)
        what = f"operators, bf16, ResNet-50's table, batch 32 and 256, best peer over ours, geometric mean, {how}"
        lines.append(_line(what, mean, 1.1, count))
    everything = [r for r in operators(data) if r.get("ratio_graphs")]
    lowest = min(everything, key=lambda r: r["ratio_graphs"], default=None)
    where = "" if lowest is None else f"{lowest['case']}, {lowest['dtype']}"
    lines.append(_line("the lowest of all layers, best peer over ours", lowest and lowest["ratio_graphs"], 0.85, len(everything), note=where))
    for batch in (256, 32):
        bound = [r for r in of_network(data, "resnet50") if r["dtype"] == "bfloat16" and r["batch"] == batch and memory_bound(r)]
        shares = {r["case"]: share for r in bound if (share := copy_share(r, data)) is not None}
        least = min(shares, key=lambda name: shares[name], default="")
        what = f"memory-bound layers (1x1 + add, stages 1 and 2), bf16, batch {batch}: lowest share of the copy's rate"
        lines.append(_line(what, shares.get(least), 0.75, len(shares), "{:.0%}", least))
    for r in _results(data, "networks", case="resnet50, residual blocks", dtype="bfloat16", batch=256):
        speeds = [r.get(f"images_a_second_{kind}", {}).get(name) for kind in ("times", "graphs") for name in ("ours", "ours, bias only")]
        most = max((speed for speed in speeds if speed), default=None)
        lines.append(_line("residual blocks of ResNet-50, bf16, batch 256, images a second", most, 50000, 1, "{:.0f}"))
    for r in _results(data, "networks", dtype="bfloat16", batch=32):
        ours = [_least(r, kind) for kind in ("graphs", "times")]
        share = ours[0] / ours[1] if ours[0] and ours[1] else None
        lines.append(_line(f"{r['case']}, bf16, batch 32: its time in a graph over that from Python", share, 1 / 1.3, 1))
    graphs = [r for r in _results(data, "graphs", dtype="bfloat16", batch=1) if r.get("network")]
    for network in ("resnet50", "resnet18"):
        ratios = [_over(r, "graphs", "compile") for r in graphs if r["network"] == network]
        mean, count = _mean(ratios)
        lines.append(_line(f"blocks of {network} at batch 1 in CUDA graphs, compile over ours, geometric mean", mean, 1.2, count))
    for r in _results(data, "training", batch=256):
        how = " under autocast" if r["autocast"] else ""
        lines.append(_line(f"forward + backward of {r['case']}, bf16{how}, batch 256, compile over ours", _over(r, "times", "compile"), 1.2, 1))
    return lines


def _least(result: dict[str, Any], kind: str) -> float | None:
    """The time of the faster of ours."""
    return min((t for name in ("ours", "ours, bias only") if (t := _median(result, kind, name)) is not None), default=None)


def _over(result: dict[str, Any], kind: str, peer: str) -> float | None:
    """A peer's time over ours."""
    theirs, ours = _median(result, kind, peer), _least(result, kind)
    return theirs / ours if theirs and ours else None


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    rule = "| " + " | ".join("---" if i < words else "---:" for i in range(len(header))) + " |"
    return "\n".join(["| " + " | ".join(header) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)])


def _micro(value: float | None) -> str:
    return "-" if value is None else f"{value * 1e3:.1f}"


def _form(value: float | None, form: str = "{:.2f}") -> str:
    return "-" if value is None else form.format(value)


def layers(data: Data) -> str:
    """One line for each convolution, batch and dtype."""
    names = ("eager", "channels_last", "compile", "cudnn", "ours")
    header = ["layer", "dtype", *(f"{name}, us" for name in names), "fastest tile, us", "ratio", "ratio from Python", "of copy", "of product"]
    rows = []
    for r in operators(data):
        times = [_micro(_median(r, "graphs", name)) for name in names]
        tile = next((name for name in r.get("graphs", {}) if name.startswith(TILE)), "")
        times.append(f"{tile.removeprefix(TILE)}: {_micro(_median(r, 'graphs', tile))}" if tile else "-")
        ratios = [_form(r.get("ratio_graphs")), _form(r.get("ratio_times"))]
        rows.append([r["case"], r["dtype"], *times, *ratios, _form(copy_share(r, data), "{:.0%}"), _form(arithmetic_share(r, data), "{:.0%}")])
    return markdown(header, rows, 2)


def kernels(folder: Path) -> str:
    """What gpu_first.py's ``smoke`` found of each kernel: those that are wrong take no part in ``tiles``."""
    rows = []
    for r in _gpu_smoke.read(folder):
        how = r["verdict"] + (f": {r['wrong']}" if "wrong" in r else "")
        row = r.get("wrong in a row")
        in_a_row = "not tried" if row is None else str(row or "right")
        rows.append([r["tile"], str(len(r.get("passed", ()))), how, r.get("ended", "-"), in_a_row])
    return markdown(["kernel", "features right", "", "ended", "calls that start while the last ends"], rows, 5) if rows else "Not tried."


def modules(data: Data, stages: Sequence[str] = ("blocks", "networks", "graphs", "training")) -> str:
    names = ("channels_last", "folded", "compile", "cudnn", "ours", "ours, bias only", DEPENDENT)
    rows = []
    for stage in stages:
        for r in _results(data, stage):
            for kind in ("times", "graphs"):
                if r.get(kind):
                    times = [_micro(_median(r, kind, name)) for name in names]
                    dtype = r["dtype"] + (" autocast" if r.get("autocast") else "")
                    how = "graph" if kind == "graphs" else "Python"
                    rows.append([stage, r["case"], dtype, str(r["batch"]), how, *times, _form(r[f"ratio_{kind}"])])
    return markdown(["stage", "case", "dtype", "batch", "called from", *(f"{n}, us" for n in names), "ratio"], rows, 3)


def fit(data: Data) -> str:
    """The choice among our kernels: what it takes, the fastest, what that takes, and what was predicted of both."""
    rows = []
    for r in _results(data, "tiles"):
        times = {name: t["median_ms"] for name, t in r["graphs"].items()}
        forced = {name: t for name, t in times.items() if name != "auto"}
        if "auto" in times and forced:
            best = min(forced, key=lambda name: forced[name])
            rows.append([
                r["case"], r["dtype"], r["predicted"].get("auto", ""), _micro(times["auto"]), best, _micro(forced[best]),
                r["predicted"].get(best, ""), f"{times['auto'] / forced[best]:.2f}",
            ])  # fmt: skip
    return markdown(["layer", "dtype", "chosen", "us", "fastest", "us", "predicted of it", "chosen over fastest"], rows, 3)


def write(folder: Path) -> tuple[Path, Path, list[dict[str, Any]]]:
    """report.json and report.md; and the demands."""
    data = load(folder)
    lines = demands(data)
    machine = next((content["machine"] for content in data.values() if "machine" in content), {})
    merged = {"machine": machine, "demands": lines, "stages": data}
    file, page = folder / "report.json", folder / "report.md"
    file.write_text(json.dumps(merged, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    parts: list[tuple[str, Callable[[], str]]] = [
        ("What must hold", lambda: markdown(
            ["what", "wanted", "measured", "cases", "verdict", "where"],
            [[d["what"], d["wanted"], d["measured"], str(d["cases"]), d["verdict"], d["note"]] for d in lines],
        )),
        ("Every kernel by itself", lambda: kernels(folder)),
        ("Layers: medians in CUDA graphs; ratio: best peer over ours", lambda: layers(data)),
        (f"Blocks, networks, training (\"{DEPENDENT}\" from Python: with the time that changing its setting takes at each call)",
            lambda: modules(data)),
        ("The choice among our kernels", lambda: fit(data)),
        ("Left out, failed, wrong", lambda: "\n".join(remarks(data)) or "Nothing."),
    ]  # fmt: skip
    text = "\n\n".join([f"# {headline(data, machine)}", *(f"## {title}\n\n{make()}" for title, make in parts)])
    page.write_text(text + "\n", encoding="utf-8")
    return file, page, lines


def headline(data: Data, machine: dict[str, Any]) -> str:
    """The device, the versions and the two ceilings."""
    cuda = machine.get("cuda", {})
    names = ", ".join(device["name"] for device in cuda.get("devices", ())) or machine.get("cpu", "unknown")
    copied, product = ceiling(data, "copy", "bytes_a_second"), ceiling(data, "product bfloat16", "flops")
    smoke = "A smoke run, in which nothing is measured: " if any(content.get("smoke") for content in data.values()) else ""
    return (
        f"{smoke}{names}, torch {machine.get('torch')}, CUDA {cuda.get('torch_build')}, cuDNN {cuda.get('cudnn')}; copy "
        f"{_form(copied and copied / 1e12)} TB/s, bf16 product {_form(product and product / 1e12, '{:.0f}')} TFLOP/s"
    )


def remarks(data: Data) -> list[str]:
    found = []
    for stage, content in data.items():
        for key, r in content.get("results", {}).items():
            if "error" in r:
                found.append(f"- {stage}, {key}: {r['error']}")
            for name in r.get("wrong", ()):
                found.append(f"- {stage}, {key}, {name}: wrong, error {r['errors'][name]}, allowed {r['allowed_error']:.2g}")
            found += [f"- {stage}, {key}, {name}: {why}" for name, why in r.get("failed", {}).items()]
        if content.get("aborted"):
            found.append(f"- {stage}: {content['aborted']}")
        if content.get("left"):
            found.append(f"- {stage}: {len(content['left'])} cases were not reached")
    return found
