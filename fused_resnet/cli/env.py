"""Print what this installation is and runs on: versions, instruction sets found and in use, caches, CUDA build and devices,
threads, the OpenMP runtimes loaded, environment variables in force, and where the compiled module was loaded from.
"""

from __future__ import annotations

import argparse
from typing import Any

from .. import _machine
from ._common import add_json, megabytes, write_json

HELP = "versions, instruction sets, CUDA, threads and environment variables in force"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
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
        ("CUDA devices", ", ".join(cuda["devices"]) or "none"),
        ("CUDA kernels of ours", "built" if cuda["kernels"] else "not in this build"),
    ]
    variables = [f"{name}={value}" for name, value in found["environment"].items()]
    rows.append(("environment", " ".join(variables) or "no FUSED_RESNET_* variable is set"))
    return rows


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
    if found["threads"] > found["cores"]:
        sentences.append(f"{found['threads']} threads share {found['cores']} cores: expect less speed, not more")
    return sentences
