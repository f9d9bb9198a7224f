// Direct convolutions, also with a joined one.
#include "../../../csrc/cpu/convolution.h"

#include <memory>

#include "by_hand.h"
#include "cases.h"
#include "check.h"
#include "guarded.h"
#include "reference.h"

using namespace fused_resnet;

namespace memory {
namespace {

// joined_c: channels of the joined convolution, 0 for none.
struct Case {
  i64 n, c, h, w, k, r, s, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, joined_c, joined_stride;
};

constexpr Case kCases[] = {
    {1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 0, 1},
    {2, 3, 5, 7, 4, 3, 3, 1, 1, 1, 1, 1, 1, 0, 1},
    {1, 17, 9, 6, 33, 3, 3, 2, 2, 1, 1, 1, 1, 0, 1},
    {3, 16, 4, 4, 16, 3, 3, 1, 1, 1, 1, 1, 1, 0, 1},
    {1, 5, 8, 8, 7, 2, 4, 1, 3, 1, 2, 2, 1, 0, 1},
    {1, 8, 31, 3, 65, 1, 1, 1, 1, 0, 0, 1, 1, 0, 1},
    {2, 33, 6, 5, 15, 1, 1, 2, 2, 0, 0, 1, 1, 0, 1},
    {1, 3, 14, 14, 8, 7, 7, 2, 2, 3, 3, 1, 1, 0, 1},
    {1, 300, 4, 5, 70, 3, 3, 1, 1, 1, 1, 1, 1, 0, 1},
    {2, 1100, 2, 3, 40, 1, 1, 1, 1, 0, 0, 1, 1, 0, 1},
    {1, 2, 3, 400, 9, 3, 3, 1, 1, 1, 1, 1, 1, 0, 1},
    {1, 4, 5, 5, 8, 3, 3, 1, 1, 4, 5, 1, 1, 0, 1},
    {1, 3, 12, 9, 5, 3, 3, 1, 1, 5, 5, 5, 5, 0, 1},
    {0, 3, 5, 5, 4, 3, 3, 1, 1, 1, 1, 1, 1, 0, 1},
    {1, 16, 3, 3, 48, 3, 3, 3, 3, 0, 0, 1, 1, 0, 1},
    {1, 128, 5, 4, 96, 3, 3, 1, 1, 1, 1, 1, 1, 0, 1},
    // Several tasks, by rows and by images.
    {3, 16, 21, 20, 40, 3, 3, 1, 1, 1, 1, 1, 1, 0, 1},
    {4, 7, 14, 13, 18, 1, 1, 1, 1, 0, 0, 1, 1, 0, 1},
    // Joined.
    {1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1},
    {2, 5, 6, 7, 19, 1, 1, 1, 1, 0, 0, 1, 1, 3, 2},
    {3, 16, 9, 8, 33, 1, 1, 1, 1, 0, 0, 1, 1, 17, 1},
    {2, 6, 13, 20, 17, 3, 3, 1, 1, 1, 1, 1, 1, 5, 2},
    {1, 9, 2, 401, 5, 1, 1, 1, 1, 0, 0, 1, 1, 4, 3},
    {1, 64, 17, 15, 70, 1, 1, 1, 1, 0, 0, 1, 1, 256, 1},
    {2, 300, 3, 3, 40, 1, 1, 2, 2, 0, 0, 1, 1, 900, 2},
    {0, 3, 5, 5, 4, 1, 1, 1, 1, 0, 0, 1, 1, 2, 1},
};

struct Problem {
  ConvShape shape, joined;           // without strides; joined: as a convolution of its own
  Values x, w, b, z, joined_x, joined_w;
  Values sum;                        // before bias and shortcut
};

Problem problem(const Case& g) {
  std::mt19937 random(1);
  Problem p;
  ConvShape& s = p.shape;
  s.n = g.n, s.c = g.c, s.h = g.h, s.w = g.w, s.k = g.k, s.r = g.r, s.s = g.s;
  s.stride_h = g.stride_h, s.stride_w = g.stride_w, s.pad_top = g.pad_h, s.pad_left = g.pad_w;
  s.dilation_h = g.dilation_h, s.dilation_w = g.dilation_w;
  s.p = (g.h + 2 * g.pad_h - g.dilation_h * (g.r - 1) - 1) / g.stride_h + 1;
  s.q = (g.w + 2 * g.pad_w - g.dilation_w * (g.s - 1) - 1) / g.stride_w + 1;
  const i64 outputs = s.n * s.k * s.p * s.q;
  p.x = integers(s.n * s.c * s.h * s.w, 8, random), p.w = integers(s.k * s.c * s.r * s.s, 1, random);
  p.b = integers(s.k, 8, random), p.z = integers(outputs, 8, random);
  p.sum.resize(std::size_t(outputs));
  Values squares(p.sum.size());
  convolve(s, p.x, p.w, p.sum, squares);
  if (g.joined_c == 0) return p;
  ConvShape& j = p.joined;
  j.n = s.n, j.c = g.joined_c, j.k = s.k, j.r = j.s = 1, j.p = s.p, j.q = s.q, j.stride_h = j.stride_w = g.joined_stride;
  // Rows end with the last pixel that is read; below it is one row more.
  j.h = (s.p - 1) * g.joined_stride + 2, j.w = (s.q - 1) * g.joined_stride + 1;
  p.joined_x = integers(j.n * j.c * j.h * j.w, 8, random), p.joined_w = integers(j.k * j.c, 1, random);
  convolve(j, p.joined_x, p.joined_w, p.sum, squares);
  return p;
}

enum Shortcut { kNone, kAsOutput, kOther, kOneForAChannel, kShortcuts };

void run_case(const Problem& g, DType dtype, int x_layout, int w_layout, int y_layout, int shortcut, int threads) {
  ConvShape s = g.shape;
  const ConvShape& j = g.joined;
  Tensor x(dtype, s.n, s.c, s.h, s.w, layout(x_layout, s.c, s.h, s.w));
  Tensor w(dtype, s.k, s.c, s.r, s.s, layout(w_layout, s.c, s.r, s.s));
  Tensor y(dtype, s.n, s.k, s.p, s.q, layout(y_layout, s.k, s.p, s.q)), by_run(dtype, s.n, s.k, s.p, s.q, y.strides());
  Tensor b(dtype, s.k, 1, 1, 1, {1, 0, 0, 0});
  const int z_layout = shortcut == kOther ? (y_layout + 1) % kLayouts : y_layout;
  Tensor z(dtype, s.n, s.k, s.p, s.q, shortcut == kOneForAChannel ? Strides{0, 1, 0, 0} : layout(z_layout, s.k, s.p, s.q));
  Tensor joined_x(dtype, s.n, j.c, j.h, j.w, layout((x_layout + w_layout) % kLayouts, j.c, j.h, j.w));
  Tensor joined_w(dtype, s.k, j.c, 1, 1, layout(w_layout, j.c, 1, 1));
  Values shortcuts = g.z;
  for (std::size_t i = 0; shortcut == kOneForAChannel && i < shortcuts.size(); ++i) {
    shortcuts[i] = g.b[i / std::size_t(s.p * s.q) % g.b.size()];
  }
  x.set(g.x), w.set(g.w), b.set(g.b), z.set(shortcuts);
  if (j.c) joined_x.set(g.joined_x), joined_w.set(g.joined_w);
  s.x = x.strides(), s.y = y.strides(), s.shortcut = z.strides();
  s.has_bias = true;
  s.has_shortcut = shortcut != kNone;
  if (j.c) s.joined = {j.c, j.stride_h, j.stride_w, joined_x.strides()};

  const auto convolution = Convolution::make(s, dtype, threads, request(Algorithm::direct));
  Guarded packed(convolution->packed_bytes());
  packed.fill(0xff);
  const WeightView joined_weight{joined_w.data(), joined_w.strides()};
  convolution->pack({w.data(), w.strides()}, j.c ? joined_weight : WeightView{}, packed.get());
  expect(w.intact() && joined_w.intact() && packed.intact(), "guard bytes after packing");
  const auto operands = [&](const Tensor& to) {
    return Operands{x.data(), packed.get(), b.data(), s.has_shortcut ? z.data() : nullptr, to.data(), j.c ? joined_x.data() : nullptr};
  };
  const auto intact = [&] {
    return x.intact() && b.intact() && z.intact() && y.intact() && by_run.intact() && packed.intact() && joined_x.intact();
  };
  expect(run_afresh(*convolution, operands(by_run)), "finite");
  expect(intact(), "guard bytes");
  if (!s.empty()) expect(by_hand(*convolution, operands(y)), "guard bytes of the workspaces, and finite");
  expect(intact(), "guard bytes after the tasks by hand");
  expect(y.gaps_are_nan(), "nothing is written between the elements");
  expect(y.same_bits(by_run), "the same bits in any order of tasks");

  const Values ours = y.values();
  bool equal = true;
  for (std::size_t i = 0; i < ours.size(); ++i) {
    const double sum = g.sum[i] + g.b[i / std::size_t(s.p * s.q) % g.b.size()] + (s.has_shortcut ? shortcuts[i] : 0);
    equal = equal && ours[i] == rounded(dtype, sum <= 0 ? 0 : sum);
  }
  expect(equal, "convolution");
}

}  // namespace

void convolutions() {
  for (const Case& c : kCases) {
    const Problem g = problem(c);
    int number = 0;
    for (const KernelTable* table : available_tables()) {
      set_isa(table->isa);
      for (int type = 0; type < kCpuDTypes; ++type) {
        for (int combination = 0; combination < kLayouts * 2 * kLayouts * kShortcuts; ++combination) {
          const int x_layout = combination % kLayouts, w_layout = combination / kLayouts % 2;
          const int y_layout = combination / (2 * kLayouts) % kLayouts, shortcut = combination / (2 * kLayouts * kLayouts);
          // Long sums take time: a seventh of the combinations, others for each dtype and instruction set, for 7 is no factor of their number.
          const bool is_long = g.shape.macs() > 2e5;
          if (++number % (is_long ? 7 : 1) != 0 || !take()) continue;
          for (const int threads : {1, 2, 3, 7}) {
            if (threads != 3 && (combination + threads) % 6 != 0) continue;
            describe("%s %s n=%ld c=%ld %ldx%ld k=%ld %ldx%ld joined=%ld layouts=%d,%d,%d shortcut=%d threads=%d", table->isa,
                     name(DType(type)), long(c.n), long(c.c), long(c.h), long(c.w), long(c.k), long(c.r), long(c.s),
                     long(c.joined_c), x_layout, w_layout, y_layout, shortcut, threads);
            run_case(g, DType(type), x_layout, w_layout, y_layout, shortcut, threads);
          }
        }
      }
    }
  }
}

}  // namespace memory
