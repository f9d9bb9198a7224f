"""Imports torchvision beside a torch build that its compiled operators do not fit.

torchvision registers fake kernels for operators of its extension when it is imported; without the extension (a CPU torch
beside a wheel made for CUDA) their schemas are missing and the import fails. Its models need none of them: declare the
schemas first.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

# The operators for which torchvision/_meta_registrations.py calls register_fake whether or not its extension loaded.
_SCHEMAS = tuple(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for name in ("nms", "qnms"))
_libraries: list[Any] = []  # a schema lives as long as the Library that defined it


def import_torchvision() -> Any:
    """The torchvision module; skips the test where it is not installed."""
    try:
        import torchvision
    except ModuleNotFoundError as error:
        if error.name == "torchvision":
            pytest.skip("torchvision is not installed", allow_module_level=True)
        raise
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            library.define(schema)
        _libraries.append(library)
        import torchvision
    return torchvision


def import_timm() -> Any:
    """The timm module, which imports torchvision; skips the test where it is not installed."""
    import_torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import timm
        except ModuleNotFoundError as error:
            if error.name == "timm":
                pytest.skip("timm is not installed", allow_module_level=True)
            raise
    return timm
