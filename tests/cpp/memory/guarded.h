// Memory between guard zones, and tensors in it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "../../../csrc/epilogue.h"
#include "../../../csrc/types.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace memory {

using fused_resnet::bf16;
using fused_resnet::DType;
using fused_resnet::i64;
using fused_resnet::Strides;

// Exactly `bytes` bytes, an even number, between two guard zones. The data starts `skew` bytes after a 64-byte boundary. A guard
// zone reads as NaN in every dtype, so that a result in which it takes part is NaN. Under AddressSanitizer any access is an error.
class Guarded {
 public:
  explicit Guarded(i64 bytes, i64 skew = 0) : bytes_(bytes), words_(std::size_t(bytes + 2 * kGuard + 64 + skew) / 2, kPattern) {
    const i64 past = i64(reinterpret_cast<std::uintptr_t>(words_.data()) % 64);
    data_ = reinterpret_cast<char*>(words_.data()) + (64 - past) % 64 + kGuard + skew;
    forbid(true);
  }
  ~Guarded() { forbid(false); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  char* get() const { return data_; }
  i64 bytes() const { return bytes_; }
  void fill(int byte) { std::memset(data_, byte, std::size_t(bytes_)); }
  bool intact() const {
    forbid(false);
    const auto is_pattern = [](std::uint16_t word) { return word == kPattern; };
    const std::uint16_t* const end = words_.data() + words_.size();
    const bool ok = std::all_of(words_.data(), reinterpret_cast<const std::uint16_t*>(data_), is_pattern) &&
                    std::all_of(reinterpret_cast<const std::uint16_t*>(data_ + bytes_), end, is_pattern);
    forbid(true);
    return ok;
  }

 private:
  static constexpr i64 kGuard = 4096;
  static constexpr std::uint16_t kPattern = 0x7ffa;

  void forbid([[maybe_unused]] bool on) const {
#if defined(__SANITIZE_ADDRESS__)
    const char* const first = reinterpret_cast<const char*>(words_.data());
    const char* const last = reinterpret_cast<const char*>(words_.data() + words_.size());
    if (on) {
      ASAN_POISON_MEMORY_REGION(first, std::size_t(data_ - first));
      ASAN_POISON_MEMORY_REGION(data_ + bytes_, std::size_t(last - data_ - bytes_));
    } else {
      ASAN_UNPOISON_MEMORY_REGION(first, std::size_t(last - first));
    }
#endif
  }

  i64 bytes_;
  char* data_;
  std::vector<std::uint16_t> words_;
};

inline i64 bytes_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

inline double load(DType dtype, const char* data, i64 index) {
  switch (dtype) {
    case DType::float32: return double(reinterpret_cast<const float*>(data)[index]);
    case DType::float64: return reinterpret_cast<const double*>(data)[index];
    default: return double(widen(reinterpret_cast<const bf16*>(data)[index]));
  }
}

inline void store(DType dtype, double value, char* data, i64 index) {
  switch (dtype) {
    case DType::float32: fused_resnet::narrow(float(value), reinterpret_cast<float*>(data) + index); break;
    case DType::float64: fused_resnet::narrow(value, reinterpret_cast<double*>(data) + index); break;
    default: fused_resnet::narrow(float(value), reinterpret_cast<bf16*>(data) + index);
  }
}

// As a value of the dtype has it. Exact up to one rounding for what float32 holds, which all our sums are.
inline double rounded(DType dtype, double value) {
  double memory;
  store(dtype, value, reinterpret_cast<char*>(&memory), 0);
  return load(dtype, reinterpret_cast<const char*>(&memory), 0);
}

inline Strides dense(bool channels_last, i64 c, i64 h, i64 w) {
  return channels_last ? Strides{h * w * c, 1, w * c, c} : Strides{c * h * w, h * w, w, 1};
}

// 0: contiguous; 1: channels_last; 2: channels_last, with gaps between pixels, rows and images; 3: rows of channels, with gaps.
constexpr int kLayouts = 4;
inline Strides layout(int kind, i64 c, i64 h, i64 w) {
  const i64 pixel = c + 3, row = w * pixel + 5, line = w + 1, lines = c * line + 2;
  switch (kind) {
    case 2: return {h * row + 7, 1, row, pixel};
    case 3: return {h * lines + 1, line, lines, 1};
    default: return dense(kind == 1, c, h, w);
  }
}

// A tensor [N, C, H, W] in guarded memory that ends with the last element that its strides reach, and starts misaligned for
// vectors. It starts as NaN, gaps between the elements included.
class Tensor {
 public:
  Tensor(DType dtype, i64 n, i64 c, i64 h, i64 w, const Strides& strides)
      : n_(n), c_(c), h_(h), w_(w), strides_(strides), dtype_(dtype), memory_(reach() * bytes_of(dtype), bytes_of(dtype)) {
    poison();
  }

  void poison() {
    for (i64 i = 0; i < elements(); ++i) store(dtype_, std::numeric_limits<double>::quiet_NaN(), data(), i);
  }
  void set(const std::vector<double>& values) {  // in the order N, C, H, W
    std::size_t i = 0;
    each([&](i64 at) { store(dtype_, values[i++], data(), at); });
  }
  std::vector<double> values() const {
    std::vector<double> result;
    each([&](i64 at) { result.push_back(load(dtype_, data(), at)); });
    return result;
  }
  // Whether every gap is NaN still.
  bool gaps_are_nan() const {
    std::vector<char> element(std::size_t(elements()), 0);
    each([&](i64 at) { element[std::size_t(at)] = 1; });
    for (i64 i = 0; i < elements(); ++i) {
      const double value = load(dtype_, data(), i);
      if (!element[std::size_t(i)] && value == value) return false;
    }
    return true;
  }
  char* data() const { return memory_.get(); }
  const Strides& strides() const { return strides_; }
  bool intact() const { return memory_.intact(); }
  bool same_bits(const Tensor& other) const {
    return memory_.bytes() == other.memory_.bytes() && std::memcmp(data(), other.data(), std::size_t(memory_.bytes())) == 0;
  }

 private:
  template <class F>
  void each(F&& f) const {
    for (i64 n = 0; n < n_; ++n)
      for (i64 c = 0; c < c_; ++c)
        for (i64 h = 0; h < h_; ++h)
          for (i64 w = 0; w < w_; ++w) f(n * strides_.n + c * strides_.c + h * strides_.h + w * strides_.w);
  }
  i64 reach() const {
    if (n_ * c_ * h_ * w_ == 0) return 0;
    return (n_ - 1) * strides_.n + (c_ - 1) * strides_.c + (h_ - 1) * strides_.h + (w_ - 1) * strides_.w + 1;
  }
  i64 elements() const { return memory_.bytes() / bytes_of(dtype_); }

  i64 n_, c_, h_, w_;
  Strides strides_;
  DType dtype_;
  Guarded memory_;
};

}  // namespace memory
