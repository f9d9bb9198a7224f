"""Residual blocks as fused kernels: convolution + bias + shortcut + ReLU in one pass, forward and backward."""

from . import models, nn, reference
from ._settings import get_numerics, set_numerics
from ._version import __version__
from .fusion import FusionReport, fuse_, unfuse_
from .ops.api import bias_add_relu, conv_bias_add_relu, why_not
from .ops.derived import clear as clear_derived

__all__ = [
    "FusionReport",
    "__version__",
    "bias_add_relu",
    "clear_derived",
    "conv_bias_add_relu",
    "fuse_",
    "get_numerics",
    "models",
    "nn",
    "reference",
    "set_numerics",
    "unfuse_",
    "why_not",
]
