"""The first minutes on a GPU: link what was compiled elsewhere, and try every tensor-core kernel by itself.

    python bench/gpu_first.py pack                     where there is nvcc: compile, and what knows no Python to .prebuilt
    python bench/gpu_first.py link                     on the machine with the GPU: the modules from them, seconds instead of minutes
    python bench/gpu_first.py smoke --out FOLDER       one JSON line a kernel: the features that are right, the first that is not, and how
    ncu --clock-control none --profile-from-start off --section SpeedOfLight --section MemoryWorkloadAnalysis \\
        --section WarpStateStats python bench/gpu_first.py profile

`pack` is for a machine of the same architecture and a C++ library that is as old or older; Python and torch may be other versions there.
In `smoke` a kernel that hangs, dies or spoils its context costs its own process, and what was right before is told. `profile` launches
four layers' kernels and cuDNN's once each, for the counters. --twin FILE: the module's twin for the host in the GPU's place, for the test
of this script. Exit status 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import _gpu_smoke

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this clone, linked in place, before any installed package
PREBUILT = ROOT / ".prebuilt"
RESULT = "RESULT "  # before what a child says
ROW = "wrong in a row"
SHORT = {_gpu_smoke.RIGHT: "ok ", _gpu_smoke.WRONG: "BAD", _gpu_smoke.UNKNOWN: "?? "}
FEW_THREADS = {"OMP_NUM_THREADS": "2"}  # several children share the cores
Commands = dict[str, list[str]]  # of each object that has to be compiled here, by its name

# ---------------------------------------------------------------------------------------------------------------------
# Objects from another machine
# ---------------------------------------------------------------------------------------------------------------------


def setup_file() -> Any:
    """setup.py, which has the flags of every file."""
    spec = importlib.util.spec_from_file_location("fused_resnet_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mark_of(root: Path) -> str:
    """What objects must have been made of: the sources and their flags."""
    digest = hashlib.sha256()
    for path in sorted([root / "setup.py", *(path for path in (root / "csrc").rglob("*") if path.is_file())]):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def build_for(build: Path) -> int:
    """Compile what has changed, for Hopper unless FUSED_RESNET_CUDA_ARCHS says else: objects must be of the sources that are marked."""
    os.environ.setdefault("FUSED_RESNET_CUDA_ARCHS", "90a")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", str(build)]
    return subprocess.run(command, cwd=ROOT, check=False, env={**os.environ, "FUSED_RESNET_CUDA": "1"}).returncode


def pack(build: Path, target: Path) -> int:
    """Copy a build's objects, but for those that know Python."""
    setup = setup_file()
    objects = {}
    for name, units in (("_cpu", setup.cpu_units()), ("_cuda", setup.cuda_units())):  # not what an older build has left there
        sources = [unit.source for unit in units if unit.source not in setup.KNOW_PYTHON]
        objects[name] = [build / f"fused_resnet.{name}" / f"{Path(source).stem}.o" for source in sources]
    missing = [path for paths in objects.values() for path in paths if not path.is_file()]
    if missing:
        print(f"gpu_first: there is no {missing[0]}", file=sys.stderr)
        return 1
    shutil.rmtree(target, ignore_errors=True)
    for name, paths in objects.items():
        (target / name).mkdir(parents=True)
        for path in paths:
            shutil.copy2(path, target / name)
    made_of = {"mark": mark_of(ROOT), "architectures": " ".join(setup.architectures())}
    (target / "made_of.json").write_text(json.dumps(made_of) + "\n")
    packed = [path for paths in objects.values() for path in paths]
    print(f"{target}: {len(packed)} objects, {sum(path.stat().st_size for path in packed) / 1e6:.0f} MB")
    return 0


def link(prebuilt: Path = PREBUILT) -> int:
    """The modules, in place."""
    setup = setup_file()
    try:
        made_of = json.loads((prebuilt / "made_of.json").read_text())
    except OSError as error:
        print(f"gpu_first: there is nothing to link ({error}): `pack` makes it", file=sys.stderr)
        return 1
    if made_of["mark"] != mark_of(ROOT):
        print("gpu_first: the objects are of other sources than these: build and pack again", file=sys.stderr)
        return 1
    compiler, device_compiler = os.environ.get("CXX") or "g++", setup.nvcc()
    if device_compiler is None:
        print("gpu_first: there is no nvcc, which links the CUDA module: set CUDA_HOME", file=sys.stderr)
        return 1
    commands: dict[str, Commands] = {"_cpu": {}, "_cuda": {}}
    for unit in setup.cpu_units():
        if unit.source in setup.KNOW_PYTHON:
            commands["_cpu"][Path(unit.source).stem] = [*compiler.split(), *setup.COMMON, *unit.flags, "-c", unit.source]
    for unit in setup.cuda_host_units(made_of["architectures"].split()):
        if unit.source in setup.KNOW_PYTHON:
            flags = [flag.replace("'", "") for flag in unit.flags]  # without the quotes that ninja's shell takes away
            commands["_cuda"][Path(unit.source).stem] = [device_compiler, *setup.CUDA_COMMON, *flags, "-c", unit.source]
    linkers = {"_cpu": [*compiler.split(), *setup.LINK.split()], "_cuda": [device_compiler, *setup.CUDA_LINK.split()]}
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    targets = {name: ROOT / "fused_resnet" / f"{name}{suffix}" for name in linkers}
    if not all(compile_and_link(commands, linkers, prebuilt, targets)):
        return 1
    look = "from fused_resnet import _extension as e; from fused_resnet.ops.cuda import tiles; assert e.cpu and tiles(), e.cuda_missing()"
    return subprocess.run([sys.executable, "-c", look], cwd=ROOT, check=False).returncode


def compile_and_link(
    commands: dict[str, Commands], linkers: dict[str, list[str]], prebuilt: Path, targets: dict[str, Path]
) -> Iterator[bool]:
    """For each module, whether it was linked: of the objects that are there and of those that the commands make, side by side."""
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
        made = {(name, stem): Path(scratch) / f"{name}-{stem}.o" for name, units in commands.items() for stem in units}
        done = {key: pool.submit(_runs, [*commands[key[0]][key[1]], "-o", str(path)]) for key, path in made.items()}
        for name, linker in linkers.items():
            own = [path for (owner, _), path in made.items() if owner == name]
            compiled = all([done[key].result() for key in made if key[0] == name])
            objects = [*map(str, own), *sorted(map(str, (prebuilt / name).glob("*.o")))]
            yield compiled and _runs([*linker, *objects, "-o", str(targets[name])])


def _runs(command: Sequence[str]) -> bool:
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    if done.returncode:
        print(f"{shlex.join(command)[:300]}\n{done.stdout}{done.stderr}"[:4000], file=sys.stderr)
    return done.returncode == 0


# ---------------------------------------------------------------------------------------------------------------------
# Every kernel by itself
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def device_of(twin: str) -> Iterator[Any]:
    """The GPU, or the CPU with the module's twin."""
    import torch

    if not twin:
        yield torch.device("cuda", 0)
        return
    from fused_resnet.ops import cuda, plans

    spec = importlib.util.spec_from_file_location("cuda_twin", twin)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with plans.backends.using(cpu=cuda.CudaBackend(module)):
        yield torch.device("cpu")


def child(tile: str, twin: str, seconds: float) -> int:
    """All features of one kernel. A line before each says what is known so far, for whoever finds this process dead."""
    import torch

    from fused_resnet import testing
    from fused_resnet.benchmark import gpu_kernels

    found: dict[str, Any] = {"tile": tile, "verdict": _gpu_smoke.UNKNOWN, "passed": []}

    def begin(what: str) -> None:
        print(RESULT + json.dumps({**found, "running": what}), flush=True)
        faulthandler.dump_traceback_later(seconds, exit=True)  # hears no signal: nor does the wait for a kernel that hangs

    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN
    generator = torch.Generator().manual_seed(0)
    with device_of(twin) as device, testing.library(tf32=True):
        for feature in gpu_kernels.features(tile):
            if twin and feature.name == gpu_kernels.MANY:  # on the host minutes
                continue
            begin(feature.name)
            wrong = gpu_kernels.Trial(tile, feature, device, generator).wrong()
            if wrong:
                found["verdict"] = _gpu_smoke.WRONG
                found["wrong"] = {"feature": feature.name, "case": feature.case.name, **wrong}
                break
            found["passed"].append(feature.name)
        else:
            found["verdict"] = _gpu_smoke.RIGHT
            begin(ROW)
            torch.use_deterministic_algorithms(False)  # nothing is launched between calls
            few = {"calls": 3, "size": 6, "batch": 1} if twin else {}
            found[ROW] = gpu_kernels.wrong_in_a_row(tile, device, generator, **few)
    faulthandler.cancel_dump_traceback_later()
    print(RESULT + json.dumps(found), flush=True)
    return 0


def judged(tile: str, command: Sequence[str], seconds: float) -> dict[str, Any]:
    """What a child said of its kernel last, and how it ended where that was not its end: a kernel at one of whose features the child hung or
    died is wrong."""
    begin, tried = time.monotonic(), True
    try:
        environment = {**os.environ, **FEW_THREADS}
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT, check=False, env=environment)
        out, ended = done.stdout, "" if done.returncode == 0 else f"died with status {done.returncode}"
        words = _end(done.stdout, done.stderr)
        if done.returncode and "Timeout (" in done.stderr:  # faulthandler's
            ended = "hung"
    except subprocess.TimeoutExpired as late:
        out, ended, words, tried = _text(late.stdout), f"not done in {seconds:.0f} s", _end(late.stdout, late.stderr), False
    lines = [line for line in out.splitlines() if line.startswith(RESULT)]
    start = {"tile": tile, "verdict": _gpu_smoke.UNKNOWN, "running": "its start"}
    found: dict[str, Any] = json.loads(lines[-1].removeprefix(RESULT)) if lines else start
    if not ended and "running" in found:
        ended, tried = "ended without a word", False
    if ended:
        if lines and tried and found["verdict"] == _gpu_smoke.UNKNOWN:
            found["verdict"] = _gpu_smoke.WRONG
        found |= {"ended": f"{ended}, at: {found.get('running', 'its end')}", "end": words}
    return {**found, "seconds": round(time.monotonic() - begin, 1)}


def _text(given: str | bytes | None) -> str:
    return given.decode(errors="replace") if isinstance(given, bytes) else given or ""


def _end(*texts: str | bytes | None) -> str:
    return "".join([_text(text)[-1000:] for text in texts])


def smoke(options: argparse.Namespace) -> int:
    from fused_resnet.benchmark import gpu_kernels

    with device_of(options.twin) as device:
        capability = gpu_kernels.capability(device)
        tiles = [tile for tile in gpu_kernels.tiles(device) if gpu_kernels.suits(tile, capability) and options.only in tile]
        mark = _gpu_smoke.mark_of(gpu_kernels.module_of(device))
    _gpu_smoke.begin(options.out, mark, tiles)
    end = time.monotonic() + options.total

    def one(tile: str) -> dict[str, Any]:
        left = end - time.monotonic()
        if left <= 0:
            return {"tile": tile, "verdict": _gpu_smoke.UNKNOWN, "ended": "time was up before it was tried"}
        command = [sys.executable, __file__, "child", "--tile", tile, "--twin", options.twin, "--seconds", str(options.seconds)]
        return judged(tile, command, left)

    right = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for done in as_completed([pool.submit(one, tile) for tile in tiles]):
            found = {**done.result(), "module": mark}
            right += found["verdict"] == _gpu_smoke.RIGHT
            _gpu_smoke.add(options.out, found)
            print(said(found), flush=True)
    print(f"smoke: {right} of {len(tiles)} kernels right")
    return 0 if tiles and right == len(tiles) else 1


def said(found: dict[str, Any]) -> str:
    """A line for a kernel. What is wrong in a row alone concerns a setting that is off (``_settings.cuda_dependent``)."""
    words = [f"{SHORT[found['verdict']]} {found['tile']}"]
    words += [str(found["ended"])] if "ended" in found else []
    words += [f"wrong: {json.dumps(found['wrong'])[:500]}"] if "wrong" in found else []
    words += [f"WRONG where a call starts while the last ends: {json.dumps(found[ROW])[:300]}"] if found.get(ROW) else []
    words += [found["end"][-300:]] if found["verdict"] != _gpu_smoke.RIGHT and found.get("end") else []
    return "; ".join(words)


# ---------------------------------------------------------------------------------------------------------------------
# For the counters
# ---------------------------------------------------------------------------------------------------------------------


def profile(options: argparse.Namespace) -> int:
    """Each kernel of the layers that decide what ResNet-50 takes, and cuDNN's fusion, once between the profiler's marks."""
    import torch

    from fused_resnet.benchmark import gpu_kernels, gpu_peers
    from fused_resnet.benchmark.gpu_contest import planned
    from fused_resnet.cases import ConvCase

    layers = (
        (ConvCase(64, 256, (56, 56), (1, 1), shortcut=True), "matrix", ("128x128", "128x256")),
        (ConvCase(256, 64, (56, 56), (1, 1)), "matrix", ("128x128", "128x64")),
        (ConvCase(64, 64, (56, 56), (3, 3), padding=(1, 1)), "image", ("128x64",)),
        (ConvCase(128, 128, (28, 28), (3, 3), padding=(1, 1)), "image", ("128x128", "128x256")),
    )
    launched = 0
    with device_of(options.twin) as device, torch.no_grad():
        there = gpu_kernels.tiles(device)
        for layer, form, sizes in layers:
            case = layer.at(1 if options.twin else 256)
            given = gpu_peers.operands(case, torch.bfloat16, device)
            calls = [(tile, planned(case, given, tile)) for size in sizes if (tile := f"sm90 bfloat16 {form} {size}") in there]
            if device.type == "cuda":
                calls.append(("cudnn", gpu_peers.cudnn_function(case)))
            for name, call in calls:
                call(*given)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                    torch.cuda.profiler.start()
                    call(*given)
                    torch.cuda.synchronize()
                    torch.cuda.profiler.stop()
                print(f"{name}: {case.name}", flush=True)
                launched += 1
    return 0 if launched else 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pack", "link", "smoke", "profile", "child"))
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "t", help="of pack: where objects are kept (default: build/t)")
    parser.add_argument("--prebuilt", type=Path, default=PREBUILT, help="the folder of the objects (default: .prebuilt)")
    parser.add_argument("--out", type=Path, default=ROOT / "gpu_report", help="folder of the results (default: gpu_report)")
    parser.add_argument("--jobs", type=int, default=6, help="kernels side by side (default: 6)")
    parser.add_argument("--seconds", type=float, default=20, help="for a feature of a kernel (default: 20)")
    parser.add_argument("--total", type=float, default=100, help="for all of them (default: 100)")
    parser.add_argument("--only", default="", help="kernels whose names contain this")
    parser.add_argument("--twin", default="", help=argparse.SUPPRESS)
    parser.add_argument("--tile", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.what == "pack":
        return build_for(options.build) or pack(options.build, options.prebuilt)
    if options.what == "link":
        return link(options.prebuilt)
    if options.what == "child":
        return child(options.tile, options.twin, options.seconds)
    return smoke(options) if options.what == "smoke" else profile(options)


if __name__ == "__main__":
    sys.exit(main())
