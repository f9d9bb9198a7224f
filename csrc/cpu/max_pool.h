// Max pooling without indices, planned once and run many times.
#pragma once

#include "../conv_shape.h"
#include "dispatch.h"
#include "step.h"

namespace fused_resnet {

// input [N, C, H, W] -> output [N, C, P, Q]; every window has an element of the input.
struct PoolShape {
  i64 n = 0, c = 0, h = 0, w = 0, p = 0, q = 0;
  i64 kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1, pad_top = 0, pad_left = 0;
  Strides x, y;
  bool channels = false;  // in both, channels lie side by side; else the pixels of a row do
};

class MaxPool final : public Step {
 public:
  static constexpr i64 kMostTaps = 64;  // elements of a window

  // Throws std::invalid_argument for a shape that cannot be computed.
  MaxPool(const PoolShape& shape, DType dtype, int threads);

  // y = the largest element of each window of x; NaN where there is one. Throws std::bad_alloc before any work. True, as
  // Convolution::run where all is well.
  bool run(const Operands& operands) const;

  // A task is one row of the output.
  int phases() const override { return 1; }
  i64 tasks(int phase) const override;
  bool run_task(int phase, i64 index, const Operands& operands, char* shared, char* mine) const noexcept override;
  i64 thread_bytes() const override;
  std::string describe() const override;
  i64 workspace_bytes() const { return thread_bytes() * threads_; }

 private:
  i64 line_elements() const;
  void channels_row(i64 n, i64 p, const char* x, char* y) const;
  void pixels_row(i64 n, i64 c, i64 p, const char* x, char* y, char* line) const;

  PoolShape shape_;
  const DTypeKernels* kernels_;
  int threads_;
};

}  // namespace fused_resnet
