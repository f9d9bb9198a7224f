// Copies of the input and of the weight in the form that the kernels read. Included by isa_*.cpp only; internal linkage.
#pragma once

#include "kernels.h"
#include "registers.h"

namespace fused_resnet {
namespace {

inline i64 clamped(i64 value, i64 most) { return value < 0 ? 0 : smaller(value, most); }

template <class V, class S>
void pack_row(const PackRowArgs& a) {
  using T = typename V::type;
  constexpr int W = V::width;
  const S* x = static_cast<const S*>(a.x);
  T* out = static_cast<T*>(a.out);
  if (V::group == 1 && a.stride_c == 1 && a.stride_w == a.channels && a.pitch == a.channels) {  // one run, as a stem's few channels are
    const i64 length = a.pixels * a.channels;
    i64 i = 0;
    for (; i + W <= length; i += W) V::store(out + i, V::load_n(x + i, W));
    if (i < length) V::store_n(out + i, V::load_n(x + i, length - i), length - i);
    return;
  }
  if (a.stride_c == 1) {
    // Two pages ahead of a short row there may be nothing, or something else: a prefetch of that is harmless.
    constexpr i64 ahead = 1024 / i64(sizeof(S));
    for (i64 w = 0; w < a.pixels; ++w, x += a.stride_w, out += a.pitch) {
      const S* next = a.channels >= ahead ? x + a.stride_w : x + ahead;
      i64 c = 0;
      for (; c + W <= a.channels; c += W) {
        __builtin_prefetch(next + c);
        V::store(out + c, V::load_n(x + c, W));
      }
      if (c < a.channels) V::store_n(out + c, V::load_n(x + c, a.channels - c), a.channels - c);
    }
    return;
  }
  i64 done = 0;  // channels that the transposing loop has done
  if (a.stride_w == 1 && W > 1) {
    for (; done < a.channels; done += W) {
      const i64 channels = smaller(a.channels - done, W);
      for (i64 w = 0; w < a.pixels; w += W) {
        const i64 pixels = smaller(a.pixels - w, W);
        typename V::reg rows[W];
        for (int j = 0; j < W; ++j) {
          rows[j] = j < channels ? V::load_n(x + (done + j) * a.stride_c + w, pixels) : V::zero();
        }
        transpose<V>(rows);
        alignas(64) T turned[W][W];
        FR_UNROLL
        for (int j = 0; j < W; ++j) V::store(turned[j], rows[j]);
        // Whole registers where what lies behind the pixel's channels is written next anyway: masked stores are slow.
        const i64 whole = V::group == 1 && a.channels < W ? clamped(a.pixels - w - (W + a.pitch - 1) / a.pitch, pixels) : 0;
        for (i64 i = 0; i < whole; ++i) V::store(out + (w + i) * a.pitch, V::load(turned[i]));
        for (i64 i = whole; i < pixels; ++i) V::store_n(out + (w + i) * a.pitch + done, V::load(turned[i]), channels);
      }
    }
    return;
  }
  for (i64 w = 0; w < a.pixels; ++w) {
    for (i64 c = 0; c < a.channels; ++c) out[w * a.pitch + c] = widen(x[w * a.stride_w + c * a.stride_c]);
  }
}

template <class V, class S>
void pack_weight(const PackWeightArgs& a) {
  using T = typename V::type;
  constexpr int W = V::width;
  const S* weight = static_cast<const S*>(a.weight);
  T* out = static_cast<T*>(a.out);
  const i64 area = a.r * a.s;
  const bool contiguous = a.stride.w == 1 && a.stride.h == a.s && a.stride.c == area;
  const bool channels_last = a.stride.c == 1 && a.stride.w == a.c && a.stride.h == a.s * a.c;
  for (i64 j = 0; j < a.width; j += W) {
    const i64 rows_here = smaller(a.k - a.k_begin - j, W);
    const S* first = weight + (a.k_begin + j) * a.stride.n;
    if (contiguous || channels_last) {
      // Each k is one run of memory: turn W of them at a time. Element i of the run is (c, r, s) or (r, s, c).
      const i64 run = a.c * area;
      i64 c = 0, rs = 0;
      for (i64 i = 0; i < run; i += W) {
        const i64 count = smaller(run - i, W);
        typename V::reg rows[W];
        for (int k = 0; k < W; ++k) rows[k] = k < rows_here ? V::load_n(first + k * a.stride.n + i, count) : V::zero();
        transpose<V>(rows);
        alignas(64) T turned[W][W];
        FR_UNROLL
        for (int k = 0; k < W; ++k) V::store(turned[k], rows[k]);
        for (i64 e = 0; e < count; ++e) {
          const i64 row = channels_last ? i + e : rs * a.c + c;
          V::store(out + row * a.width + j, V::load(turned[e]));
          if (++rs == area) {
            rs = 0;
            ++c;
          }
        }
      }
      continue;
    }
    for (i64 r = 0; r < a.r; ++r) {
      for (i64 s = 0; s < a.s; ++s) {
        for (i64 c = 0; c < a.c; ++c) {
          T* to = out + ((r * a.s + s) * a.c + c) * a.width + j;
          const S* from = first + c * a.stride.c + r * a.stride.h + s * a.stride.w;
          for (i64 k = 0; k < W; ++k) to[k] = k < rows_here ? widen(from[k * a.stride.n]) : T(0);
        }
      }
    }
  }
}

}  // namespace
}  // namespace fused_resnet
