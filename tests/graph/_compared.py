"""A forward and its converted twin: run, written to and changed alike, and compared in all that a forward may do."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator
from typing import Any

import _forwards_writes
import numpy as np
import pytest
import torch
from _blocks import randomise
from _forwards import FORWARDS, WORLD, Once
from torch import Tensor, nn

from fused_resnet.fusion import FusionEntry, fuse_
from fused_resnet.runtime import fused

# Two convolutions of 72 products, each sum rounded as often, folding with three roundings more: some 2**8 half units. Statistics of unit
# size amplify little: measured, at most 2e-15.
BOUND = 1e-12
MODES = ("eval", "train", "mixed")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Changed blocks may run as they are written, and say so."""
    fused._warned.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*runs unfused")
        warnings.filterwarnings("ignore", message=".*ran as its own forward says")
        warnings.filterwarnings("ignore", message=".*does not have any parameters with require")
        yield


def seed() -> None:
    torch.manual_seed(3), random.seed(3), np.random.seed(3)


def pair(name: str) -> tuple[Any, Any, FusionEntry]:
    """(original, converted, its entry) with statistics of unit size."""
    seed()
    original = randomise(FORWARDS[name].make()).double()
    for module in original.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_var is not None
            module.running_var.clamp_(min=0.5)
    holder = nn.Sequential(copy.deepcopy(original))
    (entry,) = fuse_(holder).entries
    return original, holder[0], entry


def written(model: nn.Module) -> dict[str, Any]:
    """Everything that a forward may have written into its modules."""
    found: dict[str, Any] = dict(model.state_dict(keep_vars=True).items())
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            if name not in ("_fused_resnet", "_modules", "_parameters", "_buffers", "training") and "_hooks" not in name:
                found[f"{path}:{name}"] = value
    return found


def run(model: nn.Module, mode: str, grad: bool, capsys: Any) -> dict[str, Any]:
    """All that can be seen of two calls."""
    model.train(mode != "eval")
    if mode == "mixed":
        for part in ("relu", "bn2", "drop"):
            getattr(model, part, nn.Identity()).eval()
    seed()
    before = WORLD["calls"], _forwards_writes.CALLS
    seen: dict[str, Any] = {}
    for call in range(2):
        x = torch.randn(3, 8, 6, 6, dtype=torch.float64)
        with torch.set_grad_enabled(grad):
            leaf = x.clone().requires_grad_(grad)
            model.zero_grad(set_to_none=True)
            try:
                y = model(leaf)
                if grad and y.requires_grad:
                    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
                seen[f"output {call}"], seen[f"requires_grad {call}"] = y.detach(), y.requires_grad
            except Exception as error:
                seen[f"error {call}"] = type(error)
        seen[f"input {call}"], seen[f"input's gradient {call}"] = leaf.detach(), leaf.grad
        seen |= {f"gradient {call} of {name}": p.grad for name, p in model.named_parameters()}
    seen["coins"] = torch.get_rng_state(), repr(random.getstate()), repr(np.random.get_state())
    seen["world"] = WORLD["calls"] - before[0], _forwards_writes.CALLS - before[1]
    seen["printed"] = capsys.readouterr().out
    return seen | written(model)


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two findings differ."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype or a.requires_grad != b.requires_grad:
            return [where]
        if not a.is_floating_point():
            return [] if torch.equal(a, b) else [where]
        scale = max(1.0, float(b.detach().abs().max())) if b.numel() else 1.0
        same = torch.equal(a.isnan(), b.isnan()) and bool(((a - b).detach().abs().nan_to_num() <= BOUND * scale).all())
        return [] if same else [where]
    if isinstance(a, dict) and isinstance(b, dict):
        if [*a] != [*b]:
            return [f"{where}: names {sorted(a.keys() ^ b.keys())}"]
        return [d for key in a for d in differences(a[key], b[key], f"{where} {key}")]
    if isinstance(a, (list, tuple)) and type(a) is type(b) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{where} {i}")]
    if isinstance(a, torch.Generator) and isinstance(b, torch.Generator):
        return [] if torch.equal(a.get_state(), b.get_state()) else [where]
    plain = (bool, int, float, str, type, type(None))
    if isinstance(a, plain) or isinstance(b, plain):
        return [] if type(a) is type(b) and a == b else [where]
    return [] if type(a) is type(b) else [where]  # functions, modules: copies of one another


def compare(original: nn.Module, converted: nn.Module, capsys: Any) -> list[str]:
    found: list[str] = []
    for mode in MODES:
        for grad in (False, True):
            theirs, ours = (run(model, mode, grad, capsys) for model in (original, converted))
            found += [f"{mode}, grad {grad}:{where}" for where in differences(ours, theirs)]
    return found


def apply(change: Any, models: list[nn.Module], patch: pytest.MonkeyPatch) -> None:
    if isinstance(change, Once):
        change.change(patch)
        return
    for model in models:
        torch.manual_seed(5)
        change(model)
