"""Runs the suite as other machines would. Run by hand: ``python tests/any_machine.py``.

The configurations: each FUSED_RESNET_ISA that this machine has, OMP_NUM_THREADS of 1, 2 and 3, and under load, beside more busy
processes than there are cores. ``--list`` prints them, ``--only NAME ...`` chooses, ``--jobs N`` runs N of them side by side, which
is one more load; their threads then wait without spinning. Each runs the whole suite; what is behind ``--`` goes to pytest, for a
quick pass whose results are kept only where ``--report FILE`` says so:

    python tests/any_machine.py --only "isa scalar" load -- tests/kernels/test_exact.py -k bias

What a configuration found is kept in bench/results/any_machine.json when it ends: counts, the tests that failed, seconds, and
the instruction set and threads that its process had, which must be those that were asked for. Each machine, with its compiled
module, has a part of its own there. Started again, the script goes on with the configurations that are missing in this machine's
part; the file begins anew if the sources or pytest's arguments are others, or with ``--fresh``. A pytest that did not run to its
end is no result.

Exit status 0: no test failed; 1: one did; 2: a configuration gave no result.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from _kept import RESULTS, ROOT, Report, digest, machine

PARTS = ("csrc", "fused_resnet", "tests", "bench", "setup.py", "pyproject.toml", "README.md")
THREADS = (1, 2, 3)
MACHINES = "machines"
# Each ends when its parent does, however that ends.
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    for _ in range(10**6): pass"


def module() -> dict[str, Any]:
    """The compiled module that the tests use, and its instruction sets."""
    from fused_resnet import _extension

    if _extension.cpu is None:
        raise SystemExit(f"there is no compiled module: {_extension.missing}")
    content = Path(_extension.cpu.__file__).read_bytes()
    return {
        "build": dict(_extension.cpu.BUILD),
        "digest": hashlib.sha256(content).hexdigest()[:16],
        "isas": list(_extension.cpu.available_isas()),
    }


def part_of(here: dict[str, Any], compiled: dict[str, Any]) -> str:
    """The name of a machine's part in the report: the processor, and a digest of all that is known of machine and module."""
    known = json.dumps([here, compiled], sort_keys=True)
    return f"{here['cpu']}, {hashlib.sha256(known.encode()).hexdigest()[:8]}"


def configurations(isas: list[str]) -> dict[str, dict[str, str]]:
    """Environment variables by name; what is not named is not set."""
    return {
        **{f"isa {isa}": {"FUSED_RESNET_ISA": isa} for isa in isas},
        # MKL, as torch asks it at its start, would allow no more threads than there are cores.
        **{f"threads {count}": {"OMP_NUM_THREADS": str(count), "MKL_DYNAMIC": "FALSE"} for count in THREADS},
        "load": {},
    }


class Recorder:
    """A plugin of pytest: what the tests' own process had and found."""

    def __init__(self, file: Path) -> None:
        import torch

        from fused_resnet import _extension

        self.file = file
        self.had = {"isa": _extension.cpu.isa() if _extension.cpu is not None else None, "threads": torch.get_num_threads()}
        self.outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        worse = "failed" if report.failed else "skipped" if report.skipped else "passed"
        if report.when == "call" or worse != "passed":
            before = self.outcomes.get(report.nodeid)
            self.outcomes[report.nodeid] = "failed" if "failed" in (before, worse) else worse

    def pytest_sessionfinish(self, session: Any, exitstatus: int) -> None:
        failed = sorted(name for name, outcome in self.outcomes.items() if outcome == "failed")
        found = {"had": self.had, "counts": dict(Counter(self.outcomes.values())), "failed": failed, "status": int(exitstatus)}
        self.file.write_text(json.dumps(found))


def child(file: Path, arguments: list[str]) -> int:
    """pytest in this process, which the script started in the configuration's environment."""
    import pytest

    sys.path.insert(0, str(ROOT))  # as `python -m pytest` does
    return int(pytest.main(["-q", *arguments], plugins=[Recorder(file)]))


@contextlib.contextmanager
def load(count: int) -> Iterator[None]:
    """So many busy processes."""
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def wrong(name: str, changes: dict[str, str], had: dict[str, Any]) -> str:
    """Why the process did not have what was asked for, or ''."""
    isa, threads = changes.get("FUSED_RESNET_ISA"), changes.get("OMP_NUM_THREADS")
    if isa is not None and had["isa"] != isa:
        return f"{name}: its process had the instruction set {had['isa']}"
    if threads is not None and had["threads"] != int(threads):
        return f"{name}: its process had {had['threads']} threads"
    return ""


def end_of(output: str) -> str:
    """What a process said last; of one that crashed, where it was, which it says first."""
    crash = output.rfind("Fatal Python error")
    return output[-2000:] if crash < 0 else output[crash:][:2000]


def run(name: str, changes: dict[str, str], arguments: list[str], busy: int) -> dict[str, Any] | str:
    """What a configuration found, or why it gave no result."""
    others = ("FUSED_RESNET_", "OMP_", "MKL_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(others)}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, load(busy):
        file = Path(folder) / "found.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--child", str(file), "--", *arguments]
        done = subprocess.run(
            command, cwd=ROOT, env={**environment, **changes}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if done.returncode not in (0, 1) or not file.exists():
            return f"pytest did not run to its end (exit status {done.returncode}): {end_of(done.stdout)}"
        found: dict[str, Any] = json.loads(file.read_text())
    if found.pop("status") != done.returncode:
        return f"pytest ended with another status than its session: {done.stdout[-2000:]}"
    if bool(found["failed"]) != (done.returncode == 1):
        return f"pytest's status {done.returncode} is not what its tests say: {done.stdout[-2000:]}"
    return wrong(name, changes, found["had"]) or {**found, "seconds": round(time.perf_counter() - start), "busy_processes": busy}


def say(name: str, found: dict[str, Any], note: str = "") -> None:
    counts = ", ".join(f"{found['counts'].get(kind, 0)} {kind}" for kind in ("passed", "failed", "skipped"))
    had = f"{found['had']['isa']}, threads {found['had']['threads']}"
    print(f"{name:<16} {counts} in {found['seconds']} s ({had}){note}", flush=True)
    for test in found["failed"]:
        print(f"    FAILED {test}", flush=True)


def main(argv: list[str]) -> int:
    own, arguments = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these configurations")
    parser.add_argument("--list", action="store_true", help="print the configurations and end")
    parser.add_argument("--fresh", action="store_true", help="take over no result")
    parser.add_argument("--report", type=Path, help="where results are kept (default: bench/results/any_machine.json)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="so many configurations side by side (default: 1)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(own)
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    if options.child is not None:
        return child(options.child, arguments)
    here = machine()
    compiled = module()
    chosen = configurations(compiled["isas"])
    if options.list:
        print("\n".join(chosen))
        return 0
    unknown = set(options.only or ()) - set(chosen)
    if unknown:
        parser.error(f"there is no configuration {', '.join(sorted(unknown))}; there are {', '.join(chosen)}")
    with tempfile.TemporaryDirectory() as folder:
        path = options.report or (Path(folder) if arguments else RESULTS) / "any_machine.json"
        report = Report(path, {"sources": digest(PARTS), "arguments": arguments}, options.fresh)
        if report.note:
            print(report.note, flush=True)
        part = part_of(here, compiled)
        report.keep(MACHINES, part, {"machine": here, "module": compiled})
        waiting = {"OMP_WAIT_POLICY": "passive"} if options.jobs > 1 else {}
        chosen = {name: {**chosen[name], **waiting} for name in options.only or chosen}
        return go_on(report, part, chosen, arguments, 2 * here["cores"] + 1, options.jobs)


def go_on(report: Report, part: str, chosen: dict[str, dict[str, str]], arguments: list[str], most: int, jobs: int) -> int:
    """The exit status when every configuration is in the report's part or gave none."""
    kept, lost = report.section(part), False
    for name in [name for name in chosen if name in kept]:
        say(name, kept[name], " kept")
    with ThreadPoolExecutor(jobs) as pool:
        missing = {name: changes for name, changes in chosen.items() if name not in kept}
        running = {
            pool.submit(run, name, changes, arguments, most if name == "load" else 0): name for name, changes in missing.items()
        }
        for future in as_completed(running):
            name, found = running[future], future.result()
            if digest(PARTS) != report.content["sources"]:
                found = "the sources changed meanwhile"
            if isinstance(found, str):
                print(f"{name:<16} NO RESULT: {found}", flush=True)
                lost = True
                continue
            report.keep(part, name, {**found, "environment": missing[name], "jobs": jobs})
            say(name, kept[name])
    failed = any(kept[name]["failed"] for name in chosen if name in kept)
    return 1 if failed else 2 if lost else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
