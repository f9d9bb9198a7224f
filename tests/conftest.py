"""What every test gets: a seed, and thread count and instruction set put back; and fixtures for the compiled kernels.

A test that takes ``kernels`` or ``isa`` is about the hot path. Without the compiled module it fails; only where
FUSED_RESNET_BACKEND=reference asked for that is it skipped, and says so.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from fused_resnet import _extension, _kernels


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    threads = torch.get_num_threads()
    cpu = _extension.cpu
    isa = None if cpu is None else cpu.isa()
    torch.manual_seed(0)
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    if cpu is not None and cpu.isa() != isa:
        _kernels.use_isa(isa)


@pytest.fixture
def one_thread(same_start: None) -> None:
    """For thousands of calls on a few elements: waking a second thread for each takes longer than all the rest."""
    torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def kernels() -> ModuleType:
    """The compiled module."""
    if _extension.cpu is None:
        if os.environ.get("FUSED_RESNET_BACKEND") == "reference":
            pytest.skip("FUSED_RESNET_BACKEND=reference: the kernels are off, so this test of them did not run")
        pytest.fail(f"no compiled module, so this test of its kernels cannot run: {_extension.missing}")
    return _extension.cpu


@pytest.fixture(params=_extension.cpu.available_isas() if _extension.cpu is not None else ["none"])
def isa(request: pytest.FixtureRequest, kernels: ModuleType) -> str:
    """Each instruction set of this machine in turn, in force during the test."""
    _kernels.use_isa(request.param)
    assert kernels.isa() == request.param
    return str(request.param)
