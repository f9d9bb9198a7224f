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

// A run of memory on its way into the L2 cache while something else is calculated, a share of it at each of `steps` steps. No line
// much more than once: a prefetch takes a place among the few misses that a core can wait for, even where the line is there already.
// Nothing is fetched from behind the run: where no memory is mapped, each prefetch would walk the page table (and take a hundred
// times as long).
class Fetch {
 public:
  static constexpr int kEvery = 4;  // a loop that fetches little is unrolled so often, and fetches once for all of these steps
  Fetch() = default;
  // Part `index` of `parts` of a run.
  Fetch(const void* data, i64 bytes, i64 index, i64 parts, i64 steps) {
    const i64 lines = (bytes + 63) / 64, begin = lines * index / parts, count = lines * (index + 1) / parts - begin;
    if (count == 0) return;
    next_ = static_cast<const char*>(data) + begin * 64;
    last_ = next_ + (count - 1) * 64;
    each_ = (count * kEvery + steps - 1) / (steps > 0 ? steps : 1);
    stride_ = count * 64 / (steps > 0 ? steps : 1);
  }
  // Whether there is so much that each step should have its share: then `one` before each, else `some` before every kEvery. Where a
  // step's share is more than a line, `one` fetches the first of them, and the hardware, which sees the run, the others.
  bool often() const { return each_ > kEvery / 2; }
  FR_INLINE void one() {
    __builtin_prefetch(next_, 0, 2);
    next_ += stride_;
  }
  FR_INLINE void some() {
    for (i64 i = each_; i > 0; --i) {
      __builtin_prefetch(next_, 0, 2);
      next_ = next_ < last_ ? next_ + 64 : last_;
    }
  }

 private:
  const char *next_ = nullptr, *last_ = nullptr;
  i64 each_ = 0, stride_ = 0;
};

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

// A sum and its shortcut: added, or the gradient through the ReLU that gave it.
template <class V>
FR_INLINE typename V::reg with_shortcut(typename V::reg value, typename V::reg shortcut, bool masked) {
  return masked ? V::relu_gradient(value, shortcut) : V::add(value, shortcut);
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
