"""The store of what is derived from weights: how long it is kept, how much of it, and what drops it.

What is trusted: weak references (what is given back is gone), and an unconverted twin or the reference for results.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from _blocks import assert_same, called
from _calls import run_python
from torch import Tensor, nn

import fused_resnet
import fused_resnet.nn as fnn
from fused_resnet import _plain, _settings, reference, testing
from fused_resnet.ops import derived, plans, store
from fused_resnet.runtime import program
from fused_resnet.runtime.cached import key_of

# ---------------------------------------------------------------------------------------------------------------------
# Memory is given back
# ---------------------------------------------------------------------------------------------------------------------


def kept_by(block: Any) -> list[weakref.ref[Any]]:
    """Weak references to all packed weights of a block, and to the storages of its parameters."""
    entries = block._fused_resnet.current.bound.store.entries()
    packed = [weakref.ref(entry.value.buffer) for entry in entries if getattr(entry.value, "buffer", None) is not None]
    assert packed
    return packed + [weakref.ref(p.untyped_storage()) for p in block.parameters()]


def alive(references: list[weakref.ref[Any]]) -> int:
    return sum(reference() is not None for reference in references)


def test_a_deleted_block_gives_everything_back(kernels: ModuleType, no_garbage_collector: None) -> None:
    block = called(fnn.BasicBlock(64, 64).eval())
    kept = kept_by(block)
    assert alive(kept) == len(kept)
    del block
    assert alive(kept) == 0


CONVERSIONS: dict[str, Callable[[nn.Module], Any]] = {
    "double": lambda m: m.double(),
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "unfuse_": fused_resnet.unfuse_,
    "clear_derived": lambda m: fused_resnet.clear_derived(),
}


@pytest.mark.parametrize("how", CONVERSIONS)
def test_packed_weights_are_given_back(kernels: ModuleType, no_garbage_collector: None, how: str) -> None:
    """... at once, without another call."""
    block: Any = nn.Sequential(_plain.BasicBlock(64, 64)).eval()
    fused_resnet.fuse_(block)
    called(block)
    packed = [r for r in kept_by(block[0]) if isinstance(r(), Tensor)]
    CONVERSIONS[how](block)
    assert alive(packed) == 0


def test_an_operators_weight_gives_everything_back(kernels: ModuleType, no_garbage_collector: None) -> None:
    """A Parameter has no weak reference; what is beside its storage goes with that."""
    x = torch.randn(1, 64, 14, 14)
    for make in (lambda t: nn.Parameter(t), lambda t: t):
        weight = make(torch.randn(64, 64, 3, 3))
        before = len(derived._beside)
        with torch.no_grad():
            fused_resnet.conv_bias_add_relu(x, weight, padding=1)
        assert len(derived._beside) == before + 1
        (entry,) = derived._beside[id(weight.untyped_storage())].entries()
        packed = weakref.ref(entry.value)
        del entry
        assert packed() is not None
        del weight
        assert packed() is None
        assert len(derived._beside) == before


@pytest.mark.parametrize("channels", [8, 64])
def test_aliases_of_one_storage(kernels: ModuleType, channels: int) -> None:
    """Tensors made anew from the same memory for each call, through ``.data``: their own version counters, all 0, say nothing about writes to
    the weight. A tensor is another one when it is another object; a Parameter is looked at by its bytes, which are compared in full only up to
    64 KiB. Neither piles up."""
    weight, x = torch.randn(channels, channels, 3, 3), torch.randn(1, channels, 6, 6)
    middle, alive = channels // 2, []
    with torch.no_grad():
        for i in range(30):
            alias = nn.Parameter(weight.data) if i % 2 and channels == 8 else weight.data
            if i % 3 == 0:
                alive.append(alias)
            y = fused_resnet.conv_bias_add_relu(x, alias)
            assert testing.norm_error(y, reference.conv_bias_add_relu(x, weight).double()) <= 1e-5
            weight[middle, middle - 1, 1, 1] += 10
    assert len(derived._beside[id(weight.untyped_storage())].entries()) == 1


def test_switching_numerics_to_and_fro_keeps_plans(kernels: ModuleType) -> None:
    """Plans of a setting that is back are used again, and the packed weights of both settings stay the only ones."""
    plans.convolution_plans.kept.clear()
    weight, x = nn.Parameter(torch.randn(64, 64, 3, 3)), torch.randn(1, 64, 28, 28)
    block = fnn.BasicBlock(64, 64).eval()
    with torch.no_grad():
        for i in range(20):
            fused_resnet.set_numerics("strict" if i % 2 else "fast")
            fused_resnet.conv_bias_add_relu(x, weight, padding=1)
            block(x)
    assert len(plans.convolution_plans.kept) == 2
    bound = block._fused_resnet.current.bound  # type: ignore[union-attr]
    assert bound is not None
    assert len(bound.plans.kept) == 2
    assert len(bound.store.entries()) <= 4
    assert len(derived._beside[id(weight.untyped_storage())].entries()) <= 2


GROWTH = """
import resource, torch
import fused_resnet
from fused_resnet import _plain
torch.set_num_threads(1)
x = torch.randn(1, 128, 14, 14)
def once():
    model = torch.nn.Sequential(_plain.BasicBlock(128, 128), _plain.BasicBlock(128, 128)).eval()
    fused_resnet.fuse_(model)
    with torch.no_grad():
        for _ in range(2):
            model(x)
        fused_resnet.conv_bias_add_relu(x, model[0].conv1.weight, padding=1)
    packed = [e.value.buffer.nbytes for b in model for e in b._fused_resnet.current.bound.store.entries()]
    return sum(packed)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
for _ in range(20):
    packed = once()
before = peak()
for _ in range(180):
    once()
print(packed, peak() - before)
"""


def test_no_growth_over_200_models(kernels: ModuleType) -> None:
    """Made, converted, called, dropped: the last 180 take no more memory than the first 20, but for four models' worth of allocator's luck."""
    done = run_python(GROWTH)
    assert done.returncode == 0, done.stderr
    packed, growth = map(int, done.stdout.split())
    assert packed > 2**20
    assert growth < 4 * packed, f"{growth / packed:.1f} times the packed weights of one model"


def test_what_a_call_reads_is_held(kernels: ModuleType, no_garbage_collector: None) -> None:
    """Another thread may clear, or drop what has changed, while a call runs: the call's packed weights live until it ends."""
    block: Any = called(fnn.BasicBlock(64, 64).eval())
    x = torch.randn(8, 64, 28, 28)
    with torch.no_grad():
        expected = block(x)
    (cached,) = block._fused_resnet.current.bound.store.cached.values()
    call, _ = cached.calls[key_of(x)]
    del cached
    entries = block._fused_resnet.current.bound.store.entries()
    read = [weakref.ref(entry.value.buffer) for entry in entries if any(used is entry for used in call.entries)]
    del entries
    fused_resnet.clear_derived()
    assert len(read) == alive(read) == 2
    assert torch.equal(call(x), expected)
    del call
    assert alive(read) == 0


# ---------------------------------------------------------------------------------------------------------------------
# How much is kept
# ---------------------------------------------------------------------------------------------------------------------


class Buffers:
    """Packed weights that were ever kept, and how many bytes of them are alive."""

    def __init__(self) -> None:
        self.seen: dict[int, weakref.ref[Tensor]] = {}

    def see(self, entries: list[store.Entry]) -> None:
        for entry in entries:
            value = entry.value if isinstance(entry.value, Tensor) else getattr(entry.value, "buffer", None)
            if value is not None:
                self.seen[id(value)] = weakref.ref(value)

    @property
    def alive(self) -> int:
        return sum(t.nbytes for t in [reference() for reference in self.seen.values()] if t is not None)


def settings_in_turn(kernels: ModuleType) -> list[tuple[str, str]]:
    """Each instruction set and algorithm: every packing that a weight can have in one process."""
    return [*itertools.product(kernels.available_isas(), ("direct", "winograd2", "winograd4"))]


def test_all_packings_of_an_operators_weight(kernels: ModuleType, no_garbage_collector: None) -> None:
    """Twice through all of them: right each time, and never more than the bound, although all together are more where there are registers
    of several lengths."""
    weight, x = torch.randn(256, 256, 3, 3), torch.randn(1, 256, 7, 7)
    expected = reference.conv_bias_add_relu(x.double(), weight.double(), padding=1)
    bound, buffers, packings = store.MOST_COPIES * weight.nbytes, Buffers(), {}
    with torch.no_grad():
        for isa, algorithm in 2 * settings_in_turn(kernels):
            _settings.use_isa(isa)
            _settings.change(algorithm=algorithm)
            assert testing.norm_error(fused_resnet.conv_bias_add_relu(x, weight, padding=1), expected) < 1e-5
            beside = derived._beside[id(weight.untyped_storage())]
            buffers.see(beside.entries())
            packings.update({tag: entry.nbytes for entries in beside.places.values() for tag, entry in entries.items()})
            assert 0 < buffers.alive <= bound
    assert bound > store.LEAST
    assert len(kernels.available_isas()) < 2 or sum(packings.values()) > bound


def test_all_packings_of_a_blocks_weights(kernels: ModuleType, no_garbage_collector: None) -> None:
    """The same of a module's, whose calls that can be repeated hold packed weights as well."""
    original = _plain.BasicBlock(256, 256).eval()
    converted: Any = nn.Sequential(_plain.BasicBlock(256, 256)).eval()
    converted[0].load_state_dict(original.state_dict())
    fused_resnet.fuse_(converted)
    x, buffers = torch.randn(1, 256, 7, 7), Buffers()
    with torch.no_grad():
        for isa, algorithm in 2 * settings_in_turn(kernels):
            _settings.use_isa(isa)
            _settings.change(algorithm=algorithm)
            for _ in range(2):
                assert_same(converted[0], original, x)
            buffers.see(converted[0]._fused_resnet.current.bound.store.entries())
            assert 0 < buffers.alive <= 2 * store.MOST_COPIES * original.conv1.weight.nbytes


def test_calls_in_turn_hold_no_more_than_the_store(
    kernels: ModuleType, no_garbage_collector: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for one packing of a weight, two layouts that need different ones push each other out: right, and nothing is left of what
    was pushed out but in the call that was just made."""
    monkeypatch.setattr(store, "MOST_COPIES", 0)
    monkeypatch.setattr(store, "LEAST", 0)
    original = _plain.BasicBlock(64, 64).eval()
    converted: Any = nn.Sequential(_plain.BasicBlock(64, 64)).eval()
    converted[0].load_state_dict(original.state_dict())
    fused_resnet.fuse_(converted)
    buffers = Buffers()
    inputs = torch.randn(1, 64, 2, 2), torch.randn(8, 64, 28, 28)  # direct convolution, and Winograd
    packings: set[object] = set()
    with torch.no_grad():
        for i in range(6):
            assert_same(converted[0], original, inputs[i % 2])
            assert_same(converted[0], original, inputs[i % 2])
            entries = converted[0]._fused_resnet.current.bound.store.entries()
            buffers.see(entries)
            packings.update(converted[0]._fused_resnet.current.bound.store.places[0])
            assert len(entries) == 2
            assert buffers.alive == sum(entry.value.buffer.nbytes for entry in entries)
    assert len(packings) == 2


def test_the_last_value_is_kept_however_large(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it would be made at each call."""
    monkeypatch.setattr(store, "MOST_COPIES", 0)
    monkeypatch.setattr(store, "LEAST", 0)
    weight = nn.Parameter(torch.randn(8, 8, 3, 3))
    made = [derived.find("a tag", (weight,), lambda held: held + 1) for _ in range(3)]
    assert made[0] is made[1] is made[2]


def test_places_of_a_storage_start_over(no_garbage_collector: None) -> None:
    """A flat buffer that is cut into ever new Parameters, which leave no trace when they go."""
    flat = torch.randn(4 * store._MOST_PLACES)
    for i in range(3 * store._MOST_PLACES):
        piece = nn.Parameter(flat[i : i + 8], requires_grad=False)
        assert torch.equal(derived.derive("a tag", (piece,), lambda held: held * 2), piece * 2)
    assert 0 < len(derived._beside[id(flat.untyped_storage())].places) <= store._MOST_PLACES


@pytest.mark.parametrize("beside", [True, False], ids=["beside a storage", "in a module's store"])
def test_what_was_made_before_a_change_goes_at_once(no_garbage_collector: None, beside: bool) -> None:
    """All of it, under whatever tag, before the first new value is made: the old ones and the new are not there at the same time."""
    weight, others = nn.Parameter(torch.randn(64, 64, 3, 3)), nn.Parameter(torch.randn(64, 64, 3, 3))
    module = store.Store()
    place, neighbour = (None, None) if beside else (store.Place(module, 0), store.Place(module, 1))
    kept = [weakref.ref(derived.derive(tag, (weight,), lambda held: held + 1, place)) for tag in ("a", "b", "c")]
    untouched = weakref.ref(derived.derive("a", (others,), lambda held: held + 1, neighbour))
    assert None not in [reference() for reference in kept]
    with torch.no_grad():
        weight.add_(1)

    def make(held: Tensor) -> Tensor:
        assert [reference() for reference in kept] == [None] * 3
        return held + 1

    assert torch.equal(derived.derive("b", (weight,), make, place), weight + 1)
    assert untouched() is not None


def test_another_source_that_changed(no_garbage_collector: None) -> None:
    """Of a value of several sources: what was made of the old one goes before the new is made."""
    module = store.Store()
    weight, mean = nn.Parameter(torch.randn(4, 4, 1, 1)), torch.zeros(4)
    for place in (store.Place(module, 0), None):
        old = weakref.ref(derived.derive("a", (weight, mean), lambda w, m: w + m, place))
        assert old() is not None
        mean.add_(1)

        def make(w: Tensor, m: Tensor, old: Any = old) -> Tensor:
            assert old() is None
            return w + m

        assert torch.equal(derived.derive("a", (weight, mean), make, place), weight + mean)


def test_a_place_whose_store_is_gone(no_garbage_collector: None) -> None:
    """A call that goes on while its module is converted back: values are right, and beside the storage from then on."""
    weight = nn.Parameter(torch.randn(4, 4, 1, 1))
    module = store.Store()
    place = store.Place(module, 0)
    in_module = weakref.ref(derived.derive("a", (weight,), lambda held: held + 1, place))
    assert id(weight.untyped_storage()) not in derived._beside
    del module
    assert in_module() is None
    for i in range(3):
        with torch.no_grad():
            weight.add_(i)
        assert torch.equal(derived.derive("a", (weight,), lambda held: held + 1, place), weight + 1)
    assert len(derived._beside[id(weight.untyped_storage())].entries()) == 1


@pytest.mark.parametrize("beside", [True, False], ids=["beside a storage", "in a module's store"])
def test_a_value_that_cannot_be_made(beside: bool) -> None:
    """There is no memory for it: the error, and the next call makes it. What else is kept of an unchanged weight stays."""
    weight, module = nn.Parameter(torch.randn(8, 8, 3, 3)), store.Store()
    place = None if beside else store.Place(module, 0)
    other = derived.find("other", (weight,), lambda held: held + 1, place)

    def fails(held: Tensor) -> Tensor:
        raise MemoryError

    with pytest.raises(MemoryError):
        derived.derive("a", (weight,), fails, place)
    assert derived.derive("a", (weight,), lambda held: 5, place) == 5
    assert derived.find("other", (weight,), lambda held: held + 2, place) is other


def test_one_parameter_in_a_block_and_in_calls_of_the_operator(kernels: ModuleType, no_garbage_collector: None) -> None:
    """In turn, with changes: each is right, and either may go first."""
    block: Any = fnn.BasicBlock(16, 16, norm_layer=nn.Identity).eval()
    weight, x = block.conv1.weight, torch.randn(1, 16, 9, 9)
    with torch.no_grad():
        for i in range(6):
            weight.mul_(-1)
            for _ in range(1 + i % 2):
                assert testing.norm_error(block(x), block._plain_forward(x).double()) < 1e-5
                expected = reference.conv_bias_add_relu(x, weight, padding=1)
                assert testing.norm_error(fused_resnet.conv_bias_add_relu(x, weight, padding=1), expected.double()) < 1e-5
            if i == 2:
                fused_resnet.clear_derived()
        del block
        assert id(weight.untyped_storage()) in derived._beside
        assert testing.norm_error(fused_resnet.conv_bias_add_relu(x, weight, padding=1), expected.double()) < 1e-5


def test_views_of_two_sizes_at_one_address(kernels: ModuleType, no_garbage_collector: None) -> None:
    """As of networks whose layers use a part of their channels: in turn, each is packed once. Parameters and plain tensors."""
    x, made = torch.randn(1, 64, 7, 7), []
    for wrap in (lambda t: nn.Parameter(t, requires_grad=False), lambda t: t):
        whole = wrap(torch.randn(64, 64, 3, 3))
        part = wrap(whole.data[:32])
        with torch.no_grad():
            for _ in range(4):
                for weight in (whole, part):
                    y = fused_resnet.conv_bias_add_relu(x, weight, padding=1)
                    assert testing.norm_error(y, reference.conv_bias_add_relu(x, weight, padding=1).double()) < 1e-5
                made.append([id(entry) for entry in derived._beside[id(whole.untyped_storage())].entries()])
            assert len(made[-1]) == 2
            assert made[-1] == made[-4]
            whole.mul_(2)  # of a plain tensor's view it is another version counter; of its bytes, all are compared
            for weight in (whole, part):
                y = fused_resnet.conv_bias_add_relu(x, weight, padding=1)
                assert testing.norm_error(y, reference.conv_bias_add_relu(x, weight, padding=1).double()) < 1e-5


def test_a_module_packs_anew_when_the_old_is_gone(kernels: ModuleType, no_garbage_collector: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls that could be repeated with the old weights hold them no longer than until the next call."""
    block: Any = called(fnn.BasicBlock(64, 64).eval())
    packed = [r for r in kept_by(block) if isinstance(r(), Tensor)]
    find, seen = program.find, []

    def watched(tag: Any, sources: Any, make: Any, place: Any) -> Any:
        return find(tag, sources, lambda *held: (seen.append(alive(packed)), make(*held))[1], place)

    monkeypatch.setattr(program, "find", watched)
    with torch.no_grad():
        for convolution in (block.conv1, block.conv2):
            convolution.weight.mul_(2)
        block(torch.randn(8, 64, 28, 28))
    assert seen == [len(packed) // 2, 0]  # at the first make the second layer's are still there


def test_calls_that_cannot_be_repeated_drop_those_that_could(kernels: ModuleType, no_garbage_collector: None) -> None:
    """After the weights were replaced by inference tensors, whose changes nothing counts."""
    block: Any = called(fnn.BasicBlock(64, 64).eval())
    kept = kept_by(block)
    with torch.inference_mode():
        for module in (block.conv1, block.bn1, block.conv2, block.bn2):
            for name, value in [*module._parameters.items()]:
                if value is not None:
                    module._parameters[name] = nn.Parameter(value.clone(), requires_grad=False)
    del value
    with torch.no_grad():
        for _ in range(2):
            x = torch.randn(8, 64, 28, 28)
            assert testing.norm_error(block(x), block._plain_forward(x).double()) < 1e-5
    assert alive(kept) == 0


def test_data_of_another_kind_than_the_tensor(kernels: ModuleType) -> None:
    """``.data`` of an inference tensor's Parameter replaced by what is none: it has a counter neither before nor after, and no error."""
    for put_inference in (True, False):
        block: Any = fnn.BasicBlock(64, 64).eval()
        with torch.inference_mode(put_inference):
            block.conv1.weight = nn.Parameter(block.conv1.weight.clone(), requires_grad=False)
        with torch.inference_mode(not put_inference):
            other = torch.randn(64, 64, 3, 3)
        block.conv1.weight.data = other
        x = torch.randn(1, 64, 9, 9)
        with torch.no_grad():
            for i in range(3):
                assert testing.norm_error(block(x), block._plain_forward(x).double()) < 1e-5
                y = fused_resnet.conv_bias_add_relu(x, block.conv1.weight, padding=1)
                assert testing.norm_error(y, reference.conv_bias_add_relu(x, block.conv1.weight, padding=1).double()) < 1e-5
                with torch.inference_mode():  # between two places that are compared of a large tensor with a counter
                    block.conv1.weight.data[32, 17, 1, i] += 1000
