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
        const i64 whole = V::group == 1 && a.channels < W && !a.others_between ? clamped(a.pixels - w - (W + a.pitch - 1) / a.pitch, pixels) : 0;
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

// What becomes of `odd`, zeros at first, where a value of `v` is not finite: NaN, and stays so.
template <class V>
FR_INLINE void note_odd(typename V::reg v, typename V::reg& odd) {
  odd = V::fma(v, V::zero(), odd);
}

// Whether `odd` of ``note_odd`` is zero everywhere still.
template <class V>
bool all_finite(typename V::reg odd) {
  alignas(64) typename V::type lanes[V::width];
  V::store(lanes, odd);
  int odd_lanes = 0;
  for (int i = 0; i < V::width; ++i) odd_lanes |= lanes[i] != 0;  // a NaN is not 0
  return odd_lanes == 0;
}

// W rows of memory, `pitch` apart, of which `rows` exist, as columns: element e of all rows goes to to(e), for e < count. Rows that do not exist
// are zeros. odd: as of ``note_odd``.
template <class V, class S, class To>
FR_INLINE void turn(const S* first, i64 pitch, i64 rows, i64 count, To to, typename V::reg& odd) {
  constexpr int W = V::width;
  for (i64 begin = 0; begin < count; begin += W) {
    const i64 here = smaller(count - begin, W);
    typename V::reg lines[W];
    for (int k = 0; k < W; ++k) lines[k] = k < rows ? V::load_n(first + k * pitch + begin, here) : V::zero();
    transpose<V>(lines);
    alignas(64) typename V::type turned[W][W];
    FR_UNROLL
    for (int k = 0; k < W; ++k) V::store(turned[k], lines[k]);
    for (i64 e = 0; e < here; ++e) {
      const typename V::reg line = V::load(turned[e]);
      note_odd<V>(line, odd);
      V::store(to(begin + e), line);
    }
  }
}

// A part of a weight: a register of output channels for each input channel and tap.
template <class V>
struct WeightBlock {
  using type = typename V::type;
  static constexpr i64 kRows = 9 * 16;

  i64 taps = 0;  // of each input channel
  alignas(64) type values[kRows][V::width];

  type* row(i64 channel, i64 tap) { return values[channel * taps + tap]; }
};

// Taps [first_tap, first_tap + taps) of input channels [c, c + channels) of `lanes` output channels from k on, and zeros in the other lanes, to
// to(channel, tap), which count from 0. odd: as of ``note_odd``.
template <class V, class S, class To>
void load_weights(const PackWeightArgs& a, i64 k, i64 lanes, i64 c, i64 channels, i64 first_tap, i64 taps, To to, typename V::reg& odd) {
  constexpr int W = V::width;
  const S* const first = static_cast<const S*>(a.weight) + k * a.stride.n + c * a.stride.c;
  const auto offset = [&](i64 tap) { return (first_tap + tap) / a.s * a.stride.h + (first_tap + tap) % a.s * a.stride.w; };
  const bool runs = a.r == 1 || a.stride.h == a.s * a.stride.w;  // the taps lie in one direction, at equal distances
  if (a.stride.n == 1) {  // output channels side by side
    for (i64 t = 0; t < taps; ++t) {
      const S* from = first + offset(t);
      for (i64 i = 0; i < channels; ++i, from += a.stride.c) {
        const typename V::reg row = V::load_n(from, lanes);
        note_odd<V>(row, odd);
        V::store(to(i, t), row);
      }
    }
  } else if (runs && a.stride.w == 1 && a.stride.c == taps) {  // all taps of a channel, then those of the next
    i64 i = 0, t = 0;
    turn<V>(first + offset(0), a.stride.n, lanes, channels * taps, [&](i64) {
      typename V::type* const row = to(i, t);
      if (++t == taps) t = 0, ++i;
      return row;
    }, odd);
  } else if (a.stride.c == 1) {  // input channels side by side
    for (i64 t = 0; t < taps; ++t) {
      turn<V>(first + offset(t), a.stride.n, lanes, channels, [&](i64 e) { return to(e, t); }, odd);
    }
  } else if (runs && (a.stride.w == 1 || a.stride.w == -1)) {
    const bool backwards = a.stride.w < 0;
    const S* from = first + offset(backwards ? taps - 1 : 0);
    for (i64 i = 0; i < channels; ++i, from += a.stride.c) {
      turn<V>(from, a.stride.n, lanes, taps, [&](i64 e) { return to(i, backwards ? taps - 1 - e : e); }, odd);
    }
  } else {
    for (i64 i = 0; i < channels; ++i) {
      for (i64 t = 0; t < taps; ++t) {
        const S* from = first + i * a.stride.c + offset(t);
        typename V::type* row = to(i, t);
        for (i64 lane = 0; lane < W; ++lane) row[lane] = lane < lanes ? widen(from[lane * a.stride.n]) : typename V::type(0);
        note_odd<V>(V::load(row), odd);
      }
    }
  }
}

// D: how the packed weights are held, V itself or pairs of bfloat16 (whose own fma multiplies pairs).
template <class V, class S, class D>
bool pack_weight(const PackWeightArgs& a) {
  constexpr int W = D::width, G = D::group;
  typename D::part* const out = static_cast<typename D::part*>(a.out);
  const i64 elements = (a.c + G - 1) / G, area = a.r * a.s;
  typename V::reg odd = V::zero();
  for (i64 j = 0; j < a.width; j += W) {
    const i64 k = a.k_begin + j, lanes = clamped(a.k - k, W);
    const auto place = [&](i64 c, i64 tap) { return out + ((tap * elements + c / G) * a.width + j) * G; };
    if constexpr (G == 1) {
      load_weights<V, S>(a, k, lanes, a.c_begin, a.c_end - a.c_begin, 0, area, [&](i64 c, i64 tap) { return place(a.c_begin + c, tap); }, odd);
    } else {
      WeightBlock<V> block;
      const i64 most_taps = smaller(area, block.kRows / G);
      for (i64 tap = 0; tap < area; tap += most_taps) {
        block.taps = smaller(area - tap, most_taps);
        const i64 most = block.kRows / block.taps / G * G;
        for (i64 c = a.c_begin; c < a.c_end; c += most) {
          const i64 channels = smaller(a.c_end - c, most);
          load_weights<V, S>(a, k, lanes, c, channels, tap, block.taps, [&](i64 i, i64 t) { return block.row(i, t); }, odd);
          for (i64 t = 0; t < block.taps; ++t) {
            for (i64 i = 0; i < channels; i += G) {
              typename V::reg group[G];
              FR_UNROLL
              for (int g = 0; g < G; ++g) group[g] = i + g < channels ? V::load(block.row(i + g, t)) : V::zero();
              D::store_group(place(c + i, tap + t), group);
            }
          }
        }
      }
    }
  }
  return all_finite<V>(odd);
}

}  // namespace
}  // namespace fused_resnet
