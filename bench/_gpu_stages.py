"""The measuring stages of gpu_report.py: what each times, in which order, and what becomes of it where something fails.

A stage's results are written after each case. Run again it goes on where it stopped; a case that killed the process, or hung until the
watchdog did, is left out then, with a sentence.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import _gpu_smoke
import torch

from fused_resnet import _extension, _machine, cases, testing
from fused_resnet.benchmark import gpu_contest as contest
from fused_resnet.benchmark import gpu_kernels
from fused_resnet.benchmark import gpu_modules as modules
from fused_resnet.benchmark import gpu_peers as peers
from fused_resnet.benchmark.gpu_timing import Turns, compete, release, sentence
from fused_resnet.cases import BlockCase, ConvCase
from fused_resnet.ops import cuda, select

Job = tuple[str, Callable[[], dict[str, Any]]]
BATCHES = (256, 32, 1)
LOW = (torch.bfloat16, torch.float16)


class Store:
    """A stage's JSON file. patience: seconds for a case, after which the process ends: a kernel that hangs, or the wait for it, hears no
    signal."""

    def __init__(
        self,
        folder: Path,
        stage: str,
        device: torch.device,
        budget: float,
        afresh: bool = False,
        smoke: bool = False,
        patience: float = math.inf,
    ) -> None:
        self.path = folder / f"{stage}.json"
        self.device = device
        self.patience = patience
        self.deadline = time.monotonic() + budget
        mark = fingerprint(device) + (", smoke" if smoke else "")
        old = read(self.path)
        same = old is not None and not afresh and old.get("fingerprint") == mark
        self.content: dict[str, Any] = old if same and old is not None else {"stage": stage, "results": {}, "seconds": 0.0}
        self.content.update(fingerprint=mark, machine=_machine.describe(paths=False), left=[], aborted="", smoke=smoke)
        died = self.content.pop("running", None)
        if died is not None:
            self.results[died] = {"error": "the process ended during this case"}
        self.save()

    @property
    def results(self) -> dict[str, Any]:
        found: dict[str, Any] = self.content["results"]
        return found

    def save(self) -> None:
        text = json.dumps(self.content, indent=1, allow_nan=False)
        draft = self.path.with_suffix(".tmp")
        draft.write_text(text + "\n", encoding="utf-8")
        draft.replace(self.path)

    def run(self, jobs: Iterable[Job]) -> bool:
        """All jobs that have no result yet and for which there is time; whether all went well."""
        start = time.monotonic()
        for key, job in jobs:
            if key in self.results:
                continue
            if self.content["aborted"] or time.monotonic() > self.deadline:
                self.content["left"].append(key)
                continue
            self.content["running"] = key
            self.save()
            if self.patience < math.inf:
                faulthandler.dump_traceback_later(self.patience, exit=True)
            try:
                self.results[key] = job()
            except contest.OutOfTime:
                self.content["left"].append(key)
            except Exception as error:
                self.results[key] = {"error": sentence(error)}
                self.content["aborted"] = broken(self.device)
            with contextlib.suppress(Exception):
                release(self.device)
            faulthandler.cancel_dump_traceback_later()
            del self.content["running"]
            if key in self.results:
                print(f"{self.content['stage']}  {key}: {brief(self.results[key])}", flush=True)
            self.save()
        self.content["seconds"] += time.monotonic() - start
        self.save()
        if self.content["left"]:
            why = self.content["aborted"] or "time is up: the same command goes on from here"
            print(f"{self.content['stage']}: {len(self.content['left'])} cases left ({why})")
        return not self.content["left"] and not any("error" in r or not r.get("ok", True) for r in self.results.values())


def read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def broken(device: torch.device) -> str:
    """Why nothing more can run on the device, or "". After an illegal access every later call fails."""
    if device.type == "cpu":
        return ""
    try:
        torch.cuda.synchronize(device)
        torch.zeros(8, device=device).sum().item()
    except Exception as error:
        return f"the device is lost to this process: {sentence(error)}"
    return ""


def fingerprint(device: torch.device) -> str:
    """What results of one file must have in common: the device, torch, and the compiled module."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    module = _extension.cuda() if device.type == "cuda" else _extension.cpu
    return f"{name}, torch {torch.__version__}, module {_gpu_smoke.mark_of(module)}"


def brief(result: dict[str, Any]) -> str:
    """One line of a case for the log."""
    if "error" in result:
        return str(result["error"])
    parts = []
    for kind in ("times", "graphs"):
        if result.get(kind):
            cells = [f"{name} {t['median_ms'] * 1e3:.1f}" for name, t in result[kind].items()]
            ratio = result.get(f"ratio_{kind}")
            parts.append(f"{kind} (us): {', '.join(cells)}" + (f"; ratio {ratio:.2f}" if ratio else ""))
    parts += [f"{name}: WRONG, error {result['errors'][name]}" for name in result.get("wrong", ())]
    parts += [f"{name}: {why}" for name, why in result.get("failed", {}).items()]
    return "; ".join(parts) or json.dumps(result)[:200]


# ---------------------------------------------------------------------------------------------------------------------
# What there is to time. ``smoke``: a few tiny cases of every kind, for a machine without a GPU.
# ---------------------------------------------------------------------------------------------------------------------


def convolutions(network: str, smoke: bool) -> tuple[ConvCase, ...]:
    """The distinct convolutions of a network, its stem last."""
    if smoke:
        return (ConvCase(16, 16, (8, 8), (3, 3), padding=(1, 1), shortcut=True), ConvCase(16, 32, (8, 8), (1, 1), (2, 2), relu=False))
    own = [conv for block in cases.BLOCKS if block.network == network for conv in block.convs()]
    return tuple(dict.fromkeys((*own, cases.STEMS[0])))


def blocks(network: str, smoke: bool) -> list[BlockCase]:
    if smoke:
        return [BlockCase("bottleneck", 16, 8, (8, 8), 2, "projection", "resnet50"), BlockCase("basic", 16, 16, (8, 8), network="resnet18")]
    return [block for block in cases.BLOCKS if block.network == network]


@dataclass(frozen=True)
class Only:
    """Which of the tables: dtypes, networks and batches by name; all where none is named."""

    words: frozenset[str] = frozenset()

    @staticmethod
    def of(text: str) -> Only:
        """Raises ValueError for a word that names nothing: "bfloat16 resnet50 256,32" is right."""
        known = {*map(_name, LOW), "resnet50", "resnet18", "cifar20", *map(str, BATCHES), "2"}
        words = frozenset(text.replace(",", " ").split())
        for word in words - known:
            raise ValueError(f"--only {word!r}: dtypes, networks and batches are {', '.join(sorted(known))}")
        return Only(words)

    def has(self, *names: object) -> bool:
        """Whether a case of this dtype, network or batch takes part: of each kind that is named at all."""
        for name in map(str, names):
            kinds = [kind for kind in _KINDS if name in kind]
            if kinds and self.words & kinds[0] and name not in self.words:
                return False
        return True


_KINDS = ({"bfloat16", "float16"}, {"resnet50", "resnet18", "cifar20"}, {"1", "2", "32", "256"})


@dataclass(frozen=True)
class Scope:
    """What a stage measures, where and how long. smoke: a few tiny cases. without: contenders that take no part. folder: of the other
    stages' results."""

    device: torch.device
    effort: contest.Effort
    smoke: bool = False
    without: frozenset[str] = frozenset()
    only: Only = Only()
    folder: Path | None = None

    @property
    def networks(self) -> tuple[str, ...]:
        names = ("cifar20",) if self.smoke else ("resnet50", "resnet18")
        return tuple(name for name in names if self.only.has(name))

    @property
    def tables(self) -> tuple[str, ...]:
        """Networks whose layers are looked at one by one."""
        return tuple(name for name in ("resnet50", "resnet18") if self.only.has(name))

    @property
    def batches(self) -> tuple[int, ...]:
        return tuple(batch for batch in ((2,) if self.smoke else BATCHES) if self.only.has(batch))

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        there = LOW if self.device.type == "cuda" else (torch.bfloat16,)
        return tuple(dtype for dtype in there if self.only.has(_name(dtype)))

    def layers(self) -> Iterator[tuple[torch.dtype, int, ConvCase]]:
        """The distinct convolutions of the tables, what matters most first: bfloat16, ResNet-50, large batches."""
        seen = set()
        for dtype in self.dtypes:
            for network in self.tables:
                for batch in self.batches:
                    for case in convolutions(network, self.smoke):
                        if (dtype, batch, case) not in seen:
                            seen.add((dtype, batch, case))
                            yield dtype, batch, case

    def names(self, contenders: tuple[str, ...], compiled: bool = True) -> list[str]:
        return [name for name in contenders if name not in self.without and (compiled or name != "compile")]

    def right_tiles(self) -> list[str]:
        """The kernels of this build but those that gpu_first.py's ``smoke`` found wrong, where it was there: they would cost others their
        figures. The report names them."""
        if self.device.type != "cuda":
            return []
        found = _gpu_smoke.read(self.folder, _gpu_smoke.mark_of(_extension.cuda()))
        wrong = {line["tile"] for line in found if line["verdict"] == _gpu_smoke.WRONG}
        return [tile for tile in cuda.tiles() if tile not in wrong]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def effort_of(smoke: bool, compile_seconds: float, deadline: float = math.inf) -> contest.Effort:
    if smoke:
        return contest.Effort(2, 0.02, compile_seconds, 1e-6, deadline)
    return contest.Effort(compile_seconds=compile_seconds, deadline=deadline)


def operators(scope: Scope) -> Iterator[Job]:
    """Without torch.compile, which takes long: see compiled_operators. The fastest right tile of the stage ``tiles`` beside the chosen."""
    there = read(scope.folder / "tiles.json") if scope.folder is not None else None
    measured = {} if there is None else there["results"]
    for dtype, batch, case in scope.layers():
        key = f"{_name(dtype)} N={batch} {case.name}"
        names = scope.names(peers.CONVOLUTION, compiled=False) + fastest_tile(measured.get(key, {}))
        yield key, partial(contest.convolution, case.at(batch), dtype, scope.device, names, scope.effort)


def fastest_tile(result: dict[str, Any]) -> list[str]:
    """The contender for a layer's fastest kernel, of what ``tiles`` measured of it; none where it measured none."""
    times = {name: timing["median_ms"] for name, timing in result.get("graphs", {}).items() if name != "auto"}
    return [peers.TILE + min(times, key=lambda name: times[name])] if times else []


def compiled_operators(scope: Scope) -> Iterator[Job]:
    """bfloat16, ResNet-50, large batches, with torch.compile: half a minute for each."""
    for dtype, batch, case in scope.layers():
        if dtype == LOW[0] and batch != 1 and case in convolutions("resnet50", scope.smoke):
            yield f"{_name(dtype)} N={batch} {case.name}", partial(
                contest.convolution, case.at(batch), dtype, scope.device, scope.names(peers.CONVOLUTION), scope.effort
            )


def tiles(scope: Scope) -> Iterator[Job]:
    """Every kernel that is for a layer, and the general one where that is small."""
    on_gpu = scope.device.type == "cuda"
    for dtype, batch, case in scope.layers():
        small = on_gpu and case.flops(batch) <= 2 * 8 * select.SMALL_ON_CUDA
        mine = [tile for tile in scope.right_tiles() if f" {_name(dtype)} " in tile and gpu_kernels.form_of(tile) not in ("joined", "plain")]
        names = ["auto", *mine, *(["general"] if small else [])]
        yield f"{_name(dtype)} N={batch} {case.name}", partial(contest.tiles, case.at(batch), dtype, scope.device, names, scope.effort)


def block_jobs(scope: Scope) -> Iterator[Job]:
    """torch.compile, which takes a minute for each, at the largest batch in bfloat16; ``graphs`` has it at batch 1."""
    for dtype in scope.dtypes:
        for network in scope.tables:
            for batch in scope.batches:
                names = scope.names(peers.MODULE, dtype == LOW[0] and batch == scope.batches[0])
                for block in blocks(network, scope.smoke):
                    key = f"{_name(dtype)} N={batch} {block.name}"
                    yield key, partial(modules.block, block, batch, dtype, scope.device, names, scope.effort)


def graph_jobs(scope: Scope) -> Iterator[Job]:
    """Batch 1 in CUDA graphs, torch.compile among the contenders."""
    names = scope.names(peers.MODULE)
    for dtype in scope.dtypes[:1]:
        for network in scope.tables:
            for block in blocks(network, scope.smoke):
                key = f"{_name(dtype)} N=1 {block.name}"
                yield key, partial(modules.block, block, 1, dtype, scope.device, names, scope.effort, plain=False)
        for network in scope.networks:
            key = f"{_name(dtype)} N=1 {network}"
            yield key, partial(modules.network, network, 1, dtype, scope.device, names, scope.effort, plain=False)


def network_jobs(scope: Scope) -> Iterator[Job]:
    for dtype in scope.dtypes:
        for network in scope.networks:
            for whole in (False, True):
                for batch in scope.batches:
                    names = scope.names(peers.MODULE, dtype == LOW[0] and batch == scope.batches[0])
                    key = f"{_name(dtype)} N={batch} {network}{'' if whole else ', residual blocks'}"
                    yield key, partial(modules.network, network, batch, dtype, scope.device, names, scope.effort, whole=whole)


def training_jobs(scope: Scope) -> Iterator[Job]:
    names = scope.names(("channels_last", "compile", "ours"))
    for network in scope.networks[:1]:
        for batch in [batch for batch in scope.batches if batch != 1]:
            for autocast in (False, True):
                for kind in ("bias only", "frozen norm"):
                    key = f"bfloat16{' autocast' if autocast else ''} N={batch} {network}, {kind}"
                    yield key, partial(modules.training, kind, network, batch, LOW[0], autocast, scope.device, names, scope.effort)


def ceilings(scope: Scope) -> Iterator[Job]:
    """What the device can do at most, measured: a copy (bytes read and written), and a large product of random matrices."""
    device, smoke = scope.device, scope.smoke

    def copy() -> dict[str, Any]:
        source = torch.randn(1 << (16 if smoke else 29), device=device)
        target = torch.empty_like(source)
        failed: dict[str, str] = {}
        time = compete({"copy": Turns(lambda i: target.copy_(source), 1)}, device, failed, 2 if smoke else 21, math.inf)
        assert torch.equal(source, target)
        return {"bytes_a_second": 2 * source.nbytes * 1e3 / time["copy"]["median_ms"], "bytes": 2 * source.nbytes, "times": time}

    def product(dtype: torch.dtype) -> dict[str, Any]:
        n = 64 if smoke else 8192
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        failed: dict[str, str] = {}
        time = compete({"product": Turns(lambda i: a @ b, 1)}, device, failed, 2 if smoke else 21, math.inf)
        assert testing.norm_error((a @ b)[:8], a[:8].double() @ b.double()) < torch.finfo(dtype).eps
        return {"flops": 2 * n**3 * 1e3 / time["product"]["median_ms"], "size": n, "times": time}

    yield "copy", copy
    for dtype in scope.dtypes:
        yield f"product {_name(dtype)}", partial(product, dtype)


MEASURING: dict[str, Callable[[Scope], Iterator[Job]]] = {
    "ceilings": ceilings,
    "tiles": tiles,
    "operators": operators,
    "compiled_operators": compiled_operators,
    "blocks": block_jobs,
    "networks": network_jobs,
    "training": training_jobs,
    "graphs": graph_jobs,
}
