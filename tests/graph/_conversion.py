"""Blocks of every spelling beside their converted copies."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import _blocks as blocks
import pytest
import torch
from _blocks import randomise
from _torchvision import import_torchvision
from torch import nn

from fused_resnet.fusion import fuse_
from fused_resnet.runtime import fused

SPELLINGS = sorted(blocks.SPELLINGS)


@pytest.fixture(autouse=True)
def quiet_and_seeded() -> Any:
    """A fused block that runs unfused says so; here that is an error unless a test expects it."""
    torch.manual_seed(0)
    fused._warned.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs unfused")
        yield


def block_pair(kind: str, mode: str = "eval") -> tuple[nn.Module, nn.Module]:
    """(original, converted copy) of one spelling with random statistics."""
    original = randomise(blocks.SPELLINGS[kind]()).train(mode == "train")
    converted = copy.deepcopy(original)
    report = fuse_(converted)
    assert len(report.fused) == 1, str(report)
    return original, converted


def small(kind: str, **kwargs: Any) -> nn.Module:
    resnet = import_torchvision().models.resnet
    model: nn.Module = resnet.ResNet(getattr(resnet, kind), [1, 1, 1, 1], num_classes=10, **kwargs)
    return model
