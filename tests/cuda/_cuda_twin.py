"""The CUDA module's twin for the host: csrc/cuda/bindings.cpp over the kernels as the host runs them. With ``CudaBackend(twin)`` CPU
tensors take the way of CUDA tensors, from the operator down to the device functions."""

from __future__ import annotations

from types import ModuleType

import _cuda_host

SOURCES = (
    "csrc/cuda/host.cpp",
    "csrc/cuda/general.cpp",
    "csrc/cuda/bindings.cpp",
    "csrc/cuda/config.cpp",
    "csrc/cuda/prediction.cpp",
    "csrc/cuda/sequence.cpp",
    "csrc/cuda/convolution.cpp",
    "csrc/cuda/tensor.cpp",
    "tests/cpp/host_device.cpp",
)
# tests/cpp/host_device.cpp has these stand-ins.
TILES = (
    "any bfloat16 few 128x64",
    "sm90 bfloat16 image 128x128",
    "sm90 bfloat16 joined 128x128",
    "sm90 bfloat16 matrix 128x128",
    "sm90 float32 image 128x64",
)


def build() -> ModuleType:
    """The twin; compiled by the first call."""
    module, message = _cuda_host.link("cuda_twin", SOURCES)
    assert module is not None, message
    assert tuple(module.tiles()) == TILES
    return module
