#include "input_gradient.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "team.h"

namespace fused_resnet {
namespace {

constexpr i64 kRestBytes = 64 << 10;  // of a task that writes what no window touches

i64 align64(i64 bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

InputGradient::Axis InputGradient::axis(i64 first, i64 size, i64 outputs, i64 kernel, i64 stride, i64 pad, i64 dilation) {
  Axis a;
  a.pixels = (size - first + stride - 1) / stride;
  const i64 common = std::gcd(stride, dilation), step = stride / common;
  i64 tap = 0;
  while (tap < step && (first + pad - tap * dilation) % stride != 0) ++tap;
  if (tap == step || tap >= kernel) return a;
  a.taps = (kernel - tap + step - 1) / step;
  a.first_tap = tap + (a.taps - 1) * step;
  a.dilation = dilation / common;
  // Of pixel 0 of the residue, the pixel of dy under the tap that is read first.
  const i64 under = (first + pad - a.first_tap * dilation) / stride;
  a.pad = std::max<i64>(-under, 0);
  a.skip = std::max<i64>(under, 0);
  a.size = outputs - a.skip;
  return a;
}

InputGradient::InputGradient(const ConvShape& shape, const Strides& weight, DType dtype, int threads, const Request& request)
    : shape_(shape), isa_(current_table().isa), bytes_(current_table().dtype[int(dtype)].storage_bytes) {
  shape.validate();
  const DTypeKernels& kernels = current_table().dtype[int(dtype)];
  threads_ = shape.macs() < serial_macs(kernels) && !streams_weights(shape, kernels) ? 1 : std::max(threads, 1);
  for (i64 row = 0; row < std::min(shape.stride_h, shape.h); ++row) {
    const Axis h = axis(row, shape.h, shape.p, shape.r, shape.stride_h, shape.pad_top, shape.dilation_h);
    for (i64 column = 0; column < std::min(shape.stride_w, shape.w); ++column) {
      const Axis w = axis(column, shape.w, shape.q, shape.s, shape.stride_w, shape.pad_left, shape.dilation_w);
      if (h.empty() || w.empty()) {
        rest_rows_ = std::max<i64>(kRestBytes / checked_product(checked_product(shape.w, shape.c), bytes_), 1);
        continue;
      }
      ConvShape s;
      s.n = shape.n, s.c = shape.k, s.h = h.size, s.w = w.size;
      s.k = shape.c, s.r = h.taps, s.s = w.taps;
      s.p = h.pixels, s.q = w.pixels;
      s.pad_top = h.pad, s.pad_left = w.pad;
      s.dilation_h = h.taps > 1 ? h.dilation : 1, s.dilation_w = w.taps > 1 ? w.dilation : 1;
      s.x = shape.y;
      s.y = {shape.x.n, shape.x.c, shape.x.h * shape.stride_h, shape.x.w * shape.stride_w};
      s.relu = false;
      s.has_shortcut = shape.has_shortcut, s.masked = shape.masked;
      s.shortcut = {shape.shortcut.n, shape.shortcut.c, shape.shortcut.h * shape.stride_h, shape.shortcut.w * shape.stride_w};
      Part part;
      const i64 step_h = shape.stride_h / std::gcd(shape.stride_h, shape.dilation_h);
      const i64 step_w = shape.stride_w / std::gcd(shape.stride_w, shape.dilation_w);
      const Strides turned{weight.c, weight.n, -step_h * weight.h, -step_w * weight.w};
      part.step = std::make_unique<FreshConvolution>(s, turned, dtype, threads_, request, true);
      part.x = h.skip * shape.y.h + w.skip * shape.y.w;
      part.weight = h.first_tap * weight.h + w.first_tap * weight.w;
      part.shortcut = row * shape.shortcut.h + column * shape.shortcut.w;
      part.y = row * shape.x.h + column * shape.x.w;
      part.shared_at = shared_bytes_;
      shared_bytes_ += align64(part.step->shared_bytes());
      thread_bytes_ = std::max(thread_bytes_, part.step->thread_bytes());
      phases_ = std::max(phases_, part.step->phases());
      parts_.push_back(std::move(part));
    }
  }
  checked_product(thread_bytes_, threads_);
}

i64 InputGradient::tasks(int phase) const {
  if (shape_.n == 0) return 0;
  i64 count = phase == 0 && rest_rows_ ? shape_.n * ((shape_.h + rest_rows_ - 1) / rest_rows_) : 0;
  for (const Part& part : parts_) count += tasks_of(part, phase);
  return count;
}

bool InputGradient::run_task(int phase, i64 index, const Operands& operands, char* shared, char* mine) const noexcept {
  for (const Part& part : parts_) {
    const i64 count = tasks_of(part, phase);
    if (index >= count) {
      index -= count;
      continue;
    }
    Operands own;
    own.x = element(operands.x, part.x);
    own.weight = element(operands.weight, part.weight);
    if (shape_.has_shortcut) own.shortcut = element(operands.shortcut, part.shortcut);
    own.y = const_cast<void*>(element(operands.y, part.y));
    return part.step->run_task(phase, index, own, shared + part.shared_at, mine);
  }
  rest(index, operands);
  return true;
}

// Some rows of an image, as they are where no window touches them.
void InputGradient::rest(i64 index, const Operands& operands) const {
  const ConvShape& s = shape_;
  const i64 per_image = (s.h + rest_rows_ - 1) / rest_rows_, image = index / per_image, begin = index % per_image * rest_rows_;
  const auto at = [&](i64 offset) { return const_cast<void*>(element(operands.y, offset)); };
  const bool adds = s.has_shortcut && !s.masked, runs = s.x.c == 1 && s.shortcut.c == 1;
  for (i64 h = begin; h < std::min(begin + rest_rows_, s.h); ++h) {
    const i64 row = image * s.x.n + h * s.x.h;
    if (adds) {
      const i64 from = image * s.shortcut.n + h * s.shortcut.h, count = runs ? s.c : 1;
      for (i64 w = 0; w < s.w; ++w) {
        for (i64 c = 0; c < s.c; c += count) {
          std::memcpy(at(row + w * s.x.w + c * s.x.c), element(operands.shortcut, from + w * s.shortcut.w + c * s.shortcut.c),
                      std::size_t(count * bytes_));
        }
      }
      continue;
    }
    if (s.x.c == 1 && s.x.w == s.c) {
      std::memset(at(row), 0, std::size_t(s.w * s.c * bytes_));
      continue;
    }
    for (i64 c = 0; c < s.c; ++c) {
      if (s.x.w == 1) {
        std::memset(at(row + c * s.x.c), 0, std::size_t(s.w * bytes_));
        continue;
      }
      for (i64 w = 0; w < s.w; ++w) std::memset(at(row + c * s.x.c + w * s.x.w), 0, std::size_t(bytes_));
    }
  }
}

bool InputGradient::run(const Operands& operands) const {
  return shape_.n == 0 || run_phases(*this, operands, threads_, helpers_as_before(threads_));
}

std::string InputGradient::describe() const {
  std::string text;
  const auto add = [&text](const std::string& words) { text += (text.empty() ? "" : "; ") + words; };
  for (const Part& part : parts_) add(part.step->describe());
  const char* const rest = shape_.has_shortcut && !shape_.masked ? "what is added" : "zeros";
  if (rest_rows_) add(std::string(rest) + " for the pixels that no window touches");
  return text;
}

std::string InputGradient::reason() const {
  if (parts_.empty()) return "no window touches a pixel";
  if (parts_.size() == 1) return parts_[0].step->convolution().choice().reason;
  return "a convolution with stride 1 for each residue of row and column modulo the stride";
}

}  // namespace fused_resnet
