"""What every test gets: a seed; thread count, instruction set, algorithm and numerics put back; and fixtures for the compiled
kernels.

A test that takes ``kernels``, ``isa`` or ``algorithm`` is about the hot path. Without the compiled module it fails; only where
FUSED_RESNET_BACKEND=reference asked for that is it skipped, and says so.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from fused_resnet import _extension, _settings


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    threads = torch.get_num_threads()
    cpu = _extension.cpu
    isa = None if cpu is None else cpu.isa()
    settings = _settings.current
    torch.manual_seed(0)
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    if cpu is not None and cpu.isa() != isa:
        _settings.use_isa(isa)
    if _settings.current != settings:
        _settings.change(**settings._asdict())


@pytest.fixture
def one_thread(same_start: None) -> None:
    """For thousands of calls on a few elements: waking a second thread for each takes longer than all the rest."""
    torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def no_garbage_collector() -> Iterator[None]:
    """What is given back must be given back at once, not when the collector comes."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def kernels() -> ModuleType:
    """The compiled module."""
    if _extension.cpu is None:
        if os.environ.get("FUSED_RESNET_BACKEND") == "reference":
            pytest.skip("FUSED_RESNET_BACKEND=reference: the kernels are off, so this test of them did not run")
        pytest.fail(f"no compiled module, so this test of its kernels cannot run: {_extension.missing}")
    return _extension.cpu


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """avx512_bf16 differs from avx512 in its kernels of bfloat16 alone: what is about another dtype has then run already."""

    def again(item: pytest.Item) -> bool:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        return parameters.get("isa") == "avx512_bf16" and parameters.get("dtype", torch.bfloat16) != torch.bfloat16

    config.hook.pytest_deselected(items=[item for item in items if again(item)])
    items[:] = [item for item in items if not again(item)]


@pytest.fixture(params=_extension.cpu.available_isas() if _extension.cpu is not None else ["none"])
def isa(request: pytest.FixtureRequest, kernels: ModuleType) -> str:
    """Each instruction set of this machine in turn, in force during the test."""
    _settings.use_isa(request.param)
    assert kernels.isa() == request.param
    return str(request.param)


@pytest.fixture(params=["direct", "winograd2", "winograd4"])
def algorithm(request: pytest.FixtureRequest, kernels: ModuleType) -> str:
    """Each algorithm in turn, in force wherever it can compute the shape; or those that ``parametrize(..., indirect=True)`` names."""
    _settings.change(algorithm=request.param)
    return str(request.param)


@pytest.fixture
def integers_stay_exact(same_start: None) -> None:
    """Strict numerics in force: the algorithm is chosen as ever, and whatever is chosen is exact on small integers."""
    _settings.set_numerics("strict")


@pytest.fixture
def direct(kernels: ModuleType) -> None:
    """Direct convolution in force: for what is promised of it alone."""
    _settings.change(algorithm="direct")
