"""The lesson "why do residual networks work?" as experiments, on real images, with the fused blocks.

  depth      training error by depth, plain against residual networks; two controls
  identity   a zero last layer gives the identity bit for bit; what a plain pair of layers does
  decay      weight decay drives a residual block to the identity
  shortcut   'same' convolutions; a learned projection or zero-padding where 128 channels meet 256
  gradients  sizes of activations and gradients before the first step, against theory

Without names all of them run: some 40 minutes on two cores, one or two with --quick. DIR gets study.json, with every run's curve, and
a picture of each experiment. A study that was interrupted goes on from its study.json. To compare the kernels with the reference:

  FUSED_RESNET_BACKEND=reference fused-resnet study depth --out reference
  fused-resnet study depth --out fused --against reference/study.json

Exit status 1 if a claim does not hold here, a run fails or the disk is full.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from pathlib import Path

from .. import _machine
from ..benchmark.output import progress, table, write_json
from ..study import EXPERIMENTS, _agreement, _data, _runner, depth
from ..study._protocol import Check, Report, Settings, Task
from ..study._store import Changed, Store
from .arguments import Usage, add_json, need, positive, threads

HELP = "the lesson's experiments: why residual networks work"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(EXPERIMENTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="less of everything, in about two minutes")
    parser.add_argument("--seeds", type=positive, metavar="N", help="runs of each network, with seeds 0 to N - 1 (default: 3; --quick: 1)")
    parser.add_argument("--depths", type=positive, nargs="+", metavar="D", help="4n + 2 for blocks of 2 layers, 6n + 2 for blocks of 3")
    parser.add_argument("--data", choices=_data.NAMES, default="digits", help="default: digits")
    parser.add_argument("--out", type=Path, default=Path("fused-resnet-study"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--jobs", type=positive, metavar="N", help="processes, of one thread each (default: the cores, at most 4)")
    parser.add_argument("--against", type=Path, metavar="FILE", help="a study.json of the other backend: compare final training losses")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    for name in arguments.names:
        if name not in EXPERIMENTS:
            raise Usage(f"NAME: there is no experiment {name!r}; there are {', '.join(EXPERIMENTS)}")
    names = [name for name in EXPERIMENTS if name in (arguments.names or EXPERIMENTS)]
    seeds = arguments.seeds or (1 if arguments.quick else 3)
    settings = Settings(arguments.quick, arguments.data, seeds, None if arguments.depths is None else tuple(sorted(set(arguments.depths))))
    try:
        if settings.depths is not None:
            depth.check_depths(settings.depths)
    except ValueError as error:
        raise Usage(f"--depths: {error}") from None
    for module in ("numpy", "matplotlib", "tqdm"):
        need(module, "study")
    start = time.perf_counter()
    tasks = {name: EXPERIMENTS[name].tasks(settings) for name in names}
    try:
        _data.path(settings.data)
        store = Store(_folder(arguments.out) / "study.json", settings.identity())
        if arguments.against is not None:
            _agreement.check([task.key for mine in tasks.values() for task in mine], arguments.against, settings.identity())
    except (ModuleNotFoundError, ValueError, OSError) as error:
        raise Usage(str(error)) from None
    try:
        with threads(1):  # as each run has
            store.content["machine"] = _machine.describe(paths=False)
            print(_machine.short())
            _run(store, [task for mine in tasks.values() for task in mine], settings, _jobs(arguments.jobs))
            return _end(store, tasks, settings, arguments, start)
    except (OSError, Changed, BrokenProcessPool) as error:
        why = getattr(error, "strerror", None) or error
        print(f"fused-resnet: the study stopped: {why}; what was finished is in {store.path}", file=sys.stderr)
        return 1


def _folder(path: Path) -> Path:
    """The folder of the results, made if it is not there.

    Raises:
        Usage: if it cannot be made or written to.
    """
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise Usage(f"--out: cannot make the folder {str(path)!r}: {error.strerror or error}") from None
    if not os.access(path, os.W_OK):
        raise Usage(f"--out: cannot write to {str(path)!r}: permission denied")
    return path


def _jobs(wanted: int | None) -> int:
    return wanted or min(_machine.cores(), 4)


def _run(store: Store, tasks: Sequence[Task], settings: Settings, jobs: int) -> None:
    """What is not in the file yet; each run goes there as it ends."""
    missing = [task for task in tasks if task.key not in store.runs]
    if len(missing) < len(tasks):
        print(f"{len(tasks) - len(missing)} of {len(tasks)} runs are in {store.path} already")
    with progress(len(missing), "study") as advance, closing(_runner.run(missing, settings.data, jobs)) as running:
        for task, result in running:
            store.add(task.key, result)
            advance(task.key)


def _end(store: Store, tasks: dict[str, list[Task]], settings: Settings, arguments: argparse.Namespace, start: float) -> int:
    """Tables, checks, pictures and the reports in the JSON file."""
    checks: list[Check] = []
    pictures: list[Path] = []
    for name, mine in tasks.items():
        runs = {task.key: store.runs[task.key] for task in mine}
        report: Report = EXPERIMENTS[name].report(runs, settings)
        for title, header, rows in report.tables:
            print(f"\n{title}\n{table(header, rows)}")
        for remark in report.remarks:
            print(f"\n{remark}")
        pictures += EXPERIMENTS[name].draw(runs, settings, arguments.out, _machine.short())
        checks += report.checks
        store.content["reports"][name] = {
            "seeds": settings.seeds,
            "seconds": round(sum(run["seconds"] for run in runs.values()), 1),
            "figures": report.figures,
            "checks": [check._asdict() for check in report.checks],
        }
    if arguments.against is not None:
        checks.append(_compare(store, tasks, settings, arguments.against))
    store.write()
    write_json(arguments.json, {name: store.content[name] for name in ("format", "settings", "machine", "reports")})
    print()
    for check in checks:
        print(f"{'holds ' if check.ok else 'FAILED'}  {check.claim}: {check.measured}")
    print(f"\n{store.path}; pictures: {', '.join(path.name for path in pictures) or 'none'}. {time.perf_counter() - start:.0f} s.")
    return 0 if all(check.ok for check in checks) else 1


def _compare(store: Store, tasks: dict[str, list[Task]], settings: Settings, file: Path) -> Check:
    runs = {task.key: store.runs[task.key] for mine in tasks.values() for task in mine}
    pairs = _agreement.compare(runs, file, settings.identity())
    header = ("final training loss, nats", "depth", "here", "there", "difference", "spread over seeds", "farthest pair of one seed")
    rows = [
        (depth.ARMS[p.arm].label, p.depth, *(v.words(".4f") for v in (p.mine, p.other)), *(f"{v:.4f}" for v in p.distances))
        for p in pairs
    ]
    print(f"\nFused and reference\n{table(header, rows)}")
    outside = [f"{p.arm} {p.depth}" for p in pairs if not p.ok]
    decided = sum(p.decided for p in pairs)
    measured = (
        f"{len(pairs) - len(outside)} of {len(pairs)} networks"
        + (f", not {', '.join(outside)}" if outside else "")
        + ("" if decided == len(pairs) else f"; the seeds of {len(pairs) - decided} of them differ too much to decide it")
    )
    check = Check("fused and reference train alike: medians differ by no more than the spread over seeds", measured, not outside)
    store.content["reports"]["agreement"] = {
        "pairs": [{**p._asdict(), "mine": p.mine._asdict(), "other": p.other._asdict(), "difference": p.difference} for p in pairs],
        "checks": [check._asdict()],
    }
    return check
