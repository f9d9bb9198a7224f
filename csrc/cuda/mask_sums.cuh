// The backward pass with a bias gradient: mask and sums in one walk over memory, then the sums of the pieces.
#pragma once

#include "passes.cuh"

namespace fused_resnet::cuda {

// The mask and, from the same values, the sums of each piece: [pieces][K]. kCount: values at once, 1 with any strides.
// kChannels: a block takes `threads_across` vectors of channels x a piece's pixels; else a piece's pixels of one channel.
template <class T, int kCount, bool kChannels>
struct MaskSums {
  using Acc = typename Accumulator<T>::type;
  static constexpr int kThreads = 256, kBlocksOnSM = 4, kInFlight = 2;
  struct Shared {
    Acc sum[kChannels ? kCount : 1][kThreads];
  };
  struct State {
    Acc sum[kCount];
  };

  const T *grad, *output;
  T* result;
  Acc* sums;
  Extent extent;
  Strides grad_strides, output_strides, result_strides;
  Pieces pieces;
  i64 pixels, beside;  // beside: blocks of each piece
  int threads_across;  // a power of two; 1 where a block has one channel

  struct Offsets {
    i64 grad, output, result;
  };
  FR_HOST_DEVICE Offsets offsets(i64 pixel, i64 channel) const {
    if (kCount > 1) {
      i64 in_image, same = kChannels ? pixel * extent.k + channel : 0;
      if (!kChannels) {
        const i64 plane = extent.p * extent.q, image = extent.quotient(pixel, plane, &in_image);
        same = (image * extent.k + channel) * plane + in_image;
      }
      return {same, same, same};
    }
    const Extent::Position at = extent.pixel_at(pixel, channel);
    return {at.in(grad_strides), at.in(output_strides), at.in(result_strides)};
  }

  template <class Block>
  FR_HOST_DEVICE void operator()(Block& block, i64 index, Shared& shared) const {
    constexpr int kWidth = kChannels ? kCount : 1;  // sums of a thread
    const i64 piece = index / beside, part = index % beside;
    const i64 begin = piece * pieces.length, end = smaller_of(begin + pieces.length, pixels);
    const int across = kChannels ? threads_across : 1, down = kThreads / across;
    const i64 step = kChannels ? down : down * kCount;  // pixels
    block.each([&](int thread, State& state) {
      FR_PRAGMA_UNROLL
      for (int j = 0; j < kCount; ++j) state.sum[j] = Acc(0);
      const i64 channel = kChannels ? (part * across + thread % across) * kCount : part;
      const i64 first = begin + thread / across * (step / down);
      if (channel < extent.k) {
        for (i64 pixel = first; pixel < end; pixel += step * kInFlight) some(state, pixel, step, end, channel);
      }
      // One channel: a thread's sums are all of that channel.
      if (!kChannels) {
        FR_PRAGMA_UNROLL
        for (int j = 1; j < kCount; ++j) state.sum[0] += state.sum[j];
      }
      FR_PRAGMA_UNROLL
      for (int j = 0; j < kWidth; ++j) shared.sum[j][thread] = state.sum[j];
    });
    for (int half = down / 2; half > 0; half /= 2) {
      block.each([&](int thread, State&) {
        if (thread >= half * across) return;
        FR_PRAGMA_UNROLL
        for (int j = 0; j < kWidth; ++j) shared.sum[j][thread] += shared.sum[j][thread + half * across];
      });
    }
    block.each([&](int thread, State&) {
      const i64 channel = kChannels ? (part * across + thread) * kCount : part;
      if (thread >= across || channel >= extent.k) return;
      FR_PRAGMA_UNROLL
      for (int j = 0; j < kWidth; ++j) sums[piece * extent.k + channel + j] = shared.sum[j][thread];
    });
  }

  // kInFlight vectors, `step` pixels apart.
  FR_HOST_DEVICE void some(State& state, i64 pixel, i64 step, i64 end, i64 channel) const {
    Pack<T, kCount> a[kInFlight], b[kInFlight];
    i64 to[kInFlight];
    FR_PRAGMA_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      if (pixel + i * step >= end) continue;
      const Offsets at = offsets(pixel + i * step, channel);
      a[i] = load_pack<Pack<T, kCount>>(grad + at.grad);
      b[i] = load_pack<Pack<T, kCount>>(output + at.output);
      to[i] = at.result;
    }
    FR_PRAGMA_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      if (pixel + i * step >= end) continue;
      Pack<T, kCount> out;
      FR_PRAGMA_UNROLL
      for (int j = 0; j < kCount; ++j) {
        const Acc value = relu_gradient(Acc(widen(a[i].value[j])), Acc(widen(b[i].value[j])));
        state.sum[j] += value;
        narrow(value, &out.value[j]);
      }
      store_pack(result + to[i], out);
    }
  }
};

// The sums over the pieces, in a fixed order and in double. A block takes 8 channels (32 bytes of each piece's sums).
template <class T>
struct SumPieces {
  using Acc = typename Accumulator<T>::type;
  static constexpr int kThreads = 256, kBlocksOnSM = 4, kChannels = 8, kInFlight = 8;
  struct Shared {
    double sum[kThreads];
  };
  struct State {
    char nothing;
  };

  const Acc* sums;
  T* out;
  i64 pieces, k;

  template <class Block>
  FR_HOST_DEVICE void operator()(Block& block, i64 index, Shared& shared) const {
    constexpr int kRows = kThreads / kChannels;
    block.each([&](int thread, State&) {
      const i64 channel = index * kChannels + thread % kChannels;
      double sum = 0;
      for (i64 piece = thread / kChannels; piece < pieces && channel < k; piece += kRows * kInFlight) {
        Acc value[kInFlight];
        FR_PRAGMA_UNROLL
        for (int i = 0; i < kInFlight; ++i) {
          value[i] = piece + i * kRows < pieces ? sums[(piece + i * kRows) * k + channel] : Acc(0);
        }
        FR_PRAGMA_UNROLL
        for (int i = 0; i < kInFlight; ++i) sum += double(value[i]);
      }
      shared.sum[thread] = sum;
    });
    for (int half = kRows / 2; half > 0; half /= 2) {
      block.each([&](int thread, State&) {
        if (thread < half * kChannels) shared.sum[thread] += shared.sum[thread + half * kChannels];
      });
    }
    block.each([&](int thread, State&) {
      const i64 channel = index * kChannels + thread;
      if (thread < kChannels && channel < k) narrow(Acc(shared.sum[thread]), out + channel);
    });
  }
};

}  // namespace fused_resnet::cuda
