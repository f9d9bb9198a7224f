"""PyTorch's undocumented names (``_compat.py``): each is there and means what we take it to mean, and what happens where one is gone."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fused_resnet
from fused_resnet import _compat

PACKAGE = Path(fused_resnet.__file__).parent


def test_no_name_is_missing() -> None:
    assert _compat.missing == []


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def _profiler() -> Iterator[None]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        yield


LISTENERS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "function mode": (Functions, _compat.function_modes),
    "dispatch mode": (Dispatched, _compat.dispatch_modes),
    "flop counter": (lambda: FlopCounterMode(display=False), _compat.dispatch_modes),
    "profiler": (_profiler, _compat.profiler_enabled),
    "forward-mode gradients": (forward_ad.dual_level, _compat.forward_mode),
    "autocast": (lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.is_autocast_enabled("cpu")),
}


@pytest.mark.parametrize("kind", LISTENERS)
def test_who_listens_is_heard(kind: str) -> None:
    enter, probe = LISTENERS[kind]
    assert not probe()
    assert _compat.is_quiet()
    with enter():
        assert probe()
        assert not _compat.is_quiet()
        assert not _compat.nobody_listens(torch.ones(1))
    assert not probe()
    assert _compat.is_quiet()
    assert _compat.nobody_listens(torch.ones(1))


@pytest.mark.smoke
def test_tracing_and_transforms_are_heard() -> None:
    found: list[bool] = []

    def watch(x: Tensor) -> Tensor:
        found.append(_compat.is_quiet())
        return x * 2

    torch.jit.trace(lambda x: watch(x), torch.ones(2), check_trace=False)
    torch.func.vmap(watch)(torch.ones(2, 3))
    torch.func.grad(lambda x: watch(x).sum())(torch.ones(2))
    torch.func.jvp(watch, (torch.ones(2),), (torch.ones(2),))
    assert found == [False] * 4
    assert _compat.is_quiet()


def test_a_device_context_is_no_listener() -> None:
    """``torch.set_default_device`` is a mode too; it wants to see nothing."""
    with torch.device("cpu"):
        assert _compat.function_modes()
        assert not _compat.has_function_mode()
    with Functions():
        assert _compat.has_function_mode()


def test_global_hooks_are_heard() -> None:
    assert not any(_compat.GLOBAL_HOOKS)
    register = nn.modules.module
    for way in (
        register.register_module_forward_pre_hook,
        register.register_module_forward_hook,
        register.register_module_full_backward_pre_hook,
        register.register_module_full_backward_hook,
    ):
        handle = way(lambda *arguments: None)
        assert any(_compat.GLOBAL_HOOKS), way
        handle.remove()
    assert not any(_compat.GLOBAL_HOOKS)


def test_tf32_is_what_the_user_has_set() -> None:
    before = _compat.tf32()
    for allowed in (True, False):
        with _compat.using_tf32(allowed):
            assert _compat.tf32() == allowed
    assert _compat.tf32() == before


def test_a_constant_result_is_one_to_the_compiler() -> None:
    """The attribute that ``torch.compiler.assume_constant_result`` sets: the function runs once, while Dynamo looks, and not in the graph."""
    calls: list[int] = []

    @_compat.constant_result
    def ask(x: int) -> int:
        calls.append(x)
        return len(calls)

    compiled = torch.compile(lambda t: t + ask(3), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)).item() == compiled(torch.zeros(1)).item() == len(calls)
    marked = torch.compiler.assume_constant_result(lambda: None)
    assert vars(marked).items() >= {"_dynamo_marked_constant": True}.items()


# A finder that gives _compat.py a getattr and a hasattr which do not know the name.
HIDE = """
import importlib.abc, importlib.util, sys
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if fullname != "fused_resnet._compat":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        execute = spec.loader.exec_module
        def exec_module(module):
            def hiding(thing, name, *default):
                if name == {hidden!r}:
                    if default:
                        return default[0]
                    raise AttributeError(name)
                return getattr(thing, name, *default)
            module.getattr = hiding
            module.hasattr = lambda thing, name: name != {hidden!r} and hasattr(thing, name)
            execute(module)
        spec.loader.exec_module = exec_module
        return spec
sys.meta_path.insert(0, Finder())
"""

GONE = """
import torch
{hide}
import fused_resnet
from fused_resnet import _compat, reference
assert _compat.missing == [{name!r}], _compat.missing
assert not _compat.is_quiet() or {name!r} in {quiet!r}
x, w = torch.arange(72.).reshape(2, 4, 3, 3).sub(30), torch.arange(144.).reshape(4, 4, 3, 3).remainder(5).sub(2)
ours = fused_resnet.conv_bias_add_relu(x, w, None, x, padding=1)
assert torch.equal(ours, reference.conv_bias_add_relu(x, w, None, x, padding=1))
block = fused_resnet.nn.BasicBlock(4, 4).eval()
with torch.no_grad():
    assert torch.allclose(block(x), block._plain_forward(x), rtol=1e-4, atol=1e-4)
"""
ASKED_BY_CALLS = (
    "_C._len_torch_dispatch_stack",
    "_C._len_torch_function_stack",
    "_C._autograd._profiler_enabled",
    "_C._get_tracing_state",
    "_C._functorch.peek_interpreter_stack",
    "autograd.forward_ad._current_level",
)
ASKED_BY_BLOCKS = (
    "_C._is_tracing",
    "overrides._get_current_function_mode_stack",
    "utils._device.DeviceContext",
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
)


@pytest.mark.parametrize("name", ASKED_BY_CALLS + ASKED_BY_BLOCKS)
def test_a_name_that_is_gone_makes_calls_slow_and_never_wrong(name: str) -> None:
    """In a process of its own: the name is hidden from ``_compat`` alone, for PyTorch needs it."""
    code = GONE.format(hide=HIDE.format(hidden=name.rpartition(".")[2]), name=name, quiet=ASKED_BY_BLOCKS)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


# What torch and its modules are called.
MODULES = ("torch", "nn", "F", "fx", "forward_ad", "nn_module")


def test_private_names_stand_in_one_file() -> None:
    """``torch._C`` and what else begins with an underscore inside torch: read in _compat.py and nowhere else in the library.

    The applications may (they set Inductor's options), and the harness of the benchmarks.
    """
    found = []
    for file in PACKAGE.rglob("*.py"):
        where = file.relative_to(PACKAGE)
        if where.name == "_compat.py" or where.parts[0] in ("benchmark", "cli", "testing"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[0] in MODULES:
                names = [node.attr]
            elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "torch":
                names = [*(node.module or "").split("."), *[alias.name for alias in node.names]]
            elif isinstance(node, ast.Import):
                names = [part for alias in node.names if alias.name.startswith("torch.") for part in alias.name.split(".")]
            found += [f"{where}:{node.lineno} {name}" for name in names if name.startswith("_") and not name.startswith("__")]
    assert not found, "\n".join(found)


def test_import_leaves_the_compiler_alone() -> None:
    """``torch._dynamo`` takes as long to import as torch."""
    code = "import torch, sys; before = set(sys.modules); import fused_resnet; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = [name for name in done.stdout.split() if name.startswith(("torch._dynamo", "torch._inductor", "sympy", "torch.onnx"))]
    assert "fused_resnet.ops.plans" in done.stdout.split()
    assert not heavy, heavy

