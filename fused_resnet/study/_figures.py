"""What the study's figures share: colours, lines with their range over seeds, legends, the line that names the machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ._protocol import Settings, Spread

# Distinguishable in grey and by colour-blind readers: plain networks in reds and ochre, residual ones in blues and greens.
PLAIN, RESIDUAL = "#b5533c", "#00796b"
SERIES = ("#b5533c", "#e0a030", "#00796b", "#4a7fb5", "#202124", "#8e5ea2")
DASHES = ("-", "--", "-", "--", ":", "-.")
STACKS = {"plain": (PLAIN, "-"), "residual": ("#4a7fb5", "--"), "residual_zero": (RESIDUAL, "-")}


@contextmanager
def page(path: Path, panels: int, size: tuple[float, float], machine: str, share: bool = False) -> Iterator[tuple[Figure, Sequence[Axes]]]:
    """A figure of panels side by side, written to ``path`` at the end; the machine in small print below."""
    figure, grid = plt.subplots(1, panels, figsize=size, squeeze=False, layout="constrained", sharey=share)
    try:
        for axes in grid[0]:
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
            axes.tick_params(length=3, labelsize=8)
        yield figure, list(grid[0])
        figure.supxlabel(machine, fontsize=6.5, color="#5f6368", x=0.99, ha="right")
        figure.savefig(path, dpi=130)
    finally:
        plt.close(figure)


def line(axes: Axes, x: Sequence[float], values: Sequence[Spread], label: str, colour: str, dash: Any = "-", marker: str = "o") -> None:
    """Medians as a line, the range over seeds as a band."""
    axes.plot(x, [v.median for v in values], color=colour, linestyle=dash, marker=marker, markersize=4, linewidth=1.6, label=label)
    axes.fill_between(x, [v.least for v in values], [v.most for v in values], color=colour, alpha=0.18, linewidth=0)


def name_axes(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=8.5)
    axes.set_ylabel(y, fontsize=8.5)


def whole_numbers() -> MaxNLocator:
    return MaxNLocator(integer=True, min_n_ticks=1)


def seeds(settings: Settings) -> str:
    return "one seed" if settings.seeds == 1 else f"line: median of {settings.seeds} seeds, band: their range"


def legend(axes: Axes, title: str) -> None:
    axes.legend(fontsize=8, frameon=False, title=title, title_fontsize=7.5, alignment="left")


def legend_below(figure: Figure, axes: Axes, title: str) -> None:
    """One legend for all panels, under them."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, fontsize=8, frameon=False, ncols=3, loc="outside lower left", title=title, title_fontsize=7.5, alignment="left"
    )
