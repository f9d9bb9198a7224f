"""Residual blocks and networks of the benchmark on a GPU, forward, and forward and backward. See ``gpu_contest.py``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _plain, cases, testing
from ..cases import BlockCase
from ..testing.compare import accumulator, unit_roundoff
from . import gpu_peers as peers
from .gpu_contest import Contest, Effort, name_of
from .gpu_timing import Call, release, sets_of


def folding_allows(model: nn.Module, eager: float, dtype: torch.dtype) -> float:
    """How large a part of the largest output a converted model may err where eager errs ``eager``.

    Eager rounds a layer's result at least once, folding rounds scale, weight and bias too: four times eager's error, or what sums of
    this length lose, and twice that for the scatter of one sample; and three units a layer, of random sign, where eager is exact by luck.
    """
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    additions = sum(m.weight[0].numel() for m in convolutions)
    summed = unit_roundoff(accumulator(dtype)) * additions**0.5
    return 2 * max(4 * eager, summed) + 3 * unit_roundoff(dtype) * len(convolutions) ** 0.5


def module(
    model: nn.Module,
    make: Callable[[], Tensor],
    dtype: torch.dtype,
    device: torch.device,
    names: Sequence[str],
    effort: Effort,
    plain: bool = True,
    graphs: bool = True,
    most: int = 512,
) -> dict[str, Any]:
    """A model in eval mode and float32, batch norm included, and what makes its inputs. The inputs rotate, ``most`` of them, the
    weights do not."""
    with torch.no_grad():
        first = make().to(device, dtype)
        count = min(sets_of(2 * first.nbytes, device), most)
        inputs = [first, *(make().to(device, dtype) for _ in range(count - 1))]
        inputs = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
        # The values that contenders get, computed in float32 (float64 on the CPU); of the same input whatever happens after.
        wide = torch.float64 if device.type == "cpu" else torch.float32
        with testing.library(deterministic=False):
            truth = copy.deepcopy(model).to(device, dtype).to(wide)(first.to(wide))
        eager = testing.relative_error(peers.module("channels_last", model, dtype, device)(inputs[0]), truth)
        allowed = folding_allows(model, eager, dtype)
        contest = Contest(device, count, lambda result: testing.relative_error(result, truth), allowed, effort)
        for name in names:

            def build(name: str = name) -> Call:
                function = peers.module(name, model, dtype, device)
                return lambda i: function(inputs[i])

            contest.add(name, build)
        found = contest.result(plain, graphs)
    return {"batch": first.shape[0], "dtype": name_of(dtype), **found}


def block(
    case: BlockCase, batch: int, dtype: torch.dtype, device: torch.device, names: Sequence[str], effort: Effort, **how: bool
) -> dict[str, Any]:
    """A residual block of the table."""
    model = case.eager(torch.Generator().manual_seed(0))
    shape = (batch, case.inplanes, *case.size)
    found = module(model, lambda: torch.relu(torch.randn(shape, device=device)), dtype, device, names, effort, **how)
    return {"case": case.name, "network": case.network, **found}


class _Stages(nn.Sequential):
    """A network's residual blocks without stem and classifier."""


def network(
    name: str,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    names: Sequence[str],
    effort: Effort,
    whole: bool = True,
    **how: bool,
) -> dict[str, Any]:
    """A network of the table, or only its residual blocks one after the other."""
    size, make = cases.NETWORKS[name]
    model: nn.Module = _plain.randomise(make(), torch.Generator().manual_seed(0)).eval()
    shape = (batch, 3, size, size)
    if not whole:
        model = _Stages(*(child for path, child in model.named_children() if path.startswith("layer")))
        first = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels
        inner = size if name == "cifar20" else size // 4  # the stem's stride and the pooling's
        shape = (batch, first, inner, inner)

    def images() -> Tensor:
        x = torch.randn(shape, device=device)
        return x if whole else torch.relu(x)

    # A pass through all layers leaves nothing of its input in a cache, so a few do.
    found = module(model, images, dtype, device, names, effort, most=4, **how)
    for kind in {"times", "graphs"} & set(found):
        found[f"images_a_second_{kind}"] = {contender: batch * 1e3 / t["median_ms"] for contender, t in found[kind].items()}
    return {"case": name if whole else f"{name}, residual blocks", **found}


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
    return {"case": f"{network}, {kind}", "batch": batch, "dtype": name_of(dtype), "autocast": autocast, **found}
