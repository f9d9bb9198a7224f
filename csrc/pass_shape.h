// The shape of a pass over memory without a convolution: forward (bias + shortcut + ReLU) and backward (mask + bias gradient).
#pragma once

#include "types.h"

namespace fused_resnet {

// A [N, K, P, Q] problem; the result is dense, contiguous or channels_last; operands have any strides (0 included).
struct PassShape {
  i64 n = 0, k = 0, p = 0, q = 0;
  Strides result, first, second;  // first: input or gradient; second: shortcut or output
  DType dtype = DType::float32;
  bool relu = true;
  bool wide_input = false;  // the input is in the accumulator's type, the rest in `dtype`
};

}  // namespace fused_resnet
