"""The one table of wrong calls: what is called, the error's type, and the sentence it must give, to the letter.

The tests make every call; the documentation quotes the sentences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def _tensor(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


def _sparse(*shape: int) -> Tensor:
    return torch.ones(shape).to_sparse()


def _quantized(*shape: int) -> Tensor:
    return torch._empty_affine_quantized(shape, scale=1.0, zero_point=0, dtype=torch.quint8)


@dataclass(frozen=True)
class ErrorCall:
    """One wrong call. ``changes`` replace arguments of the valid call that ``arguments()`` starts from; they are made when
    called for, so that importing this file allocates nothing."""

    name: str
    error: type[Exception]
    message: str
    changes: dict[str, Callable[[], Any]] = field(default_factory=dict)
    operator: str = "conv_bias_add_relu"

    def arguments(self) -> dict[str, Any]:
        return {**valid_arguments(self.operator), **{name: make() for name, make in self.changes.items()}}


def valid_arguments(operator: str = "conv_bias_add_relu") -> dict[str, Any]:
    """A call that works: input [2, 4, 6, 6], output [2, 8, 6, 6]."""
    if operator == "bias_add_relu":
        return {"input": _tensor(2, 8, 6, 6), "bias": _tensor(8), "shortcut": _tensor(2, 8, 6, 6)}
    return {
        "input": _tensor(2, 4, 6, 6),
        "weight": _tensor(8, 4, 3, 3),
        "bias": _tensor(8),
        "shortcut": _tensor(2, 8, 6, 6),
        "padding": 1,
    }


_FLOATS = "one of the dtypes float64, float32, bfloat16 on cpu"


def _const(value: Any) -> Callable[[], Any]:
    return lambda: value


def _calls() -> list[ErrorCall]:
    table: list[ErrorCall] = []

    def add(name: str, error: type[Exception], message: str, *operator: str, **changes: Any) -> None:
        makers = {key: value if callable(value) else _const(value) for key, value in changes.items()}
        table.append(ErrorCall(name, error, message, makers, *operator))

    # Not a tensor, or a tensor of the wrong kind.
    add("input is a list", TypeError, "input must be a torch.Tensor, got list", input=[[1.0]])
    add("weight is None", TypeError, "weight must be a torch.Tensor, got NoneType", weight=None)
    add("bias is a number", TypeError, "bias must be a torch.Tensor, got float", bias=1.0)
    add("shortcut is a string", TypeError, "shortcut must be a torch.Tensor, got str", shortcut="identity")
    for name, shape in (("input", (2, 4, 6, 6)), ("weight", (8, 4, 3, 3)), ("bias", (8,)), ("shortcut", (2, 8, 6, 6))):
        add(
            f"sparse {name}",
            TypeError,
            f"{name} must be a dense tensor, got layout torch.sparse_coo",
            **{name: lambda shape=shape: _sparse(*shape)},
        )
        add(
            f"nested {name}",
            TypeError,
            f"{name} must be a dense tensor, got a nested one",
            **{name: lambda shape=shape: torch.nested.nested_tensor([torch.ones(shape[1:])] * shape[0])},
        )
    add(
        "quantized input",
        TypeError,
        f"input must have {_FLOATS}, got quint8",
        input=lambda: _quantized(2, 4, 6, 6),
    )
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float16):
        got = str(dtype).removeprefix("torch.")
        add(
            f"{got} input",
            TypeError,
            f"input must have {_FLOATS}, got {got}",
            input=lambda dtype=dtype: _tensor(2, 4, 6, 6, dtype=dtype),
        )
    add(
        "everything integer",
        TypeError,
        f"input must have {_FLOATS}, got int32",
        input=lambda: _tensor(2, 4, 6, 6, dtype=torch.int32),
        weight=lambda: _tensor(8, 4, 3, 3, dtype=torch.int32),
        bias=lambda: _tensor(8, dtype=torch.int32),
        shortcut=lambda: _tensor(2, 8, 6, 6, dtype=torch.int32),
    )
    # A mix of dtypes or devices.
    for name, shape in (("weight", (8, 4, 3, 3)), ("bias", (8,)), ("shortcut", (2, 8, 6, 6))):
        add(
            f"float64 {name} beside float32 input",
            TypeError,
            f"{name} must have input's dtype float32, got float64",
            **{name: lambda shape=shape: _tensor(*shape, dtype=torch.float64)},
        )
        add(
            f"meta {name} beside cpu input",
            ValueError,
            f"{name} must be on input's device cpu, got meta",
            **{name: lambda shape=shape: _tensor(*shape, device="meta")},
        )
    add(
        "meta input beside cpu weight",
        ValueError,
        "weight must be on input's device meta, got cpu",
        input=lambda: _tensor(2, 4, 6, 6, device="meta"),
    )
    # Ranks.
    add(
        "input without a batch",
        ValueError,
        "input must have 4 dimensions [N, C, H, W], got 3: [4, 6, 6]",
        input=lambda: _tensor(4, 6, 6),
    )
    add(
        "input of a video",
        ValueError,
        "input must have 4 dimensions [N, C, H, W], got 5: [2, 4, 6, 6, 6]",
        input=lambda: _tensor(2, 4, 6, 6, 6),
    )
    add(
        "weight of rank 3",
        ValueError,
        "weight must have 4 dimensions [K, C / groups, R, S], got 3: [8, 4, 3]",
        weight=lambda: _tensor(8, 4, 3),
    )
    add("bias of rank 2", ValueError, "bias must have 1 dimensions [K], got 2: [1, 8]", bias=lambda: _tensor(1, 8))
    # Shapes.
    add(
        "bias of another length",
        ValueError,
        "bias must have one value for each of the 8 output channels, got 7",
        bias=lambda: _tensor(7),
    )
    shortcuts: tuple[tuple[str, tuple[int, ...]], ...] = (
        ("of another size", (2, 8, 3, 3)),
        ("of another batch", (1, 8, 6, 6)),
        ("that would broadcast over the map", (2, 8, 1, 1)),
        ("without a batch", (8, 6, 6)),
        ("of one value", ()),
    )
    for what, other in shortcuts:
        add(
            f"shortcut {what}",
            ValueError,
            f"shortcut must have the output's shape [2, 8, 6, 6], got {list(other)}",
            shortcut=lambda other=other: _tensor(*other),
        )
    add(
        "weight for other input channels",
        ValueError,
        "weight must have input channels / groups = 4 channels in its second dimension, got 3",
        weight=lambda: _tensor(8, 3, 3, 3),
    )
    add(
        "weight without outputs",
        ValueError,
        "weight must not be empty, got shape [0, 4, 3, 3]",
        weight=lambda: _tensor(0, 4, 3, 3),
    )
    add(
        "kernel larger than the padded input",
        ValueError,
        "weight's kernel must fit into the padded input: kernel [9, 9] with dilation, padded input [8, 8]",
        weight=lambda: _tensor(8, 4, 9, 9),
        shortcut=None,
    )
    add(
        "dilated kernel larger than the padded input",
        ValueError,
        "weight's kernel must fit into the padded input: kernel [9, 3] with dilation, padded input [8, 8]",
        dilation=(4, 1),
        shortcut=None,
    )
    add(
        "input without pixels",
        ValueError,
        "weight's kernel must fit into the padded input: kernel [3, 3] with dilation, padded input [2, 8]",
        input=lambda: _tensor(2, 4, 0, 6),
        shortcut=None,
    )
    # Groups.
    add(
        "groups that do not divide the channels",
        ValueError,
        "groups must divide the 4 input and the 8 output channels, got 3",
        groups=3,
    )
    add("groups 0", ValueError, "groups must be at least 1, got 0", groups=0)
    add("groups as a float", TypeError, "groups must be an int, got 2.0", groups=2.0)
    # Numbers.
    add("stride 0", ValueError, "stride must be at least 1, got 0", stride=0)
    for name in ("stride", "padding", "dilation"):
        for value in (2**62, 2**63, 2**64):
            add(f"{name} {value}", ValueError, f"{name} must be below 2**62, got {value}", **{name: value})
    add("stride 0 in one direction", ValueError, "stride must be at least 1, got (1, 0)", stride=(1, 0))
    add("dilation 0", ValueError, "dilation must be at least 1, got 0", dilation=0)
    add("negative padding", ValueError, "padding must be at least 0, got -1", padding=-1)
    for name in ("stride", "padding", "dilation"):
        add(
            f"three numbers for {name}",
            ValueError,
            f"{name} must be an int or a pair of ints, got 3 numbers: (1, 1, 1)",
            **{name: (1, 1, 1)},
        )
        add(f"{name} as a float", TypeError, f"{name} must be an int or a pair of ints, got 1.5", **{name: 1.5})
        add(f"{name} as a bool", TypeError, f"{name} must be an int or a pair of ints, got True", **{name: True})
    add("stride as a word", TypeError, "stride must be an int or a pair of ints, got 'same'", stride="same")
    add(
        "unknown padding",
        ValueError,
        "padding must be an int, a pair of ints, 'same' or 'valid', got 'full'",
        padding="full",
    )
    add("padding='same' with a stride", ValueError, "padding='same' needs stride 1, got stride (2, 2)", padding="same", stride=2)
    add(
        "padding='same' and a weight that is none",
        TypeError,
        "weight must be a torch.Tensor, got int",
        padding="same",
        weight=3,
    )
    # The other operator.
    end = "bias_add_relu"
    add("input is None", TypeError, "input must be a torch.Tensor, got NoneType", end, input=None)
    add(
        "float16 input",
        TypeError,
        f"input must have {_FLOATS}, got float16",
        end,
        input=lambda: _tensor(2, 8, 6, 6, dtype=torch.float16),
    )
    add(
        "input of rank 2",
        ValueError,
        "input must have 4 dimensions [N, C, H, W], got 2: [2, 8]",
        end,
        input=lambda: _tensor(2, 8),
    )
    add(
        "bias of another length",
        ValueError,
        "bias must have one value for each of the 8 output channels, got 6",
        end,
        bias=lambda: _tensor(6),
    )
    add(
        "shortcut that would broadcast",
        ValueError,
        "shortcut must have the output's shape [2, 8, 6, 6], got [2, 8, 1, 1]",
        end,
        shortcut=lambda: _tensor(2, 8, 1, 1),
    )
    add(
        "bfloat16 shortcut beside float32 input",
        TypeError,
        "shortcut must have input's dtype float32, got bfloat16",
        end,
        shortcut=lambda: _tensor(2, 8, 6, 6, dtype=torch.bfloat16),
    )
    add(
        "sparse shortcut",
        TypeError,
        "shortcut must be a dense tensor, got layout torch.sparse_coo",
        end,
        shortcut=lambda: _sparse(2, 8, 6, 6),
    )
    return table


ERROR_CALLS: tuple[ErrorCall, ...] = tuple(_calls())


@dataclass(frozen=True)
class EnvironmentCall:
    """A value of an environment variable that makes the import fail, and how the sentence begins and ends."""

    variable: str
    value: str
    begins: str
    ends: str
    needs_module: bool


ENVIRONMENT_ERRORS = (
    EnvironmentCall("FUSED_RESNET_ISA", "sse9", "FUSED_RESNET_ISA must be one of scalar", "got 'sse9'", True),
    EnvironmentCall("FUSED_RESNET_BACKEND", "fast", "FUSED_RESNET_BACKEND must be fused or reference", "got 'fast'", False),
)
