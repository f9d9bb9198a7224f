// The passes over memory that need no convolution.
#include "../../../csrc/cpu/passes.h"

#include "cases.h"
#include "check.h"
#include "guarded.h"
#include "reference.h"

using namespace fused_resnet;

namespace memory {
namespace {

void run_case(i64 n, i64 k, i64 p, i64 q, DType dtype, bool y_last, int x_layout, int z_layout, int threads) {
  std::mt19937 random(5);
  const i64 count = n * k * p * q;
  const Values x_values = integers(count, 4, random), b_values = integers(k, 4, random), z_values = integers(count, 4, random);
  Tensor x(dtype, n, k, p, q, layout(x_layout, k, p, q)), z(dtype, n, k, p, q, layout(z_layout, k, p, q));
  Tensor y(dtype, n, k, p, q, dense(y_last, k, p, q)), b(dtype, k, 1, 1, 1, {1, 0, 0, 0}), sums(dtype, k, 1, 1, 1, {1, 0, 0, 0});
  x.set(x_values), b.set(b_values), z.set(z_values);
  PassShape s;
  s.n = n, s.k = k, s.p = p, s.q = q, s.dtype = dtype;
  s.result = y.strides(), s.first = x.strides(), s.second = z.strides();
  const auto channel = [&](std::size_t i) { return i / std::size_t(p * q) % std::size_t(k); };

  bias_add_relu(s, x.data(), b.data(), z.data(), y.data(), threads);
  expect(x.intact() && b.intact() && z.intact() && y.intact(), "guard bytes of bias_add_relu");
  Values ours = y.values();
  bool equal = true;
  for (std::size_t i = 0; i < ours.size(); ++i) {
    const double sum = x_values[i] + b_values[channel(i)] + z_values[i];
    equal = equal && ours[i] == (sum <= 0 ? 0 : sum);
  }
  expect(equal, "bias_add_relu");

  y.poison();
  bias_add_relu(s, x.data(), nullptr, z.data(), y.data(), threads);
  expect(x.intact() && z.intact() && y.intact(), "guard bytes of add_relu");
  ours = y.values();
  for (std::size_t i = 0; i < ours.size(); ++i) equal = equal && ours[i] == std::max(x_values[i] + z_values[i], 0.0);
  expect(equal, "add_relu");

  y.poison();
  relu_backward(s, x.data(), z.data(), y.data(), nullptr, threads);
  expect(x.intact() && z.intact() && y.intact(), "guard bytes of relu_backward alone");
  ours = y.values();
  for (std::size_t i = 0; i < ours.size(); ++i) equal = equal && ours[i] == (z_values[i] <= 0 ? 0 : x_values[i]);
  expect(equal, "relu_backward alone");

  y.poison();
  relu_backward(s, x.data(), z.data(), y.data(), sums.data(), threads);
  expect(x.intact() && z.intact() && y.intact() && sums.intact(), "guard bytes of relu_backward");
  Values totals(std::size_t(k), 0.0);
  ours = y.values();
  equal = true;
  for (std::size_t i = 0; i < ours.size(); ++i) {
    const double masked = z_values[i] <= 0 ? 0 : x_values[i];
    totals[channel(i)] += masked;
    equal = equal && ours[i] == masked;
  }
  const Values our_sums = sums.values();
  for (std::size_t i = 0; i < totals.size(); ++i) equal = equal && our_sums[i] == rounded(dtype, totals[i]);
  expect(equal, "relu_backward");

  sums.poison();
  s.result = x.strides();
  relu_backward(s, x.data(), nullptr, nullptr, sums.data(), threads);
  expect(x.intact() && sums.intact(), "guard bytes of a bias gradient");
  totals.assign(totals.size(), 0.0);
  for (std::size_t i = 0; i < x_values.size(); ++i) totals[channel(i)] += x_values[i];
  const Values without = sums.values();
  for (std::size_t i = 0; i < totals.size(); ++i) equal = equal && without[i] == rounded(dtype, totals[i]);
  expect(equal, "a bias gradient without a ReLU");
}

}  // namespace

void passes() {
  const i64 shapes[][4] = {{2, 3, 5, 7}, {1, 33, 1, 1}, {3, 16, 4, 4}, {1, 1, 3, 17}, {2, 70, 40, 3}, {0, 3, 2, 2}};
  for (const KernelTable* table : available_tables()) {
    set_isa(table->isa);
    for (int type = 0; type < kCpuDTypes; ++type) {
      for (const auto& [n, k, p, q] : shapes) {
        for (int layouts = 0; layouts < 2 * kLayouts * kLayouts; ++layouts) {
          if (!take()) continue;
          const int x = layouts / 2 % kLayouts, z = layouts / (2 * kLayouts), threads = 1 + layouts % 3;
          describe("%s %s pass n=%ld k=%ld %ldx%ld layouts=%d,%d,%d threads=%d", table->isa, name(DType(type)), long(n), long(k), long(p),
                   long(q), layouts % 2, x, z, threads);
          run_case(n, k, p, q, DType(type), layouts % 2, x, z, threads);
        }
      }
    }
  }
}

}  // namespace memory
