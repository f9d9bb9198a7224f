"""Whether two studies, of the fused and the reference backend, train alike: a convergence test of the kernels.

Two runs of the same seed differ by rounding alone, which training magnifies until they are as far apart as two seeds are, and no
farther. So the medians over seeds of the final training loss may differ by the spread over seeds, which is the larger range of the two.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from ._protocol import Runs, Spread
from ._store import load

ROUNDING = 1e-3  # nats: of runs that all end alike, be it at guessing's 2.303 or near zero, the spread is no measure
UNDECIDED = 0.5  # nats
GUESSING = 2.302585  # log(10): what a diverged run counts as


class Pair(NamedTuple):
    """The final training losses of one arm and depth, nats. farthest: of two runs of one seed."""

    arm: str
    depth: int
    mine: Spread
    other: Spread
    farthest: float

    @property
    def difference(self) -> float:
        return abs(self.mine.median - self.other.median)

    @property
    def spread(self) -> float:
        return max(self.mine.most - self.mine.least, self.other.most - self.other.least, ROUNDING)

    @property
    def distances(self) -> tuple[float, float, float]:
        return self.difference, self.spread, self.farthest

    @property
    def ok(self) -> bool:
        return self.difference <= self.spread

    @property
    def decided(self) -> bool:
        """Whether the comparison could fail: not where the seeds end as far apart as training and failing to train are."""
        return self.spread <= UNDECIDED


def check(keys: Collection[str], file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The content of another study that can be compared with one of these runs and settings.

    Raises:
        ValueError: if the file is no study's, is of another protocol or of the same backend, or has no run of ``depth`` in common.
        OSError: if it cannot be read.
    """
    content = load(file)
    for name in ("protocol", "quick", "data"):
        if content["settings"].get(name) != settings[name]:
            raise ValueError(f"{file} was made with {name} = {content['settings'].get(name)!r}, this study with {settings[name]!r}")
    if content["settings"].get("backend") == settings["backend"]:
        raise ValueError(f"{file} was made with the backend {settings['backend']!r}, as this study: FUSED_RESNET_BACKEND chooses another")
    if not any(key in content["runs"] and key.startswith("depth/") for key in keys):
        raise ValueError(f"{file} shares no run of the experiment depth with this study")
    return content


def compare(runs: Runs, file: Path, settings: dict[str, Any]) -> list[Pair]:
    """The arms and depths of which both have runs, over the seeds that both have.

    Raises:
        ValueError, OSError: as ``check`` does.
    """
    content = check(runs, file, settings)
    shared = [key for key in runs if key in content["runs"] and key.startswith("depth/")]
    cases = dict.fromkeys((runs[key]["parameters"]["arm"], runs[key]["parameters"]["depth"]) for key in shared)
    pairs = []
    for arm, depth in cases:
        keys = [key for key in shared if (runs[key]["parameters"]["arm"], runs[key]["parameters"]["depth"]) == (arm, depth)]
        both = [(_loss(runs[key]), _loss(content["runs"][key])) for key in keys]
        mine, other = (Spread.of([pair[i] for pair in both]) for i in (0, 1))
        pairs.append(Pair(arm, depth, mine, other, max(abs(a - b) for a, b in both)))
    return pairs


def _loss(run: dict[str, Any]) -> float:
    result = run["result"]
    return GUESSING if result["diverged"] else float(result["losses"][-1])
