// The kernels without Python: every buffer has guard bytes on both sides and the exact size that its strides reach, outputs
// start as NaN, and integer data make every sum exact, so that results are compared for equality (Winograd F(4x4, 3x3), whose
// fractions round, within a bound). Convolutions also run by hand, task by task, in workspaces of exactly the size that they ask for.
// Built three times by tests/test_memory.py: as it is, under AddressSanitizer and UndefinedBehaviorSanitizer, and under
// ThreadSanitizer.
//
// Prints a line for each failure and a summary; exit status 1 if anything failed. With a number as argument, only so many
// cases are run: one in that number.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <thread>
#include <tuple>
#include <vector>

#include "../../csrc/cpu/convolution.h"
#include "../../csrc/cpu/passes.h"
#include "../../csrc/epilogue.h"

using namespace fused_resnet;

namespace {

int failures = 0, checks = 0;
unsigned every = 1, count = 0;  // run one case in so many
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

// All tasks, as Convolution::run calls them, but in the opposite order, by threads of our own (ThreadSanitizer does not see
// GCC's OpenMP synchronise, and that build is without it), and in workspaces of exactly the bytes asked for, which start as NaN. Returns whether all guard bytes of these are intact.
bool by_hand(const Convolution& convolution, const Operands& operands) {
  const auto workspace = [](i64 bytes) {
    auto made = std::make_unique<Guarded>(bytes);
    std::memset(made->get(), 0xFF, std::size_t(bytes));
    return made;
  };
  const int threads = convolution.threads();
  const auto shared = workspace(convolution.shared_bytes());
  std::vector<std::unique_ptr<Guarded>> mine;
  for (int t = 0; t < threads; ++t) mine.push_back(workspace(convolution.thread_bytes()));
  for (int phase = 0; phase < convolution.phases(); ++phase) {
    const auto work = [&](int t) {
      for (i64 i = convolution.tasks(phase) - 1 - t; i >= 0; i -= threads) {
        convolution.run_task(phase, i, operands, shared->get(), mine[std::size_t(t)]->get());
      }
    };
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back(work, t);
    work(0);
    for (std::thread& thread : others) thread.join();
  }
  return shared->intact() && std::all_of(mine.begin(), mine.end(), [](const auto& m) { return m->intact(); });
}

Request request(Algorithm algorithm) {
  Request r;
  r.automatic = false;
  r.algorithm = algorithm;
  return r;
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

  const auto made = Convolution::make(s, dtype, threads, request(Algorithm::direct));
  const Convolution& convolution = *made;
  Guarded packed(convolution.packed_bytes());
  convolution.pack({w.get(), ws}, {}, packed.get());
  expect(w.intact() && packed.intact(), "guard bytes after packing");
  const Operands operands{x.get(), packed.get(), b.get(), s.has_shortcut ? z.get() : nullptr, y.get()};
  const auto intact = [&] { return x.intact() && w.intact() && b.intact() && z.intact() && y.intact() && packed.intact(); };
  convolution.run(operands);
  expect(intact(), "guard bytes");
  if (shortcut_kind == 1) {
    if (!s.empty()) expect(by_hand(convolution, operands), "guard bytes of the workspaces");
    expect(intact(), "guard bytes after the tasks by hand");
  }

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
          if (count++ % every) continue;
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

// ---------------------------------------------------------------------------------------------------------------------
// Winograd
// ---------------------------------------------------------------------------------------------------------------------

// One convolution and what it must give, in double precision, operands and results in [N, C, H, W] order.
struct Problem {
  ConvShape shape;  // without strides
  std::vector<double> x, w, b, z;
  std::vector<double> sum, squares;  // before bias and shortcut: sums of x w and of (x w)^2
};

Problem problem(i64 n, i64 c, i64 h, i64 w, i64 k, i64 pad_h, i64 pad_w, i64 stride, std::mt19937& random) {
  Problem g;
  ConvShape& s = g.shape;
  s.n = n, s.c = c, s.h = h, s.w = w, s.k = k, s.r = s.s = 3, s.pad_top = pad_h, s.pad_left = pad_w;
  s.stride_h = s.stride_w = stride;
  s.p = (h + 2 * pad_h - 3) / stride + 1, s.q = (w + 2 * pad_w - 3) / stride + 1;
  const auto integers = [&](i64 count, int most) {
    std::vector<double> values(std::size_t(count), 0.0);
    for (double& v : values) v = random() % 3 == 0 ? int(random() % unsigned(2 * most + 1)) - most : 0;
    return values;
  };
  g.x = integers(n * c * h * w, 8), g.w = integers(k * c * 9, 1), g.b = integers(k, 8), g.z = integers(n * k * s.p * s.q, 8);
  for (i64 i = 0; i < n * k * s.p * s.q; ++i) {
    const i64 image = i / (k * s.p * s.q), channel = i / (s.p * s.q) % k;
    const i64 h0 = i / s.q % s.p * stride - pad_h, w0 = i % s.q * stride - pad_w;
    double sum = 0, squares = 0;
    for (i64 j = 0; j < c; ++j) {
      for (i64 r = std::max<i64>(-h0, 0); r < 3 && h0 + r < h; ++r) {
        for (i64 t = std::max<i64>(-w0, 0); t < 3 && w0 + t < w; ++t) {
          const double term = g.x[std::size_t(((image * c + j) * h + h0 + r) * w + w0 + t)] *
                              g.w[std::size_t((channel * c + j) * 9 + r * 3 + t)];
          sum += term;
          squares += term * term;
        }
      }
    }
    g.sum.push_back(sum);
    g.squares.push_back(squares);
  }
  return g;
}

// values[n, c, h, w] into a buffer with these strides.
template <class S>
void spread(const std::vector<double>& values, i64 c, i64 h, i64 w, const Strides& strides, Guarded& buffer) {
  S* to = reinterpret_cast<S*>(buffer.get());
  for (i64 i = 0; i < i64(values.size()); ++i) {
    const i64 at = i / (c * h * w) * strides.n + i / (h * w) % c * strides.c + i / w % h * strides.h + i % w * strides.w;
    narrow(decltype(widen(S{}))(values[std::size_t(i)]), to + at);
  }
}

// What the winograd cases hit: [instruction set, F(2x2) or F(4x4), stride, phases, more than one thread] -> how often.
std::map<std::tuple<std::string, Algorithm, i64, int, bool>, int> hits;

// The loss of F(4x4, 3x3) over a sum's own: the largest over the outputs i of the sums over positions j of A'_ij^2 |G_j|^2 |B_j|^2 / 3,
// which is 8.2 in one dimension, and as much for the roundings (its root) in two. tests/test_winograd.py calculates it.
constexpr double kAmplification4 = 8.2;

template <class S>
void winograd_case(const Problem& g, DType dtype, Algorithm algorithm, bool x_last, bool w_last, bool y_last,
                   int shortcut_kind, int threads, bool relu) {
  using T = decltype(widen(S{}));
  ConvShape s = g.shape;
  s.x = dense(x_last, s.c, s.h, s.w);
  s.y = dense(y_last, s.k, s.p, s.q);
  s.shortcut = dense(shortcut_kind == 2 ? !y_last : y_last, s.k, s.p, s.q);
  s.has_bias = shortcut_kind != 3;
  s.has_shortcut = shortcut_kind != 0;
  s.relu = relu;
  const Strides ws = dense(w_last, s.c, 3, 3);
  const i64 size = sizeof(S), outputs = s.n * s.k * s.p * s.q;
  Guarded x(i64(g.x.size()) * size, size), w(i64(g.w.size()) * size, size), b(s.k * size, size), z(outputs * size, size);
  spread<S>(g.x, s.c, s.h, s.w, s.x, x);
  spread<S>(g.w, s.c, 3, 3, ws, w);
  spread<S>(g.b, 1, 1, 1, {1, 0, 0, 0}, b);
  spread<S>(g.z, s.k, s.p, s.q, s.shortcut, z);

  const auto made = Convolution::make(s, dtype, threads, request(algorithm));
  const Convolution& convolution = *made;
  expect(convolution.choice().algorithm == (s.empty() ? Algorithm::direct : algorithm), "the algorithm asked for");
  ++hits[{convolution.isa(), convolution.choice().algorithm, s.stride_h, convolution.phases(), convolution.threads() > 1}];
  Guarded packed(convolution.packed_bytes());
  std::memset(packed.get(), 0xFF, std::size_t(convolution.packed_bytes()));
  expect(convolution.pack({w.get(), ws}, {}, packed.get()), "the transformed weight is finite");
  expect(w.intact() && packed.intact(), "guard bytes after packing");

  Guarded y(outputs * size, size), other(outputs * size, size);
  poison<S>(y, outputs);
  poison<S>(other, outputs);
  Operands operands{x.get(), packed.get(), b.get(), s.has_shortcut ? z.get() : nullptr, other.get()};
  convolution.run(operands);
  const auto intact = [&] {
    return x.intact() && w.intact() && b.intact() && z.intact() && y.intact() && other.intact() && packed.intact();
  };
  expect(intact(), "guard bytes");

  // By hand: workspaces of exactly the bytes asked for, full of NaN; tasks backwards, dealt out to threads of our own.
  if (!s.empty()) {
    poison<S>(y, outputs);
    operands.y = y.get();
    expect(by_hand(convolution, operands), "guard bytes of the workspaces");
    expect(intact(), "guard bytes after the tasks by hand");
    expect(std::memcmp(y.get(), other.get(), std::size_t(outputs * size)) == 0, "the same bits in any order of tasks");
  }

  // F(2x2, 3x3) is exact on such integers. F(4x4, 3x3): roundings of the size u sqrt(terms) sqrt(sum of squared terms), times
  // the amplification; twice that, as in fused_resnet/testing/compare.py, and the rounding to the storage type.
  const double u = std::numeric_limits<T>::epsilon() / 2, u_out = size == 2 ? 1.0 / 256 : u;
  double largest = 0;
  for (i64 i = 0; i < outputs; ++i) {
    const double bias = g.b[std::size_t(i / (s.p * s.q) % s.k)], shortcut = g.z[std::size_t(i)];
    largest = std::max(largest, g.squares[std::size_t(i)] + bias * bias + shortcut * shortcut);
  }
  double bound = algorithm == Algorithm::winograd2 ? 0 : 2 * kAmplification4 * u * std::sqrt((9.0 * double(s.c) + 2) * largest);
  // Where products are of bfloat16, both transformed operands are rounded to it: two roundings of each term.
  if (bound > 0 && current_table().dtype[int(dtype)].group > 1) bound += 2 * kAmplification4 * u_out * std::sqrt(2 * largest);
  bool good = true;
  for (i64 i = 0; i < outputs; ++i) {
    const i64 image = i / (s.k * s.p * s.q), k = i / (s.p * s.q) % s.k, p = i / s.q % s.p, q = i % s.q;
    double sum = g.sum[std::size_t(i)];
    if (s.has_bias) sum += g.b[std::size_t(k)];
    if (s.has_shortcut) sum += g.z[std::size_t(i)];
    if (relu && sum < 0) sum = 0;
    S rounded;
    narrow(T(sum), &rounded);
    const double ours = double(widen(reinterpret_cast<S*>(y.get())[image * s.y.n + k * s.y.c + p * s.y.h + q * s.y.w]));
    good = good && (bound == 0 ? ours == double(widen(rounded)) : std::fabs(ours - sum) <= bound + u_out * std::fabs(sum));
  }
  expect(good, "Winograd");
}

void winograd_cases() {
  std::mt19937 random(1);
  const auto pick = [&](std::initializer_list<i64> values) { return values.begin()[random() % values.size()]; };
  const i64 channels[] = {1, 3, 5, 16, 17, 33, 40};
  int number = 0;
  const auto all = [&](const Problem& g) {
    for (const KernelTable* table : available_tables()) {
      set_isa(table->isa);
      for (const Algorithm algorithm : {Algorithm::winograd2, Algorithm::winograd4}) {
        if (algorithm == Algorithm::winograd4 && g.shape.stride_h != 1) continue;
        for (const int threads : {1, 2}) {
          const unsigned bits = random();
          const bool x = bits & 1, w = bits & 2, y = bits & 4, relu = (bits >> 5) % 4 != 0;
          const int shortcut = int(bits >> 3 & 3);
          const ConvShape& s = g.shape;
          const auto name = [&](const char* dtype) {
            char text[256];
            std::snprintf(text, sizeof text, "%s %s F(%d) /%ld n=%ld c=%ld %ldx%ld k=%ld pad=%ld,%ld layout=%d%d%d shortcut=%d threads=%d",
                          table->isa, dtype, algorithm == Algorithm::winograd2 ? 2 : 4, long(s.stride_h), long(s.n),
                          long(s.c), long(s.h), long(s.w), long(s.k), long(s.pad_top), long(s.pad_left), x, w, y, shortcut, threads);
            context = text;
          };
          // One storage type each time, in turn; every shape meets all three.
          switch (number++ % 3) {
            case 0: name("float32"), winograd_case<float>(g, DType::float32, algorithm, x, w, y, shortcut, threads, relu); break;
            case 1: name("bfloat16"), winograd_case<bf16>(g, DType::bfloat16, algorithm, x, w, y, shortcut, threads, relu); break;
            default: name("float64"), winograd_case<double>(g, DType::float64, algorithm, x, w, y, shortcut, threads, relu);
          }
        }
      }
      ++number;
    }
  };
  const auto some = [&](i64 n, i64 c, i64 h, i64 w, i64 k, i64 pad_h, i64 pad_w, i64 stride) {
    if (count++ % every == 0) all(problem(n, c, h, w, k, pad_h, pad_w, stride, random));
  };
  // Every pair of input and output channels, sizes and padding at random among those that are easy to get wrong.
  for (const i64 c : channels) {
    for (const i64 k : channels) {
      for (int repeat = 0; repeat < 2; ++repeat) {
        const i64 pad_h = pick({0, 1, 2}), pad_w = pick({0, 1, 2});
        i64 h, w;
        do {
          h = pick({1, 2, 3, 4, 5, 7, 9, 14, 17}), w = pick({1, 2, 3, 4, 5, 7, 9, 14, 17});
        } while (h + 2 * pad_h < 3 || w + 2 * pad_w < 3);
        some(pick({0, 1, 1, 3}), c, h, w, k, pad_h, pad_w, 1 + i64(random() % 3 == 0));
      }
    }
  }
  // Every size with every padding, in both directions.
  for (const i64 size : {1, 2, 3, 4, 5, 7, 9, 14, 17}) {
    for (const i64 pad : {0, 1, 2}) {
      if (size + 2 * pad < 3) continue;
      for (const i64 stride : {1, 2}) {
        some(1, 5, size, 4, 17, pad, 1, stride);
        some(3, 17, 3, size, 16, 1, pad, stride);
      }
    }
  }
  // Rows of more tiles than a strip or a task holds; so many channels that one task's input does not fit the L2 cache; tasks
  // that end in the middle of a row, and of an image; weights enough for several threads to share them out.
  const i64 many = cache_sizes().l2 / (16 * 4 * 8);  // float32, F(2x2), 8 tiles
  const i64 large[][5] = {{1, 17, 2, 31, 40}, {1, 40, 3, 61, 16},  {2, 16, 1, 130, 33}, {1, 33, 5, 58, 17}, {1, 600, 4, 70, 3},
                          {1, many, 5, 6, 3}, {3, 40, 17, 17, 33}, {5, 16, 14, 14, 40}, {1, 5, 40, 41, 70}, {2, 3, 60, 60, 70},
                          {1, 512, 6, 6, 140}, {1, 40, 20, 20, 130}};
  for (const auto& [n, c, h, w, k] : large) {
    some(n, c, h, w, k, 1, 1, 1);
    some(n, c, 2 * h, 2 * w - 1, k, 1, 1, 2);
  }
  for (const KernelTable* table : available_tables()) {
    for (int which = 0; which < 12 && every == 1; ++which) {
      const Algorithm algorithm = which < 8 ? Algorithm::winograd2 : Algorithm::winograd4;
      const int stride = which >= 4 && which < 8 ? 2 : 1, phases = 1 + which % 2;
      const bool several = which / 2 % 2;
      char text[128];
      std::snprintf(text, sizeof text, "%s F(%d) /%d, %d phase(s), %s", table->isa, which < 8 ? 2 : 4, stride, phases,
                    several ? "several threads" : "one thread");
      context = text;
      expect(hits[{table->isa, algorithm, stride, phases, several}] > 0, "this blocking was hit");
    }
  }
}

// A packed weight serves inputs of every size, on any number of threads: its layout does not depend on them, whatever the caches.
void layouts() {
  for (const KernelTable* table : available_tables()) {
    for (int dtype = 0; dtype < kCpuDTypes; ++dtype) {
      const DTypeKernels& kernels = table->dtype[dtype];
      for (const i64 l1d : {16, 32, 48}) {
        for (const i64 l2 : {256, 512, 1024, 2048}) {
          CacheSizes caches;
          caches.l1d = l1d << 10, caches.l2 = l2 << 10;
          for (const i64 channels : {3, 40, 81, 100, 128, 200, 256, 512}) {
            for (const Algorithm algorithm : {Algorithm::direct, Algorithm::winograd2, Algorithm::winograd4}) {
              i64 first = 0;
              for (const i64 n : {1, 3, 32}) {
                for (const i64 size : {1, 7, 13, 28, 56}) {
                  for (const int threads : {1, 2, 7}) {
                    ConvShape s;
                    s.n = n, s.c = channels, s.h = s.w = s.p = s.q = size, s.k = 200, s.r = s.s = 3, s.pad_top = s.pad_left = 1;
                    s.x = {size * size * channels, 1, size * channels, channels}, s.y = {size * size * 200, 1, size * 200, 200};
                    const i64 width = algorithm == Algorithm::direct
                                          ? choose_blocking(s, kernels, caches, threads).cut.channels
                                          : choose_winograd_blocking(s, algorithm, kernels, caches, threads).cut.channels;
                    if (first == 0) first = width;
                    expect(width == first, "the same panels for every size of the input");
                  }
                }
              }
            }
          }
        }
      }
    }
  }
}

// Sizes whose products leave 64 bits are refused by an exception, never computed.
void extremes() {
  char text[128];
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
  // What validate() lets through and Winograd's own sizes do not: thrown, or computed without overflow (UBSan looks).
  for (const KernelTable* table : available_tables()) {
    set_isa(table->isa);
    for (const Algorithm algorithm : {Algorithm::winograd2, Algorithm::winograd4}) {
      for (int which = 0; which < 6; ++which) {
        ConvShape s;
        s.n = s.c = s.k = 1, s.h = s.w = s.r = s.s = 3, s.p = s.q = 1;
        s.x = s.y = {9, 9, 3, 1};
        if (which == 0) s.n = i64(1) << 59;
        if (which == 1) s.k = i64(1) << 59;
        if (which == 2) s.c = i64(1) << 59;
        if (which == 3) s.n = i64(1) << 29, s.c = i64(1) << 29;
        if (which == 4) s.k = i64(1) << 29, s.c = i64(1) << 30;
        if (which == 5) s.w = i64(1) << 59, s.q = s.w - 2;
        std::snprintf(text, sizeof text, "int64 extreme %d of F(%d), %s", which, algorithm == Algorithm::winograd2 ? 2 : 4, table->isa);
        context = text;
        const auto size = [&](auto&& of) {
          try {
            const auto convolution = Convolution::make(s, DType::float32, 2, request(algorithm));
            return of(*convolution);
          } catch (const std::overflow_error&) {
            return std::numeric_limits<i64>::max();
          }
        };
        // At least the bytes of what they hold.
        expect(double(size([](const Convolution& c) { return c.packed_bytes(); })) >= 0.99 * 36.0 / 9 * double(s.k) * double(s.c),
               "the packed weight's size");
        expect(size([](const Convolution& c) { return c.workspace_bytes(); }) > 0, "the workspace's size");
      }
    }
  }
  // 2^33 elements in a row: planned (nothing is allocated), with 64-bit offsets, and in pieces that fit.
  ConvShape s;
  s.n = 1, s.c = 64, s.h = 3, s.w = i64(1) << 27, s.k = 64, s.r = s.s = 3, s.pad_top = s.pad_left = 1, s.p = 3, s.q = s.w;
  s.x = dense(true, s.c, s.h, s.w);
  s.y = dense(true, s.k, s.p, s.q);
  const auto convolution = Convolution::make(s, DType::float32, 2, request(Algorithm::direct));
  expect(convolution->workspace_bytes() < (i64(4) << 20), "the workspace stays bounded for a long row");
}

}  // namespace

int main(int arguments, char** argument) {
  if (arguments > 1) every = unsigned(std::max(std::atoi(argument[1]), 1));
  for (const KernelTable* table : available_tables()) {
    set_isa(table->isa);
    dtype_cases<float>(DType::float32, table->isa, "float32");
    dtype_cases<double>(DType::float64, table->isa, "float64");
    dtype_cases<bf16>(DType::bfloat16, table->isa, "bfloat16");
  }
  winograd_cases();
  context = "layouts";
  layouts();
  extremes();
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures ? 1 : 0;
}
