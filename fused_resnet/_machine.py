"""What this process runs on: for ``fused-resnet env``, and stored beside every measurement."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from . import _extension
from ._version import __version__
from .ops.plans import backends

# Flags of /proc/cpuinfo that matter to a convolution.
_FLAGS = ("sse4_2", "avx", "f16c", "fma", "avx2", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
_RUNTIME = re.compile(r"^lib(gomp|iomp5|omp)\b.*\.(so|dylib|dll)")


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """The instruction sets that the processor reports, of those that matter here; empty where /proc is missing."""
    try:
        match = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return []
    found = set(match.group(1).split()) if match else set()
    return [flag for flag in _FLAGS if flag in found]


def openmp_runtimes() -> list[str]:
    """Files of the OpenMP runtimes loaded into this process. More than one: two pools of threads that fight for the cores."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    return find_runtimes(maps)


def find_runtimes(maps: str) -> list[str]:
    """The OpenMP runtimes in the text of a /proc/PID/maps."""
    files = {line.split(maxsplit=5)[5] for line in maps.splitlines() if len(line.split(maxsplit=5)) == 6}
    return sorted(file for file in files if _RUNTIME.match(Path(file).name))


def caches() -> dict[str, int]:
    """Sizes in bytes of l1d, l2 and l3, as the compiled module or the system gives them; missing where unknown."""
    if _extension.cpu is not None:
        return {name: int(size) for name, size in _extension.cpu.cache_sizes().items()}
    sizes = {}
    units = {"K": 1 << 10, "M": 1 << 20}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            name = "l1d" if level == "1" else f"l{level}"
            sizes[name] = int(size[:-1]) * units[size[-1]] if size[-1] in units else int(size)
    return sizes


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def extension() -> dict[str, Any]:
    module = _extension.cpu
    if module is None:
        return {"loaded": False, "why": _extension.missing}
    return {
        "loaded": True,
        "file": module.__file__,
        "interface": module.INTERFACE,
        "build": dict(module.BUILD),
        "isa": module.isa(),
        "available_isas": list(module.available_isas()),
    }


def cuda() -> dict[str, Any]:
    """What torch knows of CUDA, and the kernels that this package has for it."""
    devices = []
    for i in range(torch.cuda.device_count()) if torch.cuda.is_available() else ():
        properties = torch.cuda.get_device_properties(i)
        devices.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    found: dict[str, Any] = {"torch_build": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "devices": devices}
    module = _extension.cuda()
    if module is None:
        return {**found, "kernels": False, "why": _extension.cuda_missing()}
    for i, device in enumerate(devices):
        device["why_not"] = backends.cuda.why_no_kernels(torch.device("cuda", i))
    return {**found, "kernels": True, "build": dict(module.BUILD), "tiles": list(module.tiles())}


def describe(paths: bool = True) -> dict[str, Any]:
    """Everything that a measurement depends on and that this process can see. Without ``paths`` files lose their folders:
    what is published need not name them."""
    machine: dict[str, Any] = {
        "fused_resnet": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "os": platform.platform(),
        "cpu": cpu_model(),
        "cpu_flags": cpu_flags(),
        "cores": cores(),
        "caches": caches(),
        "threads": torch.get_num_threads(),
        "openmp_runtimes": openmp_runtimes(),
        "extension": extension(),
        "cuda": cuda(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("FUSED_RESNET_")},
    }
    if not paths:
        machine["openmp_runtimes"] = [os.path.basename(file) for file in machine["openmp_runtimes"]]
        machine["extension"].pop("file", None)
    return machine


def short(device: torch.device | None = None) -> str:
    """One line for pictures and reports: the processor, cores, threads, torch, instruction set; or the GPU and what serves it."""
    if device is not None and device.type == "cuda":
        kernels = _extension.cuda_missing() or "our kernels"
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, torch {torch.__version__}, {kernels}"
    module = _extension.cpu
    kernels = f"{module.isa()} kernels" if module is not None else "plain PyTorch, no compiled module"
    threads = torch.get_num_threads()
    plural = "" if threads == 1 else "s"
    return f"{cpu_model()}, {cores()} cores, {threads} thread{plural}, torch {torch.__version__}, {kernels}"
