"""Tensors whose storage was freed, as FSDP and offloading do between uses: a RuntimeError before any work, as PyTorch's operators have it.

Each case runs in a process of its own, which a read of freed memory would end. In the same process a valid call follows, before which the
memory is there again.
"""

from __future__ import annotations

import pytest
from _calls import run_python

START = """
import torch, fused_resnet, fused_resnet.nn as fnn
from fused_resnet import _plain, reference
torch.set_num_threads(1)
def freed(t, call, name):
    '''``call()`` before, without and with the memory of ``t``.'''
    before = [call() for _ in range(3)][-1]
    storage, kept = t.untyped_storage(), t.detach().clone()
    size = storage.nbytes()
    for _ in range(2):
        storage.resize_(0)
        try:
            call()
        except RuntimeError as error:
            assert "in a storage that was freed" in str(error) and name in str(error), error
        else:
            raise SystemExit("no error")
        storage.resize_(size)
        with torch.no_grad():
            t.copy_(kept)
        after = call()
        assert torch.equal(after, before), "another result after the error"
def operands(channels, size, offset):
    def make(*shape):
        return torch.randn(offset + torch.Size(shape).numel())[offset:].view(shape)
    return {"input": make(1, channels, size, size), "weight": make(channels, channels, 3, 3), "bias": make(channels),
            "shortcut": make(1, channels, size, size)}
"""

OPERATOR = """
o = operands(CHANNELS, SIZE, OFFSET)
if PARAMETERS:
    o["weight"] = torch.nn.Parameter(o["weight"], requires_grad=GRAD)
with torch.set_grad_enabled(GRAD):
    freed(o[WHICH], lambda: fused_resnet.conv_bias_add_relu(**o, padding=1, **MORE).detach(), WHICH)
"""


def run(code: str, **values: object) -> None:
    done = run_python(START + "".join(f"{key} = {value!r}\n" for key, value in values.items()) + code)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("which", ["input", "weight", "bias", "shortcut"])
@pytest.mark.parametrize(
    "what",
    [
        {"CHANNELS": 16, "SIZE": 8, "OFFSET": 0, "PARAMETERS": True, "GRAD": False, "MORE": {}},
        {"CHANNELS": 64, "SIZE": 30, "OFFSET": 24, "PARAMETERS": False, "GRAD": False, "MORE": {}},
        {"CHANNELS": 64, "SIZE": 30, "OFFSET": 0, "PARAMETERS": True, "GRAD": True, "MORE": {}},
        {"CHANNELS": 3, "SIZE": 64, "OFFSET": 8, "PARAMETERS": False, "GRAD": False, "MORE": {}},
    ],
    ids=["small", "a view with an offset", "with a gradient", "the library's convolution"],
)
def test_operator(which: str, what: dict[str, object]) -> None:
    run(OPERATOR, WHICH=which, **what)


PASS = """
x, b, s = torch.randn(1, 8, 9, 9), torch.randn(8), torch.randn(1, 8, 9, 9)
freed({"input": x, "bias": b, "shortcut": s}[WHICH], lambda: fused_resnet.bias_add_relu(x, b, s), WHICH)
"""


@pytest.mark.parametrize("which", ["input", "bias", "shortcut"])
def test_pass(which: str) -> None:
    run(PASS, WHICH=which)


GRADIENT = """
tensors = {"grad": torch.randn(1, 16, 9, 9), "weight": torch.randn(16, CHANNELS, 3, 3), "input": torch.randn(1, CHANNELS, 9, 9)}
other = "weight" if OPERAND == "input" else "input"
call = getattr(torch.ops.fused_resnet, f"conv_{OPERAND}_gradient")
size = tuple(tensors[OPERAND].shape)
op = lambda: call(tensors["grad"], tensors[other], size, False, (1, 1), (1, 1, 1, 1), (1, 1), 1)
freed(tensors[WHICH], op, WHICH)
"""


@pytest.mark.parametrize(("operand", "which"), [("input", "grad"), ("input", "weight"), ("weight", "grad"), ("weight", "input")])
@pytest.mark.parametrize("channels", [16, 3], ids=["ours", "the library's"])
def test_gradient(channels: int, operand: str, which: str) -> None:
    run(GRADIENT, OPERAND=operand, WHICH=which, CHANNELS=channels)


BLOCK = """
block = {"block": lambda: fnn.BasicBlock(16, 16), "bias only": lambda: fnn.BasicBlock(16, 16, norm_layer=torch.nn.Identity),
         "grouped": lambda: fnn.Bottleneck(16, 4, groups=2)}[KIND]().eval()
x = torch.randn(1, 16, 8, 8)
t = x if WHICH == "input" else block.get_parameter(WHICH) if WHICH in dict(block.named_parameters()) else block.get_buffer(WHICH)
with torch.no_grad():
    freed(t, lambda: block(x), "input" if WHICH == "input" else "")
"""


@pytest.mark.parametrize(
    ("kind", "which"),
    [
        ("block", "input"),
        ("block", "conv2.weight"),
        ("block", "bn1.bias"),
        ("block", "bn2.running_var"),
        ("bias only", "conv1.bias"),
        ("grouped", "conv2.weight"),
    ],
)
def test_block(kind: str, which: str) -> None:
    """``fused_resnet.nn``'s, whose calls are repeated; and one that goes layer by layer."""
    run(BLOCK, KIND=kind, WHICH=which)
