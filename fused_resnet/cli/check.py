"""Compare the operators with the reference, and their gradients with finite differences.

gradcheck and gradgradcheck in float64 for every kind of shortcut, layout and subset of the tensors that require a gradient;
the forward pass and integer gradients against the plain PyTorch reference, over dtypes, layouts and shortcuts: equal to the bit
for integer data, within twice PyTorch's own error for floats, both with strict numerics; and with fast numerics within the error
that the README promises. Exit status 1 if one fails.

--device cuda computes ours on the GPU and the reference on the CPU, float16 too; float32 without TF32, and in a group of its own
with it.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .. import _machine, _settings, cases, ops, testing
from ..benchmark.output import finite, progress, table, write_json
from ..cases import ConvCase, Operands
from .arguments import CUDA_DTYPES, DTYPES, Usage, add_device, add_json, device, seed, threads

HELP = "the gradient check against the reference, over dtypes, layouts and shortcuts"

# The convolutions whose operands are laid out in every way: hot path (two strides, 1x1, a tail of channels) and general path.
_SHAPES = (
    ConvCase(17, 17, (9, 10), (3, 3), padding=(1, 1), shortcut=True, batch=2),
    ConvCase(17, 17, (9, 10), (1, 1), shortcut=True, batch=2),
    ConvCase(17, 20, (9, 10), (3, 3), (2, 2), (1, 1), shortcut=True, batch=2),
    ConvCase(16, 16, (9, 10), (4, 2), padding="same", shortcut=True, batch=2),
    ConvCase(16, 16, (9, 10), (3, 3), padding=(1, 1), groups=4, shortcut=True, batch=2),
)
# Convolutions that fast numerics may compute by Winograd's algorithm, and the error of a block that the README promises up to
# 256 channels.
_FAST_SHAPES = (
    ConvCase(17, 17, (9, 10), (3, 3), padding=(1, 1), shortcut=True, batch=2),
    ConvCase(64, 64, (14, 15), (3, 3), padding=(1, 1), shortcut=True),
    ConvCase(256, 256, (14, 14), (3, 3), padding=(1, 1), shortcut=True),
    ConvCase(128, 128, (14, 14), (3, 3), (2, 2), (1, 1), shortcut=True),
)
_FAST = 2e-6
# Convolutions for a GPU's tensor cores: both forms (matrix, image), both strides, dilation, and tails in pixels, in input channels
# (72 is no multiple of a step of the product) and in output channels; channels_last, as they want it.
_TENSOR_SHAPES = (
    ConvCase(64, 64, (14, 15), (3, 3), padding=(1, 1), shortcut=True, batch=3),
    ConvCase(64, 256, (13, 9), (1, 1), shortcut=True, batch=3),
    ConvCase(72, 136, (9, 10), (1, 1), batch=2),
    ConvCase(72, 40, (13, 10), (3, 3), (2, 2), (1, 1), shortcut=True, batch=2),
    ConvCase(128, 64, (13, 10), (1, 1), (2, 2), relu=False, batch=2),
    ConvCase(64, 72, (11, 12), (3, 3), padding=(2, 3), dilation=(2, 3), shortcut=True, batch=2),
    ConvCase(64, 64, (12, 11), (5, 7), padding=(2, 3), bias=False, shortcut=True),
)


@dataclass(frozen=True)
class Result:
    """One check; ``used`` is the part of the tolerance that the error took, where there is one."""

    group: str
    name: str
    reason: str
    used: float | None = None


Check = Callable[[], Result]
_CPU = torch.device("cpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a part of the checks, in a few seconds")
    parser.add_argument(
        "--dtype",
        choices=tuple(CUDA_DTYPES),
        help="only this dtype (default: all); finite differences are always in float64, and left out for the others",
    )
    add_device(parser)
    parser.add_argument("--seed", type=seed, default=0, help="seed of the data (default: 0)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    where = device(arguments.device)
    available = CUDA_DTYPES if where.type == "cuda" else DTYPES
    if arguments.dtype and arguments.dtype not in available:
        raise Usage(f"--dtype: {arguments.dtype} is for --device cuda")
    dtypes = [available[arguments.dtype]] if arguments.dtype else list(available.values())
    checks = list(plan(dtypes, arguments.quick, arguments.seed, where))
    start = time.perf_counter()
    results = []
    with testing.library(), warnings.catch_warnings(), progress(len(checks), "check") as advance:
        # PyTorch's remark about the copy that its own convolution makes, in the reference.
        warnings.filterwarnings("ignore", message="Using padding='same' with even kernel lengths")
        for check in checks:
            results.append(check())
            advance(results[-1].group)
    seconds = time.perf_counter() - start
    failed = [result for result in results if result.reason]
    rows = summary(results)
    print(
        table(
            ("checked", "cases", "failed", "worst error / allowed"),
            [(r["group"], r["cases"], r["failed"], "equal" if r["worst"] is None else f"{r['worst']:.2f}") for r in rows],
        )
    )
    for result in failed:
        print(f"\nFAILED  {result.group}: {result.name}\n        {result.reason}")
    print(f"\n{len(results)} checks, {len(failed)} failed, {seconds:.1f} s, seed {arguments.seed}. {_machine.short(where)}")
    write_json(
        arguments.json,
        {
            "ok": not failed,
            "seed": arguments.seed,
            "device": where.type,
            "seconds": seconds,
            "machine": _machine.describe(),
            "groups": rows,
            "failures": [{"group": r.group, "name": r.name, "reason": r.reason} for r in failed],
        },
    )
    return 1 if failed else 0


def summary(results: list[Result]) -> list[dict[str, Any]]:
    rows = []
    for group in dict.fromkeys(result.group for result in results):
        mine = [result for result in results if result.group == group]
        used = [result.used for result in mine if result.used is not None]
        rows.append(
            {
                "group": group,
                "cases": len(mine),
                "failed": sum(bool(result.reason) for result in mine),
                "worst": finite(max(used)) if used else None,
            }
        )
    return rows


def plan(dtypes: list[torch.dtype], quick: bool, seed: int, device: torch.device = _CPU) -> Iterator[Check]:
    """Every check of a run, not yet made."""
    for dtype in dtypes:
        yield from _forward(dtype, quick, seed, device)
        yield from _integer_gradients(dtype, quick, seed, device)
    if torch.float32 in dtypes and device.type == "cpu":
        for shape in _FAST_SHAPES[: 2 if quick else None]:
            yield lambda shape=shape: _fast(shape, seed)  # type: ignore[misc]
    if torch.float32 in dtypes and device.type == "cuda":
        for shape in _TENSOR_SHAPES:
            for exact in (True, False):
                yield lambda shape=shape, exact=exact: tf32(shape, exact, seed, device)  # type: ignore[misc]
    if torch.float64 in dtypes:
        for case in testing.gradient_cases(quick):
            yield lambda case=case: finite_differences(case, seed, device)  # type: ignore[misc]


def finite_differences(case: testing.GradientCase, seed: int = 0, device: torch.device = _CPU) -> Result:
    """One case against the reference, then gradcheck and gradgradcheck with PyTorch's own tolerances for float64."""
    reason = ""
    try:
        # On one thread: for thousands of calls on a few elements, waking a second one takes longer than all the rest.
        # gradcheck wants the same result each time, which cuDNN gives where it is asked to.
        with warnings.catch_warnings(), threads(1), testing.library():
            # A function that is linear in its inputs has second derivatives of zero, which gradgradcheck remarks upon; and
            # PyTorch remarks on a copy that its own convolution makes, in the reference.
            warnings.simplefilter("ignore")
            reason = case.compare(seed, device)
            function, leaves = case.build(seed, device=device)
            torch.autograd.gradcheck(function, leaves)
            torch.autograd.gradgradcheck(function, leaves, gen_non_contig_grad_outputs=True)
    except Exception as error:  # a crash in one case is a failure of that case; the others still run
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    return Result(f"finite differences, shortcut {case.shortcut}", case.name, reason)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _shortcuts(case: ConvCase, operands: Operands) -> Iterator[tuple[str, Operands]]:
    """The operands with every kind of shortcut that their shapes allow."""
    yield "none", operands._replace(shortcut=None)
    yield "tensor", operands
    yield "expanded", testing.layout(operands, shortcut="expanded")
    if case.input_shape == case.output_shape:
        yield "input", operands._replace(shortcut=operands.input)
        wide = torch.cat((operands.input, operands.input[:, :1]), 1)
        yield "view", operands._replace(input=wide[:, :-1], shortcut=wide[:, 1:])


def _operator(device: torch.device) -> Callable[..., torch.Tensor]:
    """Our operator for tensors on the CPU, computed on a device."""
    return ops.conv_bias_add_relu if device.type == "cpu" else testing.on(device, ops.conv_bias_add_relu)


def _forward(dtype: torch.dtype, quick: bool, seed: int, device: torch.device) -> Iterator[Check]:
    name = str(dtype).removeprefix("torch.")
    for exact in (True, False):
        make = testing.integer_operands if exact else testing.float_operands
        group = f"forward {name}, {'integers' if exact else 'floats'}"
        shapes = (*_SHAPES, *cases.AWKWARD[:: 10 if quick else 1])
        for case in shapes:
            yield lambda case=case, make=make, exact=exact, group=group: _compare(  # type: ignore[misc]
                group, case.name, make(case, dtype, _generator(seed)), exact, case, device
            )
        for case in _TENSOR_SHAPES if device.type == "cuda" else ():
            yield lambda case=case, make=make, exact=exact, group=group: _compare(  # type: ignore[misc]
                group, f"{case.name}, channels_last", _channels_last(make(case, dtype, _generator(seed))), exact, case, device
            )
        for case in _SHAPES[: 1 if quick else None]:
            operands = make(case, dtype, _generator(seed + 1))
            for kind, chosen in _shortcuts(case, operands):
                label = f"{case.name}, shortcut {kind}"
                yield lambda label=label, chosen=chosen, exact=exact, group=group, case=case: _compare(  # type: ignore[misc]
                    group, label, chosen, exact, case, device
                )
            for operand in Operands._fields:
                for layout in testing.LAYOUTS:
                    chosen = testing.layout(operands, **{operand: layout})
                    label = f"{case.name}, {operand} {layout}"
                    yield lambda label=label, chosen=chosen, exact=exact, group=group, case=case: _compare(  # type: ignore[misc]
                        group, label, chosen, exact, case, device
                    )


def _channels_last(operands: Operands) -> Operands:
    return testing.layout(operands, input="channels_last", weight="channels_last", shortcut="channels_last")


def _compare(group: str, name: str, operands: Operands, exact: bool, case: ConvCase, device: torch.device) -> Result:
    try:
        # F(4x4, 3x3) is not exact on integers, nor within the envelope of direct convolution; cuDNN's is not exact either.
        with _settings.using(numerics="strict"), testing.library(cudnn=not exact):
            cutting = device.type == "cuda" and operands.input.dtype in (torch.bfloat16, torch.float16)
            result = testing.compare_forward(_operator(device), operands, exact, cutting, **case.parameters)
    except Exception as error:  # as above: one crash must not hide the other results
        return Result(group, name, f"{type(error).__name__}: {error}")
    used = None if exact else result.error / result.allowed if result.allowed else 0.0
    return Result(group, name, result.reason, used)


def tf32(case: ConvCase, exact: bool, seed: int, device: torch.device) -> Result:
    """float32 with TF32 allowed. Integers up to 8 are exact in its 11 bits, and their sums in its accumulators: equal. Floats: what
    TF32 may add to each output's error, beyond the envelope."""
    group = f"forward float32 with TF32, {'integers' if exact else 'floats'}"
    make = testing.integer_operands if exact else testing.float_operands
    operands = _channels_last(make(case, torch.float32, _generator(seed)))
    try:
        with _settings.using(numerics="strict"), testing.library(tf32=True, cudnn=not exact):
            result = _operator(device)(*operands, **case.parameters)
        truth, peer = testing.truth_and_peer(operands, **case.parameters)
        if exact:
            return Result(group, case.name, testing.compare_exact(result, peer).reason)
        scale = testing.error_scale(operands, torch.float32, True, **case.parameters)
        allowed = testing.tf32_allowed(operands, **case.parameters) + 2 * scale + torch.finfo(torch.float32).eps * truth.abs()
        used = ((result.double() - truth).abs() / allowed).max().item()
    except Exception as error:  # as above
        return Result(group, case.name, f"{type(error).__name__}: {error}")
    return Result(group, case.name, "" if used <= 1 else f"an error of {used:.2f} times what TF32 may make", used)


def _fast(case: ConvCase, seed: int) -> Result:
    """With fast numerics: the error in the 2-norm against float64, within what the README promises."""
    group = "forward float32, fast numerics"
    operands = testing.float_operands(case, torch.float32, _generator(seed))
    try:
        with _settings.using(numerics="fast"):
            result = ops.conv_bias_add_relu(*operands, **case.parameters)
        truth, _ = testing.truth_and_peer(operands, **case.parameters)
        error = testing.norm_error(result, truth)
    except Exception as exception:  # as above
        return Result(group, case.name, f"{type(exception).__name__}: {exception}")
    return Result(group, case.name, "" if error <= _FAST else f"error {error:.1e}, promised {_FAST:.0e}", error / _FAST)


def _integer_gradients(dtype: torch.dtype, quick: bool, seed: int, device: torch.device) -> Iterator[Check]:
    """Gradients of integer data, whose outputs are often exactly 0: the mask at the kink, which finite differences avoid."""
    group = f"integer gradients {str(dtype).removeprefix('torch.')}"
    for case in _SHAPES[: 1 if quick else None]:
        for layout in ("contiguous", "channels_last"):
            yield lambda case=case, layout=layout: _gradients(group, case, layout, dtype, seed, device)  # type: ignore[misc]


def _gradients(group: str, case: ConvCase, layout: str, dtype: torch.dtype, seed: int, device: torch.device) -> Result:
    generator = _generator(seed + 2)
    operands = testing.layout(testing.integer_operands(case, dtype, generator), input=layout, shortcut=layout)
    # One gradient in -1, 0, 1 for each output, few of them: for bfloat16 the sums, too, must stay below 257.
    grad = testing.unit_gradient(case.output_shape, dtype, generator)
    try:
        with _settings.using(numerics="strict"), testing.library(cudnn=False):
            found = testing.compare_gradients(_operator(device), operands, grad, **case.parameters)
    except Exception as error:
        return Result(group, f"{case.name}, {layout}", f"{type(error).__name__}: {error}")
    reason = "; ".join(f"{name}: {result.reason}" for name, result in found.items() if not result)
    return Result(group, f"{case.name}, {layout}", reason)
