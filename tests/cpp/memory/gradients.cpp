// The gradients of convolutions in their inputs and their weights.
#include "../../../csrc/cpu/input_gradient.h"
#include "../../../csrc/cpu/weight_gradient.h"

#include <cmath>

#include "by_hand.h"
#include "cases.h"
#include "check.h"
#include "guarded.h"
#include "reference.h"

using namespace fused_resnet;

namespace memory {
namespace {

struct Case {
  i64 n, c, h, w, k, r, s, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

constexpr Case kCases[] = {
    {1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1},
    {2, 4, 5, 7, 3, 3, 3, 1, 1, 1, 1, 1, 1},
    {1, 33, 9, 6, 17, 3, 3, 1, 1, 1, 1, 1, 1},
    {2, 70, 14, 13, 20, 3, 3, 1, 1, 1, 1, 1, 1},  // several pieces of packing, several tasks
    {3, 40, 20, 21, 16, 3, 3, 1, 1, 1, 1, 1, 1},
    {1, 8, 31, 3, 65, 1, 1, 1, 1, 0, 0, 1, 1},
    {1, 5, 8, 9, 7, 2, 4, 1, 1, 0, 1, 1, 2},
    {1, 4, 5, 6, 6, 1, 1, 1, 1, 2, 3, 1, 1},      // dy is cropped
    {2, 17, 9, 6, 33, 3, 3, 2, 2, 1, 1, 1, 1},
    {2, 15, 6, 5, 33, 1, 1, 2, 2, 0, 0, 1, 1},    // zeros
    {1, 5, 12, 11, 7, 2, 2, 3, 3, 1, 1, 1, 1},
    {1, 3, 14, 15, 8, 7, 7, 2, 2, 3, 3, 1, 1},
    {1, 5, 14, 15, 7, 3, 3, 2, 2, 2, 3, 4, 3},
    {1, 4, 3, 2, 6, 1, 1, 5, 4, 0, 0, 1, 1},
    {0, 3, 5, 5, 4, 3, 3, 1, 1, 1, 1, 1, 1},
    {1, 4, 1, 1, 6, 1, 1, 2, 2, 1, 1, 1, 1},       // no pixel is touched
    {1, 70, 5, 6, 300, 3, 3, 1, 1, 1, 1, 1, 1},    // several chunks of fresh weights, whatever the registers
};

ConvShape shape_of(const Case& g) {
  ConvShape s;
  s.n = g.n, s.c = g.c, s.h = g.h, s.w = g.w, s.k = g.k, s.r = g.r, s.s = g.s;
  s.stride_h = g.stride_h, s.stride_w = g.stride_w, s.pad_top = g.pad_h, s.pad_left = g.pad_w;
  s.dilation_h = g.dilation_h, s.dilation_w = g.dilation_w;
  s.p = (g.h + 2 * g.pad_h - g.dilation_h * (g.r - 1) - 1) / g.stride_h + 1;
  s.q = (g.w + 2 * g.pad_w - g.dilation_w * (g.s - 1) - 1) / g.stride_w + 1;
  s.relu = false;
  return s;
}

constexpr Case kWeightCases[] = {
    {1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1},
    {2, 4, 5, 7, 3, 3, 3, 1, 1, 1, 1, 1, 1},
    {1, 70, 9, 6, 17, 3, 3, 1, 1, 1, 1, 1, 1},     // several panels
    {1, 16, 9, 6, 64, 3, 3, 1, 1, 1, 1, 1, 1},     // as many products at a time as there is room for
    {3, 18, 20, 21, 65, 3, 3, 1, 1, 1, 1, 1, 1},   // several blocks of tiles and of products
    {2, 5, 40, 39, 7, 3, 3, 1, 1, 1, 1, 1, 1},     // of 4x4 pixels one chunk of two loads, of 2x2 several chunks
    {4, 5, 37, 38, 7, 3, 3, 1, 1, 1, 1, 1, 1},     // chunks
    {1, 3, 6, 5, 4, 3, 3, 1, 1, 0, 2, 1, 1},
    {3, 8, 31, 3, 65, 1, 1, 1, 1, 0, 0, 1, 1},
    {2, 65, 8, 31, 8, 1, 1, 1, 1, 0, 0, 1, 1},     // the other way round
    {2, 64, 20, 15, 16, 1, 1, 1, 1, 0, 0, 1, 1},   // both in place, where they lie so
    {2, 16, 30, 31, 64, 1, 1, 1, 1, 0, 0, 1, 1},   // and in chunks
    {1, 5, 8, 9, 7, 2, 4, 1, 1, 0, 1, 1, 2},
    {1, 4, 5, 6, 6, 1, 1, 1, 1, 2, 3, 1, 1},       // windows that meet nothing but padding
    {2, 17, 9, 6, 33, 3, 3, 2, 2, 1, 1, 1, 1},     // panels that begin inside a tap
    {2, 15, 6, 5, 33, 1, 1, 2, 2, 0, 0, 1, 1},
    {1, 5, 12, 11, 7, 2, 2, 3, 3, 1, 1, 1, 1},
    {1, 3, 46, 45, 8, 7, 7, 2, 2, 3, 3, 1, 1},     // several loads
    {1, 5, 14, 15, 7, 3, 3, 2, 2, 2, 3, 4, 3},
    {2, 3, 41, 43, 5, 3, 3, 1, 1, 2, 2, 2, 2},     // chunks
    {0, 3, 5, 5, 4, 3, 3, 1, 1, 1, 1, 1, 1},
    {0, 3, 5, 5, 4, 1, 1, 1, 1, 0, 0, 1, 1},
};

// Each term of the convolution's sums: f(its place in w, in x, in dy).
template <class F>
void for_each_term(const ConvShape& g, const F& f) {
  std::size_t at = 0;
  for (i64 k = 0; k < g.k; ++k)
    for (i64 c = 0; c < g.c; ++c)
      for (i64 r = 0; r < g.r; ++r)
        for (i64 s = 0; s < g.s; ++s, ++at)
          for (i64 n = 0; n < g.n; ++n)
            for (i64 p = 0; p < g.p; ++p)
              for (i64 q = 0; q < g.q; ++q) {
                const i64 h = p * g.stride_h - g.pad_top + r * g.dilation_h, v = q * g.stride_w - g.pad_left + s * g.dilation_w;
                if (h < 0 || h >= g.h || v < 0 || v >= g.w) continue;
                f(at, std::size_t(((n * g.c + c) * g.h + h) * g.w + v), std::size_t(((n * g.k + k) * g.p + p) * g.q + q));
              }
}

// Whether the sums are the right ones: exactly, or within a bound.
bool right(const Values& found, const Values& expected, const Values& squares, DType dtype, i64 terms, bool exact, bool bfloat16_transforms) {
  const double largest = squares.empty() ? 0 : *std::max_element(squares.begin(), squares.end());
  const double bound = exact ? 0 : rounding_bound(dtype, terms, largest, bfloat16_transforms);
  for (std::size_t i = 0; i < found.size(); ++i) {
    const double wanted = exact ? rounded(dtype, expected[i]) : expected[i];
    if (!(std::abs(found[i] - wanted) <= (exact ? 0 : bound + storage_unit(dtype) * std::abs(wanted)))) return false;
  }
  return true;
}

// A gradient by its run and by hand, into two tensors that must be the same; `sources` lie around.
template <class Gradient, class Intact>
void run_twice(const Gradient& gradient, Operands operands, Tensor& result, Tensor& by_run, const Intact& sources_intact) {
  const auto intact = [&] { return sources_intact() && result.intact() && by_run.intact(); };
  operands.y = by_run.data();
  expect(run_afresh(gradient, operands), "finite");
  expect(intact(), "guard bytes");
  operands.y = result.data();
  expect(by_hand(gradient, operands), "guard bytes of the workspaces, and finite");
  expect(intact(), "guard bytes after the tasks by hand");
  expect(result.gaps_are_nan(), "nothing is written between the elements");
  expect(result.same_bits(by_run), "the same bits in any order of tasks");
}

struct Problem {
  ConvShape shape;
  Values x, weight, dy, result, squares;  // what of the operands is not given is empty
};

void run_input(const Problem& problem, DType dtype, Algorithm algorithm, int dx_layout, int w_layout, int dy_layout, int threads) {
  ConvShape s = problem.shape;
  Tensor to(dtype, s.n, s.c, s.h, s.w, layout(dx_layout, s.c, s.h, s.w)), by_run(dtype, s.n, s.c, s.h, s.w, to.strides());
  Tensor w(dtype, s.k, s.c, s.r, s.s, layout(w_layout, s.c, s.r, s.s));
  Tensor from(dtype, s.n, s.k, s.p, s.q, layout(dy_layout, s.k, s.p, s.q));
  w.set(problem.weight), from.set(problem.dy);
  s.x = to.strides(), s.y = from.strides();
  // In turn: nothing, something is added, a ReLU's output.
  static int number = 0;
  const int ending = ++number % 3;
  Tensor end(dtype, s.n, s.c, s.h, s.w, layout(number / 3 % kLayouts, s.c, s.h, s.w));
  std::mt19937 random{std::uint32_t(number)};
  const Values values = integers(i64(problem.result.size()), 2, random);
  end.set(values);
  s.has_shortcut = ending > 0, s.masked = ending == 2, s.shortcut = end.strides();
  const InputGradient gradient(s, w.strides(), dtype, threads, request(algorithm));
  Operands o;
  o.x = from.data(), o.weight = w.data(), o.shortcut = ending ? end.data() : nullptr;
  run_twice(gradient, o, to, by_run, [&] { return w.intact() && from.intact() && end.intact(); });
  Values expected = problem.result;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    if (ending == 1) expected[i] += values[i];
    if (ending == 2 && values[i] <= 0) expected[i] = 0;
  }
  expect(right(to.values(), expected, problem.squares, dtype, s.k * s.r * s.s, algorithm != Algorithm::winograd4, dtype == DType::bfloat16),
         "gradient");
}

void run_weight(const Problem& problem, DType dtype, Algorithm algorithm, int x_layout, int w_layout, int dy_layout, int threads) {
  ConvShape s = problem.shape;
  Tensor to(dtype, s.k, s.c, s.r, s.s, layout(w_layout, s.c, s.r, s.s)), by_run(dtype, s.k, s.c, s.r, s.s, to.strides());
  Tensor x(dtype, s.n, s.c, s.h, s.w, layout(x_layout, s.c, s.h, s.w));
  Tensor from(dtype, s.n, s.k, s.p, s.q, layout(dy_layout, s.k, s.p, s.q));
  x.set(problem.x), from.set(problem.dy);
  s.x = x.strides(), s.y = from.strides();
  const WeightGradient gradient(s, to.strides(), dtype, threads, request(algorithm));
  Operands o;
  o.x = x.data(), o.weight = from.data();
  run_twice(gradient, o, to, by_run, [&] { return x.intact() && from.intact(); });
  expect(right(to.values(), problem.result, problem.squares, dtype, s.n * s.p * s.q, algorithm != Algorithm::winograd4, false), "gradient");
}

using Run = void (*)(const Problem&, DType, Algorithm, int, int, int, int);

// Over instruction sets, dtypes, algorithms, layouts and numbers of threads, some of each.
void run_all(const char* what, const Case& c, const Problem& problem, Run run) {
  const bool winograd = c.r == 3 && c.s == 3 && c.stride_h == 1 && c.dilation_h == 1;
  static int number = 0;
  for (const KernelTable* table : available_tables()) {
    set_isa(table->isa);
    for (int type = 0; type < kCpuDTypes; ++type) {
      for (const Algorithm algorithm : {Algorithm::direct, Algorithm::winograd2, Algorithm::winograd4}) {
        if (algorithm != Algorithm::direct && !winograd) continue;
        for (int combination = 0; combination < kLayouts * 2 * kLayouts; ++combination) {
          // Steps that share no factor with the number of combinations: others for each dtype and instruction set.
          if (++number % (problem.shape.macs() > 2e5 ? 15 : 3) != 0 || !take()) continue;
          const int threads = 1 + number % 4 % 3;
          const int x_layout = combination % kLayouts, w_layout = combination / kLayouts % 2, dy_layout = combination / (2 * kLayouts);
          describe("%s gradient %s %s algorithm=%d n=%ld c=%ld %ldx%ld k=%ld %ldx%ld stride=%ld,%ld layouts=%d,%d,%d threads=%d", what,
                   table->isa, name(DType(type)), int(algorithm), long(c.n), long(c.c), long(c.h), long(c.w), long(c.k), long(c.r), long(c.s),
                   long(c.stride_h), long(c.stride_w), x_layout, w_layout, dy_layout, threads);
          run(problem, DType(type), algorithm, x_layout, w_layout + 2 * (number / 4 % 2), dy_layout, threads);
        }
      }
    }
  }
}

// The sum of a gradient's terms, each of which is a product of two operands' elements, and of their squares.
void add(Problem& problem, std::size_t to, double term) {
  problem.result[to] += term;
  problem.squares[to] += term * term;
}

}  // namespace

void gradients() {
  for (const Case& c : kCases) {
    Problem problem;
    const ConvShape& s = problem.shape = shape_of(c);
    std::mt19937 random(2);
    problem.dy = integers(s.n * s.k * s.p * s.q, 2, random), problem.weight = integers(s.k * s.c * s.r * s.s, 1, random);
    problem.result = problem.squares = Values(std::size_t(s.n * s.c * s.h * s.w));
    for_each_term(s, [&](std::size_t w, std::size_t x, std::size_t y) { add(problem, x, problem.weight[w] * problem.dy[y]); });
    run_all("input", c, problem, run_input);
  }
  for (const Case& c : kWeightCases) {
    Problem problem;
    const ConvShape& s = problem.shape = shape_of(c);
    std::mt19937 random(3);
    problem.dy = integers(s.n * s.k * s.p * s.q, 2, random), problem.x = integers(s.n * s.c * s.h * s.w, 1, random);
    problem.result = problem.squares = Values(std::size_t(s.k * s.c * s.r * s.s));
    for_each_term(s, [&](std::size_t w, std::size_t x, std::size_t y) { add(problem, w, problem.x[x] * problem.dy[y]); });
    run_all("weight", c, problem, run_weight);
  }
}

}  // namespace memory
