// The passes over memory that need no convolution, over whole tensors: forward (bias + shortcut + ReLU) and backward (mask +
// bias gradient).
#pragma once

#include "../pass_shape.h"
#include "dispatch.h"

namespace fused_resnet {

// result = relu(input + bias + shortcut); bias and shortcut may be null. result may be input.
void bias_add_relu(const PassShape& shape, const void* input, const void* bias, const void* shortcut, void* result,
                   int threads);

// result = output <= 0 ? 0 : grad; bias_grad [K] (may be null) = its sum over N, P, Q: float32 or float64 inside fixed pieces
// of the tensor, float64 over the pieces, in an order that depends on the shape alone. Where there was no ReLU, output and result are null, and
// bias_grad is the gradient's sum.
void relu_backward(const PassShape& shape, const void* grad, const void* output, void* result, void* bias_grad, int threads);

}  // namespace fused_resnet
