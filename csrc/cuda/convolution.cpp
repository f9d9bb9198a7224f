#include "convolution.h"

#include <algorithm>

namespace fused_resnet::cuda {
namespace {

std::vector<Tile> tiles() {
  std::vector<Tile> all;
  for (const TensorKernel& kernel : tensor_kernels()) all.push_back(kernel.tile);
  return all;
}

const void* advance(const void* data, i64 bytes) { return data ? static_cast<const char*>(data) + bytes : nullptr; }

}  // namespace

Convolution::Convolution(const ConvShape& shape, DType dtype, const Device& device, bool tf32, const std::string& algorithm,
                         bool dependent)
    : shape_(shape), dtype_(dtype), device_(device), images_(shape.n) {
  shape_.validate();
  const Choice choice = choose(shape_, dtype, device, tf32, tiles(), algorithm);
  reason_ = choice.reason;
  if (choice.tile < 0) return;
  kernel_ = &tensor_kernels()[std::size_t(choice.tile)];
  dependent_ = dependent && kernel_->tile.architecture == Architecture::sm90 && kernel_->tile.form != Form::plain;
  images_ = images_a_launch(shape_, kernel_->tile);
}

void Convolution::prepare() const {
  if (kernel_) kernel_->prepare();
}

i64 Convolution::launches() const { return shape_.empty() ? 0 : kernel_ ? (shape_.n + images_ - 1) / images_ : 1; }

void Convolution::run(const ConvOperands& operands, const Strides& weight, Stream stream) const {
  if (shape_.empty()) return;
  if (!kernel_) return general_convolution(dtype_, shape_, weight, operands, stream);
  const i64 x = shape_.h * shape_.w * shape_.c * bytes_of(dtype_), y = shape_.p * shape_.q * shape_.k * bytes_of(dtype_);
  for (i64 first = 0; first < shape_.n; first += images_) {
    ConvShape part = shape_;
    part.n = std::min(images_, shape_.n - first);
    ConvOperands o = operands;
    o.x = advance(o.x, first * x);
    o.shortcut = advance(o.shortcut, first * y);
    o.y = static_cast<char*>(o.y) + first * y;
    o.joined = advance(o.joined, first * shape_.joined.x.n * bytes_of(dtype_));
    kernel_->launch(part, o, device_, stream, dependent_);
  }
}

}  // namespace fused_resnet::cuda
