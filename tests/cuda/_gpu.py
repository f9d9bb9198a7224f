"""The device of the CUDA tests, the shapes that try every tile, and what else their files share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from _calls import laid_out

import fused_resnet
from fused_resnet import _settings, testing
from fused_resnet.cases import ConvCase, Operands
from fused_resnet.ops import cuda, derived, plans

DEVICE = torch.device(os.environ.get("FUSED_RESNET_TEST_DEVICE", "cuda"))


def _missing() -> str:
    """Why these tests cannot run, or ''."""
    if DEVICE.type == "cpu":
        return ""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return plans.backends.cuda.why_no_kernels(torch.device("cuda", torch.cuda.current_device()))


MISSING = _missing()
marks = [pytest.mark.cuda, pytest.mark.skipif(bool(MISSING), reason=MISSING or "-")]
gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU: FUSED_RESNET_TEST_DEVICE names another device")

LOW = (torch.bfloat16, torch.float16) if DEVICE.type == "cuda" else (torch.bfloat16,)
DTYPES = (torch.float64, torch.float32, *LOW)
ours = testing.on(DEVICE, fused_resnet.conv_bias_add_relu)

# Tails in pixels (no multiple of 64), in input channels (no multiple of a step of 64 or 32) and in output channels; strides,
# dilation, padding, kernels of 1, 3, 5 and 7; every part of the end on and off. Channels are multiples of 8, as tiles want them.
TILE_CASES = (
    ConvCase(64, 64, (9, 11), (1, 1), shortcut=True, batch=2),
    ConvCase(72, 136, (9, 10), (1, 1), bias=False, batch=3),
    ConvCase(8, 8, (3, 3), (1, 1), relu=False),
    ConvCase(200, 264, (7, 7), (1, 1), shortcut=True, relu=False, batch=3),
    ConvCase(64, 256, (28, 28), (1, 1), shortcut=True, batch=2),
    ConvCase(256, 64, (17, 16), (1, 1), bias=False, shortcut=True, batch=2),
    ConvCase(64, 72, (14, 15), (3, 3), padding=(1, 1), shortcut=True, batch=3),
    ConvCase(24, 64, (13, 10), (3, 3), (2, 2), (1, 1), batch=3),
    ConvCase(136, 40, (9, 9), (3, 3), (2, 1), (0, 1), bias=False, relu=False),
    ConvCase(64, 128, (10, 13), (1, 1), (2, 2), relu=False, batch=2),
    ConvCase(64, 64, (12, 11), (3, 3), padding=(2, 3), dilation=(2, 3), shortcut=True, batch=2),
    ConvCase(16, 24, (11, 12), (5, 5), padding=(2, 2), bias=False, shortcut=True),
    ConvCase(8, 64, (15, 14), (7, 7), (2, 2), (3, 3), batch=2),
    ConvCase(40, 8, (6, 5), (3, 3), padding=(4, 5), shortcut=True, batch=2),
    ConvCase(64, 64, (7, 7), (3, 3), padding="same", shortcut=True, batch=5),
    ConvCase(64, 64, (56, 56), (3, 3), padding=(1, 1), shortcut=True, batch=3),
    ConvCase(512, 512, (7, 7), (3, 3), padding=(1, 1), batch=3),
)
TILES = cuda.tiles() if DEVICE.type == "cuda" and not MISSING else []


@pytest.fixture(autouse=True)
def undisturbed(one_thread: None) -> Iterator[None]:
    """Strict numerics (on the CPU direct convolution), no TF32, nothing derived before; what a test changes is put back."""
    _settings.set_numerics("strict")
    if DEVICE.type == "cpu":
        _settings.change(algorithm="direct")
    derived.clear()
    with testing.library():
        yield
    if _settings.current.cuda_algorithm != "auto":
        _settings.change(cuda_algorithm="auto")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that PyTorch hands out is full of NaN: an output that nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty_strided((3, 4), (1, 3), device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def synchronise() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def there(operands: Operands) -> Operands:
    return Operands(*testing.moved(DEVICE, *operands))


def integers(case: ConvCase, dtype: torch.dtype, form: torch.memory_format = torch.channels_last, seed: int = 0) -> Operands:
    return laid_out(testing.integer_operands(case, dtype, generator(seed)), form)


def failures_of(table: Any, make: Callable[[ConvCase], Operands], exact: bool, cutting: bool = False) -> list[str]:
    """A line for each case that differs from the reference."""
    found = []
    for case in table:
        result = testing.compare_forward(ours, make(case), exact, cutting, **case.parameters)
        if not result:
            found.append(f"{case.name}: {result.reason}")
    return found
