"""The scripts of bench/ are run by hand: here that each finds what it imports."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent.parent / "bench"


@pytest.mark.smoke
@pytest.mark.parametrize("script", sorted(BENCH.glob("*.py")), ids=lambda script: script.name)
def test_a_script_imports(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    before = set(sys.modules)
    spec = importlib.util.spec_from_file_location(f"bench_{script.stem}", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    try:
        spec.loader.exec_module(module)
    finally:  # what it took from its own folder: "cases", say, may be another's name too
        for name in set(sys.modules) - before - {spec.name}:
            if str(getattr(sys.modules[name], "__file__", None)).startswith(str(BENCH)):
                del sys.modules[name]
    assert module.__doc__
