"""Everything that is to be known of the CUDA kernels on one machine with a GPU, in stages of under ten minutes each.

    python bench/gpu_report.py build --cutlass WHEEL_OR_FOLDER     the compiled modules, in place; needs nvcc, ninja, pybind11
    python bench/gpu_report.py all                                 every stage that follows, one process each
    python bench/gpu_report.py ceilings tests --total 580          some of them, in so many seconds together
    python bench/gpu_report.py tests | sanitize | check            the tests; under compute-sanitizer; `check` and `demo`
    python bench/gpu_report.py ceilings                            what a copy and a large product of matrices reach here
    python bench/gpu_report.py tiles | operators | compiled_operators | blocks | networks | training | graphs
    python bench/gpu_report.py report                              one JSON file and a table of it all, from whatever is there

Each stage writes STAGE.json into --out after every case. What is not reached in --budget seconds is left; the same command goes on
from there (--afresh starts over). A case that takes more than --patience seconds, or ends its process, is left out, and its stage goes on
in another. --device cpu --smoke runs everything on a few tiny shapes, for the test of this script.
Exit status 1 where something failed or was wrong, 3 where cases are left.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this clone, built in place, before any installed package
OUT = ROOT / "gpu_report"
MEASURING = ("ceilings", "tiles", "operators", "graphs", "networks", "training", "blocks", "compiled_operators")  # what matters most first
ORDER = (*MEASURING[:3], "tests", "check", *MEASURING[3:-1], "sanitize", MEASURING[-1], "report")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
COMPILING = ("compiled_operators", "blocks", "networks", "training", "graphs")
# Without plugins that need not be installed (pyproject.toml names options of pytest-benchmark).
PYTEST = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-rfE", "-o", "addopts=--strict-markers -p no:cacheprovider"]
QUICK = (
    *("applications/test_testing.py", "applications/test_gpu_report.py"),
    *("ops/test_bad_input.py", "ops/test_derived.py", "ops/test_registration.py"),
)


def run(command: list[str], seconds: float, log: Path, **changes: str) -> dict[str, Any]:
    """A command with a time limit; all that it prints goes to ``log``."""
    start = time.monotonic()
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with log.open("w", encoding="utf-8") as file:
        try:
            done = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, timeout=max(seconds, 1), check=False, cwd=ROOT,
                env={**os.environ, "PYTHONPATH": path, **changes},
            )  # fmt: skip
            status, why = done.returncode, ""
        except subprocess.TimeoutExpired:
            status, why = -1, f"not done within {seconds:.0f} s"
        except OSError as error:
            status, why = -1, str(error)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    failures = [line[:300] for line in lines if line.startswith(("FAILED", "ERROR"))][:50]
    return {
        "ok": status == 0, "status": status, "why": why, "seconds": time.monotonic() - start, "failures": failures,
        "end": [line[:300] for line in lines[-15:]],
    }  # fmt: skip


def counts(log: Path) -> dict[str, int]:
    """What pytest's last line counts: passed, failed, skipped."""
    text = log.read_text(encoding="utf-8", errors="replace")
    last = next((line for line in reversed(text.splitlines()) if " passed" in line or " failed" in line or " skipped" in line), "")
    return {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?|deselected)", last)}


def cutlass(given: str | None, folder: Path) -> Path | None:
    """The folder for CUTLASS_PATH: a wheel is unpacked."""
    if given is None:
        return None
    path = Path(given).resolve()
    if path.is_dir():
        return path
    target = folder / "cutlass"
    if not (target / "cutlass_library").is_dir():
        with zipfile.ZipFile(path) as wheel:
            wheel.extractall(target)
    return target


def build(options: argparse.Namespace) -> dict[str, Any]:
    if options.smoke:
        command = [sys.executable, "setup.py", "--version"]
        return {"setup.py": run(command, 60, options.out / "build.log", FUSED_RESNET_CUDA="0")}
    changes = {"FUSED_RESNET_CUDA": "1"}
    headers = cutlass(options.cutlass, options.out)
    if headers is not None:
        changes["CUTLASS_PATH"] = str(headers)
    # What ninja has compiled stays, so that a second run goes on.
    found = run([sys.executable, "setup.py", "build_ext", "--inplace"], options.budget, options.out / "build.log", **changes)
    look = "from fused_resnet import _machine; import json; print(json.dumps(_machine.cuda()))"
    return {"build_ext": found, "import": run([sys.executable, "-c", look], 120, options.out / "import.log")}


def tests(options: argparse.Namespace) -> dict[str, Any]:
    found = {}
    if options.smoke:
        log = options.out / "tests.log"
        return {"a test": {**run([*PYTEST, "tests/applications/test_testing.py", "-k", "integer"], 120, log), "counts": counts(log)}}
    for name, chosen, share in (
        ("cuda", ["tests/cuda", "-m", "cuda and not large"], 0.7),
        ("cuda, large", ["tests/cuda", "-m", "cuda and large"], 0.2),
        ("the quick part", [str(Path("tests") / file) for file in QUICK] + ["-m", "not cuda", "-x"], 0.3),
    ):
        log = options.out / f"tests-{name.replace(', ', '-').replace(' ', '-')}.log"
        seconds = min(options.budget * share, options.end - time.monotonic())
        found[name] = {**run([*PYTEST, *at_once(name), *chosen], seconds, log), "counts": counts(log)}
        if name.startswith("cuda") and not found[name]["counts"].get("passed"):
            found[name]["ok"] = False  # all skipped is not green
        print(f"tests, {name}: {found[name]['counts']}", flush=True)
    return found


def at_once(part: str) -> list[str]:
    """Options for tests side by side and a limit for each, where pytest's plugins for that are installed; large ones one by one."""
    there = {name: importlib.util.find_spec(name) is not None for name in ("xdist", "pytest_timeout")}
    workers = ["-n", str(max(2, min(12, (os.cpu_count() or 2) - 2)))] if there["xdist"] and "large" not in part else []
    # By a thread: a wait for a kernel that hangs hears no signal. It ends the worker, and xdist begins another.
    limit = ["--timeout", "120" if "large" in part else "60", "--timeout-method", "thread"]
    return [*workers, *(limit if there["pytest_timeout"] else [])]


def sanitize(options: argparse.Namespace) -> dict[str, Any]:
    if options.smoke:
        return {}
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return {name: {"ok": False, "error": "compute-sanitizer was not found"} for name in SANITIZERS}
    found = {}
    for i, name in enumerate(SANITIZERS):
        log = options.out / f"sanitize-{name}.log"
        seconds = (options.end - time.monotonic()) / (len(SANITIZERS) - i)
        # Of all kernels memory errors; the rest of those of csrc/cuda/block.h alone: what libraries leave uninitialised is theirs, and
        # what orders TMA, mbarriers and warp groups (CUTLASS) these tools take for races and for barriers that are wrong.
        ours = [] if name == "memcheck" else ["--kernel-name", "kns=run_blocks"]
        command = [tool, "--tool", name, "--error-exitcode", "9", "--target-processes", "all", *ours]
        command += [*PYTEST, "tests/cuda", "-m", "cuda and sanitized"]
        found[name] = {**run(command, seconds, log, PYTORCH_NO_CUDA_MEMORY_CACHING="1"), "counts": counts(log)}
        summary = re.findall(r"=+ (?:ERROR|RACECHECK) SUMMARY: .*", log.read_text(errors="replace"))
        found[name]["summary"] = summary[-1] if summary else ""
        found[name]["ok"] = found[name]["ok"] and bool(summary) and bool(found[name]["counts"].get("passed"))
        print(f"sanitize, {name}: {found[name]['summary'] or found[name]['why'] or found[name]['end'][-1:]}", flush=True)
    return found


def check(options: argparse.Namespace) -> dict[str, Any]:
    device = ["--device", options.device]
    commands = {
        "check --quick": ["check", *device, "--quick"],
        "demo": ["demo", *device, "--epochs", "12", "--repeat", "5", "--out", str(options.out / "demo.png")],
        "check": ["check", *device, "--json", str(options.out / "fused-resnet-check.json")],
    }
    if options.smoke:
        commands = {"check": ["check", *device, "--quick", "--dtype", "bfloat16"]}
    found = {}
    for name, command in commands.items():
        log = options.out / f"check-{name}.log"
        found[name] = run([sys.executable, "-m", "fused_resnet", *command], options.end - time.monotonic(), log)
        print(f"{name}: {'ok' if found[name]['ok'] else found[name]['end'][-3:]}", flush=True)
    return found


def system() -> str:
    """Driver and clocks, if they can be read. Nothing is set."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,ecc.mode.current,mig.mode.current"
    done = subprocess.run([tool, f"--query-gpu={query}", "--format=csv"], capture_output=True, text=True, check=False, timeout=60)
    return " | ".join(done.stdout.strip().splitlines())


def several(options: argparse.Namespace, stages: list[str]) -> int:
    """Each in a process of its own: one that dies takes no other along. A measuring stage that died, or lost the device, goes on in another
    process without the case in which it did."""
    status, waiting = 0, list(stages)
    done: int | None = None  # cases with a result when the stage's process ended the last time
    while waiting:
        stage = waiting[0]
        seconds = min(options.budget, options.end - time.monotonic())
        if seconds < 20 and stage != "report":
            print(f"{stage}: left, time is up")
            status = max(status, 3)
            del waiting[0]
            continue
        try:
            command = _stage(options, stage, seconds, options.afresh and done is None)
            found = subprocess.run(command, check=False, timeout=max(seconds, 60) + 60).returncode
        except subprocess.TimeoutExpired:  # which says nothing against the case it was in
            found = -1
            _put_back(options.out / f"{stage}.json")
        before = done
        case, done = _lost_in(options.out / f"{stage}.json") if stage in MEASURING else ("", None)
        if not case or done == before:  # it came to its end, or the last process to none of its cases
            case, done = "", None
        _pack(options)
        print(f"{stage}: status {found}" + (f", lost in {case}: it goes on without that" if case else ""), flush=True)
        status = max(status, abs(found))
        if not case:
            del waiting[0]
    return status


def _put_back(path: Path) -> None:
    """The case in which a stage was stopped is left for another run."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    case = content.pop("running", None)
    if case is not None:
        content["left"].append(case)
        path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _pack(options: argparse.Namespace) -> None:
    if options.tar is not None:
        packed(options.out, options.tar)


def packed(folder: Path, target: Path) -> None:
    """All results so far in one file, whole at any time."""
    draft = target.with_name(target.name + ".tmp")
    with tarfile.open(draft, "w:gz") as archive:
        for path in sorted(folder.iterdir()):
            if path.suffix in (".json", ".jsonl", ".log", ".md", ".png"):
                archive.add(path, path.name)
    draft.replace(target)


def _stage(options: argparse.Namespace, stage: str, seconds: float, afresh: bool) -> list[str]:
    """The command of one stage."""
    command = [sys.executable, __file__, stage, "--alone", "--out", str(options.out), "--device", options.device]
    command += ["--budget", f"{seconds:.0f}", "--patience", str(options.patience), "--compile-seconds", str(options.compile_seconds)]
    flags = (("--smoke", options.smoke), ("--no-compile", options.no_compile), ("--afresh", afresh))
    command += ["--only", options.only, "--without", options.without, *(["--cutlass", options.cutlass] if options.cutlass else [])]
    return [*command, *[name for name, on in flags if on]]


def _lost_in(path: Path) -> tuple[str, int | None]:
    """The case during which a stage's process ended, or lost the device to a kernel; "" where neither is so. And how many cases have a
    result, that one among them."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "", None
    count = len(content["results"])
    if content.get("running"):
        return content["running"], count + 1
    return (list(content["results"])[-1], count) if content.get("aborted") and content["results"] else ("", count)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=("all", "build", *ORDER), metavar="STAGE", help="all, or any of those above")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the results (default: gpu_report in the clone)")
    parser.add_argument("--cutlass", metavar="WHEEL_OR_FOLDER", help="of build: the nvidia-cutlass wheel, or a folder with its headers")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for a stage (default: 540)")
    parser.add_argument("--total", type=float, default=float("inf"), help="seconds for all of them together (default: no limit)")
    parser.add_argument(
        "--patience", type=float, default=45.0, help="seconds for a case, and --compile-seconds where it compiles (default: 45)"
    )
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # in this process: how a stage is called
    parser.add_argument("--compile-seconds", type=float, default=150.0, help="for one torch.compile (default: 150)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--only", default="", metavar="WORDS", help='dtypes, networks, batches: "bfloat16 resnet50 256,32" (default: all)')
    parser.add_argument("--without", default="", metavar="NAMES", help="contenders that take no part, with commas: eager,compile")
    parser.add_argument("--tar", type=Path, metavar="FILE", help="pack the results into this file after each stage")
    parser.add_argument("--afresh", action="store_true", help="forget results that are there")
    parser.add_argument("--smoke", action="store_true", help="a few tiny cases, to see that everything runs")
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    options.stage = options.stages[0] if len(options.stages) == 1 else "all"
    options.start = time.monotonic()
    options.end = options.start + (options.total if options.stage == "all" else min(options.total, options.budget))
    return options


def main() -> int:
    options = arguments()
    if options.stage == "all" or (options.stage in MEASURING and not options.alone):
        return several(options, list(ORDER) if "all" in options.stages else options.stages)
    if options.stage == "build":  # before anything is imported that it builds
        found = build(options)
        return _write_outside(options, found)
    if options.stage in ("tests", "sanitize", "check"):
        return _write_outside(options, {"tests": tests, "sanitize": sanitize, "check": check}[options.stage](options))
    if options.stage == "report":
        import _gpu_table

        file, page, lines = _gpu_table.write(options.out)
        for line in lines:
            print(f"{line['verdict']:<14}{line['measured']:>8} of {line['wanted']:>6}  {line['what']}  {line['note']}")
        print(f"{file}\n{page}")
        _pack(options)
        return 0
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu_report: torch finds no CUDA device that it can use", file=sys.stderr)
        return 2
    import _gpu_stages

    try:
        only = _gpu_stages.Only.of(options.only)
    except ValueError as error:
        print(f"gpu_report: {error}", file=sys.stderr)
        return 2
    device = torch.device(options.device, *([0] if options.device == "cuda" else []))
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    patience = options.patience + (options.compile_seconds if options.stage in COMPILING and not options.no_compile else 0)
    store = _gpu_stages.Store(options.out, options.stage, device, options.budget, options.afresh, options.smoke, patience)
    store.content["system"] = system()
    effort = _gpu_stages.effort_of(options.smoke, options.compile_seconds, store.deadline)
    without = frozenset(options.without.split(",")) | ({"compile"} if options.no_compile else set())
    scope = _gpu_stages.Scope(device, effort, options.smoke, without, only, options.out)
    jobs = _gpu_stages.MEASURING[options.stage](scope)
    good = store.run(jobs)
    return 3 if store.content["left"] else 0 if good else 1


def _write_outside(options: argparse.Namespace, found: dict[str, Any]) -> int:
    """The file of a stage that ran other programs."""
    path = options.out / f"{options.stage}.json"
    seconds = time.monotonic() - options.start
    content = {"stage": options.stage, "results": found, "smoke": options.smoke, "system": system(), "seconds": seconds}
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    _pack(options)
    for name, r in found.items():
        print(f"{options.stage}, {name}: {'ok' if r['ok'] else 'NOT OK'}, {r.get('seconds', 0):.0f} s {r.get('why', '')}", flush=True)
        for line in () if r["ok"] else [*r.get("failures", ()), *r.get("end", ())]:
            print(f"    {line}")
    return 0 if all(r["ok"] for r in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
