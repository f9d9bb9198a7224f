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
    "csrc/cuda/convolution.cpp",
    "csrc/cuda/tensor.cpp",
    "tests/cpp/host_device.cpp",
)


def build() -> ModuleType:
    """The twin; compiled by the first call."""
    module, message = _cuda_host.link("cuda_twin", SOURCES)
    assert module is not None, message
    return module
