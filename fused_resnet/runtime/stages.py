"""A native call under torch.profiler: the same program with the same result, each of its stages a named range.

A stage is a step, or the whole of a residual block where that goes depth first, a few images at a time. Its range has the names of the
layers that it computes, within the module whose call it is; and how, as an argument, which ``ExecutionTraceObserver`` shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.profiler import record_function

from .._extension import cpu


def paths(module: nn.Module) -> dict[int, str]:
    """The names of a module's children, and theirs, by id."""
    return {id(child): path for path, child in module.named_modules()}


def run_in_ranges(
    program: Any, layers: Sequence[nn.Module | str], names: dict[int, str], weights: Any, input: int, second: int, output: int
) -> bool:
    """``program.run``, stage by stage. layers: of the program's network, in order: modules, or in words."""
    assert cpu is not None
    workspace = cpu.Workspace(program.workspace_bytes)
    for i, (numbers, what) in enumerate(program.stages()):
        with record_function(f"fused_resnet: {_joined([_name(layers[n], names) for n in numbers])}", what):
            if not program.run_stage(i, weights, input, second, output, workspace):
                return False
    return True


def _name(layer: nn.Module | str, names: dict[int, str]) -> str:
    return layer if isinstance(layer, str) else names.get(id(layer), type(layer).__name__)


def _joined(names: list[str]) -> str:
    """Several names, their common parent once: layer1.0.(conv1, conv2)."""
    parents = {name.rpartition(".")[0] for name in names}
    parent = min(parents, key=len)
    if len(names) < 2 or not parent or not all([name.startswith(f"{parent}.") for name in names]):
        return ", ".join(names)
    return f"{parent}.({', '.join([name[len(parent) + 1 :] for name in names])})"
