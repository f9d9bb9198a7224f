"""The CUDA module's twin for the host: csrc/cuda/bindings.cpp over the kernels as the host runs them. With ``_gpu.use_twin`` CPU
tensors take the way of CUDA tensors, from the operator down to the device functions."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import _cuda_host
import pybind11

ROOT = Path(__file__).parent.parent
SOURCES = (
    "csrc/cuda/bindings.cpp",
    "csrc/cuda/config.cpp",
    "csrc/cuda/convolution.cpp",
    "csrc/cuda/general.cpp",
    "csrc/cuda/host.cpp",
    "csrc/cuda/tensor.cpp",
    "tests/cpp/host_device.cpp",
)


@lru_cache(maxsize=1)
def build() -> ModuleType:
    """Compiles the twin with the flags of the extension, and imports it."""
    folder = Path(tempfile.mkdtemp(prefix="fused_resnet_cuda_twin_"))
    common = _cuda_host._load("fused_resnet_setup", ROOT / "setup.py").COMMON
    compiler = os.environ.get("CXX") or "g++"
    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]

    def compile_one(source: str) -> str:
        target = str(folder / (Path(source).stem + ".o"))
        optimise = "-O2" if source.endswith("host.cpp") else "-O1"
        command = [compiler, *common, optimise, "-DFR_HOST_MODULE", *include, "-c", str(ROOT / source), "-o", target]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return target

    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, SOURCES))
        library = folder / f"cuda_twin{sysconfig.get_config_var('EXT_SUFFIX')}"
        subprocess.run([compiler, "-shared", *objects, "-fopenmp", "-o", str(library)], check=True)
        return _cuda_host._load("cuda_twin", library)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
