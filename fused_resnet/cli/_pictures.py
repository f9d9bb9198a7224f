"""The pictures of `demo` and `bench`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from ._digits import Training

# Distinguishable in grey and by colour-blind readers: eager in greys, the compiler in ochre, ours in blue-green.
COLOURS = {
    "eager": "#9aa0a6",
    "channels_last": "#5f6368",
    "compile": "#c98a1b",
    "fused": "#5cb8a7",
    "fused_channels_last": "#00796b",
}
LABELS = {
    "eager": "eager, contiguous",
    "channels_last": "eager, channels_last",
    "compile": "torch.compile",
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


def draw_bench(report: dict[str, Any], path: Path) -> None:
    """One panel for each batch size and thread count; beside each case, how many times faster ours is than eager."""
    results = report["results"]
    settings = list(dict.fromkeys((r["batch"], r["threads"]) for r in results))
    names = [name for name in COLOURS if any(name in r["contenders"] for r in results)]
    cases = len(results) // len(settings)
    figure, panels = plt.subplots(len(settings), 1, figsize=(9, len(settings) * (1.2 + 0.14 * cases * len(names)) + 0.8), squeeze=False)
    for axes, (batch, threads) in zip(panels[:, 0], settings, strict=True):
        mine = [r for r in results if (r["batch"], r["threads"]) == (batch, threads)]
        notes = [_note(r["ratio"], r["contenders"].values()) for r in mine]
        _bars(axes, [(r["case"], r["contenders"]) for r in mine], names, notes)
        plural = "" if threads == 1 else "s"
        axes.set_title(f"batch {batch}, {threads} thread{plural}", fontsize=9, loc="left")
    _legend(panels[0, 0])
    options, machine = report["options"], report["machine"]
    mode = "forward pass" if options["mode"] == "forward" else "forward and backward pass"
    mean = report["geometric_mean"]
    summary = "" if mean is None else f"; geometric mean {mean:.2f}x"
    figure.suptitle(
        f"{mode.capitalize()}, {options['dtype']}: shorter is better; at the bars, better eager / better of ours{summary}",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    isa = machine["extension"].get("isa", "no compiled module")
    warning = f". {BUSY}" if report["warning"] else ""
    figure.text(0.01, 0.004, f"{machine['cpu']}, torch {machine['torch']}, {isa}{warning}", fontsize=7, color="#5f6368")
    figure.tight_layout(rect=(0, 0.015, 1, 0.99))
    figure.savefig(path, dpi=130)
    plt.close(figure)


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
