"""The names of PyTorch's modules that it does not document, in one place.

Two kinds. Who listens to a call (modes, transforms, tracing, the profiler, hooks): each name is looked for once, at import, and where
a PyTorch has it no more the safe answer stands in for it, which makes a call slower and never wrong: somebody is then taken to
listen. ``missing`` lists those. The others are needed: the dispatcher's guards, fake tensors, TF32, CUDA streams; without one of
them an import or the call that needs it fails with its name. What PyTorch changes in meaning and not in name, tests/ops/test_compat.py sees.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.utils._device
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

missing: list[str] = []


def _find(path: str, otherwise: Any, base: Any = torch) -> Any:
    """The object of this name below ``base``; ``otherwise`` where there is none, and its name among the ``missing``."""
    found = base
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            missing.append(path)
            return otherwise
    return found


def _always(answer: Any) -> Callable[..., Any]:
    return lambda *args: answer


# How many modes of torch.utils._python_dispatch and of torch.overrides are active.
dispatch_modes: Callable[[], int] = _find("_C._len_torch_dispatch_stack", _always(1))
function_modes: Callable[[], int] = _find("_C._len_torch_function_stack", _always(1))
profiler_enabled: Callable[[], bool] = _find("_C._autograd._profiler_enabled", _always(True))
# What torch.jit.trace keeps while it records; None: it does not.
tracing_state: Callable[[], Any] = _find("_C._get_tracing_state", _always(True))
is_traced: Callable[[], bool] = _find("_C._is_tracing", _always(True))
# The innermost transform of torch.func; None: there is none.
functorch_level: Callable[[], Any] = _find("_C._functorch.peek_interpreter_stack", _always(True))
# Whether a tensor is one of the batched ones of torch's older vmap, by which autograd batches gradients (is_grads_batched, vectorize).
_is_batched: Callable[[Tensor], bool] = _find("_C._functorch.is_legacy_batchedtensor", _always(True))
_function_mode_stack: Callable[[], list[Any]] = _find("overrides._get_current_function_mode_stack", lambda: [None])
_DeviceContext: Any = _find("utils._device.DeviceContext", ())

# torch's own registries: one of them is not empty as long as a global module hook is registered.
_HOOKS = ("_global_forward_pre_hooks", "_global_forward_hooks", "_global_backward_pre_hooks", "_global_backward_hooks")
GLOBAL_HOOKS: tuple[dict[int, Any], ...] = tuple([_find(name, {0: None}, nn_module) for name in _HOOKS])

# Hooks by where a module keeps them.
HOOKS: dict[str, str] = {
    "_forward_pre_hooks": "a forward pre-hook",
    "_forward_hooks": "a forward hook",
    "_backward_hooks": "a backward hook",
    "_backward_pre_hooks": "a backward pre-hook",
}

# Its ``_current_level`` is -1 where no forward-mode gradients are being computed.
_levels: Any = forward_ad
if not hasattr(forward_ad, "_current_level"):
    missing.append("autograd.forward_ad._current_level")
    _levels = SimpleNamespace(_current_level=0)


def forward_mode() -> bool:
    """Whether forward-mode gradients are being computed."""
    return _levels._current_level >= 0  # type: ignore[no-any-return]


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether forward-mode gradients are wanted of one of these tensors, or of all that are computed with (torch.func)."""
    if not forward_mode():
        return False
    return functorch_level() is not None or any([t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors])


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode gradients want to see what is computed."""
    return forward_mode() or functorch_level() is not None


def has_function_mode() -> bool:
    """Whether a mode of torch.overrides is active that does more than choose the device of what is made."""
    return bool(function_modes()) and any([not isinstance(mode, _DeviceContext) for mode in _function_mode_stack()])


def is_quiet(but_for_profiler: bool = False, but_for_autocast: bool = False) -> bool:
    """Whether nothing outside of its tensors keeps a call from going straight to the kernel: no autocast, no tracing, no mode, no
    profiler (``but_for_...``: that may be there). torch.compile traces this function's caller: that is to be asked before."""
    return not (
        dispatch_modes()
        or function_modes()
        or (not but_for_autocast and (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")))
        or (not but_for_profiler and profiler_enabled())
        or tracing_state() is not None
        or functorch_level() is not None  # this and the next: ``transformed``, without a call
        or _levels._current_level >= 0
    )


PLAIN = (Tensor, nn.Parameter)
BATCH_OR_INSTANCE_NORM = nn.modules.batchnorm._NormBase
# Fake tensors: torch.export runs a block with them. Other subclasses (quantised, distributed, ...) compute otherwise.
TENSORS = (Tensor, nn.Parameter, nn.Buffer, FakeTensor, FunctionalTensor)

# DLPack's C interface, by which compiled code asks a tensor where it is without Python (torch 2.10); and what DLPack calls the dtypes
# (DLDataType's code and bits).
DLPACK: Any = getattr(Tensor, "__dlpack_c_exchange_api__", None)
DLPACK_TYPES = {torch.float32: (2, 32), torch.float64: (2, 64), torch.float16: (2, 16), torch.bfloat16: (4, 16), torch.int64: (0, 64)}


def nobody_listens(*tensors: Any, but_for_profiler: bool = False) -> bool:
    """Whether a call with these tensors (None: no tensor) may go straight to the kernel: it ``is_quiet``, and these are plain CPU or CUDA
    tensors that want no gradient. The dispatcher and the way back into Python take longer than a small convolution."""
    if torch.compiler.is_compiling() or not is_quiet(but_for_profiler):
        return False
    grad = torch.is_grad_enabled()
    for t in tensors:
        if t is not None and (
            type(t) not in PLAIN
            or t.layout is not torch.strided
            or not (t.is_cpu or t.is_cuda)
            or (grad and t.requires_grad)
            or not is_in_memory(t)
        ):
            return False
    return True


def is_in_memory(t: Tensor) -> bool:
    """Whether the tensor's values are what its memory holds: not their negatives, as in ``.conj().imag``, nor zeros that have no memory, nor
    a batch that is hidden from whoever computes with it."""
    return not (t.is_neg() or t._is_zerotensor() or _is_batched(t))


# Context managers: operators called inside skip autograd, or autocast.
below_autograd: Callable[[], Any] = torch._C._AutoDispatchBelowAutograd


def without_autocast(device: str) -> Callable[[], Any]:
    """What makes the context in which autocast of this device type is skipped."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))
    return lambda: torch._C._ExcludeDispatchKeyGuard(keys)


# The output's memory format follows the input's, so a compiler must not change that (the tag is new in torch 2.8).
EXACT_STRIDES: Any = getattr(torch.Tag, "needs_exact_strides", None) or torch.Tag.needs_fixed_stride_order


def tf32() -> bool:
    """Whether PyTorch lets convolutions of float32 round their operands to TF32 (``torch.backends.cudnn.allow_tf32``)."""
    getter = getattr(torch._C, "_get_fp32_precision_getter", None)
    if getter is not None:  # torch 2.9: the older question raises where the newer setting was used
        return bool(getter("cuda", "conv") == "tf32")
    return bool(torch._C._get_cudnn_allow_tf32())


@contextlib.contextmanager
def using_tf32(allowed: bool) -> Iterator[None]:
    """``tf32()`` as wanted, for a while; whichever of PyTorch's two settings was used before."""
    # torch 2.9: the older setting raises where the newer one has been used, so only one of the two is touched.
    newer = hasattr(torch._C, "_set_fp32_precision_setter")
    before: Any = torch._C._get_fp32_precision_getter("cuda", "conv") if newer else torch._C._get_cudnn_allow_tf32()

    def put(value: Any) -> None:
        if newer:
            torch._C._set_fp32_precision_setter("cuda", "conv", value)
        else:
            torch._C._set_cudnn_allow_tf32(value)

    put(("tf32" if allowed else "ieee") if newer else allowed)
    try:
        yield
    finally:
        put(before)


def cuda_stream(device: torch.device) -> int:
    """The current stream of a CUDA device, as an address."""
    return int(torch._C._cuda_getCurrentRawStream(device.index))


def in_graph_trees(device: torch.device) -> bool:
    """Whether Inductor warms up or records a graph of its own (mode="reduce-overhead"): what is allocated then is the graph's."""
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    manager = None if trees is None else trees.get_manager(device.index, create_if_none_exists=False)
    return manager is not None and bool(manager.in_warmup or manager.in_recording)


def constant_result(function: Callable[..., Any]) -> Any:
    """``torch.compiler.assume_constant_result``, which sets this attribute and imports torch._dynamo, a second, to do so."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
