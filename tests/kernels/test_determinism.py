"""Determinism: the same bits over repeats, thread counts, batches and layouts, and beside other callers.

What is trusted: every output is one chain of operations whose order depends on the algorithm and the reduction alone, and the
bias gradient sums fixed pieces. Float data, so that another order would show; no tolerance. The algorithm itself may depend on
the size of the batch (not on the threads), so what is said of batches is said of each algorithm.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from _calls import DTYPES, FORMATS, kernel_function, laid_out, name
from _exact import winograd_fits
from torch import Tensor

import fused_resnet
from fused_resnet import testing
from fused_resnet.cases import BlockCase, ConvCase, Operands

THREADS = (1, 2, 3, 7)
# Large enough that threads are used, in shapes that are cut by rows, by images, by columns and by output channels; reductions
# of one chunk and of several.
CASES = (
    ConvCase(64, 64, (28, 28), (3, 3), padding=(1, 1), shortcut=True),
    ConvCase(48, 80, (7, 7), (1, 1), shortcut=True, batch=9),
    ConvCase(512, 70, (7, 7), (3, 3), padding=(1, 1), shortcut=True, batch=2),
    ConvCase(3, 20, (5, 500), (3, 3), (1, 2), (1, 1), batch=2),
    ConvCase(32, 33, (15, 13), (3, 3), (2, 2), (1, 1), shortcut=True, batch=3),
)


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8)


def _same(results: list[Tensor]) -> bool:
    return all(torch.equal(_bits(results[0]), _bits(t)) for t in results[1:])


# What is chosen, and each algorithm where it is another computation.
CHOSEN = [(case, "auto") for case in CASES]
EACH = [
    (case, algorithm)
    for case in CASES
    for algorithm in ("direct", "winograd2", "winograd4")
    if algorithm == "direct" or winograd_fits(case, algorithm)
]


@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize(("case", "algorithm"), CHOSEN + EACH, ids=name, indirect=["algorithm"])
def test_convolution(
    case: ConvCase, algorithm: str, dtype: torch.dtype, memory_format: torch.memory_format, isa: str
) -> None:
    operands = laid_out(testing.float_operands(case, dtype, torch.Generator().manual_seed(0)), memory_format)
    results = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        results += [kernel_function(*operands, **case.parameters) for _ in range(2)]
    assert _same(results)
    public = fused_resnet.conv_bias_add_relu(*operands, **case.parameters)
    if not fused_resnet.why_not(*operands, **case.parameters):
        assert _same([results[0], public])


@pytest.mark.parametrize("algorithm", ["direct", "winograd4"], indirect=True)
def test_denormals_are_as_the_caller_has_them(algorithm: str) -> None:
    """torch.set_flush_denormal is the calling thread's; those that help it compute with its settings."""
    case = CASES[0]
    x, w, *_ = testing.float_operands(case, torch.float32, torch.Generator().manual_seed(0))
    usual = kernel_function(x, w, None, None, **case.parameters)
    scale = (torch.finfo(torch.float32).tiny / usual[usual > 0].median().item()) ** 0.5  # about half of the outputs are denormals
    operands = Operands(x * scale, w * scale, None, None)
    few = {}
    try:
        for flush in (False, True):
            if not torch.set_flush_denormal(flush):
                pytest.skip("this processor flushes no denormals")
            results = []
            for threads in THREADS:
                torch.set_num_threads(threads)
                results += [kernel_function(*operands, **case.parameters) for _ in range(3)]
            assert _same(results)
            few[flush] = int((_bits(results[0]).view(torch.int32) != 0).sum())
    finally:
        torch.set_flush_denormal(False)
    assert 0 < few[True] < few[False]  # the operands reach into the denormals


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize(("case", "algorithm"), [e for e in EACH if e[0].batch > 1], ids=name, indirect=["algorithm"])
def test_an_image_is_the_same_alone_and_in_a_batch(case: ConvCase, algorithm: str, dtype: torch.dtype, isa: str) -> None:
    """And the same in both layouts: blocking and packing move data, they do not change a sum."""
    plain = testing.float_operands(case, dtype, torch.Generator().manual_seed(0))
    results = []
    for memory_format in FORMATS:
        operands = laid_out(plain, memory_format)
        results.append(kernel_function(*operands, **case.parameters))
        x, w, b, s = operands
        alone = [
            kernel_function(x[i : i + 1], w, b, None if s is None else s[i : i + 1], **case.parameters)
            for i in range(case.batch)
        ]
        results.append(torch.cat(alone))
    assert _same(results)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("block", "batch"),
    [
        (BlockCase("basic", 64, 64, (28, 28)), 1),
        (BlockCase("basic", 512, 512, (7, 7)), 7),
        (BlockCase("basic", 32, 64, (14, 14), 2, "projection"), 9),
        (BlockCase("bottleneck", 64, 32, (14, 14), 1, "projection"), 3),
    ],
    ids=lambda value: getattr(value, "name", f"N={value}"),
)
@pytest.mark.parametrize("numerics", ["fast", "strict"])
def test_whole_blocks(block: BlockCase, batch: int, numerics: str, kernels: object) -> None:
    """However a batch is cut into groups of images for the threads."""
    fused_resnet.set_numerics(numerics)
    module = block.eager()
    fused_resnet.fuse_(module)
    for dtype in (torch.float32, torch.bfloat16):
        x = block.make(batch, dtype, torch.channels_last, torch.Generator().manual_seed(0))
        results = []
        for threads in (*THREADS, 8):
            torch.set_num_threads(threads)
            with torch.no_grad():
                results += [module.to(dtype)(x) for _ in range(2)]
        assert _same(results)


@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_passes(isa: str, dtype: torch.dtype, memory_format: torch.memory_format, generator: torch.Generator) -> None:
    for shape in ((4, 64, 28, 28), (1, 5, 100, 101), (33, 40, 7, 7), (2, 300, 13, 11)):
        x, s, grad = (
            torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=memory_format) for _ in range(3)
        )
        b = torch.randn(shape[1], generator=generator).to(dtype)
        outputs, masks, sums = [], [], []
        for threads in THREADS:
            torch.set_num_threads(threads)
            for _ in range(2):
                outputs.append(fused_resnet.bias_add_relu(x, b, s))
                masked, total = torch.ops.fused_resnet.relu_backward(grad, outputs[-1], True)
                masks.append(masked)
                sums.append(total)
        assert _same(outputs)
        assert _same(masks)
        assert _same(sums)


def _together(callers: int, work: Callable[[int], None]) -> None:
    """Runs ``work(0..callers-1)`` in as many Python threads at once; the first error is raised here."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(callers)

    def run(number: int) -> None:
        try:
            barrier.wait()
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_beside_other_callers(isa: str) -> None:
    """Several Python threads, each with calls of its own and calls on one weight that all share; repeats, forward and backward."""
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    shared = ConvCase(24, 40, (14, 14), (3, 3), padding=(1, 1), shortcut=True, batch=2)
    weight = testing.float_operands(shared, torch.float32, generator).weight
    inputs = [testing.float_operands(shared, torch.float32, generator)._replace(weight=weight) for _ in range(4)]
    own = [testing.float_operands(case, torch.float32, generator) for case in CASES[:4]]

    def all_of(number: int) -> list[Tensor]:
        results = [
            fused_resnet.conv_bias_add_relu(*inputs[number], **shared.parameters),
            fused_resnet.conv_bias_add_relu(*own[number], **CASES[number].parameters),
        ]
        leaves = Operands(*(t.detach().requires_grad_() for t in inputs[number]))  # type: ignore[union-attr]
        y = fused_resnet.conv_bias_add_relu(*leaves, **shared.parameters)
        return [*results, *torch.autograd.grad(y, [leaves.bias, leaves.shortcut], torch.ones_like(y))]

    expected = [all_of(number) for number in range(4)]
    fused_resnet.ops.derived.clear()  # all callers find the shared weight unpacked

    def work(number: int) -> None:
        for _ in range(5):
            for ours, alone in zip(all_of(number), expected[number], strict=True):
                assert _same([ours, alone])

    _together(4, work)


def test_a_weight_that_changes_while_others_read_their_own(isa: str) -> None:
    """One thread trains its weight, the others must not see a packing that is not theirs."""
    torch.set_num_threads(1)
    x = torch.ones(1, 8, 5, 5)
    weights = [torch.full((16, 8, 1, 1), float(number)) for number in range(4)]

    def work(number: int) -> None:
        for step in range(50):
            value = float(number)
            if number == 0:
                value = float(step)
                weights[0].fill_(value)
            assert torch.equal(fused_resnet.conv_bias_add_relu(x, weights[number]), torch.full((1, 16, 5, 5), 8 * value))

    _together(4, work)
