// Max pooling without indices, and its gradient, planned once and run many times.
#pragma once

#include "../pool_shape.h"
#include "dispatch.h"
#include "step.h"

namespace fused_resnet {

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

// Its gradient in the input, of float32 or float64 with channels side by side. An element of dy goes to the first of its window's largest
// elements, to the last NaN where there is one.
class MaxPoolGradient final : public Step {
 public:
  // x: how the input and its gradient lie, y: how dy does. masked: the input is a ReLU's output, and what is made is the gradient in front of that
  // ReLU. Throws std::invalid_argument, as MaxPool and where the dtype or the layout is another.
  MaxPoolGradient(const PoolShape& shape, DType dtype, bool masked, int threads);

  // Operands: x: dy; weight: the input; y: dx.
  bool run(const Operands& operands) const;

  // A task is some channels of one image.
  int phases() const override { return 1; }
  i64 tasks(int) const override { return shape_.n * parts_; }
  bool run_task(int phase, i64 index, const Operands& operands, char* shared, char* mine) const noexcept override;
  i64 thread_bytes() const override { return 0; }
  std::string describe() const override;
  i64 workspace_bytes() const { return 0; }

 private:
  PoolShape shape_;
  const DTypeKernels* kernels_;
  bool masked_;
  int threads_;
  i64 parts_ = 1;  // that the channels are cut into, of whole registers
};

}  // namespace fused_resnet
