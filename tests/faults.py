"""Plants known faults in the sources and sees that the tests go red. Run by hand: ``python tests/faults.py [NAME ...]``.

Not part of the suite: each fault compiles the kernels again. It needs a C++ compiler and takes about a minute a fault.

A copy of the repository is made in a temporary folder and built there as ``setup.py`` builds it, so that the module lies
beside the copy's own Python files and is the one that is found. Without a fault the tests must be green there (the first
line of the table), or red would mean nothing. Each fault is a change of text that must be found, so a fault whose text is gone
is an error and not a pass. Exit status 0: every fault was seen.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import _faults_cpu
import _faults_cuda
import _faults_python
from _fault import Fault

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("csrc", "fused_resnet", "tests", "setup.py", "pyproject.toml", "README.md", "LICENSE")
FAULTS: tuple[Fault, ...] = (*_faults_cpu.FAULTS, *_faults_python.FAULTS, *_faults_cuda.FAULTS)


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """In the copy, with the copy first on the path and nothing of this checkout on it."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FUSED_RESNET_")}
    environment |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def _copy(folder: Path) -> None:
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        elif source.exists():
            shutil.copy2(source, folder / part)


def _build(folder: Path) -> None:
    done = _run([sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--build-temp", "build/faults"], folder)
    if done.returncode:
        raise SystemExit(f"the copy does not build:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    code = "from fused_resnet._extension import cpu; print(cpu.__file__)"
    found = _run([sys.executable, "-c", code], folder).stdout.strip()
    if not found.startswith(str(folder)):
        raise SystemExit(f"the tests would use {found!r} instead of the module built in {folder}")


def _red(test: str, folder: Path) -> bool:
    """Whether this test fails: a failed assertion, not a collection that broke."""
    done = _run([sys.executable, "-m", "pytest", "-q", "-x", "--tb=line", test], folder)
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest {test} did not run (exit status {done.returncode}):\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.returncode == 1


def _plant(fault: Fault, folder: Path) -> dict[Path, str]:
    """Changes the copy; returns the files as they were."""
    before = {}
    for name in fault.files:
        path = folder / name
        before[path] = path.read_text()
        if fault.old not in before[path]:
            raise SystemExit(f"fault {fault.name!r}: its text is no longer in {name}: {fault.old!r}")
        path.write_text(before[path].replace(fault.old, fault.new))
    return before


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", help="faults whose name contains this; all by default")
    parser.add_argument("--list", action="store_true", help="print the names and end")
    options = parser.parse_args(arguments)
    faults = [f for f in FAULTS if not options.name or any(word in f.name for word in options.name)]
    if options.list or not faults:
        print("\n".join(f.name for f in FAULTS))
        return 0 if options.list else 2
    missed = 0
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name).resolve()
        _copy(folder)
        _build(folder)
        green = sorted({test for fault in faults for test in fault.tests})
        for test in green:
            if _red(test, folder):
                print(f"{test} is red without any fault", flush=True)
                return 1
        print(f"{'no fault':<75} green ({len(green)} tests)", flush=True)
        for fault in faults:
            start = time.perf_counter()
            before = _plant(fault, folder)
            try:
                _build(folder)
                unseen = [test for test in fault.tests if not _red(test, folder)]
            finally:
                for path, text in before.items():
                    path.write_text(text)
            missed += bool(unseen)
            verdict = "red" if not unseen else "NOT SEEN by " + ", ".join(unseen)
            print(f"{fault.name:<75} {verdict} ({time.perf_counter() - start:.0f} s)", flush=True)
    print(f"{len(faults) - missed} of {len(faults)} faults seen")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
