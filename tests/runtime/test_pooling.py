"""Max pooling: our kernel against ``nn.MaxPool2d``, value for value, and what is left to the module itself."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _calls import DTYPES, FORMATS, name, run_python
from _pooling import SHAPES, WINDOWS
from torch import Tensor, nn

from fused_resnet import _plain, models
from fused_resnet._settings import Plans
from fused_resnet.fusion import fuse_, unfuse_
from fused_resnet.graph.ir import Call, MaxPool
from fused_resnet.runtime import pooling
from fused_resnet.runtime.pooling import max_pool


@pytest.fixture(autouse=True)
def _of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our kernel's, however small: small maps have more edges."""
    monkeypatch.setattr(pooling, "FEW", 0)
    monkeypatch.setattr(pooling, "FEW_CHANNELS_LAST", 0)


def _run(module: nn.MaxPool2d, x: Tensor) -> Tensor | None:
    return max_pool(Plans(9), module, x)


def test_other_windows_of_one_module(kernels: object) -> None:
    """Its settings are read at each call."""
    plans, module, x = Plans(9), nn.MaxPool2d(2, 2), torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        for kernel, stride, padding, ceil_mode in ((2, 2, 0, False), (3, 2, 0, False), (3, 2, 1, False), (3, 3, 1, False), (3, 2, 0, True)):
            module.kernel_size, module.stride, module.padding, module.ceil_mode = kernel, stride, padding, ceil_mode
            _assert_same(max_pool(plans, module, x), module(x))


def _input(shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    """Values of which many are equal, with NaN, infinities and denormals among them."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-4, 5, shape, generator=generator).to(dtype)
    tiny = torch.finfo(dtype).smallest_normal / 4
    for i, value in enumerate((float("nan"), float("inf"), float("-inf"), tiny, -tiny)):
        x[torch.randint(0, 40, shape, generator=generator) == i] = value
    return x.contiguous(memory_format=memory_format)


def _assert_same(ours: Any, expected: Tensor) -> None:
    assert type(ours) is Tensor, "the module itself ran"
    assert ours.stride() == expected.stride()
    assert ours.dtype == expected.dtype
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.smoke
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_as_the_module(isa: str, dtype: torch.dtype, memory_format: torch.memory_format, window: str) -> None:
    module = nn.MaxPool2d(**WINDOWS[window])
    ran = 0
    for shape in SHAPES:
        x = _input(shape, dtype, memory_format)
        try:
            expected = module(x)
        except RuntimeError:  # the map is smaller than the window
            assert _run(module, x) is None
            continue
        ran += 1
        _assert_same(_run(module, x), expected)
    assert ran >= 3


@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
def test_a_part_of_a_tensor(kernels: Any, memory_format: torch.memory_format) -> None:
    module = nn.MaxPool2d(3, 2, 1)
    whole = _input((4, 20, 17, 19), torch.float32, memory_format)
    for x in (whole[1:3], whole[:, :, 2:15], whole[..., 3:], whole[::2, :, ::2]):
        _assert_same(_run(module, x), module(x))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(kernels: Any, threads: int) -> None:
    module = nn.MaxPool2d(3, 2, 1)
    before = torch.get_num_threads()
    try:
        for memory_format in FORMATS:
            x = _input((2, 64, 56, 56), torch.float32, memory_format)
            torch.set_num_threads(threads)
            _assert_same(_run(module, x), module(x))
    finally:
        torch.set_num_threads(before)


# What our kernel is not for: the module does it, or raises.
OTHERS: dict[str, tuple[nn.MaxPool2d, Tensor]] = {
    "dilation": (nn.MaxPool2d(2, dilation=2), torch.randn(1, 3, 8, 8)),
    "indices": (nn.MaxPool2d(2, return_indices=True), torch.randn(1, 3, 8, 8)),
    "a window of 81": (nn.MaxPool2d(9), torch.randn(1, 3, 12, 12)),
    "too much padding": (nn.MaxPool2d(2, padding=2), torch.randn(1, 3, 8, 8)),
    "a list": (nn.MaxPool2d([2, 2]), torch.randn(1, 3, 8, 8)),  # type: ignore[arg-type]
    "a tuple of one": (nn.MaxPool2d((3,)), torch.randn(1, 3, 8, 8)),  # type: ignore[arg-type]
    "a stride of one": (nn.MaxPool2d(3, (2,)), torch.randn(1, 3, 8, 8)),  # type: ignore[arg-type]
    "a padding of one": (nn.MaxPool2d(3, 2, (1,)), torch.randn(1, 3, 8, 8)),  # type: ignore[arg-type]
    "no stride given": (nn.MaxPool2d(3, ()), torch.randn(1, 3, 8, 8)),  # type: ignore[arg-type]
    "a size that is a truth": (nn.MaxPool2d(True), torch.randn(1, 3, 8, 8)),
    "negatives": (nn.MaxPool2d(2), torch.complex(*torch.randn(2, 1, 3, 8, 8)).conj().imag),
    "zeros without memory": (nn.MaxPool2d(2), torch._efficientzerotensor((1, 3, 8, 8))),
    "a size of three": (nn.MaxPool2d((2, 2, 2)), torch.randn(1, 3, 8, 8)),  # type: ignore[arg-type]
    "a fraction": (nn.MaxPool2d(1.5), torch.randn(1, 3, 8, 8)),  # type: ignore[arg-type]
    "a text": (nn.MaxPool2d("2"), torch.randn(1, 3, 8, 8)),  # type: ignore[arg-type]
    "no stride": (nn.MaxPool2d(2, 0), torch.randn(1, 3, 8, 8)),
    "a small map": (nn.MaxPool2d(5), torch.randn(1, 3, 4, 4)),
    "three dimensions": (nn.MaxPool2d(2), torch.randn(3, 8, 8)),
    "no image": (nn.MaxPool2d(2), torch.randn(0, 3, 8, 8)),
    "integers": (nn.MaxPool2d(2), torch.arange(64).reshape(1, 1, 8, 8)),
    "other strides": (nn.MaxPool2d(2), torch.randn(8, 1, 8, 3).permute(1, 3, 2, 0)[..., ::2, ::2]),
    "a subclass": (nn.MaxPool2d(2), torch.randn(1, 3, 8, 8).as_subclass(type("Other", (Tensor,), {}))),
    "a gradient is wanted": (nn.MaxPool2d(2), torch.randn(1, 3, 8, 8, requires_grad=True)),
    "meta": (nn.MaxPool2d(2), torch.randn(1, 3, 8, 8, device="meta")),
    "sparse": (nn.MaxPool2d(2), torch.randn(1, 3, 8, 8).to_sparse()),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_left_to_the_module(kernels: Any, case: str) -> None:
    module, x = OTHERS[case]
    assert _run(module, x) is None


def test_small_maps_are_left_to_the_module(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    module, x = nn.MaxPool2d(2), torch.randn(2, 64, 16, 16)
    last = x.contiguous(memory_format=torch.channels_last)
    assert [_run(module, t) is None for t in (x, x[:1, :, :3], last, last[:1])] == [False, True, False, True]


def test_a_freed_storage(kernels: Any) -> None:
    x = torch.randn(1, 3, 8, 8)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError):
        _run(nn.MaxPool2d(2), x)


def _nodes(model: Any) -> list[type]:
    return [type(node) for node in model._fused_resnet.current.graph.nodes]


@pytest.mark.smoke
@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
def test_in_a_network(kernels: Any, memory_format: torch.memory_format, recwarn: pytest.WarningsRecorder) -> None:
    """A pooling is ours as long as nobody listens; what changes between calls is seen, there and back."""
    torch.manual_seed(0)
    original = models.resnet18(num_classes=5).eval()
    ours: Any = copy.deepcopy(original)
    fuse_(ours)
    x = torch.randn(1, 3, 64, 64).contiguous(memory_format=memory_format)
    heard: list[Tensor] = []

    def assert_same(pooling: type) -> None:
        for _ in range(3):
            with torch.no_grad():
                torch.testing.assert_close(ours(x), original(x), rtol=1e-4, atol=1e-4)
        assert _nodes(ours)[1] is pooling

    assert_same(MaxPool)
    hook = ours.maxpool.register_forward_hook(lambda module, args, output: heard.append(output))
    assert_same(Call)
    assert len(heard) == 3
    hook.remove()
    assert_same(MaxPool)
    assert len(heard) == 3
    for change in ({"kernel_size": 2}, {"padding": 0}, {"ceil_mode": True}, {"stride": (1, 2)}, {"dilation": 2}, {"dilation": 1}):
        for model in (ours, original):
            vars(model.maxpool).update(change)
        assert_same(MaxPool)
    for model in (ours, original):
        model.maxpool = nn.AvgPool2d(2)
    assert_same(Call)


@pytest.mark.parametrize("change", ["function", "property", "attribute"])
def test_a_pooling_that_computes_otherwise(kernels: Any, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pool(nn.MaxPool2d):
        pass

    original = DeepStem()
    original.pool = Pool(3, 2, 1)
    original.eval()
    ours: Any = copy.deepcopy(original)
    fuse_(ours)
    x = torch.randn(2, 3, 33, 33)
    with torch.no_grad():
        ours(x)
        if change == "function":
            plain = F.max_pool2d
            monkeypatch.setattr(F, "max_pool2d", lambda *args, **kwargs: plain(*args, **kwargs) * 2)
        elif change == "property":
            Pool.kernel_size = property(lambda self: 2)  # type: ignore[assignment]
        else:
            for model in (ours, original):
                del model.pool.ceil_mode
            Pool.ceil_mode = True
        for _ in range(2):
            torch.testing.assert_close(ours(x), original(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", ["hook", "forward", "global hook"])
def test_a_change_during_the_call_is_heard(kernels: Any, change: str) -> None:
    ours: Any = DeepStem().eval()
    fuse_(ours)
    heard: list[str] = []
    made: list[Any] = []

    def during(*args: Any) -> None:
        if change == "hook":
            made.append(ours.pool.register_forward_hook(lambda module, args, output: heard.append("pool")))
        elif change == "forward":
            ours.pool.forward = lambda x: (heard.append("pool"), type(ours.pool).forward(ours.pool, x))[1]
        else:
            note = lambda module, args, output: heard.append("pool") if module is ours.pool else None  # noqa: E731
            made.append(nn.modules.module.register_module_forward_hook(note))

    with torch.no_grad():
        ours(torch.randn(1, 3, 33, 33))
        ours.stem.register_forward_hook(during)
        try:
            ours(torch.randn(1, 3, 33, 33))
        finally:
            for handle in made:
                handle.remove()
    assert heard == ["pool"]


class Bytes(nn.Module):
    """Pixels of eight bits to values."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(x).float().div(255)


def test_a_network_that_takes_other_things_than_images(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it runs unfused, so it does not say so: its first child takes what it likes."""
    original = DeepStem().eval()
    original.stem = nn.Sequential(Bytes(), original.stem)
    ours: Any = copy.deepcopy(original)
    fuse_(ours)
    assert MaxPool in _nodes(ours)
    x = torch.randint(0, 256, (1, 3, 33, 33), dtype=torch.uint8)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (ours, copy.deepcopy(ours)):
            for y in (x, x.tolist(), x.half()):
                torch.testing.assert_close(model(y), original(y), rtol=1e-4, atol=1e-4)
        hook = ours.pool.register_forward_hook(lambda module, args, output: output * 2)
        assert not torch.allclose(ours(x), original(x))
        hook.remove()
        torch.testing.assert_close(ours(x), original(x), rtol=1e-4, atol=1e-4)
        monkeypatch.setattr(DeepStem, "forward", _not_followed)  # a block would say that it runs unfused
        torch.testing.assert_close(ours(x), original(x), rtol=1e-4, atol=1e-4)
        assert ours._fused_resnet.current.graph is None


def test_compiled_it_takes_other_things_too(kernels: Any) -> None:
    original = DeepStem().eval()
    original.stem = nn.Sequential(Bytes(), original.stem)
    ours: Any = copy.deepcopy(original)
    fuse_(ours)
    x = torch.randint(0, 256, (1, 3, 33, 33), dtype=torch.uint8)
    compiled = torch.compile(ours, backend="eager")
    with torch.no_grad():
        for y in (x, x.tolist()):
            torch.testing.assert_close(compiled(y), original(y), rtol=1e-4, atol=1e-4)


def test_a_stem_that_is_lost_says_so(kernels: Any) -> None:
    original = models.resnet18(num_classes=5).eval()
    ours: Any = copy.deepcopy(original)
    fuse_(ours)
    x = torch.randn(1, 3, 32, 32)
    for model in (ours, original):
        model.relu = nn.SiLU()
    with torch.no_grad():
        with pytest.warns(RuntimeWarning, match="runs unfused, .* does not begin with a convolution"):
            y = ours(x)
        torch.testing.assert_close(y, original(x), rtol=1e-4, atol=1e-4)
    assert _nodes(ours)[3] is MaxPool


def _not_followed(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = self.blocks(self.pool(self.stem(x))).mean((2, 3))
    return result


class DeepStem(nn.Module):
    """A network whose stem is more than one layer, as in "Bag of Tricks" (He et al. 2019): only its pooling and its blocks are ours."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 1, 1))
        self.bn, self.relu = nn.BatchNorm2d(16), nn.ReLU()
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.blocks = nn.Sequential(_plain.BasicBlock(16, 16), _plain.BasicBlock(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.blocks(self.pool(self.relu(self.bn(self.stem(x))))).mean((2, 3))
        return result


class NothingElse(DeepStem):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.blocks(self.relu(self.bn(self.stem(x)))).mean((2, 3))
        return result


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_network_without_a_stem_of_one_layer(kernels: Any, mode: str) -> None:
    original = DeepStem().train(mode == "train").double()
    ours: Any = copy.deepcopy(original)
    report = fuse_(ours)
    assert len(report.fused) == 2
    assert report.stems == ()
    assert report.pools == ("pool",)
    assert report.to_dict()["pools"] == ["pool"]
    assert "pool: max pooling by our kernel" in str(report)
    assert _nodes(ours) == [Call, Call, Call, MaxPool, Call, Call]
    x = torch.randn(2, 3, 33, 33, dtype=torch.float64)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(ours(x), original(x), rtol=1e-9, atol=1e-9)
        grads = [torch.autograd.grad(model(x).square().sum(), [*model.parameters()]) for model in (ours, original)]
        torch.testing.assert_close(*grads, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(ours.state_dict(), original.state_dict(), rtol=1e-9, atol=1e-9)
    unfuse_(ours)
    assert type(ours) is DeepStem


def test_a_network_of_which_nothing_is_ours_stays() -> None:
    model = NothingElse()
    assert len(fuse_(model).fused) == 2
    assert type(model) is NothingElse


def test_gradients_through_a_network(kernels: Any) -> None:
    """With gradients the module itself runs, and a call without them in between changes nothing."""
    torch.manual_seed(0)
    original = models.resnet18(num_classes=5).train().double()
    ours: Any = copy.deepcopy(original)
    fuse_(ours)
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    for _ in range(2):
        grads = []
        for model in (ours, original):
            model.zero_grad()
            model(x).square().sum().backward()
            grads.append([p.grad for p in model.parameters()])
            with torch.no_grad():
                model(x)
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


# Maps as convolutions make them, and as a user may: strides that are ambiguous, gaps, axes in another order.
LYING: dict[str, Any] = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "every other column": lambda t: torch.cat([t, t], 3)[..., ::2],
    "a part of the channels": lambda t: torch.cat([t, t], 1).contiguous(memory_format=torch.channels_last)[:, : t.shape[1]],
    "axes exchanged": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda t: t[:1].expand(t.shape),
}
MAPS = ((2, 3, 8, 9), (1, 1, 7, 7), (2, 5, 1, 1), (3, 1, 1, 6), (0, 3, 5, 5), (1, 8, 2, 3))


@pytest.mark.parametrize("layout", LYING)
@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_outputs_without_memory(shape: tuple[int, ...], layout: str) -> None:
    """Shapes and strides are PyTorch's, which refuses what we refuse: every kernel up to 4, stride up to 3, padding up to 3."""
    x = LYING[layout](torch.zeros(shape))
    like = torch.empty_strided(x.shape, x.stride(), device="meta")
    mean, expected = pooling.mean_of(like), F.adaptive_avg_pool2d(x, 1)
    assert (mean.shape, mean.stride()) == (expected.shape, expected.stride())
    refused = 0
    for kernel, stride, padding, ceil in itertools.product((1, 2, 3, 4), (1, 2, 3), (0, 1, 2, 3), (False, True)):
        ours = pooling.Window((kernel, kernel), (stride, stride), (padding, padding), ceil).output(like)
        try:
            y = F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil)
        except RuntimeError:
            refused += 1
            assert ours is None
            continue
        assert ours is not None, (kernel, stride, padding, ceil)
        assert (ours.shape, ours.stride(), ours.dtype) == (y.shape, y.stride(), y.dtype)
    assert refused > 20


FIRST_CALL = """
import sys, torch
import fused_resnet
import fused_resnet.nn as fnn
from fused_resnet import _plain
network = _plain.ResNet(_plain.BasicBlock, [1, 1, 1, 1], classes=10).eval()
fused_resnet.fuse_(network)
block = fnn.BasicBlock(16, 16).eval()
x, images = torch.randn(1, 16, 9, 9), torch.randn(1, 3, 64, 64)
before = set(sys.modules)
with torch.no_grad():
    network(images), network(images.contiguous(memory_format=torch.channels_last)), block(x)
    fused_resnet.conv_bias_add_relu(x, torch.randn(16, 16, 3, 3), padding=1)
with torch.no_grad():
    print(sorted(set(sys.modules) - before))
"""


def test_a_first_call_imports_nothing() -> None:
    """PyTorch's functions for tensors without memory would import its symbolic shapes: 800 modules, a second and 67 MiB."""
    done = run_python(FIRST_CALL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
