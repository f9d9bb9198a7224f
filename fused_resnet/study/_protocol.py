"""What an experiment is made of: settings, tasks that run alone, and checks of what they gave."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .. import _extension
from .._version import __version__

PROTOCOL = 1  # of the constants of all experiments: another number makes stored runs another study's


@dataclass(frozen=True)
class Settings:
    """What the command's options ask for.

    seeds: runs use 0 to seeds - 1. depths: of the networks of ``depth`` and ``gradients``; None is the protocol's own.
    """

    quick: bool = False
    data: str = "digits"
    seeds: int = 3
    depths: tuple[int, ...] | None = None

    def identity(self) -> dict[str, Any]:
        """What stored runs must agree in to be of this study. Seeds and depths are not in it: they only choose among runs."""
        module = _extension.cpu
        return {
            "protocol": PROTOCOL,
            "quick": self.quick,
            "data": self.data,
            "backend": "reference" if module is None else "fused",
            "isa": None if module is None else module.isa(),
            "torch": torch.__version__,
            "fused_resnet": __version__,
        }


class Task(NamedTuple):
    """One run, which depends on nothing but its parameters and the data. ``key`` names it in the JSON file."""

    experiment: str
    key: str
    parameters: dict[str, Any]
    weight: float = 1.0  # how long it takes, roughly, in any unit: long ones start first


def task(experiment: str, weight: float = 1.0, **parameters: Any) -> Task:
    """A task whose key is made of its parameters: `depth/plain/54/0`."""
    return Task(experiment, "/".join(map(str, (experiment, *parameters.values()))), parameters, weight)


Runs = Mapping[str, dict[str, Any]]  # key -> {"parameters": ..., "result": ..., "seconds": ...}


def select(runs: Runs, experiment: str, **parameters: Any) -> list[dict[str, Any]]:
    """The runs of an experiment that have these parameters."""
    mine = (run for key, run in runs.items() if key.split("/")[0] == experiment)
    return [run for run in mine if all(run["parameters"].get(name) == value for name, value in parameters.items())]


class Spread(NamedTuple):
    """Median and range over seeds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def words(self, form: str = ".1f") -> str:
        """`5.3 (4.9-6.0)`."""
        if self.least == self.most:
            return format(self.median, form)
        return f"{self.median:{form}} ({self.least:{form}} to {self.most:{form}})"


class Check(NamedTuple):
    """A statement of the lesson, what was measured, and whether that bears it out."""

    claim: str
    measured: str
    ok: bool


class Report(NamedTuple):
    """What an experiment's runs say. ``figures`` goes into the JSON file; ``tables`` are (title, header, rows)."""

    figures: dict[str, Any]
    tables: list[tuple[str, Sequence[str], list[Sequence[object]]]]
    checks: list[Check]
    remarks: Sequence[str] = ()
