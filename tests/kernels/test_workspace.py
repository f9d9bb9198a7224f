"""The memory of a call: sizes beyond any, none to be had, any number of threads; and which inputs share a packed weight."""

from __future__ import annotations

import copy
import sys
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
from _calls import name, run_python
from _exact import WINOGRAD

import fused_resnet
import fused_resnet.nn as fnn
from fused_resnet import _settings, reference, testing
from fused_resnet.cases import ConvCase
from fused_resnet.ops import derived

BIG = 1 << 59
REFUSALS = (OverflowError, ValueError, MemoryError)
# input, weight, output
EXTREMES: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    "batch": ((BIG, 1, 3, 3), (1, 1, 3, 3), (BIG, 1, 1, 1)),
    "batch and channels": ((1 << 47, 1 << 12, 3, 3), (1, 1 << 12, 3, 3), (1 << 47, 1, 1, 1)),
    "channels": ((1, BIG, 3, 3), (1, BIG, 3, 3), (1, 1, 1, 1)),
    "outputs": ((1, 1, 3, 3), (BIG, 1, 3, 3), (1, BIG, 1, 1)),
    "outputs and channels": ((1, 1 << 12, 3, 3), (1 << 47, 1 << 12, 3, 3), (1, 1 << 47, 1, 1)),
    "width": ((1, 1, 3, BIG), (1, 1, 3, 3), (1, 1, 1, BIG - 2)),
    "beyond 63 bits": ((1 << 40, 1 << 40, 3, 3), (1, 1 << 40, 3, 3), (1 << 40, 1, 1, 1)),
}


# Direct convolution lists the pieces of its reduction, of which this many channels have too many.
REFUSED = [(sizes, a) for sizes in EXTREMES for a in ("auto", "direct", *WINOGRAD) if sizes != "channels" or a in WINOGRAD]


@pytest.mark.parametrize(("sizes", "algorithm"), REFUSED)
def test_sizes_beyond_any_memory(isa: str, algorithm: str, sizes: str, kernels: ModuleType) -> None:
    """Planning them allocates nothing: either it is refused, or what is asked for is at least what is needed."""
    input, weight, output = EXTREMES[sizes]
    for dtype, threads in product(("float32", "bfloat16", "float64"), (1, 2, 2**31 - 1)):
        try:
            kernel = kernels.Convolution(
                dtype, input, weight, output, (1, 1), (0, 0), (1, 1), (9, 9, 3, 1), (1, 1, 1, 1), None, False, True,
                threads, algorithm, False,
            )  # fmt: skip
            packed, workspace = kernel.packed_bytes, kernel.workspace_bytes
        except REFUSALS:
            continue
        assert packed >= 2 * weight[0] * weight[1] * 9
        assert workspace > 0


@pytest.mark.parametrize("algorithm", ["direct", *WINOGRAD])
def test_absurd_numbers_of_threads(algorithm: str, kernels: ModuleType) -> None:
    """No more threads are planned for than there are tasks, so no workspace either."""
    arguments: tuple[Any, ...] = (
        "float32", (1, 64, 28, 28), (64, 64, 3, 3), (1, 64, 28, 28), (1, 1), (1, 1), (1, 1), (1, 1, 28 * 64, 64),
        (1, 1, 28 * 64, 64), None, False, True,
    )  # fmt: skip
    for threads in (0, -1, -(2**31)):
        kernel = kernels.Convolution(*arguments, threads, algorithm)
        assert kernel.workspace_bytes == kernels.Convolution(*arguments, 1, algorithm).workspace_bytes
    assert kernels.Convolution(*arguments, 2**31 - 1, algorithm).workspace_bytes < 1 << 30


NO_MEMORY = """
import resource, torch, fused_resnet
from fused_resnet import _settings, reference
_settings.change(algorithm="ALGORITHM")
torch.set_num_threads(THREADS)
w = torch.ones(1, 2048, 3, 3)
small = torch.ones(1, 2048, 4, 4)
expected = reference.conv_bias_add_relu(small, w)
large = torch.ones(1, 1, 1, 1).expand(1, 2048, 200, 200)  # its transform: more than 700 MB
fused_resnet.conv_bias_add_relu(small, w)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20), resource.RLIM_INFINITY))
for _ in range(3):
    try:
        fused_resnet.conv_bias_add_relu(large, w)
    except MemoryError as error:
        print("MemoryError", end=" ")
    y = fused_resnet.conv_bias_add_relu(small, w)
    print(torch.allclose(y, expected, rtol=1e-4), end=" ")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space as Linux does")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("algorithm", WINOGRAD)
def test_no_memory_for_the_workspace(algorithm: str, threads: int, kernels: ModuleType) -> None:
    """MemoryError, and the next call works."""
    done = run_python(NO_MEMORY.replace("ALGORITHM", algorithm).replace("THREADS", str(threads)))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["MemoryError", "True"] * 3


@pytest.mark.parametrize("algorithm", ["auto", "direct", *WINOGRAD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=name)
def test_one_weight_for_inputs_of_every_size(algorithm: str, dtype: torch.dtype, isa: str, generator: torch.Generator) -> None:
    """What was packed for one size and batch is used for all others."""
    _settings.change(algorithm=algorithm)
    for channels, outputs in ((80, 72), (128, 128)):
        base = testing.integer_operands(ConvCase(channels, outputs, (3, 3), (3, 3), padding=(1, 1)), dtype, generator)
        for batch, size in ((1, 14), (2, 12), (1, 28), (1, 3), (5, 9), (1, 7)):
            x = torch.randint(-2, 3, (batch, channels, size, size), generator=generator).to(dtype)
            y = fused_resnet.conv_bias_add_relu(x, base.weight, padding=1)
            truth = reference.conv_bias_add_relu(x.double(), base.weight.double(), padding=1)
            error = testing.norm_error(y, truth)
            assert error <= (5e-2 if dtype == torch.bfloat16 else 1e-5), (batch, size)  # a wrong layout: of order 1; rounding: at most 2e-2
        if algorithm != "auto":
            assert len(derived._beside[id(base.weight.untyped_storage())].entries()) == 1, "packed anew for another size"


@pytest.mark.parametrize("algorithm", ["auto", *WINOGRAD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
def test_groups_of_a_block_share_their_weights(algorithm: str, dtype: torch.dtype, kernels: ModuleType) -> None:
    """Also the last group of images, which may be smaller."""
    block = fnn.BasicBlock(128, 128).eval().to(dtype)
    _settings.change(algorithm=algorithm)
    with torch.no_grad():
        for batch, size in ((3, 13), (3, 14), (5, 10), (7, 7)):
            x = torch.randn(batch, 128, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)
            for threads in (1, 2):
                torch.set_num_threads(threads)
                alone = torch.cat([copy.deepcopy(block)(x[i : i + 1]) for i in range(batch)])
                assert testing.norm_error(block(x), alone.double()) <= 1e-5, (batch, size, threads)


def test_derived_values_of_each_algorithm_are_kept_apart(kernels: ModuleType, generator: torch.Generator) -> None:
    """One weight under every algorithm in turn, twice: three packings, each used again."""
    case = ConvCase(5, 19, (6, 7), (3, 3), padding=(1, 1))
    operands = testing.integer_operands(case, torch.float32, generator)
    derived.clear()
    expected = reference.conv_bias_add_relu(*operands, **case.parameters)
    for algorithm in ("direct", *WINOGRAD, "direct", *WINOGRAD):
        _settings.change(algorithm=algorithm)
        y = fused_resnet.conv_bias_add_relu(*operands, **case.parameters)
        assert torch.allclose(y, expected, rtol=0, atol=0 if algorithm != "winograd4" else 1e-3)
    (kept,) = derived._beside.values()
    assert len(kept.entries()) == 3
