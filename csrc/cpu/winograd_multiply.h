// Step 2 of Winograd convolution (winograd.h): the products, [tiles x C] by [C x K] at each position.
#pragma once

#include "kernels.h"
#include "registers.h"

namespace fused_resnet {
namespace {

// Of one panel at every position. A register tile is M tiles by NV vectors of output channels.
template <class V>
struct MultiplyArgs {
  const typename V::type* input;   // [block of W channels][tiles][W]
  i64 block;                       // elements from block to block
  const typename V::type* weight;  // [C][NV * W]
  typename V::type* product;       // [tiles][NV * W]
  i64 channels;
  bool more;                       // the product has sums, to which these are added
  Fetch fetch;                     // what comes next, a step for each channel
};

template <class V, int M, int NV>
__attribute__((noinline)) void multiply_tile(const MultiplyArgs<V>& t) {
  using T = typename V::type;
  constexpr int W = V::width, U = W < Fetch::kEvery ? W : Fetch::kEvery;
  typename V::reg acc[M][NV];
  FR_UNROLL
  for (int m = 0; m < M; ++m) {
    FR_UNROLL
    for (int v = 0; v < NV; ++v) acc[m][v] = V::zero();
  }
  if (t.more) {
    FR_UNROLL
    for (int m = 0; m < M; ++m) {
      FR_UNROLL
      for (int v = 0; v < NV; ++v) acc[m][v] = V::load(t.product + (m * NV + v) * W);
    }
  }
  const T* weight = t.weight;
  Fetch fetch = t.fetch;
  const auto step = [&](const T* input) FR_INLINE_LAMBDA {
    typename V::reg w[NV];
    FR_UNROLL
    for (int v = 0; v < NV; ++v) w[v] = V::load(weight + v * W);
    weight += NV * W;
    FR_UNROLL
    for (int m = 0; m < M; ++m) {
      const typename V::reg x = V::set1(input[m * W]);
      FR_UNROLL
      for (int v = 0; v < NV; ++v) acc[m][v] = V::fma(x, w[v], acc[m][v]);
    }
  };
  const T* block = t.input;
  i64 left = t.channels;
  const auto whole_blocks = [&](auto often) FR_INLINE_LAMBDA {
    for (; left >= W; left -= W, block += t.block) {
      for (int j = 0; j < W; j += U) {
        if (!often.value) fetch.some();
        FR_UNROLL
        for (int u = 0; u < U; ++u) {
          if (often.value) fetch.one();
          step(block + j + u);
        }
      }
    }
  };
  if (fetch.often()) {
    whole_blocks(Flag<true>());
  } else {
    whole_blocks(Flag<false>());
  }
  for (i64 j = 0; j < left; ++j) step(block + j);
  FR_UNROLL
  for (int m = 0; m < M; ++m) {
    FR_UNROLL
    for (int v = 0; v < NV; ++v) V::store(t.product + (m * NV + v) * W, acc[m][v]);
  }
}

template <class V, int NV, int M, int... Rest>
struct MultiplyTable : MultiplyTable<V, NV, M - 1, M, Rest...> {};
template <class V, int NV, int... Rest>
struct MultiplyTable<V, NV, 0, Rest...> {
  static constexpr void (*function[sizeof...(Rest)])(const MultiplyArgs<V>&) = {multiply_tile<V, Rest, NV>...};
};

// Fetches runs of memory a few pieces at a time, between two calculations that need none.
class Ahead {
 public:
  Ahead(const AheadRun* runs, i64 count, i64 calls) : run_(runs), end_(runs + count) {
    i64 pieces = 0;
    for (i64 i = 0; i < count; ++i) pieces += runs[i].count;
    quota_ = (pieces + calls - 1) / calls;
  }
  void fetch() {
    for (i64 left = quota_; left > 0 && run_ < end_;) {
      const i64 count = smaller(left, run_->count - piece_);
      const char* p = run_->first + piece_ * run_->stride;
      for (i64 i = 0; i < count; ++i, p += run_->stride) {
        for (i64 line = 0; line < run_->lines; ++line) {
          if (run_->write) {
            __builtin_prefetch(p + line * 64, 1, 2);
          } else {
            __builtin_prefetch(p + line * 64, 0, 2);
          }
        }
      }
      left -= count;
      piece_ += count;
      if (piece_ == run_->count) {
        ++run_;
        piece_ = 0;
      }
    }
  }

 private:
  const AheadRun *run_, *end_;
  i64 piece_ = 0, quota_;
};

// As tile_functions of direct.h.
template <class V, int NV>
auto multiply_functions(i64 vectors) -> void (*const*)(const MultiplyArgs<V>&) {
  if constexpr (NV > 1) {
    if (vectors < NV) return multiply_functions<V, NV - 1>(vectors);
  }
  return MultiplyTable<V, NV, V::rows[NV - 1]>::function;
}

template <class V>
void winograd_multiply(const WinogradMultiplyArgs& a) {
  using T = typename V::type;
  constexpr int W = V::width;
  const auto* functions = multiply_functions<V, V::vectors>(a.width / W);
  const i64 most = V::rows[a.width / W - 1], groups = (a.tiles + most - 1) / most;
  MultiplyArgs<V> t;
  t.block = a.block_stride;
  t.channels = a.channels;
  t.more = a.more;
  const i64 bytes = a.channels * a.width * i64(sizeof(T));
  Ahead ahead(a.ahead, a.ahead_runs, a.positions * groups);
  for (int position = 0; position < a.positions; ++position) {
    t.weight = static_cast<const T*>(a.weight) + position * a.weight_stride;
    const T* input = static_cast<const T*>(a.input) + position * a.position_stride;
    T* product = static_cast<T*>(a.product) + position * a.tiles * a.width;
    // Not from behind the weights: see direct.h, panels_outside.
    const void* next = position + 1 < a.positions ? t.weight + a.weight_stride : a.next;
    for (i64 g = 0; g < groups; ++g) {
      const i64 begin = a.tiles * g / groups, end = a.tiles * (g + 1) / groups;
      t.input = input + begin * W;
      t.product = product + begin * a.width;
      t.fetch = Fetch(next, bytes, g, groups, a.channels);
      ahead.fetch();
      functions[end - begin - 1](t);
    }
  }
}

}  // namespace
}  // namespace fused_resnet
