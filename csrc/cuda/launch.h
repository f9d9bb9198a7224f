// What the kernels offer to the host: one function each. On a GPU (*.cu) they launch on a stream; on the host (host.cpp, for
// the tests) the same device functions run thread block by thread block. No synchronisation, safe under graph capture.
#pragma once

#include <cstddef>

#include "../conv_shape.h"
#include "../pass_shape.h"

namespace fused_resnet::cuda {

using Stream = void*;  // a cudaStream_t; the host has none

struct ConvOperands {
  const void* x = nullptr;
  const void* weight = nullptr;
  const void* bias = nullptr;      // [K], or null
  const void* shortcut = nullptr;  // or null
  void* y = nullptr;
  // Of the joined convolution, where shape.joined.c > 0: its input, and its weight [K, joined.c] with strides n and c.
  const void* joined = nullptr;
  const void* joined_weight = nullptr;
  Strides joined_weight_strides;
};

// relu(conv2d(x, weight, bias) + shortcut), for every dtype and configuration: implicit GEMM without tensor cores. `weight` has
// any strides. One thread block sums an output's terms in a fixed order: the same bits on every run.
void general_convolution(DType dtype, const ConvShape& shape, const Strides& weight, const ConvOperands& operands, Stream stream);

// result = relu(input + bias + shortcut); bias and shortcut may be null; result may be input.
void bias_add_relu(const PassShape& shape, const void* input, const void* bias, const void* shortcut, void* result, Stream stream);

// result = output <= 0 ? 0 : grad; bias_grad [K] (may be null) = its sum over N, P, Q: fixed pieces of the tensor in float32
// (float64 for float64), then over the pieces in a fixed order. `workspace` holds relu_backward_workspace(shape) bytes.
void relu_backward(const PassShape& shape, const void* grad, const void* output, void* result, void* bias_grad, void* workspace,
                   Stream stream);
std::size_t relu_backward_workspace(const PassShape& shape);

}  // namespace fused_resnet::cuda
