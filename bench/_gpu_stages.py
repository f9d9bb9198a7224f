"""The measuring stages of gpu_report.py: what each times, in which order, and what becomes of it where something fails.

A stage's results are written after each case. Run again it goes on where it stopped; a case that killed the process, or hung until the
watchdog did, is left out then, with a sentence.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fused_resnet import _extension, _machine, cases, testing
from fused_resnet.benchmark import gpu_contest as contest
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
    built = hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()[:16] if module is not None and module.__file__ else "none"
    return f"{name}, torch {torch.__version__}, module {built}"


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


def _networks(smoke: bool) -> tuple[str, ...]:
    return ("cifar20",) if smoke else ("resnet50", "resnet18")


def _batches(smoke: bool) -> tuple[int, ...]:
    return (2,) if smoke else BATCHES


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def effort_of(smoke: bool, compile_seconds: float, deadline: float = math.inf) -> contest.Effort:
    if smoke:
        return contest.Effort(2, 0.02, compile_seconds, 1e-6, deadline)
    return contest.Effort(compile_seconds=compile_seconds, deadline=deadline)


def _dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    return LOW if device.type == "cuda" else (torch.bfloat16,)


def _tables(device: torch.device, smoke: bool) -> Iterator[tuple[torch.dtype, str, int]]:
    """What matters most first: bfloat16, ResNet-50, large batches."""
    for dtype in _dtypes(device):
        for network in ("resnet50", "resnet18"):
            for batch in _batches(smoke):
                yield dtype, network, batch


def _chosen(names: tuple[str, ...], compiled: bool) -> list[str]:
    return [name for name in names if compiled or name != "compile"]


def operators(device: torch.device, smoke: bool, compiled: bool, effort: contest.Effort) -> Iterator[Job]:
    """Without torch.compile, which takes long: see compiled_operators."""
    names = _chosen(peers.CONVOLUTION, False)
    seen = set()
    for dtype, network, batch in _tables(device, smoke):
        for case in convolutions(network, smoke):
            key = f"{_name(dtype)} N={batch} {case.name}"
            if key not in seen:
                seen.add(key)
                yield key, partial(contest.convolution, case.at(batch), dtype, device, names, effort)


def compiled_operators(device: torch.device, smoke: bool, compiled: bool, effort: contest.Effort) -> Iterator[Job]:
    """bfloat16, ResNet-50, large batches, with torch.compile: half a minute for each."""
    names = _chosen(peers.CONVOLUTION, compiled)
    for batch in (2,) if smoke else (256, 32):
        for case in convolutions("resnet50", smoke):
            key = f"bfloat16 N={batch} {case.name}"
            yield key, partial(contest.convolution, case.at(batch), torch.bfloat16, device, names, effort)


def tiles(device: torch.device, smoke: bool, compiled: bool, effort: contest.Effort) -> Iterator[Job]:
    seen = set()
    for dtype, network, batch in _tables(device, smoke):
        for case in convolutions(network, smoke):
            key = f"{_name(dtype)} N={batch} {case.name}"
            if key in seen:
                continue
            seen.add(key)
            small = case.flops(batch) <= 2 * 8 * select.SMALL_ON_CUDA and device.type == "cuda"
            mine = [tile for tile in cuda.tiles() if f" {_name(dtype)} " in tile] if device.type == "cuda" else []
            names = ["auto", *mine, *(["general"] if small else [])]
            yield key, partial(contest.tiles, case.at(batch), dtype, device, names, effort)


def block_jobs(device: torch.device, smoke: bool, compiled: bool, effort: contest.Effort) -> Iterator[Job]:
    """torch.compile, which takes a minute for each, at the largest batch in bfloat16; ``graphs`` has it at batch 1."""
    for dtype, network, batch in _tables(device, smoke):
        names = _chosen(peers.MODULE, compiled and dtype == LOW[0] and batch == _batches(smoke)[0])
        for block in blocks(network, smoke):
            key = f"{_name(dtype)} N={batch} {block.name}"
            yield key, partial(modules.block, block, batch, dtype, device, names, effort)


def graph_jobs(device: torch.device, smoke: bool, compiled: bool, effort: contest.Effort) -> Iterator[Job]:
    """Batch 1 in CUDA graphs, torch.compile among the contenders."""
    names = list(peers.MODULE) if compiled else _chosen(peers.MODULE, False)
    for dtype in _dtypes(device)[:1]:
        for network in ("resnet50", "resnet18"):
            for block in blocks(network, smoke):
                key = f"{_name(dtype)} N=1 {block.name}"
                yield key, partial(modules.block, block, 1, dtype, device, names, effort, plain=False)
        for network in _networks(smoke):
            yield f"{_name(dtype)} N=1 {network}", partial(modules.network, network, 1, dtype, device, names, effort, plain=False)


def network_jobs(device: torch.device, smoke: bool, compiled: bool, effort: contest.Effort) -> Iterator[Job]:
    for dtype in _dtypes(device):
        for network in _networks(smoke):
            for whole in (False, True):
                for batch in _batches(smoke):
                    names = _chosen(peers.MODULE, compiled and dtype == LOW[0] and batch == _batches(smoke)[0])
                    key = f"{_name(dtype)} N={batch} {network}{'' if whole else ', residual blocks'}"
                    yield key, partial(modules.network, network, batch, dtype, device, names, effort, whole=whole)


def training_jobs(device: torch.device, smoke: bool, compiled: bool, effort: contest.Effort) -> Iterator[Job]:
    names = ["channels_last", *(["compile"] if compiled else []), "ours"]
    network, batches = ("cifar20", (2,)) if smoke else ("resnet50", (256, 32))
    for batch in batches:
        for autocast in (False, True):
            for kind in ("bias only", "frozen norm"):
                key = f"bfloat16{' autocast' if autocast else ''} N={batch} {network}, {kind}"
                yield key, partial(modules.training, kind, network, batch, torch.bfloat16, autocast, device, names, effort)


def ceilings(device: torch.device, smoke: bool, compiled: bool, effort: contest.Effort) -> Iterator[Job]:
    """What the device can do at most, measured: a copy (bytes read and written), and a large product of random matrices."""

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
    for dtype in _dtypes(device):
        yield f"product {_name(dtype)}", partial(product, dtype)


MEASURING: dict[str, Callable[[torch.device, bool, bool, contest.Effort], Iterator[Job]]] = {
    "ceilings": ceilings,
    "tiles": tiles,
    "operators": operators,
    "compiled_operators": compiled_operators,
    "blocks": block_jobs,
    "networks": network_jobs,
    "training": training_jobs,
    "graphs": graph_jobs,
}
