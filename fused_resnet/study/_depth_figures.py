"""The lesson's two figures, measured: training error by number of layers, and by epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from . import _figures
from ._protocol import Runs, Settings, Spread, select

# (title, (arm, colour, dash)), a panel each.
_PANELS = (
    ("Plain networks", (("plain", "#b5533c", "-"), ("plain_norm", "#e0a030", "--"), ("plain_3", "#5f6368", ":"))),
    (
        "Residual networks",
        (
            ("residual", "#00796b", "-"),
            ("residual_norm", "#4a7fb5", "--"),
            ("residual_3", "#5f6368", ":"),
            ("residual_projection", "#8e5ea2", "-."),
        ),
    ),
    ("Controls: is it the start?", (("residual_he", "#b5533c", "-"), ("plain_identity", "#00796b", "--"))),
)
_CURVES = ("plain", "residual", "plain_norm", "residual_norm")
# From shallow to deep.
_SHADES = {"plain": ("#f0b8a8", "#d98a72", "#b5533c", "#7a2e1c"), "residual": ("#a5d6cf", "#5cb8a7", "#00796b", "#004d40")}


class Arm(NamedTuple):
    """What an arm is called, and the depths that were run."""

    label: str
    depths: Sequence[int]


_NOT_RUN = Arm("", ())


def draw(runs: Runs, settings: Settings, folder: Path, machine: str, arms: Mapping[str, Arm]) -> list[Path]:
    by_depth, by_epoch = folder / "study_depth.png", folder / "study_curves.png"
    _by_depth(runs, settings, by_depth, machine, arms)
    names = [name for name in _CURVES if arms.get(name, _NOT_RUN).depths]
    if not names:  # only depths of blocks of three layers were asked for
        return [by_depth]
    _by_epoch(runs, settings, {name: arms[name] for name in names}, by_epoch, machine)
    return [by_depth, by_epoch]


def _by_depth(runs: Runs, settings: Settings, path: Path, machine: str, arms: Mapping[str, Arm]) -> None:
    with _figures.page(path, 3, (12, 5), machine, share=True) as (figure, panels):
        for axes, (title, lines) in zip(panels, _PANELS, strict=True):
            axes.axhline(90, color="#9aa0a6", linewidth=0.8, linestyle=":")
            for name, colour, dash in lines:
                arm = arms.get(name, _NOT_RUN)
                for depth in arm.depths:
                    errors = _errors(runs, name, depth)
                    axes.plot([depth] * len(errors), errors, color=colour, marker="o", markersize=4, linewidth=0.8, alpha=0.4)
                    if any(run["result"]["diverged"] for run in select(runs, "depth", arm=name, depth=depth)):
                        place: Any = {"textcoords": "offset points", "ha": "right", "fontsize": 8, "color": colour}
                        axes.annotate("diverged", (depth, max(errors)), (3, 6), **place)
                if arm.depths:
                    medians = [Spread.of(_errors(runs, name, depth)).median for depth in arm.depths]
                    label = arm.label.removeprefix("control: ")
                    axes.plot(arm.depths, medians, color=colour, linestyle=dash, linewidth=1.8, marker="o", markersize=5, label=label)
            axes.xaxis.set_major_locator(_figures.whole_numbers())
            axes.set_ylim(-3, 100)
            axes.set_title(title, fontsize=9.5, loc="left")
            _figures.name_axes(axes, "number of layers", "")
            _legend(axes, 1)
        panels[0].set_ylabel("error on the training set after the last epoch, %", fontsize=8.5)
        panels[0].text(panels[0].get_xlim()[0], 90.5, " guessing", fontsize=7.5, color="#5f6368", va="bottom")
        figure.suptitle(f"Training error by depth, {_words(settings)}; {_seeds(settings, 'pale points')}", fontsize=10, x=0.01, ha="left")


def _by_epoch(runs: Runs, settings: Settings, arms: Mapping[str, Arm], path: Path, machine: str) -> None:
    with _figures.page(path, len(arms), (0.4 + 3.2 * len(arms), 4.3), machine, share=True) as (figure, panels):
        for axes, (name, arm) in zip(panels, arms.items(), strict=True):
            shades = _SHADES[name.removesuffix("_norm")]
            for i, depth in enumerate(arm.depths):
                shade = shades[-1] if len(arm.depths) == 1 else shades[round(i * (len(shades) - 1) / (len(arm.depths) - 1))]
                curves = [run["result"]["errors"] for run in select(runs, "depth", arm=name, depth=depth)]
                for errors in curves:
                    axes.plot(range(1, len(errors) + 1), errors, color=shade, linewidth=0.7, alpha=0.5)
                medians = [Spread.of(errors).median for errors in _epochs(curves)]
                axes.plot(range(1, len(medians) + 1), medians, color=shade, linewidth=2, label=f"{depth} layers")
            axes.xaxis.set_major_locator(_figures.whole_numbers())
            axes.set_ylim(-3, 100)
            axes.set_title(arm.label.capitalize(), fontsize=9.5, loc="left")
            _figures.name_axes(axes, "epoch", "")
            _legend(axes, 2)
        panels[0].set_ylabel("training error of the epoch, %", fontsize=8.5)
        figure.suptitle(f"Training error by epoch, {_words(settings)}; {_seeds(settings, 'thin lines')}", fontsize=10, x=0.01, ha="left")


def _errors(runs: Runs, name: str, depth: int) -> list[float]:
    return [run["result"]["training_error"] for run in select(runs, "depth", arm=name, depth=depth)]


def _legend(axes: Axes, columns: int) -> None:
    """Below the axes, where no curve can be."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False, ncols=columns, loc="upper left", bbox_to_anchor=(0, -0.12))


def _seeds(settings: Settings, each: str) -> str:
    return "one seed" if settings.seeds == 1 else f"bold: median of {settings.seeds} seeds, {each}: each of them"


def _epochs(curves: Sequence[Sequence[float]]) -> list[list[float]]:
    """The errors of each epoch; a curve that ended early, because its run diverged, is missing from there on."""
    return [[error for error in errors if error is not None] for errors in zip_longest(*curves)]


def _words(settings: Settings) -> str:
    return {"digits": "1,437 digits of 8x8 pixels", "mnist5k": "4,000 images of MNIST, 14x14 pixels"}[settings.data]
