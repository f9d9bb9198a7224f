// Shapes and addresses as the Python files pass them: tuples of integers. For the files that know Python.
#pragma once

#include <array>
#include <cstdint>
#include <optional>

#include "conv_shape.h"
#include "pass_shape.h"
#include "pool_shape.h"

namespace fused_resnet {

using Pointer = std::uintptr_t;
using Four = std::array<i64, 4>;
using Two = std::array<i64, 2>;

inline const void* in(Pointer p) { return reinterpret_cast<const void*>(p); }
inline void* out(Pointer p) { return reinterpret_cast<void*>(p); }
inline Strides strides(const Four& s) { return Strides{s[0], s[1], s[2], s[3]}; }

inline ConvShape conv_shape(const Four& input, const Four& weight, const Four& output, const Two& stride, const Two& pad,
                            const Two& dilation, const Four& input_strides, const Four& output_strides,
                            const std::optional<Four>& shortcut_strides, bool has_bias, bool relu) {
  ConvShape s;
  s.n = input[0];
  s.c = input[1];
  s.h = input[2];
  s.w = input[3];
  s.k = weight[0];
  s.r = weight[2];
  s.s = weight[3];
  s.p = output[2];
  s.q = output[3];
  s.stride_h = stride[0];
  s.stride_w = stride[1];
  s.pad_top = pad[0];
  s.pad_left = pad[1];
  s.dilation_h = dilation[0];
  s.dilation_w = dilation[1];
  s.x = strides(input_strides);
  s.y = strides(output_strides);
  s.has_shortcut = shortcut_strides.has_value();
  if (shortcut_strides) s.shortcut = strides(*shortcut_strides);
  s.has_bias = has_bias;
  s.relu = relu;
  return s;
}

inline PoolShape pool_shape(const Four& input, const Four& output, const Two& kernel, const Two& stride, const Two& pad,
                            const Four& input_strides, const Four& output_strides, bool channels) {
  return {input[0], input[1],  input[2],  input[3], output[2], output[3],
          kernel[0], kernel[1], stride[0], stride[1], pad[0],   pad[1],
          strides(input_strides), strides(output_strides), channels};
}

inline PassShape pass_shape(DType dtype, const Four& shape, const Four& result, const Four& first, const Four& second, bool relu,
                            bool wide_input) {
  PassShape s;
  s.n = shape[0];
  s.k = shape[1];
  s.p = shape[2];
  s.q = shape[3];
  s.result = strides(result);
  s.first = strides(first);
  s.second = strides(second);
  s.dtype = dtype;
  s.relu = relu;
  s.wide_input = wide_input;
  return s;
}

}  // namespace fused_resnet
