"""What a planted fault is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """Text to be replaced, in every place where it stands in these files, and the tests (files, or nodes of them) of which
    each must go red."""

    name: str
    files: tuple[str, ...]
    old: str
    new: str
    tests: tuple[str, ...]
