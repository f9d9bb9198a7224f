"""Plants known faults in the sources and sees that the tests go red. Run by hand: ``python tests/faults.py [NAME ...]``.

Not part of the suite: most faults compile kernels again. It needs a C++ compiler and takes about two hours on two cores.

A copy of the repository is made in a temporary folder and built there as ``setup.py`` builds it, so that the module lies
beside the copy's own Python files and is the one that is found. Without a fault the tests must be green there, or red would
mean nothing. Each fault is a change of text that must be found, so a fault whose text is gone is an error and not a pass.

Every result is kept in bench/results/faults.json as it comes. Started again, the script goes on with what is missing there, was an
error, or belongs to a fault that has changed; with everything, if the sources, the tests or the machine have. ``--fresh`` runs
everything; ``--jobs N`` runs N of them side by side, each in a copy of its own. Exit status 0: every fault was seen; 1: one was
not, or could not be planted, built or judged.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TypeVar

from _kept import RESULTS, ROOT, Report, digest, machine
from planted import cpu, cuda, gradients, graph, neighbours, python, runtime
from planted.fault import Fault

PARTS = ("csrc", "fused_resnet", "tests", "bench", "setup.py", "pyproject.toml", "README.md", "LICENSE")
FAULTS: tuple[Fault, ...] = tuple(
    fault for file in (cpu, gradients, neighbours, python, graph, runtime, cuda) for fault in file.FAULTS
)
BUILT = "build/faults"
LONGEST = 1200  # seconds for one build or test: a fault may make it wait for ever
Item = TypeVar("Item")
GREEN = "without a fault"
PLANTED = "faults"


class Broken(Exception):
    """Why a fault could not be planted, built or judged."""


class Copy:
    """A copy of the repository that is built once and put back after each fault: files, objects and their times, so that ninja
    compiles what the next fault touches and nothing else."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.clean = folder / "work", folder / "clean"
        for part in PARTS:
            source = ROOT / part
            if source.is_dir():
                shutil.copytree(source, self.folder / part, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
            elif source.exists():
                shutil.copy2(source, self.folder / part)
        self.build()
        shutil.copytree(self.folder, self.clean)

    def run(self, command: list[str], **more: str) -> subprocess.CompletedProcess[str]:
        """In the copy, with the copy first on the path and nothing of this checkout on it."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("FUSED_RESNET_")}
        environment |= {"PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1", **more}
        try:
            return subprocess.run(
                command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False, timeout=LONGEST
            )
        except subprocess.TimeoutExpired:
            raise Broken(f"it did not end within {LONGEST} s: {' '.join(command[1:])}") from None

    def build(self) -> None:
        """The module for the CPU; the tests compile what they need of CUDA's sources."""
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--build-temp", BUILT]
        done = self.run(command, FUSED_RESNET_CUDA="0")
        if done.returncode:
            raise Broken(f"the copy does not build: {(done.stdout + done.stderr)[-2000:]}")
        code = "from fused_resnet._extension import cpu; print(cpu.__file__)"
        found = self.run([sys.executable, "-c", code]).stdout.strip()
        if not found.startswith(str(self.folder)):
            raise Broken("the tests would use another module than the copy's")

    def red(self, test: str) -> bool:
        """Whether this test fails: a failed assertion, not a collection that broke."""
        done = self.run([sys.executable, "-m", "pytest", "-q", "-x", "--tb=line", test])
        if done.returncode not in (0, 1):
            raise Broken(f"pytest {test} did not run (exit status {done.returncode}): {(done.stdout + done.stderr)[-2000:]}")
        return done.returncode == 1

    def plant(self, fault: Fault) -> None:
        texts = {name: (self.folder / name).read_text() if (self.folder / name).exists() else "" for name in fault.files}
        for name, text in texts.items():
            if fault.old not in text:
                raise Broken(f"its text is no longer in {name}: {fault.old!r}")
        for name, text in texts.items():
            (self.folder / name).write_text(text.replace(fault.old, fault.new))
        if _is_compiled(fault):
            self.build()

    def restore(self, fault: Fault) -> None:
        for name in fault.files:
            if (self.clean / name).exists():
                shutil.copy2(self.clean / name, self.folder / name)
        if _is_compiled(fault):
            shutil.rmtree(self.folder / "build")
            shutil.copytree(self.clean / "build", self.folder / "build")
            for module in (self.clean / "fused_resnet").glob("*.so"):
                shutil.copy2(module, self.folder / "fused_resnet" / module.name)


def _is_compiled(fault: Fault) -> bool:
    """Whether it changes the compiled module."""
    return any(not name.endswith(".py") or name == "setup.py" for name in fault.files)


def _key(fault: Fault) -> str:
    return hashlib.sha256(repr(fault).encode()).hexdigest()[:16]


def _try(fault: Fault, copy: Copy, green: dict[str, dict[str, object]]) -> tuple[str, str]:
    """The verdict on a fault, seen, missed or error, and a sentence."""
    reds = [test for test in fault.tests if green[test]["verdict"] != "green"]
    if reds:
        return "error", f"not green without a fault: {', '.join(reds)}"
    try:
        copy.plant(fault)
        unseen = [test for test in fault.tests if not copy.red(test)]
    except Broken as why:
        return "error", str(why)
    finally:
        copy.restore(fault)
    return ("missed", f"not seen by {', '.join(unseen)}") if unseen else ("seen", "red")


def _line(name: str, words: str, seconds: float) -> None:
    print(f"{name:<75} {words.splitlines()[0]} ({seconds:.0f} s)", flush=True)


def _over_copies(
    copies: list[Copy], items: list[Item], judge: Callable[[Item, Copy], tuple[str, str]]
) -> Iterator[tuple[Item, str, str, float]]:
    """Each item with its verdict, a sentence without the copy's folder, and seconds, as they come; one item at a time in each copy."""
    free: queue.SimpleQueue[Copy] = queue.SimpleQueue()
    for copy in copies:
        free.put(copy)

    def one(item: Item) -> tuple[Item, str, str, float]:
        copy = free.get()
        try:
            start = time.perf_counter()
            verdict, words = judge(item, copy)
            return item, verdict, words.replace(str(copy.folder), ""), time.perf_counter() - start
        finally:
            free.put(copy)

    with ThreadPoolExecutor(len(copies)) as pool:
        try:
            for future in as_completed([pool.submit(one, item) for item in items]):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _without_fault(test: str, copy: Copy) -> tuple[str, str]:
    """The verdict on a test where nothing is planted, green, red or error, and a sentence."""
    try:
        return ("red", "") if copy.red(test) else ("green", "")
    except Broken as why:
        return "error", str(why)


def _run(missing: list[Fault], copies: list[Copy], report: Report) -> None:
    """First the tests without a fault, unless they are known to be green, then the faults; each result is kept as it comes."""
    green = report.section(GREEN)
    tests = sorted({test for fault in missing for test in fault.tests if green.get(test, {}).get("verdict") != "green"})
    for test, verdict, words, seconds in _over_copies(copies, tests, _without_fault):
        report.keep(GREEN, test, {"verdict": verdict, "words": words, "seconds": round(seconds, 1)})
        _line(f"no fault: {test}", words or verdict, seconds)
    for fault, verdict, words, seconds in _over_copies(copies, missing, lambda fault, copy: _try(fault, copy, green)):
        result = {"verdict": verdict, "words": words, "seconds": round(seconds, 1), "tests": fault.tests, "key": _key(fault)}
        report.keep(PLANTED, fault.name, result)
        _line(fault.name, words, seconds)


def _done(fault: Fault, report: Report) -> bool:
    kept = report.section(PLANTED).get(fault.name, {})
    return kept.get("key") == _key(fault) and kept["verdict"] in ("seen", "missed")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", help="faults whose name contains this; all by default")
    parser.add_argument("--list", action="store_true", help="print the names, with what is known of them, and end")
    parser.add_argument("--fresh", action="store_true", help="take over no result")
    where = RESULTS / "faults.json"
    parser.add_argument("--report", type=Path, default=where, help="the file in which results are kept (default: bench/results/faults.json)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="so many faults side by side (default: 1)")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    faults = [f for f in FAULTS if not options.name or any(word in f.name for word in options.name)]
    report = Report(options.report, {"machine": machine(), "sources": digest(PARTS)}, options.fresh)
    kept = report.section(PLANTED)
    for name in set(kept) - {fault.name for fault in FAULTS}:
        del kept[name]
    if options.list or not faults:
        print("\n".join(f"{f.name:<75} {kept[f.name]['verdict'] if _done(f, report) else ''}".rstrip() for f in FAULTS))
        return 0 if options.list else 2
    missing = [fault for fault in faults if not _done(fault, report)]
    print(report.note or f"{len(faults) - len(missing)} of {len(faults)} faults are in {options.report.name}", flush=True)
    if missing:
        with tempfile.TemporaryDirectory(prefix="faults-") as folder:
            try:
                copies = [Copy(Path(folder).resolve() / str(number)) for number in range(options.jobs)]
            except Broken as why:
                print(why)
                return 1
            _run(missing, copies, report)
    seen = [fault for fault in faults if kept[fault.name]["verdict"] == "seen"]
    for fault in faults:
        if fault not in seen:
            print(f"{kept[fault.name]['verdict'].upper()}  {fault.name}: {kept[fault.name]['words']}")
    print(f"{len(seen)} of {len(faults)} faults seen")
    return 0 if len(seen) == len(faults) else 1


if __name__ == "__main__":
    sys.exit(main())
