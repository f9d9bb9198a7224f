"""Faults in the kernels for CUDA and in what calls them. ``faults.py`` plants them."""

from __future__ import annotations

from .fault import Fault

FAULTS = (
    Fault(
        "CUDA, general: a pixel below the map counts as inside",
        ("csrc/cuda/general.cuh",),
        "return i >= 0 && i < size;",
        "return i >= 0 && i <= size;",
        ("tests/cuda/test_cuda_twin.py::test_awkward_convolutions", "tests/cuda/test_cuda_host.py"),
    ),
    Fault(
        "CUDA, general: the joined convolution reads its first pixels",
        ("csrc/cuda/general.cuh",),
        "pixel.joined = image * j_n + row * joined_stride_h * j_h",
        "pixel.joined = image * j_n + row * j_h",
        ("tests/cuda/test_cuda_twin.py::test_blocks_of_bfloat16_run_on_tensor_cores",),
    ),
    Fault(
        "CUDA: a weight in another order than the tensor cores read",
        ("fused_resnet/ops/cuda.py",),
        "wanted = (r * s * c, 1, s * c, c)",
        "wanted = (r * s * c, 1, c, r * c)",
        ("tests/cuda/test_cuda_twin.py::test_tensor_core_kernels_get_what_they_read",),
    ),
    Fault(
        "CUDA: a misaligned view given to the tensor cores",
        ("fused_resnet/ops/cuda.py",),
        "return not any([t is not None and t.data_ptr() % _ALIGNMENT for t in tensors])",
        "return True",
        ("tests/cuda/test_cuda_twin.py::test_tensor_core_kernels_get_what_they_read",),
    ),
    Fault(
        "CUDA: only the first bias of a joined projection",
        ("fused_resnet/ops/cuda.py",),
        "lambda a, b: (a.float() + b.float()).to(a.dtype)",
        "lambda a, b: a.clone()",
        ("tests/cuda/test_cuda_twin.py::test_blocks_of_bfloat16_run_on_tensor_cores",),
    ),
    Fault(
        "CUDA: any 1x1 convolution read as a matrix",
        ("csrc/cuda/config.cpp",),
        "s.stride_h == 1 && s.stride_w == 1 && s.pad_top == 0 && s.pad_left == 0 && s.p == s.h && s.q == s.w;",
        "true;",
        ("tests/cuda/test_cuda_config.py",),
    ),
)
