"""What is kept between calls: sequences of calls that share a weight, a block or a process. Single calls find no stale cache.

What is trusted: the reference, or an unconverted twin, called with the same tensors; on small integers their results are exact in every
order of summation. Random sequences are in test_stateful.py; this file has those that once went wrong, and their neighbours.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from _blocks import called
from _calls import DTYPES, FORMATS, name, plan_of
from torch import Tensor, nn

import fused_resnet
import fused_resnet.nn as fnn
from fused_resnet import _plain, _settings, reference, testing
from fused_resnet.cases import ConvCase
from fused_resnet.ops import derived
from fused_resnet.runtime import program
from fused_resnet.runtime.cached import key_of


def integers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def block_of_integers(channels: int, stride: int = 1, dtype: torch.dtype = torch.float32) -> fnn.BasicBlock:
    """Without normalisation, and few enough ones that every sum is exact."""
    block = fnn.BasicBlock(channels, channels, stride, norm_layer=nn.Identity)
    if stride > 1:
        block.downsample = fnn.ZeroPadShortcut(channels, channels, stride)
    with torch.no_grad():
        for seed, parameter in enumerate(block.parameters()):
            parameter.copy_(integers(*parameter.shape, seed=seed) * (torch.rand_like(parameter) < 4 / channels))
    return block.to(dtype).eval()


# ---------------------------------------------------------------------------------------------------------------------
# One weight, many uses
# ---------------------------------------------------------------------------------------------------------------------

# (size, stride, algorithm asked for): every packed layout that one weight can have.
USES = ((7, 1, "winograd2"), (14, 2, "winograd2"), (7, 1, "direct"), (14, 1, "auto"), (15, 2, "auto"), (4, 1, "winograd2"))


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("channels", [(16, 16), (40, 72), (512, 64)], ids=str)
def test_one_weight_at_several_strides_and_sizes(isa: str, channels: tuple[int, int], dtype: torch.dtype) -> None:
    """In every order of two, there and back: what the one use packs must not be taken for what the other reads."""
    fused_resnet.set_numerics("strict")  # whatever is chosen is exact on integers
    inputs, outputs = channels
    expected = {}
    weight = integers(outputs, inputs, 3, 3, dtype=dtype) * (integers(outputs, inputs, 3, 3, seed=1) > 0)
    for first, second in itertools.permutations(USES, 2):
        used = weight.clone()
        for use in (first, second, first):
            size, stride, algorithm = use
            x = integers(1, inputs, size, size, dtype=dtype, seed=2).contiguous(memory_format=torch.channels_last)
            if use not in expected:
                expected[use] = reference.conv_bias_add_relu(x, weight, stride=stride, padding=1)
            _settings.change(algorithm=algorithm)
            y = fused_resnet.conv_bias_add_relu(x, used, stride=stride, padding=1)
            assert torch.equal(y, expected[use]), (first, second, use)


@pytest.mark.parametrize("algorithm", ["auto", "winograd2", "winograd4"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_two_blocks_that_share_a_layer(kernels: ModuleType, algorithm: str, dtype: torch.dtype) -> None:
    """Weight and bias; with stride 1 in the one block and 2 in the other."""
    first, second = block_of_integers(64, 1, dtype), block_of_integers(64, 2, dtype)
    second.conv1.weight, second.conv1.bias = first.conv2.weight, first.conv2.bias
    twins = copy.deepcopy((first, second))
    x = integers(1, 64, 14, 14, dtype=dtype)
    with torch.no_grad():
        for _ in range(3):
            for block, twin in zip((first, second), twins, strict=True):
                expected = twin._plain_forward(x)
                assert testing.norm_error(block(x), expected.double()) <= (1e-6 if dtype == torch.float32 else 2e-2)
            first.conv2.weight.mul_(-1)
            twins[0].conv2.weight.mul_(-1)
            twins[1].conv1.weight.copy_(twins[0].conv2.weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_kernels_that_share_a_packing_read_the_same_bytes(isa: str, dtype: torch.dtype) -> None:
    """The kernel's own text is the key: equal texts must mean equal bytes, over strides, sizes, batches, layouts and numerics."""
    weight = torch.randn(72, 40, 3, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    found: dict[str, bytes] = {}
    shared = 0
    for algorithm, numerics in itertools.product(("auto", "direct", "winograd2", "winograd4"), ("fast", "strict")):
        _settings.change(algorithm=algorithm)
        fused_resnet.set_numerics(numerics)
        for stride, size, batch, memory_format in itertools.product((1, 2, 3), (5, 14, 56), (1, 16), FORMATS):
            case = ConvCase(40, 72, (size, size), (3, 3), (stride, stride), (1, 1), batch=batch)
            x = torch.zeros(case.input_shape, dtype=dtype).contiguous(memory_format=memory_format)
            operands = testing.integer_operands(case, dtype, torch.Generator().manual_seed(0))._replace(input=x, weight=weight)
            kernel = plan_of(operands, **case.parameters).kernel  # type: ignore[attr-defined]
            buffer = torch.full((kernel.packed_bytes,), 0xA5, dtype=torch.uint8)
            assert kernel.pack(weight.data_ptr(), weight.stride(), buffer.data_ptr())
            packed = buffer.numpy().tobytes()
            shared += kernel.packing in found
            assert found.setdefault(kernel.packing, packed) == packed, kernel.packing
    assert len(found) == len(set(found.values())) >= (1 if dtype == torch.float64 else 3)
    assert shared > 50


# ---------------------------------------------------------------------------------------------------------------------
# clear_derived, pruning
# ---------------------------------------------------------------------------------------------------------------------


def unseen(weight: Tensor) -> None:
    """A write that nothing but clear_derived can make known: one element, between two that are compared."""
    assert weight.nbytes > derived.SOME
    weight.data.view(-1)[weight.numel() // 2 + 100] += 1000


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = fnn.ConvBiasAddReLU2d(64, 64, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # type: ignore[no-any-return]


MODULES: dict[str, Callable[[], tuple[nn.Module, Callable[[Any], Tensor]]]] = {
    "operator": lambda: (OneLayer(), lambda m: m.conv.weight),
    "block": lambda: (fnn.BasicBlock(64, 64), lambda m: m.conv2.weight),
    "block, layer by layer": lambda: (fnn.Bottleneck(256, 64, groups=2), lambda m: m.conv3.weight),
    "stem": lambda: (_plain.ResNet(_plain.BasicBlock, [1, 1, 1, 1], classes=3), lambda m: m.layer2[0].conv1.weight),
}


@pytest.mark.smoke
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("what", MODULES)
def test_clear_derived_makes_everything_anew(kernels: ModuleType, what: str, threads: int) -> None:
    torch.set_num_threads(threads)
    module, weight_of = MODULES[what]()
    module.eval()
    if what == "stem":
        fused_resnet.fuse_(module)
    channels = {"block, layer by layer": 256, "stem": 3}.get(what, 64)
    x = torch.randn(1, channels, 32, 32)
    with torch.no_grad():
        for _ in range(2):
            before = [module(x) for _ in range(3)][-1]
            unseen(weight_of(module))
            fused_resnet.clear_derived()
            expected = copy.deepcopy(module)(x)
            assert not torch.equal(expected, before)
            for _ in range(3):
                assert torch.equal(module(x), expected), "something that was derived before is still used"


def test_clear_derived_while_a_call_runs(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was made before, and would be kept after it, is not."""
    block = fnn.BasicBlock(64, 64).eval()
    x, native_run = torch.randn(1, 64, 14, 14), program.run

    def run(*arguments: Any) -> Any:
        result = native_run(*arguments)
        unseen(block.conv2.weight)
        fused_resnet.clear_derived()
        return result

    with torch.no_grad():
        with monkeypatch.context() as patched:
            patched.setattr(program, "run", run)
            before = block(x)
        expected = copy.deepcopy(block)(x)
        assert not torch.equal(before, expected)
        for _ in range(3):
            assert torch.equal(block(x), expected)


@pytest.mark.parametrize("repeats", [1, 3])
def test_pruned_in_place(kernels: ModuleType, repeats: int) -> None:
    """``.data = .data[:32]`` keeps address, version and strides; only the shape tells."""
    x = torch.randn(1, 64, 14, 14)
    for norm in (nn.Identity, nn.BatchNorm2d):
        block = fnn.BasicBlock(64, 64, norm_layer=norm).eval()
        layer = OneLayer().eval()
        with torch.no_grad():
            for _ in range(repeats):
                block(x), layer(x)
            # The channels in the middle: outputs of the first convolution, inputs of the second.
            for tensor in (*block.conv1.parameters(), *block.bn1.parameters()):
                tensor.data = tensor.data[:32]
            if norm is nn.BatchNorm2d:
                for key in ("running_mean", "running_var"):
                    buffer = getattr(block.bn1, key)
                    buffer.data = buffer.data[:32]
            block.conv2.weight.data = block.conv2.weight.data[:, :32]
            for parameter in layer.parameters():
                parameter.data = parameter.data[:32]
            expected = block._plain_forward(x), reference.conv_bias_add_relu(x, layer.conv.weight, layer.conv.bias, padding=1)
            for _ in range(3):
                assert testing.norm_error(block(x), expected[0].double()) <= 1e-5
                assert layer(x).shape == expected[1].shape
                assert testing.norm_error(layer(x), expected[1].double()) <= 1e-5


@pytest.mark.parametrize("which", ["conv1.weight", "conv2.weight", "bn1.weight", "bn2.running_var", "conv1.bias"])
def test_what_alone_is_cut_is_an_error_as_in_pytorch(kernels: ModuleType, which: str) -> None:
    block = fnn.BasicBlock(16, 16, norm_layer=nn.Identity if which == "conv1.bias" else nn.BatchNorm2d).eval()
    x = torch.randn(1, 16, 8, 8)
    path, key = which.split(".")
    with torch.no_grad():
        for _ in range(3):
            block(x)
        tensor = getattr(block.get_submodule(path), key)
        whole = tensor.data
        tensor.data = whole[:8]
        with pytest.raises((RuntimeError, ValueError)):
            block._plain_forward(x)
        for _ in range(2):
            with pytest.raises((RuntimeError, ValueError)):
                block(x)
        tensor.data = whole
        assert testing.norm_error(block(x), block._plain_forward(x).double()) <= 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# swap_tensors; memory that another thread replaces
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def swapping() -> Iterator[None]:
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


@pytest.mark.parametrize("what", MODULES)
def test_conversions_that_swap_parameters(kernels: ModuleType, swapping: None, what: str) -> None:
    """``.double()`` and ``load_state_dict`` exchange a module's tensors in place, and refuse those with weak references."""
    module, _ = MODULES[what]()
    module.eval()
    if what == "stem":
        fused_resnet.fuse_(module)
    channels = {"block, layer by layer": 256, "stem": 3}.get(what, 64)
    x = torch.randn(1, channels, 32, 32)
    other = {k: torch.rand_like(v) if v.is_floating_point() else v for k, v in module.state_dict().items()}
    with torch.no_grad():
        for convert in (lambda: module.double(), lambda: module.float(), lambda: module.load_state_dict(other), lambda: module.bfloat16()):
            for _ in range(3):
                module(x)
            convert()
            x = x.to(next(module.parameters()).dtype)
            expected = copy.deepcopy(module)(x)
            assert torch.equal(module(x), expected)


class Replacing:
    """In the place of a guard, or of a call that reads with it: before that reads, another thread assigns to ``.data``; the memory that is
    read must still be somebody's."""

    def __init__(self, replaced: Any, weight: Tensor) -> None:
        self.replaced, self.weight, self.calls = replaced, weight, 0
        self.storage = weakref.ref(weight.untyped_storage())

    def _assign(self) -> None:
        self.calls += 1
        self.weight.data = torch.zeros_like(self.weight)
        assert self.storage() is not None, "the guard would read memory that was given back"

    def holds(self) -> bool:
        self._assign()
        return bool(self.replaced.holds())

    def if_holds(self, guard: Any, x: Tensor) -> Tensor | None:
        self._assign()
        result: Tensor | None = self.replaced.if_holds(guard, x)
        return result


def test_the_guard_reads_memory_that_is_held(kernels: ModuleType, no_garbage_collector: None) -> None:
    x = torch.randn(1, 64, 14, 14)
    with torch.no_grad():
        for weight in (nn.Parameter(torch.randn(64, 64, 3, 3)), torch.randn(64, 64, 3, 3)):
            fused_resnet.conv_bias_add_relu(x, weight, padding=1)
            (entry,) = derived._beside[id(weight.untyped_storage())].entries()
            source = entry.sources[0]
            assert source is not None
            source.guard = spy = Replacing(source.guard, weight)
            del entry, source
            fused_resnet.conv_bias_add_relu(x, weight, padding=1)
            assert spy.calls == 1
            assert not fused_resnet.conv_bias_add_relu(x, weight, padding=1).any()
        block = called(fnn.BasicBlock(64, 64).eval())
        block(x)
        (cached,) = block._fused_resnet.current.bound.store.cached.values()  # type: ignore[union-attr]
        key = key_of(x)
        call, external = cached.calls[key]
        spy = Replacing(call, block.conv1.weight)  # type: ignore[arg-type]
        cached.calls[key] = spy, external
        del cached
        block(x)
        assert spy.calls == 1
        assert testing.norm_error(block(x), block._plain_forward(x).double()) <= 1e-5  # type: ignore[operator]
