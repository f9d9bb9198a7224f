"""Print what this installation is and runs on: versions, instruction sets found and in use, caches, CUDA build and devices,
threads, the OpenMP runtimes loaded, environment variables in force, and where the compiled module was loaded from.

--explain INPUT KERNEL says how one convolution would be computed here, and why: `--explain 1x64x56x56 128x3x3/2` is an input of
1 image, 64 channels and 56x56 pixels, and 128 kernels of 3x3 with stride 2. The padding is half the kernel's size. With --gradient it says
the same of the convolution's gradient in its input or its weight.
"""

from __future__ import annotations

import argparse
import re
from typing import Any

import torch

from .. import _extension, _machine
from ..benchmark.output import megabytes, write_json
from ..ops.cpu import CpuBackend
from ..ops.gradients import gradient_of
from ..ops.spec import Operand, geometry_of_call, layout, spec_of
from .arguments import DTYPES, Usage, add_json

HELP = "versions, instruction sets, CUDA, threads and environment variables in force"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    parser.add_argument("--explain", nargs=2, metavar=("INPUT", "KERNEL"), help="how a convolution is computed: NxCxHxW KxRxS[/STRIDE]")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of --explain (default: float32)")
    parser.add_argument("--gradient", choices=("input", "weight"), help="--explain the gradient in one of these, not the convolution")
    parser.add_argument("--contiguous", action="store_true", help="--explain for NCHW in memory rather than channels_last")


def _explain(
    input_words: str, kernel_words: str, dtype: torch.dtype, memory_format: torch.memory_format, gradient: Operand | None
) -> dict[str, Any]:
    """What ``env --explain`` prints: the path, the algorithm, the reason, the blocking and the memory it takes.

    Raises:
        Usage: for words that are no shape, and for a convolution that is not legal.
    """
    sizes = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)", input_words)
    kernels = re.fullmatch(r"(\d+)x(\d+)x(\d+)(?:/(\d+))?", kernel_words)
    if sizes is None:
        raise Usage(f"--explain: the input must be NxCxHxW, such as 1x64x56x56, got {input_words!r}")
    if kernels is None:
        raise Usage(f"--explain: the kernel must be KxRxS or KxRxS/STRIDE, such as 128x3x3/2, got {kernel_words!r}")
    n, c, h, w = map(int, sizes.groups())
    k, r, s, stride = (int(group or 1) for group in kernels.groups())
    try:
        x = torch.empty(n, c, h, w, dtype=dtype, device="meta").contiguous(memory_format=memory_format)
        weight = torch.empty(k, c, r, s, dtype=dtype, device="meta").contiguous(memory_format=memory_format)
        spec = spec_of(x, weight, None, None, geometry_of_call(weight, stride, (r // 2, s // 2)), relu=True)
        bias = torch.empty(k, dtype=dtype, device="meta")
        backend = CpuBackend(_extension.cpu, _extension.missing)
        words = {"input": input_words, "kernel": kernel_words}
        if gradient is not None:
            return {**words, "gradient": gradient, **backend.explain_gradient(gradient, gradient_of(gradient, spec))}
        return {**words, **backend.explain(spec._replace(bias=layout(bias), shortcut=spec.output))}
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: more elements than can be counted
        raise Usage(f"--explain: {error}") from None


def run(arguments: argparse.Namespace) -> int:
    if arguments.gradient is not None and arguments.explain is None:
        raise Usage("--gradient says of which gradient --explain is to tell: it needs --explain")
    if arguments.explain is not None:
        memory_format = torch.contiguous_format if arguments.contiguous else torch.channels_last
        first, second = arguments.explain
        told = _explain(first, second, DTYPES[arguments.dtype], memory_format, arguments.gradient)
        for name, value in told.items():
            print(f"{name:<10}  {value}")
        write_json(arguments.json, told)
        return 0
    found = _machine.describe()
    rows = lines(found)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    for sentence in warnings(found):
        print(f"\nwarning: {sentence}")
    write_json(arguments.json, {**found, "warnings": warnings(found)})
    return 0


def lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    extension, cuda = found["extension"], found["cuda"]
    rows = [
        ("fused-resnet", found["fused_resnet"]),
        ("torch", found["torch"]),
        ("python", found["python"]),
        ("system", found["os"]),
        ("processor", f"{found['cpu']}, {found['cores']} cores for this process"),
        ("instructions found", " ".join(found["cpu_flags"]) or "unknown"),
        ("caches", ", ".join(f"{name} {megabytes(size)}" for name, size in found["caches"].items()) or "unknown"),
    ]
    if extension["loaded"]:
        rows += [
            ("instructions in use", f"{extension['isa']} (available: {', '.join(extension['available_isas'])})"),
            ("compiled module", f"{extension['file']}, interface {extension['interface']}"),
            ("built with", ", ".join(f"{name} {value}" for name, value in extension["build"].items()) or "unknown"),
        ]
    else:
        rows += [("instructions in use", "none of ours"), ("compiled module", f"not in use: {extension['why']}")]
    rows += [
        ("threads", str(found["threads"])),
        ("OpenMP runtimes", ", ".join(found["openmp_runtimes"]) or "none found"),
        ("CUDA in torch", cuda["torch_build"] or "not in this build"),
        ("CUDA devices", ", ".join(f"{d['name']} ({d['capability']})" for d in cuda["devices"]) or "none"),
        ("CUDA kernels of ours", _cuda_kernels(cuda)),
    ]
    variables = [f"{name}={value}" for name, value in found["environment"].items()]
    rows.append(("environment", " ".join(variables) or "no FUSED_RESNET_* variable is set"))
    return rows


def _cuda_kernels(cuda: dict[str, Any]) -> str:
    if not cuda["kernels"]:
        return f"not in use: {cuda['why']}"
    build = cuda["build"]
    return f"built with CUDA {build['cuda']} for {build['architectures']}, {len(cuda['tiles'])} of them for tensor cores"


def warnings(found: dict[str, Any]) -> list[str]:
    """What is likely to cost speed or correctness, one sentence each."""
    sentences = []
    runtimes = found["openmp_runtimes"]
    if len(runtimes) > 1:
        sentences.append(
            f"{len(runtimes)} OpenMP runtimes are loaded where one is expected ({', '.join(runtimes)}): "
            "their threads compete for the same cores"
        )
    if not found["extension"]["loaded"]:
        sentences.append(f"everything is computed through plain PyTorch: {found['extension']['why']}")
    for device in found["cuda"]["devices"]:
        if device.get("why_not"):
            sentences.append(f"on this GPU everything is computed through the library: {device['why_not']}")
    if found["threads"] > found["cores"]:
        sentences.append(f"{found['threads']} threads share {found['cores']} cores: expect less speed, not more")
    return sentences
