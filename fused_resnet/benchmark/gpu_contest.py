"""One case of the benchmark on a GPU: its contenders built, their results compared, then timed side by side. Convolutions here,
blocks and networks in ``gpu_modules.py``.

Each function returns what is written down: the medians of every right contender in ``times`` (calls from Python) and ``graphs``
(replays of a CUDA graph), the errors, what ``failed`` or was ``left out`` and why, and the best peer over ours.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .. import _extension, _settings, reference, testing
from .._compat import tf32
from ..cases import ConvCase, Operands
from ..ops.plans import backends, plan_of
from ..ops.spec import ConvSpec, geometry_of_call, spec_of
from ..testing.compare import accumulator, unit_roundoff
from . import gpu_peers as peers
from .gpu_timing import Call, Graph, Turns, compete, ratio, release, sentence, sets_of
from .output import finite


@dataclass(frozen=True)
class Effort:
    """How long a case may take: samples of each contender, seconds of sampling, seconds for one compilation, of which none goes on
    beyond ``deadline`` (of time.monotonic)."""

    repeat: int = 9
    seconds: float = 4.0
    compile_seconds: float = 120.0
    least: float = 2e-3
    deadline: float = math.inf


class OutOfTime(BaseException):
    """The deadline has come during a compilation: the case is to be measured another time."""


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Contest:
    """The contenders of a case: built, compared, timed. ``error``: of a contender's results on the first set, of which ``allowed``
    is allowed."""

    def __init__(self, device: torch.device, sets: int, error: Callable[[Any], float], allowed: float, effort: Effort) -> None:
        self.device, self.sets, self.effort = device, sets, effort
        self.error, self.allowed = error, allowed
        self.calls: dict[str, Call] = {}
        self.errors: dict[str, float | None] = {}
        self.failed: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        self.wrong: list[str] = []
        self.compiled: dict[str, float] = {}

    def add(self, name: str, build: Callable[[], Call]) -> None:
        """Build a contender and look at its first result. What raises, or is wrong, is written down and takes no further part."""
        try:
            call = build()
            if name.startswith("compile"):
                self._compile(name, call)
            error = self.error(call(0))
        except peers.Left as left:
            self.left_out[name] = str(left)
        except Exception as failure:
            self.failed[name] = sentence(failure)
            release(self.device)
        else:
            self.errors[name] = finite(error)
            if error <= self.allowed:
                self.calls[name] = call
            else:
                self.wrong.append(name)

    def _compile(self, name: str, call: Call) -> None:
        left = self.effort.deadline - time.monotonic()
        try:
            self.compiled[name] = peers.warm(lambda: call(0), min(self.effort.compile_seconds, left))
        except TimeoutError:
            if left < self.effort.compile_seconds:
                raise OutOfTime from None
            raise

    def result(self, plain: bool = True, graphs: bool = True) -> dict[str, Any]:
        """Time all that are right, and say everything."""
        effort = self.effort
        found: dict[str, Any] = {"sets": self.sets}
        if plain:
            runs: dict[str, Turns | Graph] = {name: Turns(call, self.sets) for name, call in self.calls.items()}
            found["times"] = compete(runs, self.device, self.failed, effort.repeat, effort.seconds, effort.least)
            del runs
        if graphs:
            found["graphs"] = self._graphs()
        found["allowed_error"] = self.allowed
        found["errors"], found["wrong"], found["failed"] = self.errors, self.wrong, self.failed
        found["left_out"], found["compile_seconds"] = self.left_out, self.compiled
        ours = [name for name in self.errors if name in peers.OURS]
        found["ok"] = bool(ours) and not [name for name in (*self.wrong, *self.failed) if name.split(" in a graph")[0] in peers.OURS]
        for kind in ("times", "graphs"):
            if kind in found:
                found[f"best_peer_{kind}"], found[f"ratio_{kind}"] = _best(found[kind])
        return found

    def _graphs(self) -> dict[str, dict[str, Any]]:
        runs: dict[str, Turns | Graph] = {}
        failed: dict[str, str] = {}
        for name, call in self.calls.items():
            try:
                graph = Graph(call, self.sets, self.device)
                graph()
                error = self.error(graph.kept[0])
                if not error <= self.allowed:
                    raise ValueError(f"the replay's error is {error:.2g}, allowed {self.allowed:.2g}")
                runs[name] = graph
            except Exception as failure:
                failed[name] = sentence(failure)
        times = compete(runs, self.device, failed, self.effort.repeat, self.effort.seconds, self.effort.least)
        self.failed.update({f"{name} in a graph": why for name, why in failed.items()})
        return times


def _best(times: dict[str, dict[str, Any]]) -> tuple[str | None, float | None]:
    """The fastest peer, and its time over that of the faster of ours."""
    theirs = {name: t["median_ms"] for name, t in times.items() if peers.is_peer(name)}
    ours = [t["median_ms"] for name, t in times.items() if name in peers.OURS]
    best = min(theirs, key=lambda name: theirs[name], default=None)
    return best, ratio(theirs[best] if best else None, min(ours, default=None))


# ---------------------------------------------------------------------------------------------------------------------
# One convolution
# ---------------------------------------------------------------------------------------------------------------------


def _conv_contest(case: ConvCase, dtype: torch.dtype, device: torch.device, effort: Effort) -> tuple[Contest, list[Operands]]:
    count = sets_of(case.bytes(dtype=dtype), device)
    sets = [peers.operands(case, dtype, device) for _ in range(count)]
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else torch.float64
    with testing.library(deterministic=False):
        truth = reference.conv_bias_add_relu(*(None if t is None else t.to(wide) for t in sets[0]), **case.parameters)  # type: ignore[arg-type]
    # As in `bench`: twice the larger of eager's error and of what sums of this length lose, where the largest output is 1.
    eager = testing.relative_error(peers.eager_function(case)(*sets[0]), truth)
    allowed = 2 * max(eager, unit_roundoff(accumulator(dtype)) * case.reduction**0.5) + unit_roundoff(dtype)
    return Contest(device, count, lambda result: testing.relative_error(result, truth), allowed, effort), sets


def convolution(
    case: ConvCase, dtype: torch.dtype, device: torch.device, names: Sequence[str], effort: Effort, graphs: bool = True
) -> dict[str, Any]:
    """A convolution of the table, with its own batch size."""
    with torch.no_grad():
        contest, sets = _conv_contest(case, dtype, device, effort)

        def build(name: str) -> Call:
            if not name.startswith(peers.TILE):
                return peers.convolution(name, case, sets, device)
            plan = planned(case, sets[0], name.removeprefix(peers.TILE))
            return lambda i: plan(*sets[i])

        for name in names:
            contest.add(name, partial(build, name))
        found = contest.result(graphs=graphs)
    return {"case": case.name, "batch": case.batch, "dtype": name_of(dtype), **_size(case, dtype), **found}


def _size(case: ConvCase, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "gflop": case.flops() / 1e9,
        "megabytes": case.bytes(dtype=dtype) / 1e6,
        "kernel": list(case.kernel),
        "shortcut": case.shortcut,
        "height": case.size[0],
    }


def tiles(case: ConvCase, dtype: torch.dtype, device: torch.device, names: Sequence[str], effort: Effort) -> dict[str, Any]:
    """Every kernel of ours on one convolution, in graphs: what the choice predicts, and what it takes."""
    predicted: dict[str, str] = {}
    with torch.no_grad():
        contest, sets = _conv_contest(case, dtype, device, effort)
        for name in names:

            def build(name: str = name) -> Call:
                plan = planned(case, sets[0], name)
                predicted[name] = _predicted(case, sets[0], name, plan)
                return lambda i: plan(*sets[i])

            contest.add(name, build)
        times = contest.result(plain=False)
    for entry in ("best_peer_graphs", "ratio_graphs", "ok"):
        times.pop(entry)
    return {"case": case.name, "batch": case.batch, "dtype": name_of(dtype), **_size(case, dtype), "predicted": predicted, **times}


def planned(case: ConvCase, given: Operands, algorithm: str) -> Any:
    """Our plan of a convolution with one kernel, or with the one that is chosen ("auto")."""
    try:
        with _settings.using(cuda_algorithm=algorithm):
            plan = plan_of(_spec(case, given), backends.of(given.input))
    except ValueError as refusal:
        raise peers.Left(str(refusal)) from None
    if plan.kernel is None:
        raise peers.Left("it takes the general path")
    return plan


def _spec(case: ConvCase, given: Operands) -> ConvSpec:
    return spec_of(*given, geometry_of_call(given.weight, case.stride, case.padding, case.dilation, case.groups), case.relu)


def _predicted(case: ConvCase, given: Operands, name: str, plan: Any) -> str:
    """What the choice would say of this kernel alone; of the one that was chosen, the reason."""
    compiled = _extension.cuda()
    kernel = getattr(plan, "kernel", None)
    if compiled is None or kernel is None or len(name.split()) != 4:
        return str(getattr(kernel, "reason", ""))
    architecture, dtype, form, size = name.split()
    rows, columns = map(int, size.split("x"))
    spec = _spec(case, given)
    stride, padding, dilation, groups = spec.geometry
    device = given.input.device.index or 0
    try:
        _, reason = compiled.choose(
            dtype, spec.input.shape, spec.weight.shape, spec.output.shape, stride, (padding.top, padding.left), dilation, groups,
            spec.input.strides, spec.output.strides, None if spec.shortcut is None else spec.shortcut.strides, tf32(),
            compiled.properties(device), [(architecture, dtype, form, rows, columns)],
        )  # fmt: skip
    except Exception as error:  # what it takes is still to be measured
        return sentence(error)
    return str(reason)
