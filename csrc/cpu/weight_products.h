// The gradient of a weight: products of gradient and input, summed over pixels or, by Winograd's transforms, over tiles; and what becomes of the sums.
// Templates over a vector type V (vec_*.h) and a storage type S. Included by isa_*.cpp only; internal linkage.
//
//     dw = G' [ sum over tiles of (A dy A') * (B' x B) ] G        F(m x m, 3x3) of winograd.h, differentiated in g
#pragma once

#include "kernels.h"
#include "packing.h"
#include "registers.h"
#include "winograd.h"

namespace fused_resnet {
namespace {

// A register tile: M rows by NV registers of columns. Its sums begin at zero, whatever is there, and are added to that at the end: many
// short chains lose less than one long one.
template <class V, int M, int NV>
__attribute__((noinline)) void weight_tile(const WeightProductsArgs& a, i64 row, Fetch fetch) {
  using T = typename V::type;
  constexpr int W = V::width;
  typename V::reg acc[M][NV];
  FR_UNROLL
  for (int m = 0; m < M; ++m) {
    FR_UNROLL
    for (int v = 0; v < NV; ++v) acc[m][v] = V::zero();
  }
  const T* grad = static_cast<const T*>(a.grad) + row;
  const T* input = static_cast<const T*>(a.input);
  const i64 grad_pitch = a.grad_pitch, input_pitch = a.input_pitch;
  const auto step = [&]() FR_INLINE_LAMBDA {
    typename V::reg x[NV];
    FR_UNROLL
    for (int v = 0; v < NV; ++v) x[v] = V::load(input + v * W);
    FR_UNROLL
    for (int m = 0; m < M; ++m) {
      const typename V::reg g = V::set1(grad[m]);
      FR_UNROLL
      for (int v = 0; v < NV; ++v) acc[m][v] = V::fma(g, x[v], acc[m][v]);
    }
    grad += grad_pitch;
    input += input_pitch;
  };
  i64 left = a.steps;
  if (a.next_bytes > 0) {
    for (; left >= Fetch::kEvery; left -= Fetch::kEvery) {
      fetch.some();
      for (int i = 0; i < Fetch::kEvery; ++i) step();
    }
  }
  for (; left > 0; --left) step();
  T* sums = static_cast<T*>(a.sums) + row * a.pitch;
  FR_UNROLL
  for (int m = 0; m < M; ++m, sums += a.pitch) {
    FR_UNROLL
    for (int v = 0; v < NV; ++v) V::store(sums + v * W, a.more ? V::add(V::load(sums + v * W), acc[m][v]) : acc[m][v]);
  }
}

template <class V, int NV, int M, int... Rest>
struct WeightTable : WeightTable<V, NV, M - 1, M, Rest...> {};
template <class V, int NV, int... Rest>
struct WeightTable<V, NV, 0, Rest...> {
  static constexpr void (*function[sizeof...(Rest)])(const WeightProductsArgs&, i64, Fetch) = {weight_tile<V, Rest, NV>...};
};

// As tile_functions of direct.h.
template <class V, int NV>
auto weight_functions(i64 vectors) -> void (*const*)(const WeightProductsArgs&, i64, Fetch) {
  if constexpr (NV > 1) {
    if (vectors < NV) return weight_functions<V, NV - 1>(vectors);
  }
  return WeightTable<V, NV, V::rows[NV - 1]>::function;
}

template <class V>
void weight_products(const WeightProductsArgs& a) {
  const i64 vectors = a.width / V::width, most = V::rows[vectors - 1], groups = (a.rows + most - 1) / most;
  const i64 each = a.rows / groups, more = a.rows % groups;  // the first groups have one row more
  const auto* functions = weight_functions<V, V::vectors>(vectors);
  Ahead ahead(&a.ahead, 1, groups);
  i64 row = 0;
  for (i64 g = 0; g < groups; ++g) {
    ahead.fetch();
    const i64 rows = each + (g < more);
    functions[rows - 1](a, row, a.next_bytes > 0 ? Fetch(a.next, a.next_bytes, g, groups, a.steps) : Fetch());
    row += rows;
  }
}

template <class V, class F>
void winograd_taps(const WinogradTapsArgs& a) {
  using T = typename V::type;
  using reg = typename V::reg;
  constexpr int A = F::alpha, W = V::width;
  for (i64 row = 0; row < a.rows; ++row) {
    for (i64 v = 0; v < a.width; v += W) {
      const T* const product = static_cast<const T*>(a.product) + row * a.width + v;
      T* const sums = static_cast<T*>(a.sums) + row * a.pitch + v;
      reg half[3][A];
      FR_UNROLL
      for (int l = 0; l < A; ++l) {
        reg u[A], g[3];
        FR_UNROLL
        for (int i = 0; i < A; ++i) u[i] = V::load(product + (i * A + l) * a.position_stride);
        F::weight_transposed(u, g);
        FR_UNROLL
        for (int r = 0; r < 3; ++r) half[r][l] = g[r];
      }
      FR_UNROLL
      for (int r = 0; r < 3; ++r) {
        reg g[3];
        F::weight_transposed(half[r], g);
        FR_UNROLL
        for (int s = 0; s < 3; ++s) {
          T* const out = sums + (r * 3 + s) * a.tap_stride;
          V::store(out, a.more ? V::add(V::load(out), g[s]) : g[s]);
        }
      }
    }
  }
}

template <class V, class S>
bool store_weight(const StoreWeightArgs& a) {
  using T = typename V::type;
  using reg = typename V::reg;
  constexpr int W = V::width;
  const i64 taps = a.r * a.s;
  const bool runs = a.stride.w == 1 && (a.r == 1 || a.stride.h == a.s);  // the taps of an input channel lie side by side
  const auto place = [&](i64 tap) { return tap / a.s * a.stride.h + tap % a.s * a.stride.w; };
  reg odd = V::zero();
  // W rows of registers as columns, the first `columns` of which are stored `pitch` apart, `count` elements of each.
  const auto store_turned = [](reg (&rows)[W], S* out, i64 pitch, i64 columns, i64 count) {
    transpose<V>(rows);
    alignas(64) T turned[W][W];
    FR_UNROLL
    for (int i = 0; i < W; ++i) V::store(turned[i], rows[i]);
    for (i64 i = 0; i < columns; ++i) V::store_n(out + i * pitch, V::load(turned[i]), count);
  };
  for (i64 c = 0; c < a.c; c += W) {
    const i64 channels = smaller(a.c - c, W);
    const auto sum = [&](i64 row, i64 tap) FR_INLINE_LAMBDA {
      const T* from = static_cast<const T*>(a.sums) + row * a.pitch + tap * a.tap_stride + c;
      reg value = V::load_n(from, channels);
      for (i64 part = 1; part < a.parts; ++part) value = V::add(value, V::load_n(from + part * a.part_stride, channels));
      note_odd<V>(value, odd);
      return value;
    };
    S* const first = static_cast<S*>(a.out) + c * a.stride.c;
    if (a.stride.n == 1 && a.stride.c != 1) {
      for (i64 tap = 0; tap < taps; ++tap) {
        reg rows[W];
        for (int i = 0; i < W; ++i) rows[i] = i < a.rows ? sum(i, tap) : V::zero();
        store_turned(rows, first + place(tap), a.stride.c, channels, a.rows);
      }
      continue;
    }
    for (i64 row = 0; row < a.rows; ++row) {
      S* const out = first + row * a.stride.n;
      if (a.stride.c == 1) {
        for (i64 tap = 0; tap < taps; ++tap) V::store_n(out + place(tap), sum(row, tap), channels);
      } else if (runs) {
        for (i64 tap = 0; tap < taps; tap += W) {
          const i64 count = smaller(taps - tap, W);
          reg rows[W];
          for (int i = 0; i < W; ++i) rows[i] = i < count ? sum(row, tap + i) : V::zero();
          store_turned(rows, out + tap, a.stride.c, channels, count);
        }
      } else {
        for (i64 tap = 0; tap < taps; ++tap) {
          S values[W];
          V::store_n(values, sum(row, tap), W);
          for (i64 i = 0; i < channels; ++i) out[i * a.stride.c + place(tap)] = values[i];
        }
      }
    }
  }
  return all_finite<V>(odd);
}

template <class V, class S, class F>
constexpr WinogradGradientKernels winograd_gradient_kernels() {
  using T = typename V::type;
  return WinogradGradientKernels{F::m,
                                 F::alpha,
                                 winograd_strip<V, S, V, InputTransform<V, F>>,
                                 winograd_strip<V, T, V, InputTransform<V, F>>,
                                 winograd_strip<V, S, V, GradTransform<V, F>>,
                                 winograd_strip<V, T, V, GradTransform<V, F>>,
                                 winograd_taps<V, F>};
}

}  // namespace
}  // namespace fused_resnet
