"""Finds the compiled modules, or keeps the reason why there is none.

A clone's root directory shadows the installed package (``python -m fused_resnet`` puts it first on the path), and a clone
holds no compiled module: it is then taken from where pip installed it, if it was built from the same interface.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType

import torch  # noqa: F401  first: the extension shares the OpenMP runtime that torch brings

# The interface between the Python files and the compiled module; csrc/bindings.cpp holds the same number.
INTERFACE = 11
CUDA_INTERFACE = 2  # csrc/cuda/bindings.cpp


def _find(stem: str) -> Path | None:
    """A compiled module's file: beside this one, else in the installed distribution."""
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    folders = [Path(__file__).parent]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        folders.append(Path(str(importlib.metadata.distribution("fused-resnet").locate_file("fused_resnet"))))
    # A clone's own metadata (an egg-info beside the package) would hide the installed one: look there too.
    folders += [Path(entry) / "fused_resnet" for entry in sys.path if entry]
    for folder in folders:
        for suffix in suffixes:
            file = folder / f"{stem}{suffix}"
            if file.is_file():
                return file
    return None


def _load(stem: str, interface: int, how: str) -> tuple[ModuleType | None, str]:
    """The module, or None and why. ``how``: the command that builds it."""
    file = _find(stem)
    if file is None:
        return None, f"the compiled module is not installed: run `{how}` in the project's folder"
    name = f"fused_resnet.{stem}"
    try:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        return None, f"the compiled module does not load: {error}"
    if interface != module.INTERFACE:
        return None, (
            f"the compiled module at {file} belongs to another version of this package (interface {module.INTERFACE}, "
            f"needed {interface}): run `{how}` again"
        )
    sys.modules[name] = module
    return module, ""


def _choose_isa(module: ModuleType) -> None:
    """FUSED_RESNET_ISA, read once. An unknown or unavailable value is an error, at import."""
    wanted = os.environ.get("FUSED_RESNET_ISA", "")
    if wanted:
        choices = module.available_isas()
        if wanted not in choices:
            raise ValueError(f"FUSED_RESNET_ISA must be one of {', '.join(choices)} on this machine, got {wanted!r}")
        module.set_isa(wanted)


def _choose_backend() -> str:
    """FUSED_RESNET_BACKEND, read once: '' for our kernels or 'reference' for none of them."""
    wanted = os.environ.get("FUSED_RESNET_BACKEND", "")
    if wanted not in ("", "fused", "reference"):
        raise ValueError(f"FUSED_RESNET_BACKEND must be fused or reference, got {wanted!r}")
    return wanted


_cpu: ModuleType | None
_cpu, missing = _load("_cpu", INTERFACE, "pip install .")
if _cpu is not None:
    _choose_isa(_cpu)
    if _choose_backend() == "reference":
        _cpu, missing = None, "FUSED_RESNET_BACKEND=reference turns the kernels off"
else:
    _choose_backend()
    warnings.warn(f"fused_resnet computes through its plain PyTorch reference: {missing}", RuntimeWarning, stacklevel=2)

cpu = _cpu
_REFERENCE = missing if missing.startswith("FUSED_RESNET_BACKEND") else ""


@functools.cache
def _load_cuda() -> tuple[ModuleType | None, str]:
    if _REFERENCE:
        return None, _REFERENCE
    return _load("_cuda", CUDA_INTERFACE, "FUSED_RESNET_CUDA=1 pip install .")


def cuda() -> ModuleType | None:
    """The compiled CUDA module, loaded when it is first asked for: an import never needs it. It loads without a GPU."""
    return _load_cuda()[0]


def cuda_missing() -> str:
    """Why there is no CUDA module; "" if there is one."""
    module, why = _load_cuda()
    return "" if module is not None else why.replace("the compiled module", "the compiled CUDA module")
