// The shape of a pooling.
#pragma once

#include "types.h"

namespace fused_resnet {

// input [N, C, H, W] -> output [N, C, P, Q]; every window has an element of the input.
struct PoolShape {
  i64 n = 0, c = 0, h = 0, w = 0, p = 0, q = 0;
  i64 kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1, pad_top = 0, pad_left = 0;
  Strides x, y;
  bool channels = false;  // in both, channels lie side by side; else the pixels of a row do
};

}  // namespace fused_resnet
