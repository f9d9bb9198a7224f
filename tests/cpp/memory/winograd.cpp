// Convolutions with Winograd.
#include <map>
#include <memory>
#include <tuple>

#include "../../../csrc/cpu/convolution.h"
#include "by_hand.h"
#include "cases.h"
#include "check.h"
#include "guarded.h"
#include "reference.h"

using namespace fused_resnet;

namespace memory {
namespace {

struct Problem {
  ConvShape shape;  // without strides
  Values x, w, b, z;
  Values sum, squares;  // before bias and shortcut: sums of x w and of (x w)^2
};

Problem problem(i64 n, i64 c, i64 h, i64 w, i64 k, i64 pad_h, i64 pad_w, i64 stride, std::mt19937& random) {
  Problem g;
  ConvShape& s = g.shape;
  s.n = n, s.c = c, s.h = h, s.w = w, s.k = k, s.r = s.s = 3, s.pad_top = pad_h, s.pad_left = pad_w;
  s.stride_h = s.stride_w = stride;
  s.p = (h + 2 * pad_h - 3) / stride + 1, s.q = (w + 2 * pad_w - 3) / stride + 1;
  const i64 outputs = n * k * s.p * s.q;
  g.x = integers(n * c * h * w, 8, random), g.w = integers(k * c * 9, 1, random);
  g.b = integers(k, 8, random), g.z = integers(outputs, 8, random);
  g.sum.resize(std::size_t(outputs)), g.squares.resize(std::size_t(outputs));
  convolve(s, g.x, g.w, g.sum, g.squares);
  return g;
}

// What the cases hit: [instruction set, F(2x2) or F(4x4), stride, phases, more than one thread] -> how often.
std::map<std::tuple<std::string, Algorithm, i64, int, bool>, int> hits;

struct Variant {
  int x, w, y, shortcut, threads;  // layouts; shortcut: 0 none, 1 as the output, 2 another layout, 3 without a bias
  bool relu;
};

void run_case(const Problem& g, DType dtype, Algorithm algorithm, const Variant& v) {
  ConvShape s = g.shape;
  Tensor x(dtype, s.n, s.c, s.h, s.w, layout(v.x, s.c, s.h, s.w)), w(dtype, s.k, s.c, 3, 3, layout(v.w, s.c, 3, 3));
  Tensor b(dtype, s.k, 1, 1, 1, {1, 0, 0, 0});
  Tensor z(dtype, s.n, s.k, s.p, s.q, layout(v.shortcut == 2 ? (v.y + 1) % kLayouts : v.y, s.k, s.p, s.q));
  Tensor y(dtype, s.n, s.k, s.p, s.q, layout(v.y, s.k, s.p, s.q)), by_run(dtype, s.n, s.k, s.p, s.q, y.strides());
  x.set(g.x), w.set(g.w), b.set(g.b), z.set(g.z);
  s.x = x.strides(), s.y = y.strides(), s.shortcut = z.strides();
  s.has_bias = v.shortcut != 3;
  s.has_shortcut = v.shortcut != 0;
  s.relu = v.relu;

  const auto made = Convolution::make(s, dtype, v.threads, request(algorithm));
  const Convolution& convolution = *made;
  expect(convolution.choice().algorithm == (s.empty() ? Algorithm::direct : algorithm), "the algorithm asked for");
  ++hits[{convolution.isa(), convolution.choice().algorithm, s.stride_h, convolution.phases(), convolution.threads() > 1}];
  Guarded packed(convolution.packed_bytes());
  packed.fill(0xff);
  expect(convolution.pack({w.data(), w.strides()}, {}, packed.get()), "the transformed weight is finite");
  expect(w.intact() && packed.intact(), "guard bytes after packing");

  const auto operands = [&](const Tensor& to) {
    return Operands{x.data(), packed.get(), s.has_bias ? b.data() : nullptr, s.has_shortcut ? z.data() : nullptr, to.data()};
  };
  const auto intact = [&] { return x.intact() && b.intact() && z.intact() && y.intact() && by_run.intact() && packed.intact(); };
  expect(run_afresh(convolution, operands(by_run)), "finite");
  expect(intact(), "guard bytes");
  if (!s.empty()) expect(by_hand(convolution, operands(y)), "guard bytes of the workspaces, and finite");
  expect(intact(), "guard bytes after the tasks by hand");
  expect(y.gaps_are_nan(), "nothing is written between the elements");
  expect(y.same_bits(by_run), "the same bits in any order of tasks");

  // F(2x2, 3x3) is exact on such integers. F(4x4, 3x3) rounds, and the storage type does.
  double largest = 0;
  const std::size_t pixels = std::size_t(s.p * s.q);
  for (std::size_t i = 0; i < g.sum.size(); ++i) {
    const double bias = g.b[i / pixels % g.b.size()];
    largest = std::max(largest, g.squares[i] + bias * bias + g.z[i] * g.z[i]);
  }
  const bool exact = algorithm == Algorithm::winograd2, pairs = current_table().dtype[int(dtype)].group > 1;
  const double bound = exact ? 0 : rounding_bound(dtype, 9 * s.c + 2, largest, pairs);
  const Values ours = y.values();
  bool good = true;
  for (std::size_t i = 0; i < ours.size(); ++i) {
    double sum = g.sum[i];
    if (s.has_bias) sum += g.b[i / pixels % g.b.size()];
    if (s.has_shortcut) sum += g.z[i];
    if (s.relu && sum < 0) sum = 0;
    good = good && (exact ? ours[i] == rounded(dtype, sum) : std::fabs(ours[i] - sum) <= bound + storage_unit(dtype) * std::fabs(sum));
  }
  expect(good, "Winograd");
}

// On every instruction set, with every algorithm that can.
void run_all(const Problem& g, std::mt19937& random) {
  static int number = 0;
  const ConvShape& s = g.shape;
  for (const KernelTable* table : available_tables()) {
    set_isa(table->isa);
    for (const Algorithm algorithm : {Algorithm::winograd2, Algorithm::winograd4}) {
      if (algorithm == Algorithm::winograd4 && s.stride_h != 1) continue;
      for (const int threads : {1, 2}) {
        const unsigned bits = random();
        const Variant v{int(bits % kLayouts),  int(bits >> 2 & 1), int((bits >> 3) % kLayouts),
                        int(bits >> 5 & 3), threads,            (bits >> 7) % 4 != 0};
        const DType dtype = DType(number++ % 3);  // one each time, in turn; every shape meets all three
        describe("%s %s F(%d) /%ld n=%ld c=%ld %ldx%ld k=%ld pad=%ld,%ld layouts=%d,%d,%d shortcut=%d threads=%d", table->isa,
                 name(dtype), algorithm == Algorithm::winograd2 ? 2 : 4, long(s.stride_h), long(s.n), long(s.c), long(s.h),
                 long(s.w), long(s.k), long(s.pad_top), long(s.pad_left), v.x, v.w, v.y, v.shortcut, threads);
        run_case(g, dtype, algorithm, v);
      }
    }
    ++number;
  }
}

void expect_hits() {
  for (const KernelTable* table : available_tables()) {
    for (int which = 0; which < 12; ++which) {
      const Algorithm algorithm = which < 8 ? Algorithm::winograd2 : Algorithm::winograd4;
      const int stride = which >= 4 && which < 8 ? 2 : 1, phases = 1 + which % 2;
      const bool several = which / 2 % 2;
      describe("%s F(%d) /%d, %d phase(s), %s", table->isa, which < 8 ? 2 : 4, stride, phases, several ? "several threads" : "one thread");
      expect(hits[{table->isa, algorithm, stride, phases, several}] > 0, "this blocking was hit");
    }
  }
}

}  // namespace

void winograd() {
  std::mt19937 random(1);
  const auto pick = [&](std::initializer_list<i64> values) { return values.begin()[random() % values.size()]; };
  const i64 channels[] = {1, 3, 5, 16, 17, 33, 40};
  const auto some = [&](i64 n, i64 c, i64 h, i64 w, i64 k, i64 pad_h, i64 pad_w, i64 stride, bool always = false) {
    if (take(always)) run_all(problem(n, c, h, w, k, pad_h, pad_w, stride, random), random);
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
    some(n, c, h, w, k, 1, 1, 1, c == many);  // always: two phases on every instruction set
    some(n, c, 2 * h, 2 * w - 1, k, 1, 1, 2);
  }
  if (all_cases()) expect_hits();
}

}  // namespace memory
