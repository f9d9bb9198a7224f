"""What a process can set: plans belong to the settings that they were made with."""

from __future__ import annotations

import functools
import sys
import threading
from types import ModuleType
from typing import Any

import pytest
import torch

import fused_resnet
from fused_resnet import _settings
from fused_resnet.ops import plans
from fused_resnet.ops.backend import Backend


def test_settings_that_are_back_have_their_number_again() -> None:
    first = _settings.number
    with _settings.using(numerics="strict", algorithm="direct"):
        assert _settings.current[:1] == ("strict",)
        assert _settings.number != first
    assert _settings.number == first


def test_using_puts_back_after_an_error() -> None:
    before = _settings.current
    with pytest.raises(KeyError), _settings.using(algorithm="direct"):
        raise KeyError
    assert _settings.current == before


@pytest.mark.parametrize("there_and_back", [False, True])
def test_what_is_made_during_a_change_is_not_kept(there_and_back: bool) -> None:
    """Another thread sets something while a plan is made: which setting the plan is of is not known."""
    kept = _settings.Plans(8)

    def maker() -> str:
        _settings.change(numerics="strict")
        if there_and_back:
            _settings.change(numerics="fast")
        return "a plan"

    assert kept.make(("a call", _settings.number), maker) == "a plan"
    assert not kept.kept
    # Set between the key and the making.
    number = _settings.number
    _settings.change(numerics="fast" if there_and_back is False else "strict")
    assert kept.make(("a call", number), lambda: "a plan") == "a plan"
    assert not kept.kept
    assert kept.make(("a call", _settings.number), lambda: "a plan") == "a plan"
    assert list(kept.kept.values()) == ["a plan"]


def test_what_is_made_between_the_halves_of_a_change_is_not_kept() -> None:
    """Another thread makes a plan when the instruction set is another already and its number is not."""
    kept = _settings.Plans(8)
    _settings.change(lambda: kept.make(("a call", _settings.number), lambda: "a plan"), algorithm="direct")
    assert not kept.kept


@pytest.mark.smoke
def test_threads_that_set_and_call(kernels: ModuleType) -> None:
    """Strict never runs F(4x4, 3x3), whatever another thread sets meanwhile and puts back."""
    x, weight = torch.ones(1, 128, 28, 28), torch.ones(128, 128, 3, 3)
    stop = threading.Event()

    def call() -> None:
        while not stop.is_set():
            plans.convolution_plans.kept.clear()
            fused_resnet.conv_bias_add_relu(x, weight, padding=1)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=call) for _ in range(2)]
    try:
        for thread in threads:
            thread.start()
        for i in range(400):
            fused_resnet.set_numerics("fast" if i % 2 else "strict")
            for key, plan in [*plans.convolution_plans.kept.items()]:
                wanted = "winograd4" if key[-1] == _settings._numbers[_settings.current._replace(numerics="fast")] else "winograd2"
                assert plan.kernel.algorithm == wanted, (i, key[-1])
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)


def test_plans_start_over_beyond_the_most() -> None:
    kept = _settings.Plans(3)
    for i in range(10):
        kept.make((i, _settings.number), functools.partial(int, i))
        assert len(kept.kept) <= 3
        assert kept.kept[i, _settings.number] == i


def test_each_backend_has_its_own_plans(kernels: ModuleType) -> None:
    """One after the other in the same place; and the first one again."""
    x, weight = torch.ones(1, 16, 8, 8), torch.ones(16, 16, 3, 3)

    class Marked(Backend):
        def __init__(self, value: float) -> None:
            self.value = value

        def why_general(self, spec: object) -> list[str]:
            return []

        def kernel_plan(self, spec: object) -> Any:
            return lambda *operands: torch.full((1,), self.value)

    first, second = Marked(1), Marked(2)
    for backend in (first, second, first):
        with plans.backends.using(cpu=backend):
            assert fused_resnet.conv_bias_add_relu(x, weight).item() == backend.value
    assert fused_resnet.conv_bias_add_relu(x, weight).shape == (1, 16, 6, 6)
