"""On a GPU: everything that is promised of the operators and conversions, with operands moved there and results brought back.

What is trusted: the reference on the CPU; integers on which every correct convolution gives the same bits; float64.

Skipped where there is no GPU or no compiled CUDA module. FUSED_RESNET_TEST_DEVICE=cpu runs what makes sense on the CPU: that is how
these tests are tested.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _blocks import SPELLINGS, assert_same, randomise
from _calls import CONV, FORMATS, MASK, PASS, laid_out, name
from torch import Tensor, nn

import fused_resnet
from fused_resnet import _extension, _plain, _settings, cases, reference, testing
from fused_resnet.benchmark import gpu_contest
from fused_resnet.cases import AWKWARD, CONVS, ConvCase, Operands
from fused_resnet.cli import check
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
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(bool(MISSING), reason=MISSING or "-")]
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


# ---------------------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("table", [AWKWARD, tuple(case.at(2) for case in CONVS)], ids=["awkward", "resnet"])
def test_exact_integers(table: tuple[ConvCase, ...], dtype: torch.dtype, form: torch.memory_format, poisoned: None) -> None:
    with testing.library(cudnn=False):
        failures = failures_of(table, lambda case: integers(case, dtype, form), exact=True)
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("form", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("table", [AWKWARD, TILE_CASES], ids=["awkward", "tiles"])
def test_envelope(table: tuple[ConvCase, ...], dtype: torch.dtype, form: torch.memory_format, poisoned: None) -> None:
    def make(case: ConvCase) -> Operands:
        return laid_out(testing.float_operands(case, dtype, generator(5)), form)

    failures = failures_of(table, make, exact=False, cutting=DEVICE.type == "cuda" and dtype in LOW)
    assert not failures, "\n".join(failures)


@gpu
@pytest.mark.parametrize("case", TILE_CASES, ids=name)
def test_tf32(case: ConvCase) -> None:
    """Allowed: integers are exact all the same, floats within what 10 bits lose. Not allowed: the envelope (above)."""
    for exact in (True, False):
        result = check.tf32(case, exact, 0, DEVICE)
        assert not result.reason, result.reason


def is_matrix(case: ConvCase) -> bool:
    return case.kernel == (1, 1) and case.stride == (1, 1) and case.padding == (0, 0)


def with_tile(tile: str, table: tuple[ConvCase, ...]) -> list[str]:
    """A line for each case of those that the tile is for on which it differs from the reference."""
    architecture, dtype_name, form, _ = tile.split()
    if architecture != ("sm90" if torch.cuda.get_device_capability(DEVICE)[0] == 9 else "sm80"):
        pytest.skip(f"{tile} is not for this device")
    dtype = getattr(torch, dtype_name)
    failures, count = [], 0
    with testing.library(tf32=True):
        for case in table:
            if form == "matrix" and not is_matrix(case):
                continue
            operands = integers(case, dtype)
            device_operands = there(operands)
            plan = gpu_contest.planned(case, device_operands, tile)
            assert plan.kernel.tensor_cores
            assert plan.kernel.algorithm == tile
            result = testing.compare_exact(plan(*device_operands).cpu(), reference.conv_bias_add_relu(*operands, **case.parameters))
            count += 1
            if not result:
                failures.append(f"{case.name}: {result.reason}")
    assert count > 1
    return failures


@gpu
@pytest.mark.parametrize("tile", TILES or ["none"])
def test_each_tile(tile: str, poisoned: None) -> None:
    assert TILES, "this build has no tiles"
    failures = with_tile(tile, TILE_CASES)
    assert not failures, "\n".join(failures)


@gpu
@pytest.mark.sanitized
@pytest.mark.parametrize("tile", TILES or ["none"])
def test_each_tile_on_little(tile: str) -> None:
    failures = with_tile(tile, (TILE_CASES[0], TILE_CASES[2]) if " matrix " in tile else (TILE_CASES[7], TILE_CASES[13]))
    assert not failures, "\n".join(failures)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_general_kernel_on_little(dtype: torch.dtype) -> None:
    """Without tensor cores: tails, strides, groups, an expanded shortcut."""
    if DEVICE.type == "cuda":
        _settings.change(cuda_algorithm="general")
    little = [case for case in AWKWARD if case.batch][::12]
    for form in FORMATS:
        failures = failures_of(little, lambda case, form=form: integers(case, dtype, form), exact=True)  # type: ignore[misc]
        assert not failures, "\n".join(failures)
    operands = testing.layout(integers(AWKWARD[0], dtype), shortcut="expanded", input="sliced")
    result = testing.compare_forward(ours, operands, True, **AWKWARD[0].parameters)
    assert result, result.reason


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("operand", Operands._fields)
def test_layouts(operand: str, dtype: torch.dtype, poisoned: None) -> None:
    """Each operand on its own in every layout; on the tensor cores' shapes too."""
    failures = []
    with testing.library(cudnn=False):
        for case in (TILE_CASES[0], TILE_CASES[6], AWKWARD[0], check._SHAPES[-1]):
            for layout in testing.LAYOUTS:
                operands = testing.layout(integers(case, dtype), **{operand: layout})
                result = testing.compare_forward(ours, operands, True, **case.parameters)
                if not result:
                    failures.append(f"{case.name}, {operand} {layout}: {result.reason}")
    assert not failures, "\n".join(failures)


def misaligned(t: Tensor) -> Tensor:
    """channels_last without gaps, one element into its buffer: not aligned to 16 bytes."""
    buffer = t.new_full((t.numel() + 1,), float("nan"))
    if t.dim() == 1:
        return buffer[1:].copy_(t)
    n, c, h, w = t.shape
    return buffer[1:].view(n, h, w, c).permute(0, 3, 1, 2).copy_(t)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_misaligned_views(dtype: torch.dtype) -> None:
    case = TILE_CASES[0]
    operands = integers(case, dtype)
    for field in Operands._fields:
        changed = operands._replace(**{field: misaligned(getattr(operands, field))})
        result = testing.compare_forward(ours, changed, True, **case.parameters)
        assert result, f"{field}: {result.reason}"


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_shared_memory(dtype: torch.dtype) -> None:
    """The shortcut is the input itself, or a view of it."""
    case = ConvCase(64, 64, (9, 10), (3, 3), padding=(1, 1), shortcut=True, batch=2)
    operands = integers(case, dtype)
    wide = torch.cat((operands.input, operands.input[:, :8]), 1).contiguous(memory_format=torch.channels_last)
    for changed in (
        operands._replace(shortcut=operands.input),
        operands._replace(input=wide[:, :-8], shortcut=wide[:, 8:]),
    ):
        with testing.library(cudnn=False):
            result = testing.compare_forward(ours, changed, True, **case.parameters)
        assert result, result.reason


@pytest.mark.sanitized
@pytest.mark.parametrize("form", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_passes(dtype: torch.dtype, form: torch.memory_format) -> None:
    """bias_add_relu and relu_backward, bit for bit: integers; sizes around a vector's, incoming gradients in other layouts."""
    one_pass = testing.on(DEVICE, fused_resnet.bias_add_relu)
    for shape in ((2, 1, 3, 3), (3, 8, 5, 7), (1, 17, 1, 1), (2, 33, 9, 8), (65, 5, 3, 2), (2, 64, 20, 20)):
        m = testing.MAGNITUDE[dtype]
        x, s = (torch.randint(-m, m + 1, shape, generator=generator(i)).to(dtype).contiguous(memory_format=form) for i in (1, 2))
        b = torch.randint(-m, m + 1, shape[1:2], generator=generator(3)).to(dtype)
        for bias, shortcut, relu in ((b, s, True), (b, None, True), (None, s, False), (b, s[:, :, :1, :1].expand(shape), True)):
            result = testing.compare_exact(one_pass(x, bias, shortcut, relu), reference.bias_add_relu(x, bias, shortcut, relu))
            assert result, f"{shape}: {result.reason}"
        grad = testing.unit_gradient(shape, dtype, generator(4))
        expected = torch.where(s <= 0, torch.zeros_like(grad), grad)
        for incoming in (grad, grad.contiguous(memory_format=torch.channels_last), grad.mT.contiguous().mT):
            moved = testing.moved(DEVICE, incoming, s)
            for bias_grad in (True, False):
                masked, sums = MASK(*moved, bias_grad)
                assert masked.is_contiguous(memory_format=form)
                assert testing.compare_exact(masked.cpu(), expected), shape
                if bias_grad:
                    assert testing.compare_exact(sums.cpu(), expected.sum((0, 2, 3))), shape


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("operand", ["input", "bias", "shortcut"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_special_values(dtype: torch.dtype, operand: str, value: float) -> None:
    """NaN and infinities are where the reference has them; ReLU keeps a NaN."""
    for case in (TILE_CASES[0], TILE_CASES[6], AWKWARD[0]):
        operands = laid_out(testing.float_operands(case, dtype, generator(7)), torch.channels_last)
        t = getattr(operands, operand)
        t[(3,) if t.dim() == 1 else (0, 3, 1, 2)] = value
        with testing.library(cudnn=False):  # cuDNN's Winograd makes infinity - infinity
            result = testing.compare_forward(ours, operands, False, DEVICE.type == "cuda", **case.parameters)
        assert result, f"{case.name}: {result.reason}"


def test_empty_batch() -> None:
    operands = there(integers(TILE_CASES[6].at(0), torch.float32))
    leaves = [t.requires_grad_() for t in operands]
    output = fused_resnet.conv_bias_add_relu(*leaves, padding=1)
    assert output.shape == (0, 72, 14, 15)
    gradients = torch.autograd.grad(output.sum(), leaves)
    assert [g.shape for g in gradients] == [t.shape for t in leaves]
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_the_same_bits_each_time(dtype: torch.dtype) -> None:
    """Forward, mask and bias gradient over repeats, with other work between."""
    for case in (TILE_CASES[6], TILE_CASES[1], ConvCase(64, 64, (28, 28), (3, 3), padding=(1, 1), shortcut=True, batch=16)):
        operands = there(laid_out(testing.float_operands(case, dtype, generator(1)), torch.channels_last))
        first: tuple[Tensor, ...] = ()
        for repeat in range(5):
            output = fused_resnet.conv_bias_add_relu(*operands, **case.parameters)
            masked, sums = MASK(output.sin(), output, True)
            if repeat == 0:
                first = output, masked, sums
            assert all(map(torch.equal, (output, masked, sums), first)), case.name
            torch.randn(1 << 16, device=DEVICE).sum()


# ---------------------------------------------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", testing.gradient_cases(quick=True), ids=name)
def test_finite_differences(case: testing.GradientCase) -> None:
    """Against the reference; gradcheck and gradgradcheck in float64, on the device."""
    assert not check.finite_differences(case, 0, DEVICE).reason


@pytest.mark.parametrize("form", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_integer_gradients(dtype: torch.dtype, form: torch.memory_format) -> None:
    for case in (*check._SHAPES, TILE_CASES[0], TILE_CASES[6], TILE_CASES[7]):
        operands = integers(case, dtype, form)
        grad = testing.unit_gradient(case.output_shape, dtype, generator(2))
        with testing.library(cudnn=False):
            found = testing.compare_gradients(ours, operands, grad, **case.parameters)
        assert len(found) >= 2
        for what, result in found.items():
            assert result, f"{case.name}, {what}: {result.reason}"


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_float_gradients(dtype: torch.dtype) -> None:
    """Against float64 in the 2-norm: twice what PyTorch's own lose on this device, and the rounding of the result. An output within
    rounding of 0 passes its gradient in one and not in the other: three elements' worth is allowed for those."""
    for case in (TILE_CASES[0], TILE_CASES[6], TILE_CASES[7], TILE_CASES[15]):
        operands = laid_out(testing.float_operands(case, dtype, generator(3)), torch.channels_last)
        grad = torch.randn(case.output_shape, generator=generator(4)).to(dtype)

        def run(function: Any, tensors: Any, incoming: Tensor, case: ConvCase = case) -> list[Tensor]:
            leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
            output = function(*leaves, **case.parameters)
            return [g.cpu() for g in torch.autograd.grad(output, [t for t in leaves if t is not None], incoming)]

        truth = run(reference.conv_bias_add_relu, [None if t is None else t.double() for t in operands], grad.double())
        moved, arriving = there(operands), grad.to(DEVICE)
        mine = run(fused_resnet.conv_bias_add_relu, moved, arriving)
        theirs = run(reference.conv_bias_add_relu, moved, arriving)
        flips = (3 / grad.numel()) ** 0.5
        for got, peer, wanted in zip(mine, theirs, truth, strict=True):
            error, allowed = testing.norm_error(got, wanted), 2 * testing.norm_error(peer, wanted) + torch.finfo(dtype).eps + flips
            assert error <= allowed, f"{case.name}: error {error:.2g}, allowed {allowed:.2g}"


# ---------------------------------------------------------------------------------------------------------------------
# Streams, graphs, threads, devices, memory
# ---------------------------------------------------------------------------------------------------------------------


@gpu
def test_a_derived_weight_on_another_stream() -> None:
    """Laid out for the tensor cores on one stream, far behind a kernel that takes long, and used on another at once."""
    case = ConvCase(64, 64, (14, 14), (3, 3), padding=(1, 1), shortcut=True, batch=4)
    operands = integers(case, torch.bfloat16)
    expected = reference.conv_bias_add_relu(*operands, **case.parameters)
    device_operands = there(operands._replace(weight=operands.weight.contiguous()))
    torch.cuda.synchronize()
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(first):
        poison = torch.full_like(device_operands.weight, float("nan"))
        first.synchronize()
        del poison  # the derived weight gets this memory
        torch.cuda._sleep(200_000_000)
        early = fused_resnet.conv_bias_add_relu(*device_operands, **case.parameters)
    with torch.cuda.stream(second):
        late = fused_resnet.conv_bias_add_relu(*device_operands, **case.parameters)
    torch.cuda.synchronize()
    assert len(derived._beside) == 1
    assert torch.equal(early.cpu(), expected)
    assert torch.equal(late.cpu(), expected)


@gpu
@pytest.mark.parametrize("dtype", LOW, ids=name)
def test_graph_of_inference(dtype: torch.dtype) -> None:
    """Frozen parameters; the graph outlives everything derived from them, and reads its input anew at each replay."""
    net = _plain.randomise(nn.Sequential(*(_plain.BasicBlock(64, 64) for _ in range(2))), generator()).eval()
    net = net.to(DEVICE, dtype).to(memory_format=torch.channels_last).requires_grad_(False)
    fused_resnet.fuse_(net)
    x = torch.randn(4, 64, 14, 14, generator=generator(1)).to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            net(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = net(x)
        for seed in range(3):
            x.copy_(torch.randn(4, 64, 14, 14, generator=generator(seed + 2)))
            graph.replay()
            replayed = y.clone()
            assert torch.equal(replayed, net(x))
        assert y.isfinite().all()


@gpu
@pytest.mark.parametrize("form", FORMATS, ids=name)
def test_graph_of_training(form: torch.memory_format) -> None:
    """Parameters change between replays, and what is derived from them is derived in the graph: as without one, bit for bit."""

    def start() -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        block = fused_resnet.nn.BasicBlock(64, 64, norm_layer=nn.Identity).to(DEVICE, torch.bfloat16).to(memory_format=form)
        x = torch.randn(4, 64, 14, 14).to(DEVICE, torch.bfloat16).contiguous(memory_format=form)
        return block, x

    def step(block: nn.Module, x: Tensor) -> Tensor:
        output: Tensor = block(x)
        parameters = list(block.parameters())
        gradients = torch.autograd.grad(output.float().square().mean(), parameters)
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p.sub_(g, alpha=0.1)
        return output.detach()

    block, x = start()
    expected = [step(block, x).clone() for _ in range(6)]
    assert not torch.equal(expected[-1], expected[-2])
    block, x = start()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found = [step(block, x).clone() for _ in range(2)]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step(block, x)
    for _ in range(4):
        graph.replay()
        found.append(output.clone())
    assert all(map(torch.equal, found, expected))


@gpu
def test_without_a_graph_after_replays() -> None:
    """A replay writes parameters and no counter sees it: what was derived from them before is not to be used after it."""
    case = ConvCase(64, 64, (14, 14), (3, 3), padding=(1, 1), batch=2)
    x, weight, bias, _ = there(integers(case, torch.bfloat16))
    weight = weight.contiguous().requires_grad_()

    def step() -> None:
        (gradient,) = torch.autograd.grad(fused_resnet.conv_bias_add_relu(x, weight, bias, **case.parameters).sum(), weight)
        with torch.no_grad():
            weight.add_(gradient.sign())

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    seen = []
    for _ in range(3):
        graph.replay()
        with torch.no_grad():
            seen.append(fused_resnet.conv_bias_add_relu(x, weight, bias, **case.parameters))
            fresh = fused_resnet.conv_bias_add_relu(x, weight.clone(), bias, **case.parameters)
        assert torch.equal(seen[-1], fresh)
    assert not torch.equal(seen[0], seen[-1])


def test_four_threads() -> None:
    """Each on a stream of its own, all with the same weight, which is derived once."""
    case = ConvCase(64, 64, (14, 14), (3, 3), padding=(1, 1), shortcut=True, batch=2)
    inputs = [integers(case, torch.bfloat16, seed=seed) for seed in range(4)]
    weight = inputs[0].weight.contiguous()
    inputs = [operands._replace(weight=weight) for operands in inputs]
    expected = [reference.conv_bias_add_relu(*operands, **case.parameters) for operands in inputs]
    shared = weight.to(DEVICE)
    device_inputs = [there(operands)._replace(weight=shared) for operands in inputs]
    synchronise()
    wrong: list[str] = []
    barrier = threading.Barrier(4)

    def work(i: int) -> None:
        try:
            stream = torch.cuda.Stream() if DEVICE.type == "cuda" else None
            barrier.wait()
            for repeat in range(20):
                with torch.cuda.stream(stream), torch.no_grad():
                    result = fused_resnet.conv_bias_add_relu(*device_inputs[i], **case.parameters)
                    if not torch.equal(result.cpu(), expected[i]):
                        wrong.append(f"thread {i}, repeat {repeat}")
        except Exception as error:
            wrong.append(f"thread {i}: {error!r}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@gpu
@pytest.mark.parametrize("operand", ["weight", "bias", "shortcut"])
def test_tensors_on_different_devices(operand: str) -> None:
    case = TILE_CASES[0]
    operands = integers(case, torch.bfloat16)
    device_operands = there(operands)
    wrong = device_operands._replace(**{operand: getattr(operands, operand)})
    with pytest.raises(ValueError, match=f"{operand} must be on input's device cuda:0, got cpu"):
        fused_resnet.conv_bias_add_relu(*wrong, **case.parameters)
    result = fused_resnet.conv_bias_add_relu(*device_operands, **case.parameters)
    assert torch.equal(result.cpu(), reference.conv_bias_add_relu(*operands, **case.parameters))


@gpu
def test_a_device_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = TILE_CASES[6]
    operands = integers(case, torch.bfloat16)
    assert torch.cuda.current_device() == 0
    moved = Operands(*testing.moved("cuda:1", *operands))
    result = fused_resnet.conv_bias_add_relu(*moved, **case.parameters)
    assert result.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    assert torch.equal(result.cpu(), reference.conv_bias_add_relu(*operands, **case.parameters))


def test_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence that says so, and the general path, which is right."""
    old = SimpleNamespace(capability=lambda index: (7, 5), tiles=list, BUILD={"architectures": "80 90a"})
    cuda._why_no_kernels.cache_clear()
    monkeypatch.setattr(_extension, "cuda", lambda: old)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "an old one")
    sentence = "the CUDA kernels of this build are for compute capability 8.0 and later, an old one has 7.5"
    assert plans.backends.cuda.why_no_kernels(torch.device("cuda", 0)) == sentence
    plans.convolution_plans.kept.clear()
    try:
        case = TILE_CASES[6]
        operands = integers(case, torch.bfloat16)
        if DEVICE.type == "cuda":
            assert fused_resnet.why_not(*there(operands), **case.parameters) == [sentence]
        with testing.library(cudnn=False):
            result = testing.compare_forward(ours, operands, True, **case.parameters)
        assert result, result.reason
    finally:
        plans.convolution_plans.kept.clear()
        cuda._why_no_kernels.cache_clear()


def test_out_of_memory() -> None:
    """PyTorch's own error, before anything runs; a later call works."""
    few = torch.zeros(1, 8, 8, 8, device=DEVICE)
    weight = torch.ones(64, 8, 1, 1, device=DEVICE)
    many = few.expand(1 << 32, 8, 8, 8)
    error = torch.OutOfMemoryError if DEVICE.type == "cuda" else RuntimeError
    for call in (lambda: fused_resnet.conv_bias_add_relu(many, weight), lambda: fused_resnet.bias_add_relu(many)):
        with pytest.raises(error):
            call()
        synchronise()
        operands = integers(TILE_CASES[0], torch.float32)
        result = testing.compare_forward(ours, operands, True, **TILE_CASES[0].parameters)
        assert result, result.reason


def need_memory(size: int) -> None:
    free = torch.cuda.mem_get_info()[0]
    if free < size:
        pytest.skip(f"needs {size / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")


@gpu
@pytest.mark.large
@pytest.mark.parametrize("tensor_cores", [True, False], ids=["tensor cores", "general kernel"])
def test_more_than_2_to_31_elements(tensor_cores: bool) -> None:
    """Many images: each of some must be what it is alone; those around element 2^31 among them, and the last."""
    shape = (10720, 64, 56, 56)
    assert shape[0] * 64 * 56 * 56 > 2**31
    need_memory(3 * 2 * 10720 * 64 * 56 * 56 + (2 << 30))
    torch.manual_seed(0)
    x = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE, memory_format=torch.channels_last).normal_()
    weight = (torch.randn(64, 64, 1, 1, device=DEVICE) / 8).bfloat16().contiguous(memory_format=torch.channels_last)
    # One kernel for all, so that a sum's order is the same.
    case = ConvCase(64, 64, (56, 56), (1, 1), bias=False, shortcut=True, batch=shape[0])
    chosen = gpu_contest.planned(case, Operands(x, weight, None, x), "auto").kernel
    assert chosen.tensor_cores
    assert chosen.launches > 1
    _settings.change(cuda_algorithm=chosen.algorithm if tensor_cores else "general")
    y = fused_resnet.conv_bias_add_relu(x, weight, None, x)
    masked, _ = MASK(x, y, False)
    for image in (0, 5349, 2**31 // (64 * 56 * 56), 10700, 10719):
        alone = fused_resnet.conv_bias_add_relu(x[image : image + 1], weight, None, x[image : image + 1])
        assert torch.equal(y[image : image + 1], alone), image
        assert torch.equal(masked[image], torch.where(y[image] <= 0, torch.zeros_like(x[image]), x[image])), image
    assert not y.isnan().any()


@gpu
@pytest.mark.large
def test_one_image_of_more_than_2_to_31_elements() -> None:
    side = 16400
    need_memory(2 * 2 * 8 * side * side + (4 << 30))
    torch.manual_seed(0)
    x = torch.empty((1, 8, side, side), dtype=torch.bfloat16, device=DEVICE, memory_format=torch.channels_last).normal_()
    assert x.numel() > 2**31
    weight = torch.randn(8, 8, 1, 1, device=DEVICE).bfloat16().contiguous(memory_format=torch.channels_last)
    y = fused_resnet.conv_bias_add_relu(x, weight)
    _settings.change(cuda_algorithm="general")
    for row in (0, side // 2, 2**31 // (8 * side) - 1, 2**31 // (8 * side), side - 1):
        part = slice(row, row + 1)
        assert torch.equal(y[:, :, part], fused_resnet.conv_bias_add_relu(x[:, :, part], weight)), row


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch's machinery
# ---------------------------------------------------------------------------------------------------------------------


@gpu
def test_the_tensor_cores_are_what_runs() -> None:
    for dtype in LOW:
        for case in TILE_CASES:
            operands = there(integers(case, dtype))
            assert fused_resnet.why_not(*operands, **case.parameters) == []
            assert gpu_contest.planned(case, operands, "auto").kernel.tensor_cores, case.name


CALLS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "float32": lambda: (*leaves(TILE_CASES[0], torch.float32), (1, 1), (0, 0, 0, 0), (1, 1), 1, True),
    "bfloat16, channels_last": lambda: (*leaves(TILE_CASES[6], torch.bfloat16), (1, 1), (1, 1, 1, 1), (1, 1), 1, True),
    "bfloat16, contiguous": lambda: (
        *leaves(TILE_CASES[6], torch.bfloat16, torch.contiguous_format), (1, 1), (1, 1, 1, 1), (1, 1), 1, True
    ),
    "float64, groups, channels_last": lambda: (*leaves(check._SHAPES[-1], torch.float64), (1, 1), (1, 1, 1, 1), (1, 1), 4, True),
    "uneven padding": lambda: (*leaves(TILE_CASES[6], torch.float32)[:3], None, (1, 1), (1, 2, 0, 1), (1, 1), 1, True),
    "groups, bfloat16, no ReLU": lambda: (*leaves(check._SHAPES[-1], torch.bfloat16), (1, 1), (1, 1, 1, 1), (1, 1), 4, False),
}  # fmt: skip


def leaves(case: ConvCase, dtype: torch.dtype, form: torch.memory_format = torch.channels_last) -> Operands:
    operands = there(laid_out(testing.float_operands(case, dtype, generator(1)), form))
    return Operands(*(None if t is None else t.requires_grad_() for t in operands))  # type: ignore[arg-type]


@pytest.mark.parametrize("call", CALLS)
def test_opcheck(call: str) -> None:
    torch.library.opcheck(CONV, CALLS[call]())


@pytest.mark.parametrize("call", CALLS)
def test_fake_strides_are_the_real_ones(call: str) -> None:
    arguments = CALLS[call]()
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = CONV(*arguments)
    with FakeTensorMode() as mode:
        fake = CONV(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
    assert (fake.shape, fake.stride(), fake.dtype, fake.device) == (real.shape, real.stride(), real.dtype, real.device)


def test_opcheck_of_the_passes() -> None:
    x, _, b, s = leaves(ConvCase(64, 64, (5, 6), (1, 1), shortcut=True, batch=2), torch.bfloat16)
    torch.library.opcheck(PASS, (x, b, s, True))
    torch.library.opcheck(MASK, (x.detach(), s.detach(), True))


@pytest.mark.parametrize("backend", ["aot_eager", *(["inductor"] if DEVICE.type == "cuda" else [])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_compile_without_a_break(dtype: torch.dtype, backend: str) -> None:
    case = TILE_CASES[6]
    torch._dynamo.reset()

    def function(*tensors: Tensor) -> Tensor:
        return fused_resnet.conv_bias_add_relu(*tensors, **case.parameters) * 2

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    results = []
    for f in (function, compiled):
        operands = leaves(case, dtype)
        output = f(*operands)
        results.append((output, *torch.autograd.grad(output.float().square().mean(), operands)))
    torch._dynamo.reset()
    for mine, wanted in zip(*results, strict=True):
        # The same kernels on the same data; what the compiler fuses around them may round once less.
        assert testing.norm_error(mine, wanted.double()) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", LOW, ids=name)
@pytest.mark.parametrize("shortcut_dtype", ["same", "float32"])
def test_autocast(dtype: torch.dtype, shortcut_dtype: str) -> None:
    """The convolution in the autocast's dtype, the sum as eager promotes it; errors at most twice eager's own."""
    case = TILE_CASES[6]
    operands = laid_out(testing.float_operands(case, torch.float32, generator(1)), torch.channels_last)
    truth = reference.conv_bias_add_relu(*(t.double() for t in operands), **case.parameters)  # type: ignore[union-attr]
    x, w, b, s = there(operands)
    s = s.to(dtype) if shortcut_dtype == "same" else s
    with torch.autocast(DEVICE.type, dtype):
        mine = fused_resnet.conv_bias_add_relu(x, w, b, s, **case.parameters)
        theirs = torch.relu(torch.nn.functional.conv2d(x, w, b, padding=1) + s)
    assert mine.dtype == theirs.dtype
    error, peer = (testing.relative_error(t.cpu(), truth) for t in (mine, theirs))
    assert error <= 2 * peer + torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_spellings(spelling: str, train: bool) -> None:
    """Hand-written blocks in float32, without TF32."""
    model = randomise(nn.Sequential(SPELLINGS[spelling]()).train(train)).to(DEVICE)
    converted = copy.deepcopy(model)
    assert fused_resnet.fuse_(converted).fused
    x = torch.randn(2, 8, 8, 8, generator=generator(1)).to(DEVICE)
    with torch.no_grad():
        assert_same(converted, model, x)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("network", [_plain.resnet18, _plain.resnet50], ids=["resnet18", "resnet50"])
def test_networks(network: Callable[[], nn.Module], dtype: torch.dtype, train: bool) -> None:
    """Torchvision's networks after ``fuse_``: the 2-norm of output and gradients against float64, at most four times eager's own
    error (folding rounds three times more than eager's layers, once), twice for the scatter of one sample."""
    model = _plain.randomise(network(), generator()).train(train).to(DEVICE, dtype).to(memory_format=torch.channels_last)
    converted = copy.deepcopy(model)
    report = fused_resnet.fuse_(converted)
    assert len(report.fused) == {"resnet18": 8, "resnet50": 16}[network.__name__]
    x = torch.randn(4, 3, 64, 64, generator=generator(1)).to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)
    arriving = torch.randn(4, 1000, generator=generator(2)).to(DEVICE)

    def run(m: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        output = m(images)
        weight = m.get_parameter("fc.weight")
        (gradient,) = torch.autograd.grad(output, weight, arriving.to(output.dtype))
        return output.detach(), gradient

    truth = run(copy.deepcopy(model).double(), x.double())
    theirs, mine = run(copy.deepcopy(model), x), run(converted, x)
    for got, peer, wanted in zip(mine, theirs, truth, strict=True):
        assert got.isfinite().all()
        error, allowed = testing.norm_error(got, wanted), 8 * testing.norm_error(peer, wanted) + torch.finfo(dtype).eps
        assert error <= allowed, f"error {error:.2g}, allowed {allowed:.2g}"


@pytest.mark.parametrize("network", ["resnet18", "resnet50"])
def test_inputs_of_the_table_take_the_hot_path(network: str) -> None:
    """Every convolution of the residual blocks, in bfloat16 and channels_last; on a GPU on tensor cores."""
    convs = {conv for block in cases.BLOCKS if block.network == network for conv in block.convs()}
    assert len(convs) > 8
    for conv in convs:
        operands = laid_out(conv.at(2).make(dtype=torch.bfloat16), torch.channels_last)
        moved = there(operands)
        assert fused_resnet.why_not(*moved, **conv.parameters) == [], conv.name
        if DEVICE.type == "cuda":
            assert gpu_contest.planned(conv.at(2), moved, "auto").kernel.tensor_cores, conv.name
