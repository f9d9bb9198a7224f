// The general convolution's plan, and its door: checks and the dtype. The kernels are in general_*.cu, one dtype each.
#include "general_plan.h"

#include <cstdint>

#include "../epilogue.h"

namespace fused_resnet::cuda {
namespace {

// Room for what a tile reaches beyond the problem (rounded up to tiles, stages and tables), far below 2^31.
constexpr double kMost32 = 2147483647.0 - 65536.0;

double reach(double size, i64 stride) { return (size - 1) * double(stride); }

// Sums in double: exact where they are small enough to matter, and far beyond the limit where they are not exact.
bool needs_64_bits(const ConvShape& s, const Strides& weight, const Strides& joined_weight) {
  const double rows = double(s.pad_top) + reach(double(s.p), s.stride_h) + reach(double(s.r), s.dilation_h) + 1;
  const double cols = double(s.pad_left) + reach(double(s.q), s.stride_w) + reach(double(s.s), s.dilation_w) + 1;
  const auto map = [&](const Strides& t, double c, double h, double w) {
    return reach(double(s.n), t.n) + reach(c, t.c) + reach(h, t.h) + reach(w, t.w);
  };
  const Joined& j = s.joined;
  const double most[] = {
      double(s.n) * double(s.p) * double(s.q), double(s.k), double(s.reduction()), double(s.h), double(s.w), rows, cols,
      map(s.x, double(s.c), rows, cols), map(s.y, double(s.k), double(s.p), double(s.q)),
      s.has_shortcut ? map(s.shortcut, double(s.k), double(s.p), double(s.q)) : 0,
      reach(double(s.k), weight.n) + reach(double(s.c / s.groups), weight.c) + reach(double(s.r), weight.h) +
          reach(double(s.s), weight.w),
      j.c ? map(j.x, double(j.c), reach(double(s.p), j.stride_h) + 1, reach(double(s.q), j.stride_w) + 1) : 0,
      j.c ? reach(double(s.k), joined_weight.n) + reach(double(j.c), joined_weight.c) : 0};
  for (const double value : most) {
    if (!(value < kMost32)) return true;
  }
  return false;
}

i64 tiles(const ConvShape& s, i64 pixels, i64 channels) {
  const i64 count = s.k / s.groups;
  return (s.n * s.p * s.q + pixels - 1) / pixels * ((count + channels - 1) / channels) * s.groups;
}

// Whether `count` values in a row along the tensor's fastest axis are one aligned piece of memory, wherever the end of a tile
// starts. `pixels`: along the pixels of an image, else along the channels.
bool pieces(const ConvShape& s, const Strides& t, const void* data, bool pixels, i64 count, i64 bytes) {
  if (reinterpret_cast<std::uintptr_t>(data) % std::uintptr_t(count * bytes)) return false;
  const bool runs = pixels ? t.w == 1 && (s.p == 1 || t.h == s.q) : t.c == 1 && t.h % count == 0 && t.w % count == 0;
  return runs && t.n % count == 0 && (!pixels || t.c % count == 0);
}

}  // namespace

GeneralPlan general_plan(const ConvShape& s, const Strides& weight, const ConvOperands& operands, i64 bytes) {
  constexpr i64 kFewChannels = 16;
  constexpr i64 kEnoughBlocks = 264;  // two for each SM of the largest GPUs of today
  GeneralPlan plan;
  plan.wide = needs_64_bits(s, weight, operands.joined_weight_strides);
  plan.tile = s.k / s.groups <= kFewChannels                        ? GeneralTile::narrow
              : !plan.wide && tiles(s, 128, 64) < kEnoughBlocks     ? GeneralTile::medium
                                                                    : GeneralTile::large;
  const bool pixels = s.y.w < s.y.c;
  const i64 count = 16 / (bytes == 8 ? 8 : 4);
  plan.vector_store = (pixels ? s.p * s.q : s.k / s.groups) % count == 0 && pieces(s, s.y, operands.y, pixels, count, bytes) &&
                      (!s.has_shortcut || pieces(s, s.shortcut, operands.shortcut, pixels, count, bytes));
  return plan;
}

void general_convolution(DType dtype, const ConvShape& s, const Strides& weight, const ConvOperands& operands, Stream stream) {
  s.validate();
  if (s.empty()) return;
  const i64 bytes = dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
  const GeneralPlan plan = general_plan(s, weight, operands, bytes);
  switch (dtype) {
    case DType::float32: return general_convolution_of<float>(plan, s, weight, operands, stream);
    case DType::float64: return general_convolution_of<double>(plan, s, weight, operands, stream);
    case DType::bfloat16: return general_convolution_of<bf16>(plan, s, weight, operands, stream);
    case DType::float16: return general_convolution_of<fp16>(plan, s, weight, operands, stream);
  }
}

}  // namespace fused_resnet::cuda
