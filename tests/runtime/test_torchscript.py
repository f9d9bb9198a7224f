"""TorchScript: a converted block is traced as its author wrote it, and compiled only after it was converted back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from _blocks import Functional, randomise
from torch import nn

from fused_resnet import models
from fused_resnet.fusion import fuse_, unfuse_
from fused_resnet.runtime import fused


@pytest.fixture(autouse=True)
def warnings_are_new() -> None:
    """Each reason is warned of once in a process, whichever test came first."""
    fused._warned.clear()


def _pair() -> tuple[Any, Any]:
    torch.manual_seed(0)
    original = randomise(Functional()).eval()
    converted = copy.deepcopy(original)
    assert fuse_(converted).fused
    return original, converted


@pytest.mark.smoke
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_traces_the_original() -> None:
    original, converted = _pair()
    x = torch.randn(1, 8, 6, 6)
    with pytest.warns(RuntimeWarning, match="torch.jit.trace"):
        traced = torch.jit.trace(converted, (x,))
    assert "fused_resnet" not in str(traced.graph)
    assert torch.equal(traced(x), original(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.jit.trace")
@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
def test_torchscript_traces_what_was_called_or_exported() -> None:
    """A trace records what is read of a tensor, so a block is not looked at while it is traced, and repeats no call."""
    original, converted = _pair()
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        converted(x), converted(x)
        assert torch.equal(torch.jit.trace(converted, (x,))(x * 2), original(x * 2))
        torch.export.export(converted, (x,))
        assert torch.equal(torch.jit.trace(converted, (x,))(x * 2), original(x * 2))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_compiles_the_original() -> None:
    """A converted block has no source of its own, which is said; nothing of the model is changed by the attempt."""
    model = nn.Sequential(nn.Conv2d(8, 8, 1), Functional()).eval()
    assert fuse_(model).fused
    with pytest.raises(RuntimeError, match="convert the model back with fused_resnet"):
        torch.jit.script(model)
    x = torch.randn(1, 8, 6, 6)
    assert not fuse_(model).refused
    script = torch.jit.script(unfuse_(model))
    with torch.no_grad():
        torch.testing.assert_close(script(x), model(x))
    with pytest.raises(RuntimeError, match="use torch"):
        torch.jit.script(models.cifar_resnet(20))
