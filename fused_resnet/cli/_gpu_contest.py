"""One case of the benchmark on a GPU: its contenders built, their results compared, then timed side by side.

Each function returns what is written down: the medians of every right contender in ``times`` (calls from Python) and ``graphs``
(replays of a CUDA graph), the errors, what ``failed`` or was ``left out`` and why, and the best peer over ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import _gpu, _kernels, _plain, cases, reference, testing
from .._arguments import pad
from ..cases import BlockCase, ConvCase, Operands
from ..testing.compare import accumulator, unit_roundoff
from . import _gpu_peers as peers
from ._common import finite
from ._gpu_timing import Call, Graph, Turns, compete, ratio, release, sentence, sets_of


@dataclass(frozen=True)
class Effort:
    """How long a case may take: samples of each contender, seconds of sampling, seconds for one compilation."""

    repeat: int = 9
    seconds: float = 4.0
    compile_seconds: float = 120.0
    least: float = 2e-3


def _name(dtype: torch.dtype) -> str:
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
                self.compiled[name] = peers.warm(lambda: call(0), self.effort.compile_seconds)
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
    theirs = {name: t["median_ms"] for name, t in times.items() if name not in peers.OURS}
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
        for name in names:
            contest.add(name, lambda name=name: peers.convolution(name, case, sets, device))  # type: ignore[misc]
        found = contest.result(graphs=graphs)
    return {"case": case.name, "batch": case.batch, "dtype": _name(dtype), **_size(case, dtype), **found}


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
    return {"case": case.name, "batch": case.batch, "dtype": _name(dtype), **_size(case, dtype), "predicted": predicted, **times}


def planned(case: ConvCase, given: Operands, algorithm: str) -> Any:
    """Our plan of a convolution with one kernel, or with the one that is chosen ("auto")."""
    before = _gpu._algorithm
    if algorithm != before:
        _gpu.use_algorithm(algorithm)
    try:
        padding = pad(case.padding, given.weight, case.stride, case.dilation)
        plan = _kernels.convolution(*given, case.stride, padding, case.dilation, case.groups, case.relu)
    except ValueError as refusal:
        raise peers.Left(str(refusal)) from None
    finally:
        if algorithm != before:
            _gpu.use_algorithm(before)
    if plan is None:
        raise peers.Left("it takes the general path")
    return plan


def _predicted(case: ConvCase, given: Operands, name: str, plan: Any) -> str:
    """What the choice would say of this kernel alone; of the one that was chosen, the reason."""
    compiled = _gpu.module()
    kernel = getattr(plan, "kernel", None)
    if compiled is None or kernel is None or len(name.split()) != 4:
        return str(getattr(kernel, "reason", ""))
    architecture, dtype, form, size = name.split()
    rows, columns = map(int, size.split("x"))
    padding = pad(case.padding, given.weight, case.stride, case.dilation)
    device = given.input.device.index or 0
    shape = case.output_shape
    strides = torch.empty(shape, device="meta", memory_format=torch.channels_last).stride()
    _, reason = compiled.choose(
        dtype, case.input_shape, case.weight_shape, shape, case.stride, (padding.top, padding.left), case.dilation, case.groups,
        given.input.stride(), strides, None if given.shortcut is None else given.shortcut.stride(), _gpu.tf32(),
        (*compiled.capability(device), compiled.multiprocessors(device)), [(architecture, dtype, form, rows, columns)],
    )  # fmt: skip
    return str(reason)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks and networks, forward
# ---------------------------------------------------------------------------------------------------------------------


def module(
    model: nn.Module,
    make: Callable[[], Tensor],
    dtype: torch.dtype,
    device: torch.device,
    names: Sequence[str],
    effort: Effort,
    plain: bool = True,
    graphs: bool = True,
) -> dict[str, Any]:
    """A model in eval mode and float32, batch norm included, and what makes its inputs. The inputs rotate, the weights do not."""
    with torch.no_grad():
        first = make().to(device, dtype)
        count = sets_of(2 * first.nbytes, device)
        inputs = [first, *(make().to(device, dtype) for _ in range(count - 1))]
        inputs = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
        # The values that contenders get, computed in float32 (float64 on the CPU); of the same input whatever happens after.
        wide = torch.float64 if device.type == "cpu" else torch.float32
        with testing.library(deterministic=False):
            truth = copy.deepcopy(model).to(device, dtype).to(wide)(first.to(wide))
        eager = testing.relative_error(peers.module("channels_last", model, dtype, device)(inputs[0]), truth)
        additions = sum(m.weight[0].numel() for m in model.modules() if isinstance(m, nn.Conv2d))
        # Folding rounds weights and biases anew: four times eager's error, and three units a layer, of random sign.
        layers = sum(isinstance(m, nn.Conv2d) for m in model.modules())
        allowed = 2 * max(4 * eager, unit_roundoff(accumulator(dtype)) * additions**0.5) + 3 * unit_roundoff(dtype) * layers**0.5
        contest = Contest(device, count, lambda result: testing.relative_error(result, truth), allowed, effort)
        for name in names:

            def build(name: str = name) -> Call:
                function = peers.module(name, model, dtype, device)
                return lambda i: function(inputs[i])

            contest.add(name, build)
        found = contest.result(plain, graphs)
    return {"batch": first.shape[0], "dtype": _name(dtype), **found}


def block(
    case: BlockCase, batch: int, dtype: torch.dtype, device: torch.device, names: Sequence[str], effort: Effort, **how: bool
) -> dict[str, Any]:
    """A residual block of the table."""
    model = case.eager(torch.Generator().manual_seed(0))
    shape = (batch, case.inplanes, *case.size)
    found = module(model, lambda: torch.relu(torch.randn(shape, device=device)), dtype, device, names, effort, **how)
    return {"case": case.name, "network": case.network, **found}


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def training_model(kind: str, network: str) -> tuple[Any, nn.Module]:
    """A network for training, eager and ours, with the same parameters. ``kind``: "bias only", or "frozen norm" (batch norm in eval
    mode, its parameters fixed)."""
    plain: nn.Module = _plain.randomise(cases.NETWORKS[network][1](), torch.Generator().manual_seed(0)).eval()
    eager = peers.folded(plain) if kind == "bias only" else plain
    for m in eager.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.requires_grad_(False)
    return eager, peers.fused(copy.deepcopy(eager))


def training(
    kind: str,
    network: str,
    batch: int,
    dtype: torch.dtype,
    autocast: bool,
    device: torch.device,
    names: Sequence[str],
    effort: Effort,
) -> dict[str, Any]:
    """Forward and backward of a network, without the optimizer's step, which is the same for all."""
    eager, ours = training_model(kind, network)
    size = cases.NETWORKS[network][0]
    images, arriving = torch.randn(batch, 3, size, size, device=device), torch.randn(batch, eager.fc.out_features, device=device)

    def build(name: str, held: torch.dtype = torch.float32 if autocast else dtype) -> Call:
        model = copy.deepcopy(ours if name in peers.OURS else eager).to(device, held)
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = images.to(held).contiguous(memory_format=torch.channels_last)
        function: Callable[[Tensor], Tensor] = model
        if name == "compile":
            torch.compiler.reset()
            function = torch.compile(model, mode="max-autotune-no-cudagraphs", dynamic=False)
        parameters = [p for p in model.parameters() if p.requires_grad]

        def call(i: int) -> tuple[Tensor, ...]:
            with torch.autocast(device.type, dtype, enabled=autocast and name != "truth"):
                output = function(x)
            return output.detach(), *torch.autograd.grad(output, parameters, arriving.to(output.dtype))

        return call

    with testing.library(deterministic=False):
        truth = [t.cpu() for t in build("truth", torch.float64 if device.type == "cpu" else torch.float32)(0)]
    release(device)

    def error(results: Any) -> float:
        """In the 2-norm, the largest of the output's and the gradients': where a pre-activation is at the kink within rounding, its
        gradient passes in one and not in the other, and both are right."""
        return max(testing.norm_error(ours.cpu(), theirs) for ours, theirs in zip(results, truth, strict=True))

    # Twice what PyTorch's own gradients lose in this dtype.
    contest = Contest(device, 1, error, 2 * error(build("channels_last")(0)) + unit_roundoff(dtype), effort)
    release(device)
    for name in names:
        contest.add(name, lambda name=name: build(name))  # type: ignore[misc]
    found = contest.result(graphs=False)
    return {"case": f"{network}, {kind}", "batch": batch, "dtype": _name(dtype), "autocast": autocast, **found}
