// The gradients of convolutions in their inputs.
#include "../../../csrc/cpu/input_gradient.h"

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

// dx, and the squares of its terms, by the definition of the convolution: each of its terms, the other way.
void gradient(const ConvShape& g, const Values& dy, const Values& weight, Values& dx, Values& squares) {
  std::size_t at = 0;
  for (i64 k = 0; k < g.k; ++k)
    for (i64 c = 0; c < g.c; ++c)
      for (i64 r = 0; r < g.r; ++r)
        for (i64 s = 0; s < g.s; ++s) {
          const double w = weight[at++];
          for (i64 n = 0; n < g.n; ++n)
            for (i64 p = 0; p < g.p; ++p)
              for (i64 q = 0; q < g.q; ++q) {
                const i64 h = p * g.stride_h - g.pad_top + r * g.dilation_h, v = q * g.stride_w - g.pad_left + s * g.dilation_w;
                if (h < 0 || h >= g.h || v < 0 || v >= g.w) continue;
                const double term = w * dy[std::size_t(((n * g.k + k) * g.p + p) * g.q + q)];
                const std::size_t to = std::size_t(((n * g.c + c) * g.h + h) * g.w + v);
                dx[to] += term;
                squares[to] += term * term;
              }
        }
}

void run_case(const ConvShape& shape, const Values& dy, const Values& weight, const Values& dx, double largest_squares, DType dtype,
              Algorithm algorithm, int dx_layout, int w_layout, int dy_layout, int threads) {
  ConvShape s = shape;
  Tensor to(dtype, s.n, s.c, s.h, s.w, layout(dx_layout, s.c, s.h, s.w)), by_run(dtype, s.n, s.c, s.h, s.w, to.strides());
  Tensor w(dtype, s.k, s.c, s.r, s.s, layout(w_layout, s.c, s.r, s.s));
  Tensor from(dtype, s.n, s.k, s.p, s.q, layout(dy_layout, s.k, s.p, s.q));
  w.set(weight), from.set(dy);
  s.x = to.strides(), s.y = from.strides();
  const InputGradient gradient(s, w.strides(), dtype, threads, request(algorithm));
  const auto operands = [&](const Tensor& result) {
    Operands o;
    o.x = from.data(), o.weight = w.data(), o.y = result.data();
    return o;
  };
  const auto intact = [&] { return w.intact() && from.intact() && to.intact() && by_run.intact(); };
  expect(run_afresh(gradient, operands(by_run)), "finite");
  expect(intact(), "guard bytes");
  expect(by_hand(gradient, operands(to)), "guard bytes of the workspaces, and finite");
  expect(intact(), "guard bytes after the tasks by hand");
  expect(to.gaps_are_nan(), "nothing is written between the elements");
  expect(to.same_bits(by_run), "the same bits in any order of tasks");
  const Values ours = to.values();
  const bool exact = algorithm != Algorithm::winograd4;
  const double bound = exact ? 0 : rounding_bound(dtype, s.k * s.r * s.s, largest_squares, dtype == DType::bfloat16);
  bool right = true;
  for (std::size_t i = 0; i < ours.size(); ++i) {
    const double expected = rounded(dtype, dx[i]);
    right = right && (exact ? ours[i] == expected : std::abs(ours[i] - dx[i]) <= bound + storage_unit(dtype) * std::abs(dx[i]));
  }
  expect(right, "gradient");
}

}  // namespace

void gradients() {
  for (const Case& c : kCases) {
    const ConvShape s = shape_of(c);
    std::mt19937 random(2);
    const Values dy = integers(s.n * s.k * s.p * s.q, 2, random), weight = integers(s.k * s.c * s.r * s.s, 1, random);
    Values dx(std::size_t(s.n * s.c * s.h * s.w)), squares(dx.size());
    gradient(s, dy, weight, dx, squares);
    const double largest = squares.empty() ? 0 : *std::max_element(squares.begin(), squares.end());
    const bool winograd = c.r == 3 && c.s == 3 && c.stride_h == 1 && c.dilation_h == 1;
    int number = 0;
    for (const KernelTable* table : available_tables()) {
      set_isa(table->isa);
      for (int type = 0; type < kCpuDTypes; ++type) {
        for (const Algorithm algorithm : {Algorithm::direct, Algorithm::winograd2, Algorithm::winograd4}) {
          if (algorithm != Algorithm::direct && !winograd) continue;
          for (int combination = 0; combination < kLayouts * 2 * kLayouts; ++combination) {
            const bool is_long = s.macs() > 2e5;
            // Steps that share no factor with the number of combinations: others for each dtype and instruction set.
            if (++number % (is_long ? 15 : 3) != 0 || !take()) continue;
            const int threads = 1 + number % 4 % 3;
            const int dx_layout = combination % kLayouts, w_layout = combination / kLayouts % 2, dy_layout = combination / (2 * kLayouts);
            describe("gradient %s %s algorithm=%d n=%ld c=%ld %ldx%ld k=%ld %ldx%ld stride=%ld,%ld layouts=%d,%d,%d threads=%d", table->isa,
                     name(DType(type)), int(algorithm), long(c.n), long(c.c), long(c.h), long(c.w), long(c.k), long(c.r), long(c.s),
                     long(c.stride_h), long(c.stride_w), dx_layout, w_layout, dy_layout, threads);
            run_case(s, dy, weight, dx, largest, DType(type), algorithm, dx_layout, w_layout, dy_layout, threads);
          }
        }
      }
    }
  }
}

}  // namespace memory
