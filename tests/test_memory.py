"""Memory: the kernels in a C++ program with guard bytes around every buffer, plain and under ASan + UBSan.

What is trusted: that a write or a read outside of a buffer hits a guard byte or the sanitizer, and that an output element
that is never written stays NaN and so fails the comparison with a naive loop.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1"]


def _setup() -> object:
    """setup.py as a module, for its sources and flags: the program is built as the extension is."""
    spec = importlib.util.spec_from_file_location("fused_resnet_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build(folder: Path, extra: list[str]) -> Path:
    setup = _setup()
    compiler = os.environ.get("CXX") or "g++"
    sources = {name: flags for name, flags in setup.SOURCES.items() if name != "csrc/bindings.cpp"}  # type: ignore[attr-defined]
    sources["tests/cpp/test_memory.cpp"] = ["-O1"]

    def compile_one(item: tuple[str, list[str]]) -> str:
        source, flags = item
        target = str(folder / (Path(source).stem + ".o"))
        command = [compiler, *setup.COMMON, *flags, *extra, "-c", str(ROOT / source), "-o", target]  # type: ignore[attr-defined]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources.items()))
    program = folder / "test_memory"
    subprocess.run([compiler, *objects, "-fopenmp", *extra, "-o", str(program)], check=True)
    return program


@pytest.mark.parametrize("extra", [[], ["-O1", *SANITIZE]], ids=["guard bytes", "ASan + UBSan"])
def test_memory(tmp_path: Path, extra: list[str]) -> None:
    program = _build(tmp_path, extra)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    checks, failures = (int(word) for word in done.stdout.split()[-4::2])
    assert checks > 1000
    assert failures == 0
