"""Finds the compiled module, or keeps the reason why there is none.

A clone's root directory shadows the installed package (``python -m fused_resnet`` puts it first on the path), and a clone
holds no compiled module: it is then taken from where pip installed it, if it was built from the same interface.
"""

from __future__ import annotations

import contextlib
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
INTERFACE = 2


def _find() -> Path | None:
    """The compiled module's file: beside this one, else in the installed distribution."""
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    folders = [Path(__file__).parent]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        folders.append(Path(str(importlib.metadata.distribution("fused-resnet").locate_file("fused_resnet"))))
    # A clone's own metadata (an egg-info beside the package) would hide the installed one: look there too.
    folders += [Path(entry) / "fused_resnet" for entry in sys.path if entry]
    for folder in folders:
        for suffix in suffixes:
            file = folder / f"_cpu{suffix}"
            if file.is_file():
                return file
    return None


def _load() -> tuple[ModuleType | None, str]:
    file = _find()
    if file is None:
        return None, "the compiled module is not installed: run `pip install .` in the project's folder"
    name = "fused_resnet._cpu"
    try:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        return None, f"the compiled module does not load: {error}"
    if module.INTERFACE != INTERFACE:
        return None, (
            f"the compiled module at {file} belongs to another version of this package (interface {module.INTERFACE}, "
            f"needed {INTERFACE}): run `pip install .` again"
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
_cpu, missing = _load()
if _cpu is not None:
    _choose_isa(_cpu)
    if _choose_backend() == "reference":
        _cpu, missing = None, "FUSED_RESNET_BACKEND=reference turns the kernels off"
else:
    _choose_backend()
    warnings.warn(f"fused_resnet computes through its plain PyTorch reference: {missing}", RuntimeWarning, stacklevel=2)

cpu = _cpu
