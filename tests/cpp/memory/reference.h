// Naive convolution in double precision, and how far from it a rounding algorithm may be.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "../../../csrc/conv_shape.h"
#include "../../../csrc/cpu/algorithm.h"
#include "guarded.h"

namespace memory {

using fused_resnet::ConvShape;
using Values = std::vector<double>;  // of a tensor, in the order N, C, H, W

// So many integers, two of three of them 0, none above `most`: small enough that every sum of products is exact in float32.
inline Values integers(i64 count, int most, std::mt19937& random) {
  Values values(std::size_t(count), 0.0);
  for (double& v : values) v = random() % 3 == 0 ? int(random() % unsigned(2 * most + 1)) - most : 0;
  return values;
}

// Adds the convolution of x [N, C, H, W] with weight [K, C, R, S] to sum [N, K, P, Q], and the squares of its terms to `squares`.
inline void convolve(const ConvShape& g, const Values& x, const Values& weight, Values& sum, Values& squares) {
  std::size_t at = 0;
  for (i64 k = 0; k < g.k; ++k)
    for (i64 c = 0; c < g.c; ++c)
      for (i64 r = 0; r < g.r; ++r)
        for (i64 s = 0; s < g.s; ++s) {
          const double w = weight[at++];
          if (w == 0) continue;
          for (i64 n = 0; n < g.n; ++n)
            for (i64 p = 0; p < g.p; ++p) {
              const i64 h = p * g.stride_h - g.pad_top + r * g.dilation_h;
              if (h < 0 || h >= g.h) continue;
              for (i64 q = 0; q < g.q; ++q) {
                const i64 v = q * g.stride_w - g.pad_left + s * g.dilation_w;
                if (v < 0 || v >= g.w) continue;
                const double term = w * x[std::size_t(((n * g.c + c) * g.h + h) * g.w + v)];
                const std::size_t to = std::size_t(((n * g.k + k) * g.p + p) * g.q + q);
                sum[to] += term;
                squares[to] += term * term;
              }
            }
        }
}

// The loss of F(4x4, 3x3) over a sum's own: the largest over the outputs i of the sums over positions j of A'_ij^2 |G_j|^2 |B_j|^2 / 3,
// which is 8.2 in one dimension, and as much for the roundings (its root) in two. tests/kernels/test_winograd.py calculates it.
constexpr double kAmplification4 = 8.2;

// Half a unit in the last place of 1, of what is added up and of what is stored.
inline double sum_unit(DType dtype) {
  return dtype == DType::float64 ? std::numeric_limits<double>::epsilon() / 2 : double(std::numeric_limits<float>::epsilon()) / 2;
}
inline double storage_unit(DType dtype) { return dtype == DType::bfloat16 ? 1.0 / 256 : sum_unit(dtype); }

// How far a sum may be from the true one: roundings of the size u sqrt(terms) sqrt(sum of squared terms), times the amplification of
// F(4x4, 3x3), which is the largest of all algorithms'; twice that, as in fused_resnet/testing/compare.py. Where Winograd's products
// are of bfloat16, both transformed operands are rounded to it: two more roundings of each term.
inline double rounding_bound(DType dtype, i64 terms, double largest_squares, bool bfloat16_transforms) {
  double bound = 2 * kAmplification4 * sum_unit(dtype) * std::sqrt(double(terms) * largest_squares);
  if (bfloat16_transforms) bound += 2 * kAmplification4 * storage_unit(dtype) * std::sqrt(2 * largest_squares);
  return bound;
}

inline fused_resnet::Request request(fused_resnet::Algorithm algorithm) {
  fused_resnet::Request r;
  r.automatic = false;
  r.algorithm = algorithm;
  return r;
}

}  // namespace memory
