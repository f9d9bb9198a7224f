"""Residual blocks as fused kernels: convolution + bias + shortcut + ReLU in one pass, forward and backward."""

from . import reference
from .ops import bias_add_relu, conv_bias_add_relu, why_not

__version__ = "0.1.0"
__all__ = ["bias_add_relu", "conv_bias_add_relu", "reference", "why_not"]
