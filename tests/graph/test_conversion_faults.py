"""The comparison of converted with unconverted blocks notices a dropped bias, a wrong eps and a lost shortcut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from _blocks import assert_same
from _conversion import SPELLINGS, block_pair, quiet_and_seeded
from torch import Tensor

from fused_resnet.runtime import bound, executor, program

__all__ = ["quiet_and_seeded"]  # a fixture


def _drop_bias(x: Tensor, w: Tensor, b: Any, *rest: Any) -> Tensor:
    return _operator(x, w, None, *rest)


def _drop_shortcut(x: Tensor, w: Tensor, b: Any, s: Any, *rest: Any) -> Tensor:
    return _operator(x, w, b, None, *rest)


def _drop_relu(*arguments: Any) -> Tensor:
    return _operator(*arguments[:-1], False)


_operator = executor.conv_bias_add_relu


@pytest.mark.parametrize("fault", [_drop_bias, _drop_shortcut, _drop_relu])
@pytest.mark.parametrize("kind", SPELLINGS)
def test_planted_faults(monkeypatch: pytest.MonkeyPatch, fault: Callable[..., Tensor], kind: str) -> None:
    """Layer by layer."""
    original, converted = block_pair(kind)
    monkeypatch.setattr(executor, "_run_native", lambda *arguments: None)
    monkeypatch.setattr(executor, "conv_bias_add_relu", fault)
    with torch.no_grad(), pytest.raises(AssertionError, match="bound"):
        assert_same(converted, original, torch.randn(2, 8, 6, 6))


_native_run = program.run
_operand_of = program.operand_of


def _without_bias(node: bound.BoundConvolution) -> program.Operand:
    operand = _operand_of(node)
    weight, _, *norm = operand.sources
    if not norm:
        return operand._replace(sources=(weight, None))
    gamma, _, mean, variance = norm
    return operand._replace(sources=(weight, None, gamma, None, torch.zeros_like(mean), variance))  # type: ignore[arg-type]


def _without_relu(node: bound.BoundConvolution) -> program.Operand:
    return _operand_of(node)._replace(relu=False)


def _without_shortcut(segment: bound.Segment) -> bound.Segment:
    return segment._replace(steps=tuple([step._replace(shortcut=None) for step in segment.steps]))


@pytest.mark.parametrize("fault", [None, _without_bias, _without_shortcut, _without_relu])
@pytest.mark.parametrize("kind", [kind for kind in SPELLINGS if kind != "pooled"])
def test_planted_faults_in_whole_blocks(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[..., Any] | None, kind: str, kernels: object
) -> None:
    """As one call, which all spellings are but the one that pools in the middle."""
    original, converted = block_pair(kind)
    runs: list[Any] = []

    def run(plans: Any, segment: bound.Segment, *arguments: Any) -> Any:
        runs.append(_native_run(plans, _without_shortcut(segment) if fault is _without_shortcut else segment, *arguments))
        return runs[-1]

    monkeypatch.setattr(program, "run", run)
    if fault is not None and fault is not _without_shortcut:
        monkeypatch.setattr(program, "operand_of", fault)
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        if fault is None:
            assert_same(converted, original, x)
        else:
            with pytest.raises(AssertionError, match="bound"):
                assert_same(converted, original, x)
    assert len(runs) == 1
    assert runs[0] is not None, "it went layer by layer"


def test_planted_eps() -> None:
    """Frozen batch norm without eps, a fault of other packages: seen in the channel of tiny variance."""
    original, converted = block_pair("functional")
    converted.na.eps = converted.nb.eps = 0.0
    with torch.no_grad(), pytest.raises(AssertionError, match="bound"):
        assert_same(converted, original, torch.randn(2, 8, 6, 6))
