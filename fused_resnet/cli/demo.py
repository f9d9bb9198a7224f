"""The main job on real input, in about a minute on two cores.

1. Trains a small bias-only residual network of fused blocks on scikit-learn's handwritten digits.
2. Checks gradients: the trained network's against the plain PyTorch reference, and the operators' by finite differences.
3. Converts a ResNet-18 and a ResNet-50 (random weights, batch norm calibrated on photographs), runs scikit-learn's photograph
   through both forms, and times each distinct block before and after.

--device cuda does all of it on the GPU, the conversion in bfloat16 on a batch of photographs. Writes a picture of it. Exit status 1
if the accuracy stays under 95 %, a gradient or a result is wrong.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _machine, _plain, testing
from ..benchmark.output import milliseconds, progress, table, write_json
from ..benchmark.timing import geometric_mean
from ..testing.compare import unit_roundoff
from . import _conversion, _digits
from .arguments import Usage, add_device, add_json, device, need, picture, positive, seed, threads
from .check import finite_differences

HELP = "the main job on real input, on any machine, in about a minute"

GOAL = 0.95  # test accuracy on the digits
_MANY = 32  # images that a GPU is given at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=picture, default=Path("fused-resnet-demo.png"), metavar="FILE", help="default: %(default)s")
    parser.add_argument("--epochs", type=positive, default=20, help="of the training on digits (default: 20)")
    parser.add_argument("--image-size", type=positive, default=224, help="of the photograph, in pixels (default: 224)")
    parser.add_argument("--repeat", type=positive, default=15, help="samples of each timing (default: 15)")
    add_device(parser)
    parser.add_argument("--threads", type=positive, help="default: torch's")
    parser.add_argument("--seed", type=seed, default=0, help="of weights and data (default: 0)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    for module in ("numpy", "PIL", "matplotlib", "tqdm"):
        need(module, "demo")
    _digits.sklearn_folder()
    where = device(arguments.device)
    picture(str(arguments.out))  # the default has not been through the argument's type
    if arguments.image_size < 32:  # ResNet's stages halve the image five times
        raise Usage(f"--image-size must be at least 32, got {arguments.image_size}")
    start = time.perf_counter()
    with threads(arguments.threads):
        print(_machine.short(where))
        training, network, digits, passed = _train(arguments, where)
        gradients = _check_gradients(network, digits, arguments.seed, where)
        conversions, shown = _convert(arguments, where)
        from ._pictures import draw_demo

        rows = [row for conversion in conversions for row in conversion.rows]
        contested = [row["case"] for row in rows if row["before"]["contested"]]
        draw_demo(training, GOAL, shown.pixels, rows, _machine.short(where), arguments.out)
    ok = passed and gradients["ok"] and all(conversion.ok for conversion in conversions)
    mean = geometric_mean(row["ratio"] for row in rows if not row["whole"])
    _say_end(training, gradients, conversions, mean, contested, time.perf_counter() - start, arguments.out)
    write_json(
        arguments.json,
        {
            "ok": ok,
            "device": where.type,
            "machine": _machine.describe(paths=False),
            "seconds": time.perf_counter() - start,
            "training": {"losses": training.losses, "accuracies": training.accuracies, "seconds": training.seconds},
            "gradients": gradients,
            "conversions": [
                {
                    "network": c.name,
                    "fused_blocks": c.fused_blocks,
                    "blocks": c.blocks,
                    "difference": c.difference,
                    "error": c.error,
                    "eager_error": c.eager_error,
                    "allowed_error": c.allowed,
                    "keys_kept": c.keys_kept,
                    "ok": c.ok,
                    "times": c.rows,
                }
                for c in conversions
            ],
            "geometric_mean": mean,
            "contested": contested,
        },
    )
    return 0 if ok else 1


def _train(arguments: argparse.Namespace, where: torch.device) -> tuple[_digits.Training, _digits.DigitNet, _digits.Digits, bool]:
    generator = torch.Generator().manual_seed(arguments.seed)
    digits = _digits.load(generator).to(where)
    network = _digits.DigitNet(generator).to(where)
    print(
        f"\n1. Training on {len(digits.images)} handwritten digits of 8x8 pixels: "
        f"{len(network.blocks)} fused residual blocks with biases, no batch norm"
    )
    with progress(arguments.epochs, "training") as advance:
        training = _digits.train(network, digits, arguments.epochs, generator, advance)
    passed = training.accuracies[-1] >= GOAL
    print(
        f"   loss {training.losses[0]:.3f} -> {training.losses[-1]:.3f}, test accuracy {training.accuracies[-1]:.1%} on "
        f"{len(digits.test_images)} others, {training.seconds:.1f} s"
    )
    if not passed:
        print(f"   FAILED  the accuracy is under the goal of {GOAL:.0%}")
    return training, network, digits, passed


def _check_gradients(network: _digits.DigitNet, digits: _digits.Digits, seed: int, where: torch.device) -> dict[str, Any]:
    """The network's gradients on a batch of digits, in float64, where no pre-activation is at the kink by rounding alone;
    then gradcheck and gradgradcheck of the operators."""
    print("\n2. Checking gradients")
    double = network.double()
    images = digits.images[:64].double()
    parameters = dict(double.named_parameters())
    # The gradient that arrives is drawn, not the loss's: of a network that is nearly always right that one is a difference of
    # almost equal numbers, which would magnify the rounding of both sides.
    arriving = torch.randn(len(images), 10, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(where)

    def gradients(forward: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(images), list(parameters.values()), arriving)

    found = zip(gradients(double), gradients(double.plain), strict=True)
    errors = {name: testing.norm_error(*pair) for name, pair in zip(parameters, found, strict=True)}
    worst = max(errors, key=lambda name: errors[name])
    # Two results that each lose u sqrt(additions), over the sums of all layers, forward and backward (a gradient sums over
    # images and pixels too).
    additions = sum(p[0].numel() for p in parameters.values() if p.dim() == 4) * 2 + images.numel()
    allowed = 2 * unit_roundoff(torch.float64) * math.sqrt(additions)
    ok = errors[worst] <= allowed
    print(
        f"   {len(errors)} parameters of the trained network against the reference, float64: largest relative difference "
        f"{errors[worst]:.1e} ({worst}), allowed {allowed:.1e}"
    )
    network.float()
    cases = testing.gradient_cases(quick=True)
    failed = []
    with progress(len(cases), "finite differences") as advance:
        for case in cases:
            result = finite_differences(case, seed, where)
            if result.reason:
                failed.append(result)
            advance(case.shortcut)
    print(f"   {len(cases)} cases of gradcheck and gradgradcheck: {len(failed)} failed")
    for result in failed:
        print(f"   FAILED  {result.name}\n           {result.reason}")
    return {
        "ok": ok and not failed,
        "network_error": errors[worst],
        "allowed_error": allowed,
        "finite_difference_cases": len(cases),
        "failures": [result.name for result in failed],
    }


def _convert(arguments: argparse.Namespace, where: torch.device) -> tuple[list[_conversion.Conversion], _conversion.Photograph]:
    size = arguments.image_size
    shown = _conversion.photograph("china.jpg", size)
    crops = [
        _conversion.photograph(name, size, corner).tensor
        for name in ("china.jpg", "flower.jpg")
        for corner in ((0.0, 0.0), (0.5, 0.5), (1.0, 1.0))
    ]
    # One image is what a processor is given, and a GPU many; in bfloat16, its tensor cores' own.
    on_gpu = where.type == "cuda"
    images = shown.tensor.repeat(_MANY if on_gpu else 1, 1, 1, 1).to(where)
    what = f"{len(images)} times in bfloat16" if on_gpu else "one image"
    print(
        f"\n3. Converting ResNets and running a photograph of {size}x{size} pixels through both forms. The weights are random; "
        "batch norm is calibrated on scikit-learn's two photographs."
    )
    generator = torch.Generator().manual_seed(arguments.seed)
    results = []
    steps = 2 + sum(2 + count for count in (7, 8))
    with progress(steps, "conversion") as advance:
        for name, make in (("ResNet-18", _plain.resnet18), ("ResNet-50", _plain.resnet50)):
            model = _conversion.calibrate(_plain.randomise(make(), generator).to(where), torch.cat(crops).to(where))
            advance(f"{name} calibrated")
            if on_gpu:
                model, images = model.bfloat16(), images.bfloat16()
            results.append(_conversion.convert(name, model, images, arguments.repeat, advance))
    for result in results:
        print(
            f"\n   {result.name}: {result.fused_blocks} of {result.blocks} residual blocks fused; largest difference between "
            f"the forms {result.difference:.1e} of the largest output\n   (error against float64: fused {result.error:.1e}, "
            f"eager {result.eager_error:.1e}, allowed {result.allowed:.1e}); "
            f"state_dict {'unchanged' if result.keys_kept else 'CHANGED'}"
            f"{'' if result.ok else '   FAILED'}"
        )
        rows = [
            (
                row["case"],
                milliseconds(row["before"]["median_ms"] / 1e3),
                milliseconds(row["after"]["median_ms"] / 1e3),
                f"{row['ratio']:.2f}x{'?' if row['before']['contested'] else ''}",
            )
            for row in result.rows
        ]
        print("   " + table((what, "before, ms", "after, ms", "faster"), rows).replace("\n", "\n   "))
    return results, shown


def _say_end(
    training: _digits.Training,
    gradients: dict[str, Any],
    conversions: list[_conversion.Conversion],
    mean: float,
    contested: list[str],
    seconds: float,
    out: Path,
) -> None:
    networks = ", ".join(f"{c.name} {c.rows[-1]['ratio']:.2f}x" for c in conversions)
    faults = [
        *(["the accuracy"] if training.accuracies[-1] < GOAL else []),
        *([] if gradients["ok"] else ["the gradients"]),
        *(c.name for c in conversions if not c.ok),
    ]
    verdict = "all as they should be" if not faults else f"NOT as they should be: {', '.join(faults)}"
    print(
        f"\nChecked: test accuracy {training.accuracies[-1]:.1%} (goal {GOAL:.0%}), gradients against the reference and finite "
        f"differences, two converted networks\nagainst float64 and their state_dicts: {verdict}."
    )
    if contested:
        print(
            f"How much faster it runs here cannot be said: other processes held the cores while {len(contested)} of these "
            "were timed. Run it again when the machine is idle."
        )
    else:
        print(f"Here the blocks run at {mean:.2f}x the speed of the better eager memory format (geometric mean); whole networks: {networks}.")
    print(f"Picture: {out}. {seconds:.0f} s.")
