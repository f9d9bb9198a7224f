// The general convolution: implicit GEMM without tensor cores, for every dtype, stride and configuration.
//
// A block computes a tile of output pixels (of all images, one after the other) x output channels of one group. The terms of a
// sum, (r, s, c) with c fastest and then those of the joined convolution, are cut into stages of kDepth terms: while the block
// multiplies one stage in shared memory, the next is on its way in registers. Where a term is in the input and in the weight is
// a table in shared memory, filled for kTableStages stages at once, so that the loop has no division. Every sum is made by one
// thread, in the order of the terms.
#pragma once

#include "block.h"
#include "general_plan.h"

namespace fused_resnet::cuda {

// Pixels x channels of a block, and the part of one thread.
template <int kPixels_, int kChannels_, int kThreadPixels_, int kThreadChannels_>
struct BlockTile {
  static constexpr int kPixels = kPixels_, kChannels = kChannels_;
  static constexpr int kThreadPixels = kThreadPixels_, kThreadChannels = kThreadChannels_;
};
template <class T>
struct LargeTileOf {
  using type = BlockTile<128, 64, 8, 4>;
};
template <>
struct LargeTileOf<double> {  // a value takes two registers
  using type = BlockTile<64, 64, 4, 4>;
};
using MediumTile = BlockTile<64, 32, 4, 2>;
using NarrowTile = BlockTile<128, 8, 4, 1>;

template <class T, class Index, class TileOf>
struct GeneralConvolution {
  using Acc = typename Accumulator<T>::type;
  static constexpr int kThreads = 256, kBlocksOnSM = sizeof(T) + sizeof(Index) < 16 ? 2 : 1;  // 128 registers a thread, or 255
  static constexpr int kPixels = TileOf::kPixels, kChannels = TileOf::kChannels;
  static constexpr int kM = TileOf::kThreadPixels, kN = TileOf::kThreadChannels;
  static constexpr int kDepth = 8, kTableStages = 32;
  static constexpr int kLane = 16 / int(sizeof(Acc));        // values in 16 bytes
  static constexpr int kLaneM = kM < kLane ? kM : kLane, kLaneN = kN < kLane ? kN : kLane;
  static constexpr int kThreadsM = kPixels / kM, kThreadsN = kChannels / kN;
  static constexpr int kLoadsX = kPixels * kDepth / kThreads;
  static constexpr int kLoadsW = kChannels * kDepth > kThreads ? kChannels * kDepth / kThreads : 1;
  static_assert(kThreadsM * kThreadsN == kThreads && kPixels <= kThreads && kTableStages * kDepth <= kThreads, "");

  // A pixel of the tile: offsets into x (of its first tap, which may be outside), the joined input, y and shortcut.
  struct Pixel {
    Index x, h, w, joined;
  };
  struct PixelEnd {
    Index y, shortcut;
  };
  // A term of the sum: offsets into x and weight. weight < 0: there is no such term.
  struct Term {
    Index x, h, w, weight;
  };
  // 16 bytes more than a row has: 8 rows then start in different banks, for writes along the terms.
  struct Stage {
    alignas(16) Acc x[kDepth][kPixels + kLane];
    alignas(16) Acc w[kDepth][kChannels + kLane];
  };
  struct Shared {
    Stage stage[2];
    Term term[kTableStages * kDepth];
    Pixel pixel[kPixels];
    PixelEnd end[kPixels];
  };
  struct State {
    Acc acc[kM][kN];
    T x[kLoadsX], w[kLoadsW];  // the next stage
  };

  const T *x, *joined, *weight, *joined_weight, *bias, *shortcut;
  T* y;
  Index pixels, p, q, h, w, channels, outputs, taps_w;  // channels and outputs: of one group
  Index stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w, joined_stride_h, joined_stride_w;
  Index terms, joined_terms, stages, joined_from;  // joined_from: the first stage of the joined convolution
  i64 channel_tiles, tiles_of_pixels;              // a tile of pixels is channel_tiles blocks, over all groups
  Index group_tiles;                               // tiles of channels of one group
  Index x_n, x_c, x_h, x_w, j_n, j_c, j_h, j_w, y_n, y_c, y_h, y_w, s_n, s_c, s_h, s_w;
  Index w_k, w_c, w_h, w_w, jw_k, jw_c;
  bool relu, vector_store;
  bool x_terms_fast, w_terms_fast, y_pixels_fast;  // which axis neighbouring threads take

  // What one block works on.
  struct Place {
    Index first_pixel, group, first_channel;  // first_channel: of the group
  };

  FR_HOST_DEVICE Place place(i64 index) const {
    Place at;
    const Index tile = Index(index % channel_tiles);
    at.first_pixel = Index(index / channel_tiles) * kPixels;
    at.group = tile / group_tiles;
    at.first_channel = tile % group_tiles * kChannels;
    return at;
  }

  // Pixels beyond the last one are computed as the last one, and not stored.
  FR_HOST_DEVICE void locate(Index number, Index group, Pixel& pixel, PixelEnd& end) const {
    const Index i = smaller_of(number, Index(pixels - 1));
    const Index col = i % q, line = i / q, row = line % p, image = line / p;
    pixel.h = row * stride_h - pad_top;
    pixel.w = col * stride_w - pad_left;
    pixel.x = image * x_n + group * channels * x_c + pixel.h * x_h + pixel.w * x_w;
    pixel.joined = image * j_n + row * joined_stride_h * j_h + col * joined_stride_w * j_w;
    end.y = image * y_n + row * y_h + col * y_w;
    end.shortcut = image * s_n + row * s_h + col * s_w;
  }

  FR_HOST_DEVICE Term term_at(Index number) const {
    Term term;
    term.x = term.h = term.w = 0;
    term.weight = -1;
    const Index stage = number / kDepth;
    if (stage < joined_from) {
      if (number >= terms) return term;
      const Index c = number % channels, tap = number / channels, r = tap / taps_w, s = tap % taps_w;
      term.h = r * dilation_h;
      term.w = s * dilation_w;
      term.x = c * x_c + term.h * x_h + term.w * x_w;
      term.weight = c * w_c + r * w_h + s * w_w;
    } else {
      const Index c = number - joined_from * kDepth;
      if (c >= joined_terms) return term;
      term.x = c * j_c;
      term.weight = c * jw_c;
    }
    return term;
  }

  FR_HOST_DEVICE static bool inside(Index i, Index size) {
    return i >= 0 && i < size;
  }

  // Which values of a stage a thread loads: `row` (pixel or channel) and `depth` (term), each load a step further.
  struct Part {
    int row, depth, row_step, depth_step;
  };
  FR_HOST_DEVICE static Part part_of(int thread, bool terms_fast, int rows) {
    Part part;
    part.row = terms_fast ? thread / kDepth : thread % rows;
    part.depth = terms_fast ? thread % kDepth : thread / rows;
    part.row_step = terms_fast ? kThreads / kDepth : 0;
    part.depth_step = terms_fast ? 0 : kThreads / rows;
    return part;
  }

  FR_HOST_DEVICE void fetch(int thread, State& state, const Shared& shared, const Place& at, Index stage) const {
    const bool of_joined = stage >= joined_from;
    const Term* table = shared.term + stage % kTableStages * kDepth;
    const T* from = of_joined ? joined : x;
    const Part px = part_of(thread, x_terms_fast, kPixels);
    FR_PRAGMA_UNROLL
    for (int i = 0; i < kLoadsX; ++i) {
      const Term term = table[px.depth + i * px.depth_step];
      const Pixel pixel = shared.pixel[px.row + i * px.row_step];
      const bool read = term.weight >= 0 && (of_joined || (inside(pixel.h + term.h, h) && inside(pixel.w + term.w, w)));
      const Index offset = (of_joined ? pixel.joined : pixel.x) + term.x;
      T value{};
      if (read) value = from[offset];
      state.x[i] = value;
    }
    if (kChannels * kDepth < kThreads && thread >= kChannels * kDepth) return;
    const T* weights = of_joined ? joined_weight : weight;
    const Index step = of_joined ? jw_k : w_k;
    const Part pw = part_of(thread, w_terms_fast, kChannels);
    FR_PRAGMA_UNROLL
    for (int i = 0; i < kLoadsW; ++i) {
      const Index offset = table[pw.depth + i * pw.depth_step].weight;
      const Index k = smaller_of(Index(at.first_channel + pw.row + i * pw.row_step), Index(outputs - 1));
      T value{};
      if (offset >= 0) value = weights[(at.group * outputs + k) * step + offset];
      state.w[i] = value;
    }
  }

  FR_HOST_DEVICE void put(int thread, const State& state, Stage& stage) const {
    const Part px = part_of(thread, x_terms_fast, kPixels);
    FR_PRAGMA_UNROLL
    for (int i = 0; i < kLoadsX; ++i) {
      stage.x[px.depth + i * px.depth_step][px.row + i * px.row_step] = widen(state.x[i]);
    }
    if (kChannels * kDepth < kThreads && thread >= kChannels * kDepth) return;
    const Part pw = part_of(thread, w_terms_fast, kChannels);
    FR_PRAGMA_UNROLL
    for (int i = 0; i < kLoadsW; ++i) {
      stage.w[pw.depth + i * pw.depth_step][pw.row + i * pw.row_step] = widen(state.w[i]);
    }
  }

  // A thread's outputs are groups of kLaneM pixels x kLaneN channels; the groups of neighbouring threads are neighbours.
  FR_HOST_DEVICE int thread_m(int thread) const { return y_pixels_fast ? thread % kThreadsM : thread / kThreadsN; }
  FR_HOST_DEVICE int thread_n(int thread) const { return y_pixels_fast ? thread / kThreadsM : thread % kThreadsN; }
  FR_HOST_DEVICE static int pixel_of(int tm, int m) { return (m / kLaneM * kThreadsM + tm) * kLaneM + m % kLaneM; }
  FR_HOST_DEVICE static int channel_of(int tn, int n) { return (n / kLaneN * kThreadsN + tn) * kLaneN + n % kLaneN; }

  FR_HOST_DEVICE void multiply(int tm, int tn, State& state, const Stage& stage) const {
    FR_PRAGMA_UNROLL
    for (int d = 0; d < kDepth; ++d) {
      Pack<Acc, kLaneM> a[kM / kLaneM];
      Pack<Acc, kLaneN> b[kN / kLaneN];
      FR_PRAGMA_UNROLL
      for (int m = 0; m < kM / kLaneM; ++m) a[m] = load_pack<Pack<Acc, kLaneM>>(&stage.x[d][pixel_of(tm, m * kLaneM)]);
      FR_PRAGMA_UNROLL
      for (int n = 0; n < kN / kLaneN; ++n) b[n] = load_pack<Pack<Acc, kLaneN>>(&stage.w[d][channel_of(tn, n * kLaneN)]);
      FR_PRAGMA_UNROLL
      for (int m = 0; m < kM; ++m) {
        FR_PRAGMA_UNROLL
        for (int n = 0; n < kN; ++n) {
          state.acc[m][n] += a[m / kLaneM].value[m % kLaneM] * b[n / kLaneN].value[n % kLaneN];
        }
      }
    }
  }

  FR_HOST_DEVICE Acc finished(Acc value, Acc bias_value, bool add, Acc shortcut_value) const {
    if (bias) value += bias_value;
    if (add) value += shortcut_value;
    return relu ? fused_resnet::relu(value) : value;
  }

  FR_HOST_DEVICE void finish(int thread, const State& state, const Shared& shared, const Place& at) const {
    const int tm = thread_m(thread), tn = thread_n(thread);
    const Index left = pixels - at.first_pixel;
    Acc bias_value[kN];
    FR_PRAGMA_UNROLL
    for (int n = 0; n < kN; ++n) {
      const Index k = at.first_channel + channel_of(tn, n);
      bias_value[n] = bias && k < outputs ? widen(bias[at.group * outputs + k]) : Acc(0);
    }
    // A vector is a group's pixels or its channels: whole or beyond the end, never cut (see general_plan).
    if (vector_store && y_pixels_fast && kLaneM == kLane) {
      store<true, kLaneM == kLane>(state, shared, at, left, tm, tn, bias_value);
    } else if (vector_store && !y_pixels_fast && kLaneN == kLane) {
      store<false, kLaneN == kLane>(state, shared, at, left, tm, tn, bias_value);
    } else {
      store<false, false>(state, shared, at, left, tm, tn, bias_value);
    }
  }

  template <bool kAlongPixels, bool kVector>
  FR_HOST_DEVICE void store(const State& state, const Shared& shared, const Place& at, Index left, int tm, int tn,
                            const Acc* bias_value) const {
    constexpr int kStepM = kVector && kAlongPixels ? kLane : 1, kStepN = kVector && !kAlongPixels ? kLane : 1;
    constexpr int kCount = kStepM * kStepN;
    FR_PRAGMA_UNROLL
    for (int m = 0; m < kM; m += kStepM) {
      const int pixel = pixel_of(tm, m);
      if (pixel >= left) continue;
      const PixelEnd end = shared.end[pixel];
      FR_PRAGMA_UNROLL
      for (int n = 0; n < kN; n += kStepN) {
        const Index in_group = at.first_channel + channel_of(tn, n), k = at.group * outputs + in_group;
        if (in_group >= outputs) continue;
        Pack<T, kCount> add{}, out;
        if (shortcut) add = load_pack<Pack<T, kCount>>(shortcut + (end.shortcut + k * s_c));
        FR_PRAGMA_UNROLL
        for (int i = 0; i < kCount; ++i) {
          const int mi = m + (kAlongPixels ? i : 0), ni = n + (kAlongPixels ? 0 : i);
          narrow(finished(state.acc[mi][ni], bias_value[ni], shortcut != nullptr, widen(add.value[i])), &out.value[i]);
        }
        store_pack(y + (end.y + k * y_c), out);
      }
    }
  }

  FR_HOST_DEVICE void fill_table(int thread, Shared& shared, Index first_stage) const {
    if (thread < kTableStages * kDepth) shared.term[thread] = term_at(first_stage * kDepth + thread);
  }

  template <class Block>
  FR_HOST_DEVICE void operator()(Block& block, i64 index, Shared& shared) const {
    const Place at = place(index);
    block.each([&](int thread, State& state) {
      FR_PRAGMA_UNROLL
      for (int m = 0; m < kM; ++m) {
        FR_PRAGMA_UNROLL
        for (int n = 0; n < kN; ++n) state.acc[m][n] = Acc(0);
      }
      if (thread < kPixels) locate(at.first_pixel + thread, at.group, shared.pixel[thread], shared.end[thread]);
      fill_table(thread, shared, 0);
    });
    block.each([&](int thread, State& state) {
      fetch(thread, state, shared, at, 0);
      put(thread, state, shared.stage[0]);
    });
    FR_PRAGMA_NO_UNROLL
    for (Index stage = 0; stage < stages; ++stage) {
      const Index next = stage + 1;
      if (next % kTableStages == 0 && next < stages) {
        block.each([&](int thread, State&) { fill_table(thread, shared, next); });
      }
      block.each([&](int thread, State& state) {
        if (next < stages) fetch(thread, state, shared, at, next);
        multiply(thread_m(thread), thread_n(thread), state, shared.stage[stage & 1]);
        if (next < stages) put(thread, state, shared.stage[next & 1]);
      });
    }
    block.each([&](int thread, State& state) { finish(thread, state, shared, at); });
  }
};

}  // namespace fused_resnet::cuda
