#include "mean_pool.h"

#include <algorithm>
#include <stdexcept>

namespace fused_resnet {
namespace {

constexpr i64 kChannels = 512;  // of a task: whole cache lines of the output

}  // namespace

MeanPool::MeanPool(const MeanPoolShape& s, DType dtype) : shape_(s), kernels_(&current_table().dtype[int(dtype)]) {
  if (s.n < 0 || s.c < 1 || s.h < 1 || s.w < 1) throw std::invalid_argument("a pooling needs sizes of at least 1 (the batch may be 0)");
  if (s.x.c != 1 || s.y.c != 1 || s.x.h != s.w * s.x.w) throw std::invalid_argument("a mean needs channels side by side, and rows without gaps");
  checked_product(checked_product(s.n, s.c), checked_product(s.h, s.w));
}

i64 MeanPool::tasks(int) const { return shape_.n * ((shape_.c + kChannels - 1) / kChannels); }

bool MeanPool::run_task(int, i64 index, const Operands& operands, char*, char*) const noexcept {
  const i64 parts = (shape_.c + kChannels - 1) / kChannels, n = index / parts, c = index % parts * kChannels;
  MeanRowArgs a;
  a.x = static_cast<const char*>(operands.x) + (n * shape_.x.n + c) * kernels_->storage_bytes;
  a.stride = shape_.x.w;
  a.rows = shape_.h * shape_.w;
  a.length = std::min(kChannels, shape_.c - c);
  a.y = static_cast<char*>(operands.y) + (n * shape_.y.n + c) * kernels_->storage_bytes;
  kernels_->mean_row(a);
  return true;
}

std::string MeanPool::describe() const {
  return "mean of " + std::to_string(shape_.h) + "x" + std::to_string(shape_.w) + " pixels";
}

}  // namespace fused_resnet
