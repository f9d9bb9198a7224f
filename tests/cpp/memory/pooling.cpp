// Max pooling.
#include "../../../csrc/cpu/max_pool.h"

#include <cmath>
#include <limits>

#include "by_hand.h"
#include "cases.h"
#include "check.h"
#include "guarded.h"
#include "reference.h"

using namespace fused_resnet;

namespace memory {
namespace {

struct Window {
  i64 kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left;
};

Values largest(const PoolShape& s, const Values& x) {
  Values result;
  for (i64 plane = 0; plane < s.n * s.c; ++plane)
    for (i64 p = 0; p < s.p; ++p)
      for (i64 q = 0; q < s.q; ++q) {
        double most = -std::numeric_limits<double>::infinity();
        for (i64 i = 0; i < s.kernel_h * s.kernel_w; ++i) {
          const i64 h = p * s.stride_h - s.pad_top + i / s.kernel_w, w = q * s.stride_w - s.pad_left + i % s.kernel_w;
          if (h < 0 || h >= s.h || w < 0 || w >= s.w) continue;
          const double value = x[std::size_t((plane * s.h + h) * s.w + w)];
          if (value > most || std::isnan(value)) most = value;
        }
        result.push_back(most);
      }
  return result;
}

bool same(const Values& a, const Values& b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(), [](double x, double y) {
    return x == y || (std::isnan(x) && std::isnan(y));
  });
}

// Where the gradient of each window goes; masked: nowhere, where the largest is 0 or less.
Values gradient(const PoolShape& s, const Values& x, const Values& dy, bool masked) {
  Values result(x.size());
  std::size_t window = 0;
  for (i64 plane = 0; plane < s.n * s.c; ++plane)
    for (i64 p = 0; p < s.p; ++p)
      for (i64 q = 0; q < s.q; ++q, ++window) {
        std::size_t at = x.size();
        for (i64 i = 0; i < s.kernel_h * s.kernel_w; ++i) {
          const i64 h = p * s.stride_h - s.pad_top + i / s.kernel_w, w = q * s.stride_w - s.pad_left + i % s.kernel_w;
          if (h < 0 || h >= s.h || w < 0 || w >= s.w) continue;
          const std::size_t here = std::size_t((plane * s.h + h) * s.w + w);
          if (at == x.size() || x[here] > x[at] || std::isnan(x[here])) at = here;
        }
        if (!masked || !(x[at] <= 0)) result[at] += dy[window];
      }
  return result;
}

void run_gradient(PoolShape s, DType dtype, const Tensor& x, const Values& x_values, int threads, bool masked) {
  std::mt19937 random(8);
  const Values dy_values = integers(s.n * s.c * s.p * s.q, 9, random);
  Tensor dy(dtype, s.n, s.c, s.p, s.q, dense(true, s.c, s.p, s.q)), dx(dtype, s.n, s.c, s.h, s.w, x.strides());
  dy.set(dy_values);
  s.y = dy.strides();
  const MaxPoolGradient pool(s, dtype, masked, threads);
  Operands operands;
  operands.x = dy.data(), operands.weight = x.data(), operands.y = dx.data();
  const auto intact = [&] { return x.intact() && dy.intact() && dx.intact() && dx.gaps_are_nan(); };
  expect(run_afresh(pool, operands) && intact(), "guard bytes of max_pool's gradient");
  const Values expected = gradient(s, x_values, dy_values, masked);
  expect(same(dx.values(), expected), "max_pool's gradient");
  dx.poison();
  expect(by_hand(pool, operands) && intact(), "guard bytes of max_pool's gradient by hand");
  expect(same(dx.values(), expected), "max_pool's gradient by hand");
}

void run_case(PoolShape s, DType dtype, int x_layout, bool y_last, int threads, bool special) {
  std::mt19937 random(7);
  Values values = integers(s.n * s.c * s.h * s.w, 9, random);
  if (special) {
    const double some[] = {std::nan(""), -std::numeric_limits<double>::infinity(), std::numeric_limits<double>::infinity()};
    for (double& value : values) {
      const unsigned draw = unsigned(random() % 24);
      if (draw < 3) value = some[draw];
    }
  }
  Tensor x(dtype, s.n, s.c, s.h, s.w, layout(x_layout, s.c, s.h, s.w)), y(dtype, s.n, s.c, s.p, s.q, dense(y_last, s.c, s.p, s.q));
  x.set(values);
  s.x = x.strides(), s.y = y.strides(), s.channels = y_last;
  const Values expected = largest(s, values);
  const MaxPool pool(s, dtype, threads);
  Operands operands;
  operands.x = x.data(), operands.y = y.data();
  expect(run_afresh(pool, operands), "max_pool runs");
  expect(x.intact() && y.intact(), "guard bytes of max_pool");
  expect(same(y.values(), expected), "max_pool");
  y.poison();
  expect(by_hand(pool, operands), "guard bytes of max_pool's workspace");
  expect(x.intact() && y.intact(), "guard bytes of max_pool by hand");
  expect(same(y.values(), expected), "max_pool by hand");
  if (s.channels && dtype != DType::bfloat16) run_gradient(s, dtype, x, values, threads, special);
}

}  // namespace

void pooling() {
  const Window windows[] = {{3, 3, 2, 2, 1, 1}, {2, 2, 2, 2, 0, 0}, {3, 2, 1, 3, 1, 0}, {5, 8, 4, 2, 2, 4}, {1, 1, 1, 1, 0, 0}};
  const i64 shapes[][4] = {{2, 3, 9, 8}, {1, 35, 8, 9}, {1, 1, 8, 41}, {2, 16, 10, 70}, {0, 3, 8, 8}};
  for (const KernelTable* table : available_tables()) {
    set_isa(table->isa);
    for (int type = 0; type < kCpuDTypes; ++type) {
      for (const auto& [n, c, h, w] : shapes) {
        for (const Window& v : windows) {
          for (int variant = 0; variant < 2 * kLayouts; ++variant) {
            if (!take()) continue;
            PoolShape s;
            s.n = n, s.c = c, s.h = h, s.w = w;
            s.kernel_h = v.kernel_h, s.kernel_w = v.kernel_w, s.stride_h = v.stride_h, s.stride_w = v.stride_w;
            s.pad_top = v.pad_top, s.pad_left = v.pad_left;
            // As few rows and columns of windows as there is room for, or one more of each, which hangs over the edge.
            const i64 more = variant % 2;
            s.p = (h + 2 * v.pad_top - v.kernel_h) / v.stride_h + 1, s.q = (w + 2 * v.pad_left - v.kernel_w) / v.stride_w + 1;
            if (s.p * v.stride_h - v.pad_top < h) s.p += more;
            if (s.q * v.stride_w - v.pad_left < w) s.q += more;
            const int x = variant / 2, threads = 1 + variant % 3;
            const bool channels = x == 1 || x == 2;
            describe("%s %s max_pool n=%ld c=%ld %ldx%ld window %ldx%ld / %ldx%ld variant=%d", table->isa, name(DType(type)), long(n), long(c),
                     long(h), long(w), long(v.kernel_h), long(v.kernel_w), long(v.stride_h), long(v.stride_w), variant);
            run_case(s, DType(type), x, channels, threads, variant % 2);
          }
        }
      }
    }
  }
}

}  // namespace memory
