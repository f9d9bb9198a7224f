"""Convolutions in a row as one native call on a GPU, without a GPU: the same bits as node by node, and no change of a parameter unseen.

What is trusted: the module's twin (``_cuda_twin``), by whose kernels the same layers run node by node (test_cuda_twin.py has those).
"""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from _calls import FORMATS, name
from _cuda_rows import BF16, BLOCKS, LAST, Counter, Net, both, converted, counting, images, node_by_node
from torch import Tensor, nn

import fused_resnet
from fused_resnet import _settings, cases, testing
from fused_resnet.cases import BlockCase
from fused_resnet.ops import derived, select
from fused_resnet.ops.spec import Layout
from fused_resnet.runtime import executor, launches, rows


@pytest.fixture(autouse=True)
def counter() -> Iterator[Counter]:
    with counting() as module:
        yield module


@pytest.mark.parametrize("form", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=name)
@pytest.mark.parametrize("case", BLOCKS, ids=name)
def test_blocks(case: BlockCase, dtype: torch.dtype, form: torch.memory_format, counter: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call a block; a projection is a launch of its own, or a part of the last one on the tensor cores."""
    torch.manual_seed(0)
    block = converted(case.eager(), dtype, form)
    for n in (2, 1, 0):
        both(block, images(n, case.inplanes, *case.size, dtype=dtype, form=form), monkeypatch)
    joined = dtype == BF16 and form is LAST
    layers = (2 if case.kind == "basic" else 3) + (case.shortcut == "projection" and not joined)
    assert counter.rows[:2] == [layers] * 2


def test_a_network(counter: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    """All convolutions between the stem and the classifier are one call; the stem's channels are padded, by itself. No value is held that
    nothing reads any more."""
    torch.manual_seed(0)
    model = converted(Net())
    alive: list[int] = []
    by_itself = launches._by_itself

    def watched(step: Any, values: dict[int, Any]) -> Tensor:
        alive.append(len(values))
        return by_itself(step, values)

    monkeypatch.setattr(launches, "_by_itself", watched)
    for n in (2, 1):
        counter.rows.clear()
        alive.clear()
        both(model, images(n, 3, 32, 32), monkeypatch)
        assert counter.rows == [7]
        assert counter.given[-1] == 2  # what the row reads, and what is read behind it
        assert alive == [1] * 5
    counter.rows.clear()
    both(model, images(2, 3, 32, 32, form=torch.contiguous_format), monkeypatch)
    assert sum(counter.rows) >= 7
    model.maxpool.kernel_size, model.maxpool.padding = 4, 0  # to another size
    both(model, images(2, 3, 32, 32), monkeypatch)


def test_what_the_library_makes_in_another_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pooling whose output is not in the memory format of its input: a row reads what it was planned for."""
    torch.manual_seed(0)
    model, x = converted(Net()), images(2, 3, 32, 32)
    expected = both(model, x, monkeypatch)
    by_itself = launches._by_itself
    monkeypatch.setattr(launches, "_by_itself", lambda step, values: by_itself(step, values).contiguous())
    assert torch.equal(model(x), expected)


def test_parameters_that_change(counter: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence of changes between calls of one model, each as node by node sees it; and back."""
    torch.manual_seed(0)
    block = converted(BLOCKS[1].eager())
    x = images(2, 16, 8, 8)
    first = both(block, x, monkeypatch)
    state = copy.deepcopy(block.state_dict())

    def statistics() -> None:
        block.train()
        block(images(3, 16, 8, 8) + 1)
        block.eval()

    changes: list[Callable[[], object]] = [
        lambda: block.conv1.weight.mul_(2),  # type: ignore[operator, union-attr]
        lambda: block.bn2.running_mean.add_(1),  # type: ignore[operator, union-attr]
        lambda: block.downsample[1].bias.add_(3),  # type: ignore[index, union-attr]
        lambda: setattr(block.conv2.weight, "data", torch.randn_like(block.conv2.weight)),  # type: ignore[union-attr, arg-type]
        statistics,
        lambda: setattr(block.bn1, "eps", 0.5),
        lambda: setattr(block.downsample[1], "eps", 0.25),  # type: ignore[index, union-attr]
        lambda: setattr(block.downsample[0], "weight", nn.Parameter(-block.downsample[0].weight)),  # type: ignore[index, union-attr, operator]
    ]
    seen = [first]
    for change in changes:
        change()
        seen.append(both(block, x, monkeypatch))
        assert not torch.equal(seen[-1], seen[-2])
    block.bn1.eps = block.downsample[1].eps = 1e-5  # type: ignore[index, union-attr]
    block.load_state_dict(state)
    assert torch.equal(both(block, x, monkeypatch), first)
    assert counter.rows
    assert set(counter.rows) == {2}


def test_statistics_where_no_bytes_are_read(counter: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: batch norm's update of its statistics raises no version, and its counter is all there is to see it by."""
    monkeypatch.setattr(derived, "_guard", lambda t: None)
    torch.manual_seed(0)
    block, x = converted(BLOCKS[1].eager()), images(2, 16, 8, 8)
    for norm in (block.bn1, block.bn2, block.downsample[1]):  # type: ignore[index, union-attr]
        before = both(block, x, monkeypatch)
        norm.train()  # type: ignore[operator, union-attr]
        norm(images(3, norm.num_features, 4, 4) + 1)  # type: ignore[operator, union-attr]
        norm.eval()  # type: ignore[operator, union-attr]
        assert not torch.equal(both(block, x, monkeypatch), before)
    counter.rows.clear()
    block.bn1.num_batches_tracked = None  # type: ignore[union-attr, assignment]
    block(x)
    assert counter.rows == []  # nothing would tell


def test_one_model_under_many_settings(counter: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan is of one layout, of settings of this package, of PyTorch and of the layers: in turn, and back."""
    torch.manual_seed(0)
    block = converted(BLOCKS[1].eager(), torch.float32)
    x = images(2, 16, 8, 8, dtype=torch.float32)

    def kernels(given: Tensor = x) -> set[str]:
        counter.kernels.clear()
        both(block, given, monkeypatch)
        return set().union(*counter.kernels)

    monkeypatch.setattr(select, "SMALL_ON_CUDA", 0)
    narrow = torch.zeros(2, 16, 8, 16).contiguous(memory_format=LAST)[..., ::2].copy_(x)
    image = "sm90 float32 image 128x64"
    for _ in range(2):
        with testing.library(tf32=True):
            assert kernels() == {image}
            with _settings.using(cuda_algorithm="general"):
                assert kernels() == {"general float32"}
            assert kernels() == {image}
            for given in (x.contiguous(), narrow, x[:1].expand(2, -1, -1, -1), x[:, :, :4]):
                kernels(given)
            assert kernels() == {image}
        with testing.library(tf32=False):
            assert kernels() == set()  # the library's
    for conv, changes in (
        (block.conv2, {"padding": (2, 2), "dilation": (2, 2)}),
        (block.conv1, {"stride": (1, 1)}),
        (block.conv1, {"stride": [1, 1]}),  # as torch takes it too
        (block.downsample[0], {"stride": 1}),  # type: ignore[index, union-attr]
    ):
        for setting, value in changes.items():
            setattr(conv, setting, value)
        if block.conv1.stride[0] == 2 or block.downsample[0].stride == 1:  # type: ignore[index, union-attr]
            both(block, x, monkeypatch)
    assert block(x).shape == (2, 24, 8, 8)


def test_weights_and_biases_that_begin_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels read from multiples of 16 bytes: others are copied."""
    torch.manual_seed(0)
    block, x = converted(nn.Sequential(_Plain(), _Plain())), images(2, 16, 8, 8)
    expected = both(block, x, monkeypatch)
    for conv in (block[0].conv1, block[1].conv2):  # type: ignore[index, union-attr]
        for parameter in (conv.weight, conv.bias):
            skewed = torch.empty(parameter.numel() + 1, dtype=BF16)[1:].as_strided(parameter.shape, parameter.stride()).copy_(parameter)
            assert skewed.data_ptr() % 16
            parameter.data = skewed
            assert torch.equal(both(block, x, monkeypatch), expected)


def test_a_shortcut_on_the_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """It decides the sum's memory format."""
    torch.manual_seed(0)
    for form in FORMATS:
        for model in (nn.Sequential(_Left(), _Left()), nn.Sequential(_Plain(), _Left())):
            both(converted(model), images(2, 16, 8, 8, form=form), monkeypatch)


def test_who_listens_gets_it_node_by_node(counter: Counter) -> None:
    torch.manual_seed(0)
    block, x = converted(BLOCKS[0].eager()), images(2, 16, 8, 8)
    expected = block(x)
    counter.rows.clear()
    with torch.enable_grad():
        assert torch.equal(block(x).detach(), expected)
    with torch.profiler.profile():
        assert torch.equal(block(x), expected)
    buffer = torch.empty(x.numel() + 1, dtype=BF16)
    skewed = buffer[1:].as_strided(x.shape, x.stride(), 1).copy_(x)
    assert torch.equal(block(skewed), expected)
    assert counter.rows == []
    block.train()
    block(x)
    assert counter.rows == []


def test_what_is_not_in_a_row(counter: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups, a shortcut that another module makes, one that is zero-padded: as node by node, and in rows what can
    be. A projection of any padding that comes to none is a part of the last convolution either way."""
    torch.manual_seed(0)

    grouped = BLOCKS[2].eager()
    grouped.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
    pooled = BLOCKS[1].eager()
    pooled.downsample = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(16, 24, 1, bias=False), nn.BatchNorm2d(24))
    for module in (grouped, pooled):
        both(converted(module), images(2, module.conv1.in_channels, 8, 8), monkeypatch)
        assert counter.rows == []
    with monkeypatch.context() as patch:  # nor is that module called before it goes node by node: it may not be without effects
        patch.setattr(executor, "_external", lambda segment, x: pytest.fail("it is called twice"))
        pooled(images(2, 16, 8, 8))
    both(converted(cases.NETWORKS["cifar20"][1]()), images(1, 3, 8, 8), monkeypatch)
    assert counter.rows
    for padding in (1, "same", "valid", [0, 0], 0):
        projected = BlockCase("basic", 16, 16, (8, 8), 1, "projection").eager()
        if padding == 1:  # which is none
            projected.conv2.padding = (2, 2)
        projected.downsample[0] = nn.Conv2d(16, 16, 1, padding=tuple(padding) if isinstance(padding, list) else padding, bias=False)
        projected.downsample[0].padding = padding
        counter.rows.clear()
        both(converted(projected), images(2, 16, 8, 8), monkeypatch)
        if padding != [0, 0]:  # which no key takes
            assert counter.rows == [3 if padding == 1 else 2]
    for conv in (projected.conv2, projected.downsample[0]):  # nor these
        conv.stride = [1, 1]
        both(projected, images(2, 16, 8, 8), monkeypatch)


def test_operands_that_do_not_fit(counter: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias of another dtype or length, parameters elsewhere: what they raise node by node, and no row."""
    torch.manual_seed(0)
    x = images(2, 16, 8, 8)
    wrong = [("bias", t) for t in (torch.randn(16), torch.randn(8).bfloat16(), torch.zeros(16, dtype=BF16, device="meta"))]
    for parameter, value in (*wrong, ("weight", torch.randn(16, 16, 3, 3))):
        block = converted(nn.Sequential(_Plain(), _Plain()))
        block(x)
        assert counter.rows
        counter.rows.clear()
        fitting = getattr(block[1].conv2, parameter)  # type: ignore[index, union-attr]
        setattr(block[1].conv2, parameter, nn.Parameter(value))  # type: ignore[index, union-attr]
        errors = []
        for way in (nullcontext(), node_by_node(monkeypatch)):
            with way, pytest.raises((TypeError, ValueError, RuntimeError, NotImplementedError)) as raised:
                block[1](x)  # type: ignore[index, operator]
            errors.append((raised.type, str(raised.value)))
        assert errors[0] == errors[1]
        assert counter.rows == []
        setattr(block[1].conv2, parameter, fitting)  # type: ignore[index, union-attr]
        block[1](x)  # type: ignore[index, operator]
        assert counter.rows  # again


class _Plain(nn.Module):
    """A block without norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv2(self.relu(self.conv1(x))) + x)  # type: ignore[no-any-return]


class _Left(_Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.conv2(self.relu(self.conv1(x))))  # type: ignore[no-any-return]


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    block = converted(BLOCKS[3].eager())
    given = [images(1, 16, 8, 8) for _ in range(4)]
    with node_by_node(monkeypatch):
        expected = [block(x) for x in given]
    wrong: list[str] = []

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                if not torch.equal(block(given[i]), expected[i]):
                    wrong.append(f"thread {i}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_places_in_the_arena() -> None:
    """Random rows: no value that is still to be read is written over, and the arena ends where the last one does."""
    chance = random.Random(0)
    for _ in range(200):
        count = chance.randint(1, 12)
        layouts = {v: Layout((1, chance.randint(1, 40), chance.randint(1, 9), 3), (0, 0, 0, 0)) for v in range(count + 2)}
        made = []
        for i in range(count):
            reads = [chance.randint(0, i + 1) for _ in range(3)]
            shortcut, other = (v if chance.random() < 0.5 else None for v in reads[1:])
            made.append(rows.Launch(i, None, reads[0], shortcut, i + 2, None, other))
        given = {0: -1, 1: -2, count + 1: -3}
        places, size = rows._places(made, layouts, given, 2)
        held: dict[int, tuple[int, int]] = {}
        ends = [0]
        for i, launch in enumerate(made):
            if launch.y not in given:
                begin, end = places[launch.y], places[launch.y] + 2 * torch.Size(layouts[launch.y].shape).numel()
                assert begin % 256 == 0
                ends.append(end)
                assert all(end <= a or b <= begin for a, b in held.values())
                held[launch.y] = begin, end
            held = {v: place for v, place in held.items() if any(v in later.reads for later in made[i + 1 :])}
        assert {v: places[v] for v in given} == given
        assert size == -(-max(ends) // 256) * 256


def test_a_sequence_refuses_what_does_not_fit(counter: Counter) -> None:
    twin = counter.twin
    strides = (8 * 16, 1, 8 * 4, 8)
    shape, one = (1, 8, 4, 4), (1, 1)
    kernel = twin.Convolution(
        "float32", shape, (8, 8, 1, 1), shape, one, (0, 0), one, 1, strides, (8, 1, 8, 8), strides, None, False, True, 0, False
    )
    with pytest.raises(ValueError, match="needs a step"):
        twin.Sequence([])
    with pytest.raises(ValueError, match="an input and an output"):
        twin.Sequence([(kernel, -1, None, None, None)])
    sequence = twin.Sequence([(kernel, -1, None, 0, None), (kernel, 0, None, -2, None)])
    for values, weights in (([1], [(1, 0, 0)] * 2), ([1, 1], [(1, 0, 0)])):
        with pytest.raises(ValueError, match="too few values or weights"):
            sequence.run(values, 0, weights, 0)
    x, w = torch.randn(1, 8, 4, 4).contiguous(memory_format=LAST), torch.randn(8, 8, 1, 1)
    y, arena = torch.empty_like(x), torch.empty(8 * 16 * 4, dtype=torch.uint8)
    sequence.run([x.data_ptr(), y.data_ptr()], arena.data_ptr(), [(w.data_ptr(), 0, 0)] * 2, 0)
    once = fused_resnet.conv_bias_add_relu(x, w)
    assert torch.equal(y, fused_resnet.conv_bias_add_relu(once, w))
    assert select.SMALL_ON_CUDA > 8 * 8 * 16  # both by the general kernel
