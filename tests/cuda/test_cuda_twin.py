"""The way of a CUDA tensor, without a GPU: operator, plan, choice of a tile, weights as the tensor cores read them, passes, blocks.

What is trusted: the module's twin (``_cuda_twin``), whose general kernels are the device functions themselves, and whose tensor-core
kernels are stand-ins that refuse what the real ones cannot read. ``test_cuda_host.py`` looks at the device functions,
``test_cuda.py`` at a GPU.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import _cuda_twin
import pytest
import torch
import torch.nn.functional as F
from _blocks import SPELLINGS, assert_same, randomise
from _calls import CONV, DTYPES, FORMATS, laid_out, name
from torch import Tensor

import fused_resnet
from fused_resnet import _compat, _extension, _settings, cases, reference, testing
from fused_resnet.benchmark import gpu_kernels
from fused_resnet.cases import AWKWARD, BLOCKS, BlockCase, ConvCase, Operands
from fused_resnet.ops import cuda, derived, plans, select
from fused_resnet.ops.backend import Backend

BF16 = "sm90 bfloat16 image 128x128"
# What the stand-ins can compute: channels in multiples of 8.
WIDE = (
    ConvCase(16, 24, (9, 7), (3, 3), padding=(1, 1), shortcut=True, batch=2),
    ConvCase(16, 24, (9, 7), (3, 3), (2, 2), (1, 1), shortcut=True, batch=3),
    ConvCase(24, 16, (6, 5), (1, 1), shortcut=True, batch=2),
    ConvCase(24, 16, (6, 5), (1, 1), (2, 2), batch=2),
    ConvCase(8, 8, (11, 9), (5, 5), padding="same", dilation=(2, 1), shortcut=True),
    ConvCase(8, 8, (6, 7), (4, 2), padding="same", shortcut=True),
    ConvCase(8, 8, (5, 5), (3, 3), padding=(1, 1), shortcut=True, bias=False, relu=False),
)


@pytest.fixture(autouse=True)
def twin() -> Iterator[ModuleType]:
    module = _cuda_twin.build()
    with plans.backends.using(cpu=cuda.CudaBackend(module)):
        yield module


def _kernel(operands: Operands, case: ConvCase) -> str:
    """What computes a call: a kernel's name, or "library"."""
    plans.convolution_plans.kept.clear()
    fused_resnet.conv_bias_add_relu(*operands, **case.parameters)
    (plan,) = plans.convolution_plans.kept.values()
    return "library" if plan.kernel is None else str(plan.kernel.algorithm)


@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_awkward_convolutions(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Every case: through whatever is chosen, and through the general kernel, groups included."""
    failures = []
    for case in AWKWARD:
        operands = laid_out(testing.integer_operands(case, dtype, torch.Generator().manual_seed(0)), memory_format)
        for algorithm in ("auto", "general"):
            _settings.change(cuda_algorithm=algorithm)
            result = testing.compare_forward(fused_resnet.conv_bias_add_relu, operands, True, **case.parameters)
            if not result:
                failures.append(f"{case.name} ({algorithm}): {result.reason}")
    assert not failures, "\n".join(failures)


STEMS = tuple(
    ConvCase(channels, 16, (17, 15), (kernel, kernel), (stride, stride), (kernel // 2, kernel // 2), batch=2)
    for channels, kernel, stride in ((3, 7, 2), (3, 3, 1), (4, 7, 2), (2, 1, 1))
)


@pytest.mark.parametrize("case", STEMS, ids=name)
def test_stems(case: ConvCase) -> None:
    """One to three channels are padded to the four that the stem's kernel reads; the weight's padding follows the weight."""
    operands = laid_out(testing.integer_operands(case, torch.bfloat16, torch.Generator().manual_seed(4)), torch.channels_last)
    assert _kernel(operands, case) == "any bfloat16 few 128x64"
    for _ in range(2):
        result = testing.compare_forward(fused_resnet.conv_bias_add_relu, operands, True, **case.parameters)
        assert result, result.reason
        operands.weight.neg_()
    first = laid_out(operands, torch.contiguous_format)
    assert testing.compare_forward(fused_resnet.conv_bias_add_relu, first, True, **case.parameters)


@pytest.mark.parametrize("case", WIDE, ids=name)
def test_tensor_core_kernels_get_what_they_read(case: ConvCase) -> None:
    """Weights of any layout, biases and shortcuts that do not begin at 16 bytes: the same result, or the general kernel."""
    generator = torch.Generator().manual_seed(1)
    operands = laid_out(testing.integer_operands(case, torch.bfloat16, generator), torch.channels_last)
    expected = reference.conv_bias_add_relu(*operands, **case.parameters)
    assert _kernel(operands, case).startswith("sm90 bfloat16")
    for layout in ("contiguous", "channels_last", "sliced"):
        chosen = testing.layout(operands, weight=layout)
        result = testing.compare_exact(fused_resnet.conv_bias_add_relu(*chosen, **case.parameters), expected)
        assert result, f"weight {layout}: {result.reason}"
    for field in ("input", "bias", "shortcut"):
        t = getattr(operands, field)
        if t is None:
            continue
        buffer = torch.empty(t.numel() + 1, dtype=t.dtype)
        skewed = buffer[1:].as_strided(t.shape, t.stride(), 1).copy_(t)
        assert skewed.data_ptr() % 16
        chosen = operands._replace(**{field: skewed})
        result = testing.compare_exact(fused_resnet.conv_bias_add_relu(*chosen, **case.parameters), expected)
        assert result, f"{field} at an odd address: {result.reason}"


def test_what_is_chosen() -> None:
    """Tensor cores where they can, the general kernel where a call is small, the library where it is large."""
    torch.manual_seed(0)
    case = ConvCase(64, 64, (28, 28), (3, 3), padding=(1, 1), shortcut=True)
    small = ConvCase(8, 8, (9, 9), (3, 3), padding=(1, 1), shortcut=True)
    odd = ConvCase(63, 65, (28, 28), (3, 3), padding=(1, 1), shortcut=True)
    make = testing.integer_operands
    last, first, general = torch.channels_last, torch.contiguous_format, "general "
    rows: list[tuple[ConvCase, torch.dtype, torch.memory_format, str, str]] = [
        (case, torch.bfloat16, last, "sm90 bfloat16 image", ""),
        (case, torch.bfloat16, first, "sm90 bfloat16 image", ""),
        (small, torch.bfloat16, first, general, ""),
        (odd, torch.bfloat16, last, "library", "multiples of 8"),
        (ConvCase(1, 64, (112, 112), (7, 7), padding=(3, 3)), torch.bfloat16, last, "any bfloat16 few", ""),
        (case, torch.float32, last, "library" if not _compat.tf32() else "sm90 float32", "" if _compat.tf32() else "without TF32"),
        (case, torch.float64, last, general, ""),
    ]
    for chosen, dtype, memory_format, kernel, why in rows:
        operands = laid_out(make(chosen, dtype, torch.Generator().manual_seed(0)), memory_format)
        assert _kernel(operands, chosen).startswith(kernel), (chosen.name, dtype, memory_format)
        sentences = fused_resnet.why_not(*operands, **chosen.parameters)
        assert (kernel == "library") == bool(sentences)
        assert why in " ".join(sentences)


@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("shortcut", [False, True])
def test_the_library_on_a_gpu_computes_in_16_bits(shortcut: bool, memory_format: torch.memory_format) -> None:
    """What the tensor cores refuse and is large: the library's convolution in its own dtype, rounded there, and then our pass."""
    small = ConvCase(16, 16, (9, 7), (3, 3), padding=(1, 1), groups=4, shortcut=shortcut)
    operands = laid_out(testing.float_operands(small, torch.bfloat16, torch.Generator().manual_seed(6)), memory_format)
    assert _kernel(operands, small) == "library"
    result = testing.compare_forward(fused_resnet.conv_bias_add_relu, operands, False, **small.parameters)
    assert result, result.reason  # a small one is rounded once
    case = ConvCase(63, 65, (28, 28), (3, 3), padding=(1, 1), shortcut=shortcut)
    operands = laid_out(testing.float_operands(case, torch.bfloat16, torch.Generator().manual_seed(6)), memory_format)
    assert _kernel(operands, case) == "library"
    wide = F.conv2d(operands.input, operands.weight, padding=1).float() + operands.bias.float()[:, None, None]
    if operands.shortcut is not None:
        wide = wide + operands.shortcut.float()
    assert torch.equal(fused_resnet.conv_bias_add_relu(*operands, **case.parameters), torch.relu(wide).bfloat16())
    with plans.backends.using(cpu=Backend()):  # of other devices: rounded once
        result = testing.compare_forward(fused_resnet.conv_bias_add_relu, operands, False, **case.parameters)
    assert result, result.reason


@pytest.mark.parametrize("stem", [False, True])
def test_contiguous_tensors_are_turned(stem: bool) -> None:
    """Large contiguous convolutions take the tensor cores too: input and shortcut are turned, and the output back."""
    case = ConvCase(3 if stem else 40, 64, (60, 52) if stem else (30, 26), (7, 7), padding=(3, 3), shortcut=True, batch=2)
    given = testing.integer_operands(case, torch.bfloat16, torch.Generator().manual_seed(5))
    kernel = "any bfloat16 few" if stem else "sm90 bfloat16 image"
    for changes in ({}, {"input": "channels_last"}, {"shortcut": "channels_last"}, {"shortcut": "expanded"}, {"input": "sliced"}):
        operands = testing.layout(given, **changes)
        assert _kernel(operands, case).startswith(kernel)
        result = testing.compare_forward(fused_resnet.conv_bias_add_relu, operands, True, **case.parameters)
        assert result, f"{changes}: {result.reason}"


def test_tf32_is_the_users_choice() -> None:
    case = ConvCase(64, 64, (28, 28), (3, 3), padding=(1, 1), shortcut=True)
    operands = laid_out(testing.integer_operands(case, torch.float32, torch.Generator().manual_seed(0)), torch.channels_last)
    before = torch.backends.cudnn.allow_tf32
    try:
        for allowed, kernel in ((True, "sm90 float32 image 128x64"), (False, "library")):
            torch.backends.cudnn.allow_tf32 = allowed
            assert _compat.tf32() == allowed
            fused_resnet.conv_bias_add_relu(*operands, **case.parameters)  # a plan of the other setting must not serve
            assert _kernel(operands, case) == kernel
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_a_packed_weight_follows_its_parameter() -> None:
    """[K, R, S, C] copies are kept until the weight changes; a weight that lies so is read where it is."""
    case = WIDE[0]
    operands = laid_out(testing.integer_operands(case, torch.bfloat16, torch.Generator().manual_seed(2)), torch.channels_last)
    weight = operands.weight.contiguous()
    assert cuda.krsc(operands.weight) is operands.weight
    packed = cuda.krsc(weight)
    assert packed is cuda.krsc(weight)
    weight.neg_()
    again = cuda.krsc(weight)
    assert again is not packed
    assert torch.equal(again, weight)
    assert again.is_contiguous(memory_format=torch.channels_last)
    chosen = operands._replace(weight=weight)
    expected = reference.conv_bias_add_relu(*chosen, **case.parameters)
    assert torch.equal(fused_resnet.conv_bias_add_relu(*chosen, **case.parameters), expected)


def test_an_unknown_algorithm_is_refused() -> None:
    operands = laid_out(testing.integer_operands(WIDE[0], torch.float32, torch.Generator().manual_seed(2)), torch.channels_last)
    for wrong, message in (("sm90 bfloat16 image 7x7", "name of a tile"), (BF16, "not for this dtype")):
        _settings.change(cuda_algorithm=wrong)
        with pytest.raises(ValueError, match=message):
            fused_resnet.conv_bias_add_relu(*operands, **WIDE[0].parameters)


@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_passes(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """bias_add_relu and relu_backward, and the gradient of a convolution through the latter."""
    generator = torch.Generator().manual_seed(3)
    for shape in ((2, 1, 3, 3), (3, 8, 5, 7), (1, 17, 1, 1), (2, 64, 9, 8), (0, 4, 3, 3)):
        x, s, b = (torch.randint(-2, 3, n, generator=generator).to(dtype) for n in (shape, shape, shape[1:2]))
        x, s = (t.contiguous(memory_format=memory_format) for t in (x, s))
        ours = fused_resnet.bias_add_relu(x, b, s)
        assert testing.compare_exact(ours, reference.bias_add_relu(x, b, s))
        grad = torch.randint(-2, 3, shape, generator=generator).to(dtype)
        masked, sums = torch.ops.fused_resnet.relu_backward(grad, ours, True)
        expected = torch.where(ours <= 0, torch.zeros_like(grad), grad)
        assert testing.compare_exact(masked, expected)
        assert testing.compare_exact(sums, expected.sum((0, 2, 3)))


@pytest.mark.parametrize("case", testing.gradient_cases(quick=True)[::4], ids=lambda case: case.name)
def test_gradients(case: testing.GradientCase) -> None:
    assert not case.compare(0)
    function, leaves = case.build(0)
    # Along random directions only: every call runs a kernel thread by thread.
    torch.autograd.gradcheck(function, leaves, fast_mode=True)
    torch.autograd.gradgradcheck(function, leaves, gen_non_contig_grad_outputs=True, fast_mode=True)


@pytest.mark.smoke
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_converted_blocks(spelling: str) -> None:
    torch.manual_seed(0)
    original = randomise(SPELLINGS[spelling]()).eval()
    converted = copy.deepcopy(original)
    report = fused_resnet.fuse_(converted)
    assert report.fused
    x = torch.randn(2, 8, 8, 8)
    with torch.no_grad():
        assert_same(converted, original, x)
        assert_same(converted, original, x.contiguous(memory_format=torch.channels_last))
    converted.train()
    original.train()
    assert_same(converted, copy.deepcopy(original), x)


PROJECTED = [b for b in BLOCKS if b.network == "resnet50" and b.size[0] <= 14]


@pytest.mark.parametrize("block", PROJECTED, ids=name)
@pytest.mark.parametrize("without_cpu", [False, True], ids=["", "without the CPU module"])
def test_blocks_of_bfloat16_run_on_tensor_cores(
    block: BlockCase, twin: ModuleType, without_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every convolution is a tensor-core kernel's; a projection is a part of the last one, whether there is a CPU module or not."""
    if without_cpu:
        for holder in [m for key, m in sys.modules.items() if key.startswith("fused_resnet.") and getattr(m, "cpu", None) is _extension.cpu]:
            monkeypatch.setattr(holder, "cpu", None)
    made: list[str] = []

    class Recorder:
        def __getattr__(self, name: str) -> object:
            return getattr(twin, name)

        def Convolution(self, *arguments: object, **more: object) -> object:
            kernel = twin.Convolution(*arguments, **more)
            made.append(kernel.algorithm)
            return kernel

    module = block.eager().to(torch.bfloat16).to(memory_format=torch.channels_last)
    fused = copy.deepcopy(module)
    assert fused_resnet.fuse_(fused).fused
    x = block.make(1, torch.bfloat16, torch.channels_last, torch.Generator().manual_seed(0))[:, :, :4, :4]
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        truth = copy.deepcopy(module).double()(x.double())
        with plans.backends.using(cpu=cuda.CudaBackend(Recorder())):  # type: ignore[arg-type]
            ours = fused(x)
        with plans.backends.using(cpu=Backend()):
            eager = module(x)
    # Fewer roundings than eager's, of which those of folding are new.
    error, peer = testing.norm_error(ours, truth), testing.norm_error(eager, truth)
    assert error <= 2 * peer, (error, peer)
    chosen = [kernel for kernel in made if kernel.startswith("sm90")]
    assert ("sm90 bfloat16 joined 128x128" in chosen) == (block.shortcut == "projection")
    assert len(chosen) == 3, made  # two or three layers and a projection are three kernels


def test_a_projection_that_cannot_be_joined_is_a_layer_of_its_own() -> None:
    """Another kernel size, groups, a dtype without tensor cores: the same result as the block's own code."""
    torch.manual_seed(0)
    for changes in ({"kernel_size": 3, "padding": 1}, {"groups": 2}, {"padding": 1, "kernel_size": 3}, {}):
        block = cases.BlockCase("basic", 16, 24, (8, 8), 2, "projection").eager()
        arguments = {"kernel_size": 1, **changes}
        block.downsample[0] = torch.nn.Conv2d(16, 24, stride=2, bias=True, **arguments)  # type: ignore[index]
        original = randomise(block).eval()
        converted = copy.deepcopy(original)
        assert fused_resnet.fuse_(converted).fused
        with torch.no_grad():
            assert_same(converted, original, torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last))


def test_compile_and_autocast() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    w, b = torch.randn(16, 16, 3, 3), torch.randn(16)

    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return fused_resnet.conv_bias_add_relu(x, w, b, x, padding=1)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, w, b), function(x, w, b))
    with torch.autocast("cpu", torch.bfloat16):
        ours = function(x, w, b)
        eager = F.relu(F.conv2d(x, w, b, padding=1) + x)
    assert ours.dtype == eager.dtype
    torch.library.opcheck(CONV, (x, w, b, None, [1, 1], [1, 1, 1, 1], [1, 1], 1, True))


def test_large_batches_are_cut_into_launches(twin: ModuleType) -> None:
    """The tensor-core kernels count in 32 bits: no launch gets more than 2^31 bytes of a tensor."""
    c, size = 64, 112
    strides = (c * size * size, 1, c * size, c)
    image = 2 * c * size * size

    def launches(n: int) -> int:
        shape, weight = (n, c, size, size), (c, c, 3, 3)
        plan = twin.Convolution(
            "bfloat16", shape, weight, shape, (1, 1), (1, 1), (1, 1), 1, strides, (c * 9, 9, 3, 1), strides, strides, True, True, 0, False
        )
        assert plan.tensor_cores
        return int(plan.launches)

    most = (2**31 - 1) // image
    assert [launches(n) for n in (0, 1, most, most + 1, 2 * most + 1)] == [0, 1, 1, 2, 3]
    c, size = 4, 224  # a stem: 16 times an element's offset stays below 2^31
    most = 2**27 // (c * size * size)
    strides = (c * size * size, 1, c * size, c)

    def stem(n: int) -> tuple[str, int]:
        shape, weight, output = (n, c, size, size), (64, c, 7, 7), (n, 64, 112, 112)
        out = (64 * 112 * 112, 1, 64 * 112, 64)
        plan = twin.Convolution(
            "bfloat16", shape, weight, output, (2, 2), (3, 3), (1, 1), 1, strides, (c * 49, 49, 7, 1), out, None, True, True, 0, False
        )
        return plan.algorithm, int(plan.launches)

    assert [stem(n) for n in (most, most + 1)] == [("any bfloat16 few 128x64", 1), ("any bfloat16 few 128x64", 2)]


def test_a_gpu_that_is_too_old_is_told() -> None:
    assert select.too_old((9, 0), ["80", "90a"], "") == select.too_old((8, 0), ["80"], "") == select.too_old((10, 0), ["90a"], "") == ""
    sentence = select.too_old((8, 6), ["90a"], "NVIDIA A10")
    assert sentence == "the CUDA kernels of this build are for compute capability 9.0 and later, NVIDIA A10 has 8.6"
    assert "8.0 and later, Tesla T4 has 7.5" in select.too_old((7, 5), ["80", "90a"], "Tesla T4")


@pytest.mark.parametrize("tile", _cuda_twin.TILES)
def test_features_of_each_kernel(tile: str) -> None:
    """What is asked of every kernel on a GPU (gpu_kernels), of the stand-ins: they refuse strides that a descriptor would."""
    generator = torch.Generator().manual_seed(0)
    for feature in gpu_kernels.features(tile):
        if feature.name != gpu_kernels.MANY:  # seconds, where threads run one by one
            trial = gpu_kernels.Trial(tile, feature, torch.device("cpu"), generator)
            assert trial.wrong() == {}, feature.name


@pytest.mark.parametrize("tile", _cuda_twin.TILES)
def test_calls_in_a_row(tile: str, twin: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain of calls whose last value is known; Hopper's plans are told that they may start early, where it is set."""
    told: list[bool] = []

    class Recorder:
        def __getattr__(self, name: str) -> object:
            return getattr(twin, name)

        def Convolution(self, *arguments: object, **more: object) -> object:
            kernel = twin.Convolution(*arguments, **more)
            told.append(kernel.dependent)
            return kernel

    def wrong() -> dict[str, Any] | None:
        return gpu_kernels.wrong_in_a_row(tile, torch.device("cpu"), torch.Generator().manual_seed(0), calls=3, size=5, batch=1)

    with plans.backends.using(cpu=cuda.CudaBackend(Recorder())):  # type: ignore[arg-type]
        form = gpu_kernels.form_of(tile)
        assert wrong() == (None if form == "few" else {})
        plans_of = {"matrix": 2, "image": 2, "joined": 1, "few": 0}[form]
        assert told[::2] == [True] * plans_of
        assert told[1::2] == [False] * (plans_of if form != "joined" else 0)  # the general kernel, which has no such wait
        for feature in gpu_kernels.features(tile)[:1]:
            told.clear()
            assert gpu_kernels.Trial(tile, feature, torch.device("cpu"), torch.Generator().manual_seed(0)).wrong() == {}
            assert told
            assert not any(told)  # it is off
    if plans_of:
        monkeypatch.setattr(torch, "randperm", lambda n, generator: torch.arange(n).roll(1))
        kind: Any = cuda.JoinedPlan if form == "joined" else cuda.CudaPlan
        right = kind.__call__
        monkeypatch.setattr(kind, "__call__", lambda plan, x, *rest: right(plan, x.roll(1, 1), *rest))
        found = wrong()
        assert found is not None
        assert found["of"] == 64 * 25


def test_which_device_runs_a_kernel() -> None:
    """As the choice has it: Hopper's on Hopper, Ampere's on everything else from Ampere on, a stem's on all."""
    assert [gpu_kernels.suits(BF16, device) for device in ((9, 0), (8, 0), (10, 0))] == [True, False, False]
    assert [gpu_kernels.suits("sm80 float16 image 64x64", device) for device in ((9, 0), (8, 9), (10, 0))] == [False, True, True]
    assert all(gpu_kernels.suits("any bfloat16 few 128x64", device) for device in ((9, 0), (8, 0), (12, 0)))
    assert gpu_kernels.form_of(BF16) == "image"
    assert gpu_kernels.dtype_of("sm80 float16 image 64x64") == torch.float16


def test_a_wrong_kernel_is_described() -> None:
    """Where and how an output differs from what it has to be; NaN, and what changes from call to call, too."""
    feature = gpu_kernels.features(BF16)[1]
    trial = gpu_kernels.Trial(BF16, feature, torch.device("cpu"), torch.Generator().manual_seed(0))
    right = trial.call

    def planted(place: tuple[int, ...], value: float) -> Callable[[], Tensor]:
        def call() -> Tensor:
            y = right()
            y[place] = value
            return y

        return call

    trial.call = planted((1, 5), 7.0)
    found = trial.wrong()
    assert (found["images"], found["channels"], found["nan"], found["got"]) == ([1], [5], 0, "7.0")
    trial.call = planted((0, 63, 7, 2), float("nan"))
    found = trial.wrong()
    assert {key: found[key] for key in ("elements", "of", "nan", "got")} == {"elements": 1, "of": 2 * 64 * 64, "nan": 1, "got": "nan"}
    assert found["first"] == found["last"] == [0, 63, 7, 2]
    assert (found["rows"], found["columns"]) == ([7], [2])
    numbers = iter(range(1, 9))
    trial.call = lambda: right() if next(numbers) == 1 else right().neg_()
    assert trial.wrong() == {"differs between calls": True}


def test_a_device_that_cannot_be_used_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device is asked for its capability, then to load the kernels, once. What either says is the reason for the general path."""
    asked: list[str] = []

    def refuse(what: str, answer: str = "") -> Callable[[int], tuple[int, int]]:
        def ask(index: int) -> tuple[int, int]:
            asked.append(what)
            if answer:
                raise RuntimeError(answer)
            return 9, 0

        return ask

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    for module, wanted, order in (
        ({"capability": refuse("capability", "the driver is old"), "load": refuse("load")}, "the driver is old", ["capability"]),
        ({"capability": refuse("capability"), "load": refuse("load", "no kernel image")}, "no kernel image", ["capability", "load"]),
        ({"capability": refuse("capability"), "load": refuse("load")}, "", ["capability", "load"]),
    ):
        asked.clear()
        cuda._devices.clear()
        monkeypatch.setattr(_extension, "cuda", lambda module=module: SimpleNamespace(BUILD={"architectures": "90a"}, **module))
        for _ in range(2):
            sentence = cuda.CudaBackend().why_no_kernels(torch.device("cuda", 0))
            assert sentence == (f"our CUDA module cannot use the device: {wanted}" if wanted else "")
        assert asked == (order * 2 if wanted else order)  # what may pass, as a lack of memory, is asked again
    cuda._devices.clear()


def test_derived_values_are_dropped_by_clear() -> None:
    weight = torch.randn(8, 8, 3, 3)
    packed = cuda.krsc(weight)
    derived.clear()
    assert cuda.krsc(weight) is not packed


def test_types_are_the_modules_own(twin: ModuleType) -> None:
    """Where there is a GPU, one process of the tests has the module and its twin."""
    types = [found for found in vars(twin).values() if isinstance(found, type)]
    assert types
    for found in types:
        assert any([attribute.startswith("__pybind11_module_local") for attribute in dir(found)]), found
