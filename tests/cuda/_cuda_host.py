"""The CUDA kernels on the host: the module of ``tests/cpp/cuda_host.cpp``, built once a session, and calls of it on tensors.

Every result lies between guard bytes in a buffer of its own and starts as NaN: what is written outside fails the call, what is
never written fails the comparison. The same holds for the workspace of ``relu_backward``. Reads outside of an operand show where
CXX names a compiler that adds ``-fsanitize=address,undefined`` and LD_PRELOAD its two libraries.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pybind11
import torch
from _calls import ROOT
from torch import Tensor

from fused_resnet.ops.spec import Geometry, check_convolution, geometry_of_call, is_channels_last, output_format, pair

SOURCES = ("csrc/cuda/host.cpp", "csrc/cuda/general.cpp", "tests/cpp/cuda_host.cpp")
GUARD = 256  # bytes on each side
PATTERN = 0xA5
ORDERS = ("forward", "reverse", "shuffled")


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build() -> ModuleType:
    """The module; compiled by the first call. Where that fails, every call fails with the compiler's message."""
    module, message = link("cuda_host", SOURCES)
    assert module is not None, message
    return module


@lru_cache(maxsize=1)
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fused_resnet_cuda_host_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@lru_cache(maxsize=1)
def _flags() -> list[str]:
    """Those of the extension."""
    common: list[str] = _load("fused_resnet_setup", ROOT / "setup.py").COMMON
    return [*common, "-DFR_HOST_MODULE", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]


_compiled: dict[str, tuple[str, str]] = {}  # source -> object file, what the compiler said


def _compile(source: str) -> tuple[str, str]:
    if source not in _compiled:
        target = str(_folder() / (Path(source).stem + "_" + Path(source).parent.name + ".o"))
        optimise = "-O0" if source.startswith("tests") else "-O1"  # compiling takes longer than all the tests
        command = [os.environ.get("CXX") or "g++", *_flags(), optimise, "-c", str(ROOT / source), "-o", target]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        _compiled[source] = target, done.stderr[-3000:] if done.returncode else ""
    return _compiled[source]


@lru_cache(maxsize=2)
def link(name: str, sources: tuple[str, ...]) -> tuple[ModuleType | None, str]:
    """The module of these sources, each compiled once for all modules; or None and the compiler's message."""
    _flags()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects, messages = zip(*pool.map(_compile, sources), strict=True)
    if any(messages):
        return None, "\n".join(messages)
    library = _folder() / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([os.environ.get("CXX") or "g++", "-shared", *objects, "-fopenmp", "-o", str(library)], check=True)
    return _load(name, library), ""


@contextmanager
def options(order: str = "forward", poison: int = -1) -> Iterator[None]:
    """The order in which the threads of a phase run, and the byte that fills shared memory before a block (-1: none)."""
    build().set_options(ORDERS.index(order), poison)
    try:
        yield
    finally:
        build().set_options(0, -1)


@contextmanager
def guarded(shape: Any, dtype: torch.dtype, memory_format: torch.memory_format, skew: int = 0) -> Iterator[Tensor]:
    """An uninitialised (NaN) tensor that starts ``skew`` elements beyond an aligned address, between guard bytes."""
    like = torch.empty(tuple(shape), device="meta", memory_format=memory_format)
    size = like.numel() * dtype.itemsize
    buffer = torch.full((size + 2 * GUARD + 64,), PATTERN, dtype=torch.uint8)
    start = GUARD + (-buffer.data_ptr() - GUARD) % 64 + skew * dtype.itemsize
    assert start + size + GUARD - 64 <= buffer.numel()
    data = buffer[start : start + size].view(dtype).as_strided(like.shape, like.stride())
    data.fill_(float("nan"))
    yield data
    assert (buffer[:start] == PATTERN).all(), "bytes before the result were written"
    assert (buffer[start + size :] == PATTERN).all(), "bytes behind the result were written"


def same_bits(a: Tensor, b: Tensor) -> bool:
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.itemsize]
    return torch.equal(a.contiguous().view(whole), b.contiguous().view(whole))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _data(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _four(values: Any) -> list[int]:
    return [int(value) for value in values]


def call(
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    shortcut: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    relu: bool = True,
    joined: tuple[Tensor, Tensor, Any] | None = None,
) -> Any:
    """The module's Convolution for tensors. ``joined``: input, weight [K, C, 1, 1] and stride of a projection that is added."""
    geometry = geometry_of_call(_stand_in(weight), stride, padding, dilation, groups)
    extra = None
    if joined is not None:
        x, w, steps = joined
        extra = (x.data_ptr(), x.shape[1], list(pair(steps, "stride", 1)), _four(x.stride()), w.data_ptr(), _four(w.stride()))
    return build().Convolution(
        name_of(input.dtype),
        _four(input.shape),
        _four(weight.shape),
        _four(output.shape),
        list(geometry.stride),
        [geometry.padding.top, geometry.padding.left],
        list(geometry.dilation),
        groups,
        _four(input.stride()),
        _four(weight.stride()),
        _four(output.stride()),
        None if shortcut is None else _four(shortcut.stride()),
        relu,
        _data(input),
        _data(weight),
        _data(None if bias is None else bias.contiguous()),
        _data(shortcut),
        _data(output),
        extra,
    )


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    shortcut: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    relu: bool = True,
    *,
    joined: tuple[Tensor, Tensor, Any] | None = None,
    tile: str = "auto",
    wide: bool = False,
    skew: int = 0,
) -> Tensor:
    """``conv_bias_add_relu`` by the general CUDA kernel on the host. ``skew``: the output is not aligned."""
    shape = check_shape(input, weight, geometry_of_call(_stand_in(weight), stride, padding, dilation, groups))
    bias = None if bias is None else bias.contiguous()
    with guarded(shape, input.dtype, output_format(input, weight, shape), skew) as output:
        call(output, input, weight, bias, shortcut, stride, padding, dilation, groups, relu, joined).run(tile, wide)
    return output


def _stand_in(t: Tensor) -> Tensor:
    """Of one element, in float32: the checks' refusal of float16 on the CPU is not about these kernels."""
    return torch.empty(()).expand(t.shape)


def check_shape(input: Tensor, weight: Tensor, geometry: Geometry) -> Any:
    """The output's shape."""
    return check_convolution(_stand_in(input), _stand_in(weight), None, None, geometry)


def result_format(t: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(t) else torch.contiguous_format


def bias_add_relu(
    input: Tensor,
    bias: Tensor | None = None,
    shortcut: Tensor | None = None,
    relu: bool = True,
    *,
    dtype: torch.dtype | None = None,
    in_place: bool = False,
    skew: int = 0,
) -> Tensor:
    """``dtype``: of everything but the input, where that is float32 and the rest is narrower."""
    dtype = dtype or input.dtype

    def run(result: Tensor) -> None:
        strides = [_four(t.stride()) for t in (result, input, input if shortcut is None else shortcut)]
        shape = build().PassShape(name_of(dtype), _four(input.shape), *strides, relu, dtype != input.dtype)
        build().bias_add_relu(shape, _data(input), _data(bias), _data(shortcut), _data(result))

    if in_place:
        run(input)
        return input
    with guarded(input.shape, dtype, result_format(input), skew) as result:
        run(result)
    return result


def relu_backward(grad: Tensor, output: Tensor, bias: bool = True, *, skew: int = 0) -> tuple[Tensor, Tensor | None]:
    """The masked gradient and the bias gradient."""
    channels = output.shape[1]
    accumulator = torch.float64 if output.dtype == torch.float64 else torch.float32
    flat = torch.contiguous_format
    with guarded(output.shape, output.dtype, result_format(output), skew) as result:
        strides = [_four(t.stride()) for t in (result, grad, output)]
        shape = build().PassShape(name_of(output.dtype), _four(output.shape), *strides)
        if not bias:
            build().relu_backward(shape, _data(grad), _data(output), _data(result), 0, 0)
            return result, None
        size = build().relu_backward_workspace(shape) // accumulator.itemsize
        with guarded((size,), accumulator, flat) as workspace, guarded((channels,), output.dtype, flat) as sums:
            build().relu_backward(shape, _data(grad), _data(output), _data(result), _data(sums), _data(workspace))
    return result, sums
