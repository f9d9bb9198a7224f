"""Derived values: packed weights are made once, remade when the weight changes, never saved, and die with their tensor.

What is trusted: the reference on the changed weight (integers, no tolerance), and a counter around ``Convolution.pack``'s maker.
"""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from _calls import ROOT
from torch import Tensor, nn

import fused_resnet
from fused_resnet import reference
from fused_resnet.ops import cpu, derived, plans

pytestmark = pytest.mark.usefixtures("one_thread", "kernels")

X = torch.arange(2 * 4 * 5 * 5).remainder(7).sub(3).float().reshape(2, 4, 5, 5)


def _weight(seed: int = 0, outputs: int = 6) -> Tensor:
    return torch.randint(-3, 4, (outputs, 4, 3, 3), generator=torch.Generator().manual_seed(seed)).float()


def check(weight: Tensor) -> None:
    with torch.no_grad():
        ours = fused_resnet.conv_bias_add_relu(X, weight, relu=False)
        assert torch.equal(ours, reference.conv_bias_add_relu(X, weight, relu=False))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows by one tag each time that a derived value is made."""
    tags: list[object] = []
    real = derived.find

    def find(tag: object, sources: tuple[Tensor | None, ...], make: Callable[..., Any], *place: Any) -> Any:
        def counted(*held: Tensor | None) -> Any:
            tags.append(tag)
            return make(*held)

        return real(tag, sources, counted, *place)

    monkeypatch.setattr(cpu, "find", find)
    plans.convolution_plans.kept.clear()
    return tags


def test_packed_once(made: list[object]) -> None:
    weight = _weight()
    for _ in range(3):
        check(weight)
    with torch.no_grad():
        fused_resnet.conv_bias_add_relu(X[:1], weight, padding=1)  # another shape: the same packing
    assert len(made) == 1


def _sgd(weight: Tensor) -> None:
    parameter = weight.requires_grad_()
    optimizer = torch.optim.SGD([parameter], lr=1)
    fused_resnet.conv_bias_add_relu(X, parameter).sum().backward()
    optimizer.step()


def _load(weight: Tensor) -> None:
    module = nn.Module()
    module.weight = nn.Parameter(weight)  # the same memory: load_state_dict copies into it
    module.load_state_dict({"weight": _weight(1)})


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "add_": lambda w: w.add_(1),
    "one element": lambda w: w[0, 0, 0, 0].add_(1),
    "copy_": lambda w: w.copy_(_weight(1)),
    "through a view": lambda w: w.view(-1)[3:5].fill_(2),
    "optimizer step": _sgd,
    "load_state_dict": _load,
    ".data = other": lambda w: setattr(w, "data", _weight(1)),
    ".data = other layout": lambda w: setattr(w, "data", _weight(1).contiguous(memory_format=torch.channels_last)),
    "in place through .data": lambda w: w.data.mul_(-1),
    "in place through detach": lambda w: w.detach().mul_(-1),
    "in place through numpy": lambda w: w.detach().numpy().__imul__(-1),
    "set_": lambda w: w.set_(_weight(1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_remade_after(change: str, made: list[object]) -> None:
    weight = _weight()
    with torch.no_grad():
        check(weight)
        before = fused_resnet.conv_bias_add_relu(X, weight, relu=False)
        with torch.enable_grad() if "optimizer" in change else torch.no_grad():
            CHANGES[change](weight)
        weight.requires_grad_(False)
        assert not torch.equal(reference.conv_bias_add_relu(X, weight, relu=False), before), "nothing has changed"
        check(weight)
        packings = len(made)
        check(weight)
    assert len(made) == packings
    assert packings >= 2


@pytest.mark.parametrize("as_parameter", [False, True], ids=["tensor", "parameter"])
def test_writes_through_data_of_a_large_weight(as_parameter: bool) -> None:
    """Above 64 KiB the fingerprint samples 64 words: a write through ``.data`` that changes most of the tensor, or its ends,
    is seen. (One that changes a few words may not be: the limit is in ``ops/derived.py``'s documentation, and the version counter
    sees everything that does not go through ``.data``.)"""
    weight = torch.randint(-2, 3, (64, 64, 3, 3)).float()
    assert weight.nbytes > derived.SOME
    weight = nn.Parameter(weight) if as_parameter else weight
    x = torch.randint(-2, 3, (1, 64, 4, 4)).float()

    def check_large() -> None:
        with torch.no_grad():
            ours = fused_resnet.conv_bias_add_relu(x, weight, relu=False)
            assert torch.equal(ours, reference.conv_bias_add_relu(x, weight, relu=False))

    check_large()
    weight.data.mul_(-2)
    check_large()
    weight.data[0, 0, 0, 0] += 1
    check_large()
    weight.data[-1, -1, -1, -1] += 1
    check_large()
    with torch.no_grad():
        weight[31, 17, 1, 1] += 1  # one word in the middle, but counted
    check_large()


@pytest.mark.smoke
def test_training_loop() -> None:
    """Forward, backward, step, evaluation, ten times: weights and outputs equal those of the reference (integers: gradients are exact)."""
    ours, theirs = (nn.Parameter(_weight(outputs=3)) for _ in range(2))
    optimizers = [torch.optim.SGD([parameter], lr=1.0) for parameter in (ours, theirs)]
    for step in range(10):
        x = torch.randint(-1, 2, (1, 4, 4, 4), generator=torch.Generator().manual_seed(step)).float()
        for module, parameter, optimizer in zip((fused_resnet, reference), (ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            module.conv_bias_add_relu(x, parameter, relu=True).sum().backward()
            optimizer.step()
        assert torch.equal(ours, theirs)
        with torch.no_grad():  # a step packs its weight for itself; without gradients it is kept, and the next step changes it
            assert torch.equal(fused_resnet.conv_bias_add_relu(x, ours), reference.conv_bias_add_relu(x, theirs))
    assert not torch.equal(ours, _weight(outputs=3))


def test_copies_have_packings_of_their_own() -> None:
    weight = nn.Parameter(_weight())
    check(weight)
    for other in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), weight.detach().clone()):
        with torch.no_grad():
            other.mul_(2)
        check(other)
        check(weight)
    # Two tensors on the same memory: a change through one is seen by the other.
    alias = weight.detach()
    check(alias)
    with torch.no_grad():
        alias.add_(1)
    check(weight)
    check(alias)


def test_nothing_is_saved() -> None:
    """Pickles, state_dicts and deep copies of a module are what they were before the first call."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return fused_resnet.conv_bias_add_relu(x, self.conv.weight, self.conv.bias)

    def saved(module: nn.Module) -> tuple[int, int, list[str], list[str]]:
        buffer = io.BytesIO()
        torch.save(module.state_dict(), buffer)
        attributes = [*vars(module), *vars(module.conv), *vars(module.conv.weight)]
        return len(pickle.dumps(module.conv)), buffer.tell(), list(module.state_dict()), attributes

    block = Block().eval()
    before = saved(block)
    with torch.no_grad():
        block(X)
        with torch.autocast("cpu", torch.bfloat16):
            block(X)
    assert len(derived._beside) > 0
    assert saved(block) == before
    twin = copy.deepcopy(block)
    assert saved(twin) == before
    with torch.no_grad():
        assert torch.equal(twin(X), block(X))


@pytest.fixture
def no_entries() -> Iterator[None]:
    """No derived values before the test but those that it makes."""
    plans.convolution_plans.kept.clear()
    derived.clear()
    gc.collect()
    assert len(derived._beside) == 0
    yield
    derived.clear()


def test_entries_die_with_their_tensor(no_entries: None) -> None:
    weights = [_weight(seed) for seed in range(5)]
    for weight in weights:
        check(weight)
    assert len(derived._beside) == 5
    del weights[1:], weight
    gc.collect()
    assert len(derived._beside) == 1
    check(weights[0])
    for seed in range(50):  # new tensors at old addresses, with old ids
        check(_weight(seed))
    gc.collect()
    assert len(derived._beside) == 1
    derived.clear()
    check(weights[0])


@pytest.mark.smoke
def test_a_tensor_is_not_kept_alive(no_entries: None) -> None:
    import weakref

    weight = _weight()
    check(weight)
    reference_to = weakref.ref(weight)
    del weight
    gc.collect()
    assert reference_to() is None


def test_inference_tensors(no_entries: None) -> None:
    """No version counter: every byte is looked at on every call."""
    with torch.inference_mode():
        weight = torch.randint(-2, 3, (64, 64, 3, 3)).float()
        x = torch.randint(-2, 3, (1, 64, 4, 4)).float()
        assert weight.is_inference()
        for place in (None, (0, 0, 0, 0), (31, 17, 1, 1), (63, 63, 2, 2)):
            if place is not None:
                weight[place] += 1
            ours = fused_resnet.conv_bias_add_relu(x, weight, relu=False)
            assert torch.equal(ours, reference.conv_bias_add_relu(x, weight, relu=False))
    # A normal weight packed under inference_mode serves, and is watched, outside of it.
    normal = _weight()
    with torch.inference_mode():
        fused_resnet.conv_bias_add_relu(X, normal)
    check(normal)
    normal.add_(1)
    check(normal)
    parameter = normal.requires_grad_()
    y = fused_resnet.conv_bias_add_relu(X, parameter)
    y.sum().backward()
    assert parameter.grad is not None


def test_weights_that_are_not_dense(no_entries: None) -> None:
    """Their bytes cannot be fingerprinted from the first element on: packed anew each time, and right after any change."""
    buffer = torch.randint(-3, 4, (6, 4, 3, 6)).float()
    for weight in (buffer[..., ::2], buffer[:, :, :, 1:4], buffer[:1, ..., :3].expand(6, 4, 3, 3)):
        check(weight)
        buffer.data.add_(1)
        check(weight)
        buffer.data[..., 2] = 7
        check(weight)
    assert len(derived._beside) == 0
    # Dense in another order of the axes: kept.
    dense = (_weight().permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3), _weight().mT.contiguous().mT)
    for count, weight in enumerate(dense, start=1):
        check(weight)
        weight.data.add_(1)
        check(weight)
        assert len(derived._beside) == count


def test_what_counts_as_dense() -> None:
    """``is_dense`` decides by strides alone; what it says for the shapes that are easy to get wrong."""
    dense = torch.zeros(4, 3, 2, 2)
    yes = (dense, dense.permute(3, 1, 0, 2), dense[:1], torch.zeros(5, 1, 1, 1), torch.zeros(0, 3, 2, 2))
    no = (dense[:, 1:], dense[..., ::2], dense[:1].expand(4, 3, 2, 2))
    assert [derived.is_dense(t) for t in yes] == [True] * len(yes)
    assert [derived.is_dense(t) for t in no] == [False] * len(no)


def test_the_cast_weight_of_autocast_follows_too() -> None:
    weight = _weight()
    for _ in range(3):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            ours = fused_resnet.conv_bias_add_relu(X, weight)
        expected = reference.conv_bias_add_relu(X.bfloat16(), weight.bfloat16())
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, expected)
        weight.add_(1)


def test_a_failed_packing_is_not_kept(no_entries: None) -> None:
    weight = _weight()

    def fails(held: Tensor) -> Tensor:
        raise MemoryError

    with pytest.raises(MemoryError):
        derived.derive("packed", (weight,), fails)
    assert derived.derive("packed", (weight,), lambda held: 5) == 5
    check(weight)


_STATISTICS = """
import copy, sys, torch
sys.path.insert(0, sys.argv[1])
from _blocks import Functional, assert_same, randomise
from fused_resnet.fusion import fuse_
for counted in (True, False):
    original = randomise(Functional())
    if not counted:
        original.na.num_batches_tracked = original.nb.num_batches_tracked = None
    converted = copy.deepcopy(original)
    assert fuse_(converted).fused
    x = torch.randn(4, 8, 6, 6)
    with torch.no_grad():
        for _ in range(2):
            for training in (False, True, False):
                if training:
                    original.train()(x), converted.train()(x)
                else:
                    assert_same(converted.eval(), original.eval(), x)
"""


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_statistics_that_training_changed(backend: str) -> None:
    """Batch norm raises no version when it updates them: bytes tell, or where none are read the counter; without a counter nothing is kept."""
    folder = str(ROOT / "tests")
    environment = {**os.environ, "FUSED_RESNET_BACKEND": backend}
    command = [sys.executable, "-W", "ignore", "-c", _STATISTICS, folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
