// The passes over memory without a convolution. Bound by memory: where all operands are dense in one order and aligned, 16
// bytes at a time and several of them in flight in each thread; else value by value, with any strides.
#pragma once

#include "block.h"
#include "pass_plan.h"

namespace fused_resnet::cuda {

template <class T>
constexpr int kVector = 16 / int(sizeof(T));  // values in 16 bytes

// Sizes of a pass for the device; 32-bit division is several times faster than 64-bit.
struct Extent {
  i64 n, k, p, q;
  bool small;     // fewer than 2^31 elements
  bool channels;  // the result runs over channels

  FR_HOST_DEVICE i64 quotient(i64 a, i64 b, i64* rest) const {
    if (small) {
      const std::uint32_t result = std::uint32_t(a) / std::uint32_t(b);
      *rest = i64(std::uint32_t(a) - result * std::uint32_t(b));
      return result;
    }
    const i64 result = a / b;
    *rest = a - result * b;
    return result;
  }

  struct Position {
    i64 n, k, p, q;
    FR_HOST_DEVICE i64 in(const Strides& t) const { return n * t.n + k * t.c + p * t.h + q * t.w; }
  };

  // Of pixel number `pixel` over all images, lines and columns.
  FR_HOST_DEVICE Position pixel_at(i64 pixel, i64 channel) const {
    Position at;
    at.k = channel;
    at.n = quotient(quotient(pixel, q, &at.q), p, &at.p);
    return at;
  }

  // Of element number `index` in the result's order.
  FR_HOST_DEVICE Position at(i64 index) const {
    if (channels) {
      i64 channel;
      const i64 pixel = quotient(index, k, &channel);
      return pixel_at(pixel, channel);
    }
    Position at;
    at.n = quotient(quotient(quotient(index, q, &at.q), p, &at.p), k, &at.k);
    return at;
  }
};

inline Extent extent_of(const PassShape& s) {
  return {s.n, s.k, s.p, s.q, elements(s) <= 2147483647, runs_over_channels(s)};
}

enum class Walk {
  strided,       // value by value, any strides
  dense,         // vectors; a vector's values may be of several channels
  dense_groups,  // vectors along the channels, K a multiple: the bias is a vector too
};

// result = relu(first + bias + second), or with kMask: second <= 0 ? 0 : first. X: the type of `first`.
template <class T, class X, Walk kWalk, bool kMask>
struct Pass {
  using Acc = typename Accumulator<T>::type;
  static constexpr int kThreads = 256, kBlocksOnSM = 3;
  static constexpr int kCount = kWalk == Walk::strided ? 1 : kVector<T>;
  static constexpr int kInFlight = sizeof(X) > sizeof(T) ? 2 : 4;  // a vector of a wide input is 32 bytes
  static constexpr int kTile = kThreads * kInFlight * kCount;  // elements of a block
  struct Shared {
    char nothing;
  };
  struct State {
    Pack<X, kCount> first[kInFlight];
    Pack<T, kCount> second[kInFlight];
  };

  const X* first;
  const T *second, *bias;
  T* result;
  Extent extent;
  Strides first_strides, second_strides, result_strides;
  i64 elements, plane;  // plane: elements of one channel side by side
  bool relu;

  struct Offsets {
    i64 first, second, result;
  };
  FR_HOST_DEVICE Offsets offsets(i64 element) const {
    if (kWalk != Walk::strided) return {element, element, element};
    const Extent::Position at = extent.at(element);
    return {at.in(first_strides), at.in(second_strides), at.in(result_strides)};
  }

  FR_HOST_DEVICE T value_of(X a, T b, Acc bias_value) const {
    T out;
    if (kMask) {
      narrow(relu_gradient(Acc(widen(a)), widen(b)), &out);
    } else {
      Acc value = Acc(widen(a));
      if (bias) value += bias_value;
      if (second) value += widen(b);
      narrow(relu ? fused_resnet::relu(value) : value, &out);
    }
    return out;
  }

  // The values after the last whole vector, one for each thread.
  FR_HOST_DEVICE void rest(int thread) const {
    const i64 element = elements / kCount * kCount + thread;
    if (element >= elements) return;
    T b{};
    if (second) b = second[element];
    result[element] = value_of(first[element], b, !kMask && bias ? widen(bias[extent.at(element).k]) : Acc(0));
  }

  template <class Block>
  FR_HOST_DEVICE void operator()(Block& block, i64 index, Shared&) const {
    block.each([&](int thread, State& state) {
      const i64 vectors = elements / kCount, from = index * (kThreads * kInFlight) + thread;
      FR_PRAGMA_UNROLL
      for (int i = 0; i < kInFlight; ++i) {
        if (from + i * kThreads >= vectors) continue;
        const Offsets at = offsets((from + i * kThreads) * kCount);
        state.first[i] = load_pack<Pack<X, kCount>>(first + at.first);
        if (second) state.second[i] = load_pack<Pack<T, kCount>>(second + at.second);
      }
      FR_PRAGMA_UNROLL
      for (int i = 0; i < kInFlight; ++i) {
        const i64 vector = from + i * kThreads;
        if (vector >= vectors) continue;
        Acc bias_value[kCount] = {};
        if (!kMask && bias) biases(vector * kCount, bias_value);
        Pack<T, kCount> out;
        FR_PRAGMA_UNROLL
        for (int j = 0; j < kCount; ++j) {
          out.value[j] = value_of(state.first[i].value[j], second ? state.second[i].value[j] : T{}, bias_value[j]);
        }
        store_pack(result + offsets(vector * kCount).result, out);
      }
      if (kCount > 1 && index == 0) rest(thread);
    });
  }

  FR_HOST_DEVICE void biases(i64 element, Acc* out) const {
    if (kWalk == Walk::dense_groups) {
      i64 channel;
      extent.quotient(element, extent.k, &channel);
      const auto pack = load_pack<Pack<T, kCount>>(bias + channel);
      FR_PRAGMA_UNROLL
      for (int j = 0; j < kCount; ++j) out[j] = widen(pack.value[j]);
      return;
    }
    i64 in_plane, channel;
    extent.quotient(extent.quotient(element, plane, &in_plane), extent.k, &channel);
    Acc value = widen(bias[channel]);
    FR_PRAGMA_UNROLL
    for (int j = 0; j < kCount; ++j) {
      out[j] = value;
      if (++in_plane == plane && j + 1 < kCount) {
        in_plane = 0;
        if (++channel == extent.k) channel = 0;
        value = widen(bias[channel]);
      }
    }
  }
};

}  // namespace fused_resnet::cuda
