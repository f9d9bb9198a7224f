"""Memory: the kernels in a C++ program (tests/cpp/memory) with guard bytes around every buffer, plain, under ASan + UBSan and under TSan.

What is trusted: that a write or a read outside of a buffer hits a guard byte or the sanitizer, and that an output element
that is never written stays NaN and so fails the comparison with a naive loop. ThreadSanitizer does not see how GCC's OpenMP
synchronises and would report every parallel region: that build is without OpenMP, and the program's own threads share the tasks
of each phase in a random order, so what it looks at is whether two tasks of one phase touch the same memory; and it looks at the
team's own threads (csrc/cpu/team.cpp), which are late on purpose there.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from _calls import ROOT

COMPILER = os.environ.get("CXX") or "g++"

SANITIZE = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1"]
# libgomp: for omp_get_thread_num, which is then always 0. Delays: team.cpp's threads are late where that matters.
THREADS = ["-O0", "-fsanitize=thread", "-DFUSED_RESNET_TEST_DELAYS", "-fno-openmp", "-Wno-unknown-pragmas", "-g1", "-lgomp"]

# Flags beyond setup.py's, and one case in how many the program runs. In this order, the next build is compiled while a program runs.
BUILDS = {"TSan": (THREADS, 80), "guard bytes": ([], 1), "ASan + UBSan": (SANITIZE, 6)}


def _setup() -> object:
    """setup.py as a module, for its sources and flags: the program is built as the extension is."""
    spec = importlib.util.spec_from_file_location("fused_resnet_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _commands(folder: Path, extra: list[str]) -> dict[str, list[str]]:
    """What compiles each object file."""
    setup = _setup()
    sources = {name: flags for name, flags in setup.SOURCES.items() if name not in setup.KNOW_PYTHON}  # type: ignore[attr-defined]
    # What takes longest comes first.
    sources = dict(sorted(sources.items(), key=lambda item: "isa_avx512" not in item[0]))
    sources |= {str(path.relative_to(ROOT)): ["-O1"] for path in sorted((ROOT / "tests" / "cpp" / "memory").glob("*.cpp"))}
    commands = {}
    for source, flags in sources.items():
        target = str(folder / source.replace("/", "-").replace(".cpp", ".o"))
        commands[target] = [COMPILER, *setup.COMMON, *flags, *extra, "-c", str(ROOT / source), "-o", target]  # type: ignore[attr-defined]
    return commands


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def _links(flags: list[str], folder: Path) -> bool:
    """Whether the compiler has the sanitizer's runtime (and its programs run: TSan refuses some kernels' address spaces)."""
    source = folder / "empty.cpp"
    source.write_text("int main() {}\n")
    command = [COMPILER, str(source), *flags, "-o", str(folder / "empty")]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        return False
    return subprocess.run([str(folder / "empty")], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def objects(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, Future[None]]]]:
    """For each build that a test of this run wants and that the compiler knows: its object files, and their compilations."""
    wanted = {item.callspec.params["build"] for item in request.session.items if getattr(item, "originalname", "") == "test_memory"}
    pool = ThreadPoolExecutor(os.cpu_count())
    result = {}
    for build, (extra, _) in BUILDS.items():
        folder = tmp_path_factory.mktemp("memory")
        if build in wanted and (build != "TSan" or _links(extra, folder)):
            result[build] = {target: pool.submit(_run, command) for target, command in _commands(folder, extra).items()}
    yield result
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("build", BUILDS)
def test_memory(objects: dict[str, dict[str, Future[None]]], tmp_path: Path, build: str) -> None:
    if build not in objects:
        pytest.skip("no ThreadSanitizer here, so this run of the tasks on several threads was not looked at")
    for compilation in objects[build].values():
        compilation.result()
    extra, every = BUILDS[build]
    program = str(tmp_path / "memory")
    _run([COMPILER, *objects[build], "-fopenmp", *extra, "-o", program])
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")}  # the program asks for threads itself
    environment["TSAN_OPTIONS"] = "halt_on_error=1"
    done = subprocess.run([program, str(every)], capture_output=True, text=True, check=False, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    checks, failures = (int(word) for word in done.stdout.split()[-4::2])
    assert checks > 1000
    assert failures == 0
