"""Memory: the kernels in a C++ program (tests/cpp/memory) with guard bytes around every buffer, plain, under ASan + UBSan and under TSan.

What is trusted: that a write or a read outside of a buffer hits a guard byte or the sanitizer, and that an output element
that is never written stays NaN and so fails the comparison with a naive loop. ThreadSanitizer does not see how GCC's OpenMP
synchronises and would report every parallel region: that build is without OpenMP, and the program's own threads share the tasks
of each phase in a random order, so what it looks at is whether two tasks of one phase touch the same memory.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

SANITIZE = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1"]
# libgomp: for omp_get_thread_num, which is then always 0.
THREADS = ["-O0", "-fsanitize=thread", "-fno-openmp", "-Wno-unknown-pragmas", "-g1", "-lgomp"]

# Flags beyond setup.py's, and one case in how many the program runs.
BUILDS = {"guard bytes": ([], 1), "ASan + UBSan": (SANITIZE, 3), "TSan": (THREADS, 19)}


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
    # What takes longest to compile comes first.
    sources = dict(sorted(sources.items(), key=lambda item: "isa_avx512" not in item[0]))
    sources |= {str(path.relative_to(ROOT)): ["-O1"] for path in sorted((ROOT / "tests" / "cpp" / "memory").glob("*.cpp"))}

    def compile_one(item: tuple[str, list[str]]) -> str:
        source, flags = item
        target = str(folder / source.replace("/", "-").replace(".cpp", ".o"))
        command = [compiler, *setup.COMMON, *flags, *extra, "-c", str(ROOT / source), "-o", target]  # type: ignore[attr-defined]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources.items()))
    program = folder / "memory"
    subprocess.run([compiler, *objects, "-fopenmp", *extra, "-o", str(program)], check=True)
    return program


def _links(flags: list[str], folder: Path) -> bool:
    """Whether the compiler has the sanitizer's runtime (and its programs run: TSan refuses some kernels' address spaces)."""
    source = folder / "empty.cpp"
    source.write_text("int main() {}\n")
    command = [os.environ.get("CXX") or "g++", str(source), *flags, "-o", str(folder / "empty")]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        return False
    return subprocess.run([str(folder / "empty")], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("build", BUILDS)
def test_memory(tmp_path: Path, build: str) -> None:
    extra, every = BUILDS[build]
    if build == "TSan" and not _links(extra, tmp_path):
        pytest.skip("no ThreadSanitizer here, so this run of the tasks on several threads was not looked at")
    program = _build(tmp_path, extra)
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run([str(program), str(every)], capture_output=True, text=True, check=False, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    checks, failures = (int(word) for word in done.stdout.split()[-4::2])
    assert checks > 1000
    assert failures == 0
