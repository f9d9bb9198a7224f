// The shape of one convolution, and the arithmetic on it. Every size, stride and offset is a 64-bit count of elements.
#pragma once

#include <stdexcept>
#include <string>

#include "types.h"

namespace fused_resnet {

// A product of sizes; throws where it does not fit into 64 bits.
inline i64 checked_product(i64 a, i64 b) {
  i64 result = 0;
  if (__builtin_mul_overflow(a, b, &result)) {
    throw std::overflow_error("the sizes overflow 64 bits: " + std::to_string(a) + " * " + std::to_string(b));
  }
  return result;
}

// A 1x1 convolution of another tensor with `c` channels whose result is added: more terms of the same sums.
struct Joined {
  i64 c = 0, stride_h = 1, stride_w = 1;
  Strides x;
};

struct ConvShape {
  i64 n = 0, c = 0, h = 0, w = 0;  // input [N, C, H, W]
  i64 k = 0, r = 0, s = 0;         // weight [K, C / groups, R, S]
  i64 p = 0, q = 0;                // output [N, K, P, Q]
  i64 stride_h = 1, stride_w = 1, pad_top = 0, pad_left = 0, dilation_h = 1, dilation_w = 1;
  Strides x, y, shortcut;
  bool has_bias = false, has_shortcut = false, relu = true;
  bool masked = false;  // the shortcut is not added: it is the output of a ReLU, and the result goes through that ReLU's gradient
  i64 groups = 1;  // more than one: the general CUDA kernel alone
  Joined joined;  // joined.c == 0: nothing

  i64 reduction() const { return c / groups * r * s + joined.c; }  // terms of an output's sum

  bool empty() const { return n == 0 || k == 0 || p == 0 || q == 0; }

  // Multiply-adds, as a double: only for deciding whether threads are worth their while.
  double macs() const {
    return double(n) * double(k) * double(p) * double(q) * (double(c / groups) * double(r) * double(s) + double(joined.c));
  }

  // Throws std::invalid_argument or std::overflow_error unless every index below stays inside 64 bits.
  void validate() const {
    if (n < 0 || c < 1 || h < 1 || w < 1 || k < 1 || r < 1 || s < 1 || p < 1 || q < 1) {
      throw std::invalid_argument("a convolution needs sizes of at least 1 (the batch may be 0)");
    }
    if (stride_h < 1 || stride_w < 1 || dilation_h < 1 || dilation_w < 1 || pad_top < 0 || pad_left < 0) {
      throw std::invalid_argument("a convolution needs stride and dilation of at least 1 and padding of at least 0");
    }
    if (groups < 1 || c % groups || k % groups) throw std::invalid_argument("groups must divide the channels");
    checked_product(checked_product(checked_product(n, c), h), w);
    checked_product(checked_product(checked_product(n, k), p), q);
    checked_product(checked_product(checked_product(k, c), r), s);
    checked_product(k, joined.c);
    checked_product(checked_product(p, stride_h) + pad_top, 4);
    checked_product(checked_product(q, stride_w) + pad_left, 4);
    checked_product(checked_product(r, dilation_h), 4);
    checked_product(checked_product(s, dilation_w), 4);
  }
};

}  // namespace fused_resnet
