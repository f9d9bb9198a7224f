"""Weights that change while Winograd's transforms of them are kept: in modules, copies and pickles, under other threads' calls."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from _exact import WINOGRAD
from torch import Tensor, nn

import fused_resnet
import fused_resnet.nn as fnn
from fused_resnet.ops import cpu, derived
from fused_resnet.runtime import program as native_program


@pytest.mark.parametrize("algorithm", ["direct", *WINOGRAD], indirect=True)
def test_modules_whose_weights_change(algorithm: str, one_thread: None) -> None:
    """load_state_dict, .data =, in place, an optimizer's step, deepcopy, pickle: the result is that of a module that was
    made with these weights, bit for bit; of a layer, and of a block whose call is repeated."""
    x = torch.randn(2, 16, 9, 9)

    def fresh(module: nn.Module) -> Tensor:
        twin = copy.deepcopy(module)
        twin.load_state_dict(module.state_dict())
        y: Tensor = twin(x)
        return y

    modules = (fnn.ConvBiasAddReLU2d(16, 16, 3, padding=1), fnn.BasicBlock(16, 16), fnn.Bottleneck(16, 4))
    for module in (m.eval() for m in modules):
        parameter = next(p for p in module.parameters() if p.dim() == 4 and p.shape[2] == 3)
        other = {key: t * 1.5 if t.is_floating_point() else t for key, t in module.state_dict().items()}

        def step(parameter: nn.Parameter = parameter, module: nn.Module = module) -> None:
            with torch.enable_grad():
                module(x).square().sum().backward()
            torch.optim.SGD([parameter], lr=1e-3).step()

        changes: dict[str, Callable[[], Any]] = {
            "load_state_dict": lambda module=module, other=other: module.load_state_dict(other),
            ".data =": lambda parameter=parameter: setattr(parameter, "data", -parameter.data.clone()),
            "in place": lambda parameter=parameter: parameter.mul_(0.5),
            "in place through .data": lambda parameter=parameter: parameter.data.mul_(3),
            "one element": lambda parameter=parameter: parameter[3, 2, 1, 0].add_(1),
            "step": step,
            "channels_last": lambda module=module: module.to(memory_format=torch.channels_last),
        }
        with torch.no_grad():
            for what, change in changes.items():
                before = [module(x) for _ in range(3)][-1]
                change()
                ours = [module(x) for _ in range(3)]
                expected = fresh(module)
                assert all(torch.equal(y, expected) for y in ours), f"{type(module).__name__}: {what}"
                assert what == "channels_last" or not torch.equal(ours[0], before), "nothing has changed"
            for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
                assert torch.equal(twin(x), expected)
                next(twin.parameters()).mul_(2)
                assert torch.equal(twin(x), fresh(twin))
                assert torch.equal(module(x), expected)


class Layer(nn.Module):
    """One 3x3 convolution without a bias: one tensor, so that a result belongs to one state of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(32, 32, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return fused_resnet.conv_bias_add_relu(x, self.conv.weight, padding=1, relu=False)


@pytest.mark.parametrize("whole", [False, True], ids=["layer", "block"])
@pytest.mark.parametrize("algorithm", ["direct", *WINOGRAD], indirect=True)
def test_a_weight_that_is_replaced_while_eight_threads_use_it(algorithm: str, whole: bool, one_thread: None) -> None:
    """Each result is that of the old weight or of the new one, entirely; and when the last replacement is over, of the last."""
    module: nn.Module = fnn.BasicBlock(32, 32, norm_layer=nn.Identity).eval() if whole else Layer()
    conv = module.conv2 if whole else module.conv
    x = torch.randn(1, 32, 14, 14)
    weights = [conv.weight.detach().clone(), -conv.weight.detach(), 2 * conv.weight.detach()]  # type: ignore[operator, union-attr]
    with torch.no_grad():
        expected = []
        for w in weights:
            conv.weight.data = w  # type: ignore[union-attr]
            expected.append(copy.deepcopy(module)(x))
        errors: list[str] = []
        stop = threading.Event()

        def read() -> None:
            with torch.no_grad():  # of this thread
                while not stop.is_set():
                    y = module(x)
                    if not any(torch.equal(y, e) for e in expected):
                        errors.append("neither the one nor the other")
                        return

        for last in (0, 1, 2, 0):
            stop.clear()
            threads = [threading.Thread(target=read) for _ in range(8)]
            for thread in threads:
                thread.start()
            for turn in range(15):
                time.sleep(0.001)
                conv.weight.data = weights[(turn + last + 1) % 3]  # type: ignore[union-attr]
            conv.weight.data = weights[last]  # type: ignore[union-attr]
            stop.set()
            for thread in threads:
                thread.join()
            assert not errors, errors[0]
            for _ in range(3):
                assert torch.equal(module(x), expected[last]), "a weight that is no longer there is still used"


def test_a_weight_that_changes_during_a_blocks_call(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the kernels run, other threads may. What they change is seen at the next call, also where it would be repeated."""
    x = torch.randn(1, 16, 8, 8)
    native_run = native_program.run
    for change in ("in place", ".data =", "running_mean", "eps"):
        block = fnn.BasicBlock(16, 16).eval()

        def meanwhile(block: fnn.BasicBlock = block, change: str = change) -> None:
            if change == "in place":
                block.conv2.weight.mul_(-2)
            elif change == ".data =":
                block.conv2.weight.data = -2 * block.conv2.weight.data
            elif change == "running_mean":
                block.bn1.running_mean.add_(1)  # type: ignore[union-attr]
            else:
                block.bn1.eps = 1.0  # type: ignore[union-attr]

        def run(*arguments: Any, meanwhile: Callable[[], None] = meanwhile) -> Any:
            result = native_run(*arguments)
            meanwhile()
            return result

        with torch.no_grad():
            with monkeypatch.context() as patched:
                patched.setattr(native_program, "run", run)
                before = block(x)
            expected = copy.deepcopy(block)(x)
            assert not torch.equal(before, expected)
            for _ in range(3):
                assert torch.equal(block(x), expected), f"{change}: the old state is still used"


@pytest.mark.parametrize("whole", [False, True], ids=["layer", "block"])
@pytest.mark.parametrize("moment", ["before the packing", "while it packs"])
def test_a_weight_that_is_replaced_and_put_back(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, whole: bool, moment: str
) -> None:
    """Another thread replaces the weight and puts the old one back, all within one call: what was made meanwhile from the other one
    must not be kept for the old one."""
    module: nn.Module = fnn.BasicBlock(32, 32, norm_layer=nn.Identity).eval() if whole else Layer()
    conv = module.conv2 if whole else module.conv
    old = conv.weight.data  # type: ignore[union-attr]
    other = -old  # type: ignore[operator]
    x = torch.randn(1, 32, 14, 14)
    find = derived.find

    def replaced_before(tag: Any, sources: Any, make: Any, *store: Any) -> Any:
        conv.weight.data = other  # type: ignore[union-attr]
        try:
            return find(tag, sources, make, *store)
        finally:
            conv.weight.data = old  # type: ignore[union-attr]

    def replaced_within(tag: Any, sources: Any, make: Any, *store: Any) -> Any:
        def while_replaced(*held: Any) -> Any:
            conv.weight.data = other  # type: ignore[union-attr]
            try:
                return make(*held)
            finally:
                conv.weight.data = old  # type: ignore[union-attr]

        return find(tag, sources, while_replaced, *store)

    with torch.no_grad():
        expected = copy.deepcopy(module)(x)
        with monkeypatch.context() as patched:
            replaced = replaced_within if moment == "while it packs" else replaced_before
            patched.setattr(native_program if whole else cpu, "find", replaced)
            y = module(x)
        assert torch.equal(y, expected) == (moment == "while it packs"), "the weight was not replaced at that moment"
        for _ in range(3):
            assert torch.equal(module(x), expected), "a weight that is no longer there is still used"


@pytest.mark.parametrize("algorithm", ["direct", *WINOGRAD], indirect=True)
def test_load_state_dict_while_others_call(algorithm: str, one_thread: None) -> None:
    """A call that overlaps with it may see both states, as it may in PyTorch itself. Afterwards none does."""
    module = fnn.BasicBlock(32, 32).eval()
    x = torch.randn(1, 32, 14, 14)
    states = [copy.deepcopy(module.state_dict()) for _ in range(2)]
    for key, t in states[1].items():
        if t.is_floating_point() and "var" not in key:
            t.mul_(-1)
    stop = threading.Event()

    def read() -> None:
        with torch.no_grad():
            while not stop.is_set():
                assert module(x).isfinite().all()

    with torch.no_grad():
        for turn in range(8):
            stop.clear()
            threads = [threading.Thread(target=read) for _ in range(3)]
            for thread in threads:
                thread.start()
            time.sleep(0.004)
            module.load_state_dict(states[turn % 2])
            stop.set()
            for thread in threads:
                thread.join()
            twin = copy.deepcopy(module)
            assert torch.equal(module(x), twin(x))
