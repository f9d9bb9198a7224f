"""The compiled module (csrc/bindings.cpp). Internal: pointers are addresses, and nothing here checks them."""

from collections.abc import Sequence
from typing import Any, ClassVar, overload

INTERFACE: int
BUILD: dict[str, str]

def available_isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
def cache_sizes() -> dict[str, int]: ...
def release_workspaces() -> None: ...
def measure_fma_peak(seconds: float) -> float: ...

class Convolution:
    def __init__(
        self,
        dtype: str,
        input: Sequence[int],
        weight: Sequence[int],
        output: Sequence[int],
        stride: Sequence[int],
        pad: Sequence[int],
        dilation: Sequence[int],
        input_strides: Sequence[int],
        output_strides: Sequence[int],
        shortcut_strides: Sequence[int] | None,
        has_bias: bool,
        relu: bool,
        threads: int,
        algorithm: str = "auto",
        strict: bool = False,
    ) -> None: ...
    def run(self, input: int, packed_weight: int, bias: int, shortcut: int, output: int) -> bool: ...
    def pack(
        self,
        weight: int,
        strides: Sequence[int],
        packed_weight: int,
        joined_weight: int = 0,
        joined_strides: Sequence[int] = (0, 0, 0, 0),
    ) -> bool: ...
    def describe(self) -> str: ...
    @property
    def packed_bytes(self) -> int: ...
    @property
    def packing(self) -> str: ...
    @property
    def workspace_bytes(self) -> int: ...
    @property
    def algorithm(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def isa(self) -> str: ...

class Network:
    """What a ``Program`` computes: each method adds a node and returns the number of its value."""

    def __init__(self, images: int) -> None: ...
    def input(self, channels: int, height: int, width: int, strides: Sequence[int]) -> int: ...
    def convolution(
        self,
        value: int,
        shortcut: int,
        weight: Sequence[int],
        output: Sequence[int],
        stride: Sequence[int],
        pad: Sequence[int],
        dilation: Sequence[int],
        has_bias: bool,
        relu: bool,
    ) -> int: ...
    def max_pool(self, value: int, output: Sequence[int], kernel: Sequence[int], stride: Sequence[int], pad: Sequence[int]) -> int: ...
    def mean_pool(self, value: int) -> int: ...
    def zero_pad(self, value: int, channels: int, before: int, stride_h: int, stride_w: int) -> int: ...
    def section(self) -> None: ...

class Weights:
    def __init__(self, packed: Sequence[int], biases: Sequence[int]) -> None: ...

class Workspace:
    def __init__(self, bytes: int) -> None: ...

class Program:
    def __init__(
        self, network: Network, output_strides: Sequence[int], dtype: str, threads: int, algorithm: str = "auto", strict: bool = False
    ) -> None: ...
    # True; False: to be computed by direct convolutions; None: the guard does not hold.
    def run(self, weights: Weights, input: int, second_input: int, output: int, guard: Guard | None = None) -> bool | None: ...
    # For whoever watches a run: numbers of a stage's nodes in the network, and what it does.
    def stages(self) -> list[tuple[list[int], str]]: ...
    # In a workspace of workspace_bytes, after the stages before it.
    def run_stage(self, index: int, weights: Weights, input: int, second_input: int, output: int, workspace: Workspace) -> bool: ...
    def convolution(self, index: int) -> Convolution: ...
    def joined_to(self, index: int) -> int: ...
    def describe(self) -> str: ...
    @property
    def convolutions(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def workspace_bytes(self) -> int: ...

class MaxPool:
    MOST_TAPS: ClassVar[int]
    def __init__(
        self,
        dtype: str,
        input: Sequence[int],
        output: Sequence[int],
        kernel: Sequence[int],
        stride: Sequence[int],
        pad: Sequence[int],
        input_strides: Sequence[int],
        output_strides: Sequence[int],
        channels: bool,
        threads: int,
    ) -> None: ...
    def run(self, input: int, output: int) -> None: ...

class Guard:
    @overload
    def __init__(self, data: int, bytes: int, most: int) -> None: ...
    @overload
    def __init__(self, guards: Sequence[Guard]) -> None: ...
    def holds(self) -> bool: ...

def bias_add_relu(
    dtype: str,
    shape: Sequence[int],
    output_strides: Sequence[int],
    input_strides: Sequence[int],
    shortcut_strides: Sequence[int],
    relu: bool,
    wide_input: bool,
    input: int,
    bias: int,
    shortcut: int,
    output: int,
    threads: int,
) -> None: ...
def relu_backward(
    dtype: str,
    shape: Sequence[int],
    result_strides: Sequence[int],
    grad_strides: Sequence[int],
    output_strides: Sequence[int],
    grad: int,
    output: int,
    result: int,
    bias_grad: int,
    threads: int,
) -> None: ...

class Facts:
    def __init__(self, rows: Sequence[tuple[int, Any, Any, Any]], missing: object) -> None: ...
    def include(self, other: Facts, owner: dict[str, Any]) -> None: ...
    def broken(self, owner: dict[str, Any]) -> int: ...

# (tensor, class, version, address, shape, strides, dtype, DLPack's code and bits of the dtype)
TensorRow = tuple[Any, type, int, int, tuple[int, ...], tuple[int, ...], Any, tuple[int, int]]

class Watch:
    def __init__(self, rows: Sequence[TensorRow], tensor: type, exchange: object, on_gpu: bool) -> None: ...
    def first_changed(self, grad: bool) -> int: ...
