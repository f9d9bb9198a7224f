// The mean of each channel of an image: a network's last pooling.
#pragma once

#include "../conv_shape.h"
#include "dispatch.h"
#include "step.h"

namespace fused_resnet {

// input [N, C, H, W], its channels side by side and its rows without gaps -> output [N, C, 1, 1].
struct MeanPoolShape {
  i64 n = 0, c = 0, h = 0, w = 0;
  Strides x, y;
};

class MeanPool final : public Step {
 public:
  // Throws std::invalid_argument for a shape that cannot be computed.
  MeanPool(const MeanPoolShape& shape, DType dtype);

  // A task is some channels of one image.
  int phases() const override { return 1; }
  i64 tasks(int phase) const override;
  bool run_task(int phase, i64 index, const Operands& operands, char* shared, char* mine) const noexcept override;
  i64 thread_bytes() const override { return 0; }
  std::string describe() const override;

 private:
  MeanPoolShape shape_;
  const DTypeKernels* kernels_;
};

}  // namespace fused_resnet
