"""The pictures of `demo` and `bench`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from ._digits import Training

# Distinguishable in grey and by colour-blind readers: eager in greys, ours in blue-green, the others in ochre, reds and blues.
COLOURS = {
    "eager": "#9aa0a6",
    "channels_last": "#5f6368",
    "compile": "#e0b252",
    "onnxruntime": "#b0cbe8",
    "openvino": "#4a7fb5",
    "ncnn": "#e58a6a",
    "mnn": "#f3c1b0",
    "mnn_exact": "#b5533c",
    "fused": "#5cb8a7",
    "fused_channels_last": "#00796b",
}
LABELS = {
    "eager": "eager, contiguous",
    "channels_last": "eager, channels_last",
    "compile": "torch.compile",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "ncnn": "ncnn",
    "mnn": "MNN",
    "mnn_exact": "MNN, smaller tiles",
    "fused": "fused, contiguous",
    "fused_channels_last": "fused, channels_last",
}


def _plain_axes(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=3, labelsize=8)


def _whiskers(rows: list[dict[str, Any]]) -> list[list[float]]:
    """Distances from the median to the 20 % and 80 % quantiles."""
    return [[r["median_ms"] - r["q20_ms"] for r in rows], [r["q80_ms"] - r["median_ms"] for r in rows]]


def _bars(axes: Axes, groups: list[tuple[str, dict[str, dict[str, Any]]]], names: list[str], notes: list[str]) -> None:
    """Horizontal bars, one group a case from the top down, one bar a name; a note at the end of each group."""
    height = 0.8 / len(names)
    longest = max(entry["q80_ms"] for _, entries in groups for entry in entries.values())
    for i, name in enumerate(names):
        rows = [(g, entries[name]) for g, (_, entries) in enumerate(groups) if name in entries]
        axes.barh(
            [g - 0.4 + (i + 0.5) * height for g, _ in rows],
            [entry["median_ms"] for _, entry in rows],
            height * 0.92,
            color=COLOURS[name],
            label=LABELS[name],
            xerr=_whiskers([entry for _, entry in rows]),
            error_kw={"elinewidth": 0.8, "ecolor": "#202124"},
        )
    for g, ((_, entries), note) in enumerate(zip(groups, notes, strict=True)):
        end = max(entry["q80_ms"] for entry in entries.values())
        axes.text(end + 0.015 * longest, g, note, va="center", fontsize=8)
    axes.set_yticks(range(len(groups)), [label for label, _ in groups], fontsize=8)
    axes.set_ylim(len(groups) - 0.45, -0.55)
    axes.set_xlim(0, 1.12 * longest)
    axes.set_xlabel("time of one call, ms (median; whiskers: 20 % and 80 % quantiles)", fontsize=8)
    _plain_axes(axes)


def _legend(axes: Axes, labels: list[str] | None = None) -> None:
    """Above the axes, where no bar can be; the title moves up for it."""
    handles, known = axes.get_legend_handles_labels()
    labels = labels or known
    axes.legend(handles, labels, fontsize=8, frameon=False, ncols=len(labels), loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
    axes.set_title(axes.get_title(loc="left"), fontsize=9, loc="left", pad=20)


BUSY = "?: timed while other processes held the cores, not to be trusted"


def _note(ratio: float | None, timings: Iterable[dict[str, Any]]) -> str:
    """The ratio at the end of a group of bars, with a mark where it cannot be trusted."""
    mark = "?" if any(timing["contested"] for timing in timings) else ""
    return "" if ratio is None else f"{ratio:.2f}x{mark}"


CASES = 20  # of one picture


def _speedups(result: dict[str, Any]) -> dict[str, float]:
    """Contender -> better eager's time over its own; of ours the better one, under one name. Wrong results have no bar."""
    eager, mine = result["best_eager"], result["best_ours"]
    if eager is None:
        return {}
    times = {name: timing["median_ms"] for name, timing in result["contenders"].items() if name not in result["wrong"]}
    kept = {name: time for name, time in times.items() if name not in ("eager", "channels_last", "fused", "fused_channels_last")}
    if mine is not None:
        kept["fused_channels_last"] = times[mine]
    return {name: times[eager] / time for name, time in kept.items()}


def draw_bench(report: dict[str, Any], path: Path) -> list[Path]:
    """How many times faster than the better eager each contender is; one column for each batch size and thread count.

    Returns the files: ``path``, and path-2, path-3, ... for every further CASES cases.
    """
    cases = list(dict.fromkeys(result["case"] for result in report["results"]))
    written = []
    for first in range(0, len(cases), CASES):
        file = path if first == 0 else path.with_name(f"{path.stem}-{first // CASES + 1}{path.suffix}")
        _draw_speedups(report, cases[first : first + CASES], file)
        written.append(file)
    return written


def _draw_speedups(report: dict[str, Any], cases: list[str], path: Path) -> None:
    settings = list(dict.fromkeys((r["batch"], r["threads"]) for r in report["results"]))
    bars = {(r["case"], r["batch"], r["threads"]): (_speedups(r), r) for r in report["results"] if r["case"] in cases}
    names = [name for name in COLOURS if any(name in speedups for speedups, _ in bars.values())]
    height = 0.84 / max(len(names), 1)
    # The longest bar that can be trusted ends the axis: one that cannot must not shrink all others.
    trusted = [s for speedups, r in bars.values() if not _contested(r) for s in speedups.values()]
    longest = max(trusted or [s for speedups, _ in bars.values() for s in speedups.values()], default=1.0)
    end = 1.2 * max(longest, 1)
    size = (2.2 + 3.4 * len(settings), 1.5 + len(cases) * max(0.085 * len(names), 0.25))
    figure, panels = plt.subplots(1, len(settings), figsize=size, squeeze=False, sharey=True, sharex=True, layout="constrained")
    for axes, (batch, threads) in zip(panels[0], settings, strict=True):
        axes.axvline(1, color="#5f6368", linewidth=0.8)
        for g, case in enumerate(cases):
            speedups, result = bars.get((case, batch, threads), ({}, None))
            faint = result is not None and _contested(result)
            for i, name in enumerate(names):
                if name in speedups:
                    y = g - 0.42 + (i + 0.5) * height
                    axes.barh(y, speedups[name], height * 0.95, color=COLOURS[name], alpha=0.35 if faint else 1)
                    if name == "fused_channels_last":
                        text = f" {speedups[name]:.2f}{'?' if faint else ''} "
                        inside = speedups[name] > 0.9 * end
                        axes.text(min(speedups[name], end), y, text, va="center", ha="right" if inside else "left", fontsize=7)
        axes.set_xlim(0, end)
        axes.set_title(f"batch {batch}, {threads} thread{'' if threads == 1 else 's'}", fontsize=9, loc="left")
        _plain_axes(axes)
    panels[0, 0].set_yticks(range(len(cases)), cases, fontsize=8)
    panels[0, 0].set_ylim(len(cases) - 0.45, -0.55)
    options, machine = report["options"], report["machine"]
    mode = "forward pass" if options["mode"] == "forward" else "forward and backward pass"
    lines = [f"Speed of the {mode}, {options['dtype']}, over the better eager's (1: the line); longer is better"]
    isa = machine["extension"].get("isa", "no compiled module")
    lines.append(f"{machine['cpu']}, torch {machine['torch']}, {isa}")
    if any(r["wrong"] or r["failed"] for _, r in bars.values()):
        lines.append("no bar where a contender failed or its result was wrong")
    if any(_contested(r) for _, r in bars.values()):
        lines.append("faint, ?: timed while other processes held the cores, not to be trusted")
    figure.suptitle("\n".join(lines), fontsize=8, x=0.01, ha="left")
    handles = [Patch(color=COLOURS[name], label="ours" if name == "fused_channels_last" else LABELS[name]) for name in names]
    if handles:
        figure.legend(handles=handles, fontsize=8, frameon=False, ncols=min(len(handles), 2 + 2 * len(settings)), loc="outside lower left")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _contested(result: dict[str, Any]) -> bool:
    return any(timing["contested"] for timing in result["contenders"].values())


def draw_demo(training: Training, goal: float, photograph: Any, rows: list[dict[str, Any]], machine: str, path: Path) -> None:
    """Left: the training and the photograph. Right: each distinct block and the networks, before and after."""
    figure = plt.figure(figsize=(12, 7.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.9))  # type: ignore[misc]
    curve, image = left.subplots(2, 1)
    epochs = range(1, len(training.losses) + 1)
    curve.plot(epochs, [100 * a for a in training.accuracies], color=COLOURS["fused_channels_last"], marker="o", markersize=3)
    curve.axhline(100 * goal, color="#5f6368", linewidth=0.8, linestyle="--")
    curve.text(len(training.losses), 100 * goal, f"goal {goal:.0%} ", fontsize=8, va="top", ha="right", color="#5f6368")
    curve.set_ylim(0, 103)
    curve.xaxis.get_major_locator().set_params(integer=True)
    curve.set_xlabel("epoch", fontsize=8)
    curve.set_ylabel("test accuracy, %", fontsize=8)
    curve.set_title("Bias-only residual network of fused blocks, trained on digits", fontsize=9, loc="left")
    _plain_axes(curve)
    image.imshow(photograph)
    image.set_title(f"The input: china.jpg, {photograph.shape[1]}x{photograph.shape[0]} pixels", fontsize=9, loc="left")
    image.axis("off")

    blocks, networks = right.subplots(2, 1, height_ratios=(sum(not row["whole"] for row in rows), 1.6 * sum(row["whole"] for row in rows)))
    busy = False
    for axes, chosen, title in (
        (blocks, [row for row in rows if not row["whole"]], "Distinct residual blocks"),
        (networks, [row for row in rows if row["whole"]], "Whole networks (shorter is better)"),
    ):
        # The forms are named by what is better here; the colours stand for before and after.
        groups = [(row["case"], {"channels_last": row["before"], "fused_channels_last": row["after"]}) for row in chosen]
        notes = [_note(row["ratio"], (row["before"], row["after"])) for row in chosen]
        busy = busy or any(note.endswith("?") for note in notes)
        _bars(axes, groups, ["channels_last", "fused_channels_last"], notes)
        axes.set_title(title, fontsize=9, loc="left")
    blocks.set_xlabel("")
    _legend(blocks, ["before: eager, better memory format", "after fuse_: better memory format"])
    warning = f" ({BUSY})" if busy else ""
    figure.suptitle(f"fused_resnet demo, one image, float32, forward pass{warning}\n{machine}", fontsize=9, x=0.01, ha="left")
    figure.savefig(path, dpi=130)
    plt.close(figure)
