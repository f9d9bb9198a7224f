// The kernels without Python: every buffer has guard bytes on both sides and the exact size that its strides reach, outputs
// start as NaN, and integer data make every sum exact, so that results are compared for equality. Built twice by
// tests/test_memory.py: as it is, and under AddressSanitizer and UndefinedBehaviorSanitizer.
//
// Prints a line for each failure and a summary; exit status 1 if anything failed.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../../csrc/cpu/convolution.h"
#include "../../csrc/cpu/passes.h"
#include "../../csrc/epilogue.h"

using namespace fused_resnet;

namespace {

int failures = 0, checks = 0;
std::string context;

void expect(bool ok, const char* what) {
  ++checks;
  if (ok) return;
  if (++failures <= 20) std::printf("FAILED %s: %s\n", what, context.c_str());
}

// Exactly `bytes` bytes between two guard zones. The data starts `skew` bytes after a 64-byte boundary.
class Guarded {
 public:
  Guarded(i64 bytes, i64 skew = 0) : bytes_(bytes), skew_(skew), data_(std::size_t(bytes + 2 * kGuard + 64 + skew), kPattern) {}
  char* get() { return aligned() + kGuard + skew_; }
  bool intact() const {
    Guarded& self = const_cast<Guarded&>(*this);
    const char* begin = self.get();
    const char* first = data_.data();
    const char* last = data_.data() + data_.size();
    return std::all_of(first, begin, [](char c) { return c == kPattern; }) &&
           std::all_of(begin + bytes_, last, [](char c) { return c == kPattern; });
  }

 private:
  static constexpr i64 kGuard = 4096;
  static constexpr char kPattern = char(0xA5);
  char* aligned() { return data_.data() + (64 - reinterpret_cast<std::uintptr_t>(data_.data()) % 64) % 64; }
  i64 bytes_, skew_;
  std::vector<char> data_;
};

template <class S>
void fill(Guarded& buffer, i64 count, int seed, int most) {
  std::mt19937 random(static_cast<unsigned>(seed));
  S* p = reinterpret_cast<S*>(buffer.get());
  for (i64 i = 0; i < count; ++i) {
    const int value = random() % 3 ? 0 : int(random() % unsigned(2 * most + 1)) - most;
    narrow(decltype(widen(S{}))(value), p + i);
  }
}

template <class S>
void poison(Guarded& buffer, i64 count) {
  S* p = reinterpret_cast<S*>(buffer.get());
  for (i64 i = 0; i < count; ++i) narrow(std::numeric_limits<decltype(widen(S{}))>::quiet_NaN(), p + i);
}

Strides dense(bool channels_last, i64 c, i64 h, i64 w) {
  return channels_last ? Strides{h * w * c, 1, w * c, c} : Strides{c * h * w, h * w, w, 1};
}

struct Case {
  i64 n, c, h, w, k, r, s, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

template <class S>
void convolution_case(const Case& g, DType dtype, bool x_last, bool w_last, bool y_last, int shortcut_kind, int threads) {
  ConvShape s;
  s.n = g.n, s.c = g.c, s.h = g.h, s.w = g.w, s.k = g.k, s.r = g.r, s.s = g.s;
  s.stride_h = g.stride_h, s.stride_w = g.stride_w, s.pad_top = g.pad_h, s.pad_left = g.pad_w;
  s.dilation_h = g.dilation_h, s.dilation_w = g.dilation_w;
  s.p = (g.h + 2 * g.pad_h - g.dilation_h * (g.r - 1) - 1) / g.stride_h + 1;
  s.q = (g.w + 2 * g.pad_w - g.dilation_w * (g.s - 1) - 1) / g.stride_w + 1;
  s.x = dense(x_last, g.c, g.h, g.w);
  s.y = dense(y_last, g.k, s.p, s.q);
  const Strides ws = dense(w_last, g.c, g.r, g.s);
  s.has_bias = true;
  s.has_shortcut = shortcut_kind != 0;
  // 1: as the output; 2: the other format; 3: one value for each channel, expanded.
  s.shortcut = shortcut_kind == 3 ? Strides{0, 1, 0, 0} : dense(shortcut_kind == 2 ? !y_last : y_last, g.k, s.p, s.q);
  const i64 outputs = s.n * s.k * s.p * s.q, size = sizeof(S), skew = size;  // misaligned for vectors
  const i64 shortcut_count = shortcut_kind == 3 ? s.k : outputs;
  Guarded x(s.n * s.c * s.h * s.w * size, skew), w(s.k * s.c * s.r * s.s * size, skew), b(s.k * size, skew),
      z(shortcut_count * size, skew), y(outputs * size, skew);
  const int most = dtype == DType::bfloat16 ? 2 : 8;
  fill<S>(x, s.n * s.c * s.h * s.w, 1, most);
  fill<S>(w, s.k * s.c * s.r * s.s, 2, 1);
  fill<S>(b, s.k, 3, most);
  fill<S>(z, shortcut_count, 4, most);
  poison<S>(y, outputs);

  const auto made = Convolution::make(s, dtype, threads);
  const Convolution& convolution = *made;
  Guarded packed(convolution.packed_bytes());
  convolution.pack(w.get(), ws, packed.get());
  expect(w.intact() && packed.intact(), "guard bytes after packing");
  convolution.run({x.get(), packed.get(), b.get(), s.has_shortcut ? z.get() : nullptr, y.get()});
  expect(x.intact() && w.intact() && b.intact() && z.intact() && y.intact() && packed.intact(), "guard bytes");

  const auto read = [](Guarded& buffer, i64 i) { return double(widen(reinterpret_cast<S*>(buffer.get())[i])); };
  bool equal = true;
  for (i64 n = 0; n < s.n; ++n) {
    for (i64 k = 0; k < s.k; ++k) {
      for (i64 p = 0; p < s.p; ++p) {
        for (i64 q = 0; q < s.q; ++q) {
          double sum = read(b, k);
          for (i64 c = 0; c < s.c; ++c) {
            for (i64 r = 0; r < s.r; ++r) {
              for (i64 t = 0; t < s.s; ++t) {
                const i64 h = p * s.stride_h - s.pad_top + r * s.dilation_h;
                const i64 v = q * s.stride_w - s.pad_left + t * s.dilation_w;
                if (h < 0 || h >= s.h || v < 0 || v >= s.w) continue;
                sum += read(x, n * s.x.n + c * s.x.c + h * s.x.h + v * s.x.w) *
                       read(w, k * ws.n + c * ws.c + r * ws.h + t * ws.w);
              }
            }
          }
          if (s.has_shortcut) {
            sum += read(z, n * s.shortcut.n + k * s.shortcut.c + p * s.shortcut.h + q * s.shortcut.w);
          }
          S expected;
          narrow(decltype(widen(S{}))(sum <= 0 ? 0 : sum), &expected);
          equal = equal && read(y, n * s.y.n + k * s.y.c + p * s.y.h + q * s.y.w) == double(widen(expected));
        }
      }
    }
  }
  expect(equal, "convolution");
}

template <class S>
void pass_case(i64 n, i64 k, i64 p, i64 q, DType dtype, bool y_last, bool x_last, bool other_last, int threads) {
  PassShape s;
  s.n = n, s.k = k, s.p = p, s.q = q, s.dtype = dtype;
  s.result = dense(y_last, k, p, q);
  s.first = dense(x_last, k, p, q);
  s.second = dense(other_last, k, p, q);
  const i64 count = n * k * p * q, size = sizeof(S);
  Guarded x(count * size, size), b(k * size, size), z(count * size, size), y(count * size, size), sums(k * size, size);
  fill<S>(x, count, 5, 4);
  fill<S>(b, k, 6, 4);
  fill<S>(z, count, 7, 4);
  const auto read = [](Guarded& buffer, i64 i) { return double(widen(reinterpret_cast<S*>(buffer.get())[i])); };
  const auto each = [&](auto&& check) {
    for (i64 i = 0; i < n; ++i)
      for (i64 j = 0; j < k; ++j)
        for (i64 u = 0; u < p; ++u)
          for (i64 v = 0; v < q; ++v) {
            const auto at = [&](const Strides& t) { return i * t.n + j * t.c + u * t.h + v * t.w; };
            check(j, at(s.result), at(s.first), at(s.second));
          }
  };
  poison<S>(y, count);
  bias_add_relu(s, x.get(), b.get(), z.get(), y.get(), threads);
  expect(x.intact() && b.intact() && z.intact() && y.intact(), "guard bytes of bias_add_relu");
  bool equal = true;
  each([&](i64 j, i64 to, i64 from, i64 other) {
    const double sum = read(x, from) + read(b, j) + read(z, other);
    equal = equal && read(y, to) == (sum <= 0 ? 0 : sum);
  });
  expect(equal, "bias_add_relu");

  poison<S>(y, count);
  poison<S>(sums, k);
  relu_backward(s, x.get(), z.get(), y.get(), sums.get(), threads);
  expect(x.intact() && z.intact() && y.intact() && sums.intact(), "guard bytes of relu_backward");
  std::vector<double> totals(std::size_t(k), 0.0);
  equal = true;
  each([&](i64 j, i64 to, i64 from, i64 other) {
    const double masked = read(z, other) <= 0 ? 0 : read(x, from);
    totals[std::size_t(j)] += masked;
    equal = equal && read(y, to) == masked;
  });
  for (i64 j = 0; j < k; ++j) {
    S expected;
    narrow(decltype(widen(S{}))(totals[std::size_t(j)]), &expected);
    equal = equal && read(sums, j) == double(widen(expected));
  }
  expect(equal, "relu_backward");
}

template <class S>
void dtype_cases(DType dtype, const char* isa, const char* name) {
  const Case cases[] = {
      {1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1},    {2, 3, 5, 7, 4, 3, 3, 1, 1, 1, 1, 1, 1},
      {1, 17, 9, 6, 33, 3, 3, 2, 2, 1, 1, 1, 1},  {3, 16, 4, 4, 16, 3, 3, 1, 1, 1, 1, 1, 1},
      {1, 5, 8, 8, 7, 2, 4, 1, 3, 1, 2, 2, 1},    {1, 8, 31, 3, 65, 1, 1, 1, 1, 0, 0, 1, 1},
      {2, 33, 6, 5, 15, 1, 1, 2, 2, 0, 0, 1, 1},  {1, 3, 14, 14, 8, 7, 7, 2, 2, 3, 3, 1, 1},
      {1, 300, 4, 5, 70, 3, 3, 1, 1, 1, 1, 1, 1}, {2, 1100, 2, 3, 40, 1, 1, 1, 1, 0, 0, 1, 1},
      {1, 2, 3, 400, 9, 3, 3, 1, 1, 1, 1, 1, 1},  {1, 4, 5, 5, 8, 3, 3, 1, 1, 4, 5, 1, 1},
      {1, 3, 12, 9, 5, 3, 3, 1, 1, 5, 5, 5, 5},   {0, 3, 5, 5, 4, 3, 3, 1, 1, 1, 1, 1, 1},
      {1, 16, 3, 3, 48, 3, 3, 3, 3, 0, 0, 1, 1},  {1, 128, 5, 4, 96, 3, 3, 1, 1, 1, 1, 1, 1},
  };
  for (const Case& c : cases) {
    for (int layout = 0; layout < 8; ++layout) {
      for (int shortcut = 0; shortcut < 4; ++shortcut) {
        for (const int threads : {1, 3}) {
          if (threads == 3 && (layout + shortcut) % 3 != 0) continue;
          char text[256];
          std::snprintf(text, sizeof text, "%s %s n=%ld c=%ld %ldx%ld k=%ld %ldx%ld layout=%d shortcut=%d threads=%d", isa,
                        name, long(c.n), long(c.c), long(c.h), long(c.w), long(c.k), long(c.r), long(c.s), layout, shortcut,
                        threads);
          context = text;
          // Long reductions are exact but slow here: one layout of each kind is enough.
          if (c.c > 64 && (layout % 3 != 0 || shortcut == 2)) continue;
          convolution_case<S>(c, dtype, layout & 1, layout & 2, layout & 4, shortcut, threads);
        }
      }
    }
  }
  const i64 shapes[][4] = {{2, 3, 5, 7}, {1, 33, 1, 1}, {3, 16, 4, 4}, {1, 1, 3, 17}, {2, 70, 40, 3}, {0, 3, 2, 2}};
  for (const auto& [n, k, p, q] : shapes) {
    for (int layout = 0; layout < 8; ++layout) {
      context = std::string(isa) + " " + name + " pass k=" + std::to_string(k) + " layout=" + std::to_string(layout);
      pass_case<S>(n, k, p, q, dtype, layout & 1, layout & 2, layout & 4, 1 + layout % 3);
    }
  }
}

// Sizes whose products leave 64 bits are refused by an exception, never computed.
void extremes() {
  context = "int64 extremes";
  const i64 big = i64(1) << 40;
  for (int which = 0; which < 6; ++which) {
    ConvShape s;
    s.n = s.c = s.h = s.w = s.k = s.r = s.s = s.p = s.q = 1;
    if (which == 0) s.n = s.c = big;
    if (which == 1) s.k = s.c = big;
    if (which == 2) s.p = s.stride_h = big;
    if (which == 3) s.s = s.dilation_w = big;
    if (which == 4) s.k = s.q = big;
    if (which == 5) s.pad_left = std::numeric_limits<i64>::max() - 1;
    bool refused = false;
    try {
      s.validate();
    } catch (const std::overflow_error&) {
      refused = true;
    }
    expect(refused, "an overflowing shape is refused");
  }
  // 2^33 elements in a row: planned (nothing is allocated), with 64-bit offsets, and in pieces that fit.
  ConvShape s;
  s.n = 1, s.c = 64, s.h = 3, s.w = i64(1) << 27, s.k = 64, s.r = s.s = 3, s.pad_top = s.pad_left = 1, s.p = 3, s.q = s.w;
  s.x = dense(true, s.c, s.h, s.w);
  s.y = dense(true, s.k, s.p, s.q);
  const Convolution convolution(s, DType::float32, 2);
  expect(convolution.workspace_bytes() < (i64(4) << 20), "the workspace stays bounded for a long row");
}

}  // namespace

int main() {
  for (const KernelTable* table : available_tables()) {
    set_isa(table->isa);
    dtype_cases<float>(DType::float32, table->isa, "float32");
    dtype_cases<double>(DType::float64, table->isa, "float64");
    dtype_cases<bf16>(DType::bfloat16, table->isa, "bfloat16");
  }
  extremes();
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures ? 1 : 0;
}
