"""The compiled module (csrc/bindings.cpp). Internal: pointers are addresses, and nothing here checks them."""

from collections.abc import Sequence
from typing import Any, overload

INTERFACE: int
BUILD: dict[str, str]

def available_isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
def cache_sizes() -> dict[str, int]: ...
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

class Block:
    def __init__(
        self,
        dtype: str,
        input: Sequence[int],
        input_strides: Sequence[int],
        main: Sequence[tuple[object, ...]],
        projection: tuple[object, ...] | None,
        shortcut: str,
        shortcut_strides: Sequence[int],
        output_strides: Sequence[int],
        threads: int,
        algorithm: str = "auto",
        strict: bool = False,
    ) -> None: ...
    def run(
        self, input: int, packed_weights: Sequence[int], biases: Sequence[int], shortcut: int, output: int
    ) -> bool: ...
    def convolution(self, index: int) -> Convolution: ...
    def describe(self) -> str: ...
    @property
    def convolutions(self) -> int: ...
    @property
    def joined(self) -> bool: ...
    @property
    def workspace_bytes(self) -> int: ...

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
    def first_broken(self, owner: dict[str, Any]) -> int: ...
