"""The operators ``torch.ops.fused_resnet.*`` by name and schema.

====================  =====================================================================================
conv_bias_add_relu    relu(conv2d(input, weight, bias) + shortcut)
bias_add_relu         relu(input + bias + shortcut): one pass, for blocks whose normalisation is live
relu_backward         the gradient through ReLU and the bias gradient, both from one pass over memory
conv_input_gradient   the gradient of conv2d in its input, from its output's
conv_weight_gradient  the gradient of conv2d in its weight, from its output's
====================  =====================================================================================

``reference.py`` holds the definition of the first two; ``registration.py`` what they do.
"""

from __future__ import annotations

import torch

from .._compat import EXACT_STRIDES

library = torch.library.Library("fused_resnet", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, EXACT_STRIDES)
library.define(
    "conv_bias_add_relu(Tensor input, Tensor weight, Tensor? bias, Tensor? shortcut, SymInt[2] stride, "
    "SymInt[4] padding, SymInt[2] dilation, SymInt groups, bool relu) -> Tensor",
    tags=_TAGS,
)
library.define("bias_add_relu(Tensor input, Tensor? bias, Tensor? shortcut, bool relu) -> Tensor", tags=_TAGS)
library.define("relu_backward(Tensor grad, Tensor output, bool bias_grad) -> (Tensor, Tensor)", tags=_TAGS)
for _gradient in (
    "conv_input_gradient(Tensor grad, Tensor weight, SymInt[4] input_size",
    "conv_weight_gradient(Tensor grad, Tensor input, SymInt[4] weight_size",
):
    library.define(
        f"{_gradient}, bool channels_last, SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, SymInt groups) -> Tensor", tags=_TAGS
    )
conv_bias_add_relu = torch.ops.fused_resnet.conv_bias_add_relu.default
bias_add_relu = torch.ops.fused_resnet.bias_add_relu.default
relu_backward = torch.ops.fused_resnet.relu_backward.default
conv_input_gradient = torch.ops.fused_resnet.conv_input_gradient.default
conv_weight_gradient = torch.ops.fused_resnet.conv_weight_gradient.default
