"""On a GPU: streams, graphs, threads, several devices, memory that is not to be had or very large. See test_cuda.py."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _calls import FORMATS, MASK, name, run_python
from _gpu import (
    DEVICE,
    LOW,
    TILE_CASES,
    generator,
    gpu,
    integers,
    marks,
    ours,
    poisoned,
    synchronise,
    there,
    undisturbed,
)
from torch import Tensor, nn

import fused_resnet
from fused_resnet import _extension, _plain, _settings, reference, testing
from fused_resnet.benchmark import gpu_contest
from fused_resnet.cases import BlockCase, ConvCase, Operands
from fused_resnet.ops import cuda, derived, plans
from fused_resnet.runtime import executor, launches

pytestmark = marks
__all__ = ["poisoned", "undisturbed"]  # fixtures


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
def test_calls_that_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call of a stream is a repeated one; the first waits for what another stream has packed. A graph captured on a stream that
    repeats its calls sees at each replay what the parameters are then."""
    block = _plain.randomise(BlockCase("basic", 64, 128, (14, 14), 2, "projection").eager(), generator()).eval().to(DEVICE, torch.bfloat16)
    block = block.to(memory_format=torch.channels_last)
    assert fused_resnet.fuse_(block).fused
    x = torch.randn(4, 64, 14, 14, generator=generator(1)).to(DEVICE, torch.bfloat16).contiguous(memory_format=torch.channels_last)
    run, made = launches.run, []

    def counted(*arguments: Any) -> Any:
        made.append(1)
        return run(*arguments)

    monkeypatch.setattr(launches, "run", counted)

    def anew() -> Tensor:
        torch.cuda.synchronize()
        with monkeypatch.context() as patch:
            patch.setattr(executor, "_repeat", lambda *arguments: None)
            patch.setattr(launches, "run", lambda *arguments: None)
            derived.clear()
            found: Tensor = block(x)
        torch.cuda.synchronize()
        return found

    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.no_grad():
        wanted = anew()
        with torch.cuda.stream(first):
            torch.cuda._sleep(200_000_000)
            found = [block(x) for _ in range(3)]
        with torch.cuda.stream(second):
            found += [block(x) for _ in range(3)]
        torch.cuda.synchronize()
        assert all(torch.equal(y, wanted) for y in found)
        assert len(made) == 2
        with torch.cuda.stream(second):
            block.conv1.weight.mul_(1.25)
            found = [block(x) for _ in range(3)]
        wanted = anew()
        assert all(torch.equal(y, wanted) for y in found)
        assert len(made) == 3
        with torch.cuda.stream(second):
            found = [block(x) for _ in range(2)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=second):
            y = block(x)
        for _ in range(2):
            block.conv2.weight.mul_(-1)
            graph.replay()
            assert torch.equal(y, anew())
            assert torch.equal(y, block(x))


@gpu
def test_capture_before_the_first_call() -> None:
    """Nothing has been loaded, chosen or packed: all of that happens while the stream is captured. In a process of its own."""
    code = """if True:
        import torch, fused_resnet
        from fused_resnet import reference
        make = lambda *shape: torch.randint(-2, 3, shape).to(torch.bfloat16)
        operands = [make(2, 64, 14, 14), make(64, 64, 3, 3), make(64), make(2, 64, 14, 14)]
        x, w, b, s = [t.cuda() if t.dim() == 1 else t.cuda().contiguous(memory_format=torch.channels_last) for t in operands]
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            y = fused_resnet.bias_add_relu(fused_resnet.conv_bias_add_relu(x, w, b, s, padding=1), b)
        graph.replay()
        wanted = reference.bias_add_relu(reference.conv_bias_add_relu(*operands, padding=1), operands[2])
        print(torch.equal(y.cpu(), wanted))"""
    done = run_python(code)
    assert done.stdout.strip() == "True", done.stderr[-2000:]


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
    cuda._devices.clear()
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
        cuda._devices.clear()


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
def test_a_projection_of_more_than_2_to_31_elements() -> None:
    """Its images go with those of the convolution that it is a part of."""
    need_memory(2 * 2 * 10720 * 64 * 56 * 56 + (2 << 30))
    torch.manual_seed(0)
    x = torch.empty((10720, 64, 56, 56), dtype=torch.bfloat16, device=DEVICE, memory_format=torch.channels_last).normal_()
    weights = [(torch.randn(64, 64, 1, 1, device=DEVICE) / 8).bfloat16().contiguous(memory_format=torch.channels_last) for _ in range(2)]

    def call(x: Tensor) -> Tensor:
        found = plans.joined(x, (weights[0], None), (1, 0, 1, 1), x, (weights[1], None), 1, True)
        assert found is not None
        return found

    plans.joined_plans.kept.clear()
    y = call(x)
    (plan,) = plans.joined_plans.kept.values()
    assert plan.kernel.launches > 1
    _settings.change(cuda_algorithm=plan.kernel.algorithm)  # so that a sum's order is the same
    for image in (0, 5349, 2**31 // (64 * 56 * 56), 10719):
        assert torch.equal(y[image : image + 1], call(x[image : image + 1])), image


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
