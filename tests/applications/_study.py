"""The study in small, for the tests of the command and of the experiments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fused_resnet import cli
from fused_resnet.study import decay, depth, identity, shortcut


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every experiment in a second or so. What decays does so as far as in the full protocol, in fewer and longer steps."""
    monkeypatch.setattr(depth, "QUICK_EPOCHS", {"digits": 1, "mnist5k": 1})
    monkeypatch.setattr(depth, "ARMS", {name: depth.ARMS[name] for name in ("plain", "residual", "residual_norm", "plain_3", "residual_3")})
    monkeypatch.setattr(identity, "SHAPES", ((4, 1, 1), (20, 9, 10), (64, 8, 8)))
    monkeypatch.setattr(identity, "QUICK_BLOCKS", (1, 2))
    monkeypatch.setattr(identity, "QUICK_STEPS", 30)
    monkeypatch.setattr(decay, "FIRST_EPOCHS", {"digits": 2, "mnist5k": 1})
    monkeypatch.setattr(decay, "STEPS", 40)
    monkeypatch.setattr(decay, "DECAY", 10.0)
    monkeypatch.setattr(decay, "ARMS", {name: kind._replace(decay=10.0) if kind.decay == 1.0 else kind for name, kind in decay.ARMS.items()})
    monkeypatch.setattr(shortcut, "QUICK_IMAGES", 32)
    monkeypatch.setattr(shortcut, "QUICK_EPOCHS", 1)
    monkeypatch.setattr(shortcut, "ROUNDS", 3)


def study(*argv: str, out: Path, jobs: int = 1) -> int:
    return cli.main(["study", *argv, "--quick", "--out", str(out), "--jobs", str(jobs)])


def stored(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "study.json").read_text())
    return content
