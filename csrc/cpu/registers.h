// Small helpers on registers that the kernels of every algorithm share. Included by isa_*.cpp only; internal linkage.
#pragma once

#include "../types.h"

#define FR_UNROLL _Pragma("GCC unroll 32")
#define FR_INLINE inline __attribute__((always_inline))
#define FR_INLINE_LAMBDA __attribute__((always_inline))

namespace fused_resnet {
namespace {

template <bool B>
struct Flag {
  static constexpr bool value = B;
};

inline i64 smaller(i64 a, i64 b) { return a < b ? a : b; }

// Rows of a V::width x V::width matrix in registers become its columns: log2(width) rounds of perfect shuffles.
template <class V>
inline void transpose(typename V::reg (&rows)[V::width]) {
  constexpr int half = V::width / 2;
  FR_UNROLL
  for (int round = 1; round < V::width; round *= 2) {
    typename V::reg next[V::width];
    FR_UNROLL
    for (int i = 0; i < half; ++i) {
      next[2 * i] = V::interleave_low(rows[i], rows[i + half]);
      next[2 * i + 1] = V::interleave_high(rows[i], rows[i + half]);
    }
    FR_UNROLL
    for (int i = 0; i < V::width; ++i) rows[i] = next[i];
  }
}

// `count` elements, `step` apart, as a register.
template <class V, class S>
inline typename V::reg load_steps(const S* p, i64 step, i64 count) {
  if (step == 1) return V::load_n(p, count);
  S gathered[V::width];
  for (i64 i = 0; i < count; ++i) gathered[i] = p[i * step];
  return V::load_n(gathered, count);
}

}  // namespace
}  // namespace fused_resnet
