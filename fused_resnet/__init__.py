"""Residual blocks as fused kernels: convolution + bias + shortcut + ReLU in one pass, forward and backward."""

from . import reference
from ._version import __version__
from .ops import bias_add_relu, conv_bias_add_relu, why_not


__all__ = ["__version__", "bias_add_relu", "conv_bias_add_relu", "reference", "why_not"]
