// The shortcut without parameters: strided pixels, channels of zeros before and behind.
#pragma once

#include "../conv_shape.h"
#include "step.h"

namespace fused_resnet {

// input [N, C, H, W] -> output [N, K, P, Q] with P = ceil(H / stride): y[k] = x[k - before] where there is such a channel, else 0.
struct ZeroPadShape {
  i64 n = 0, c = 0, k = 0, p = 0, q = 0;
  i64 stride_h = 1, stride_w = 1, before = 0;
  Strides x, y;
};

class ZeroPad final : public Step {
 public:
  // bytes: of an element, 2, 4 or 8. Throws std::invalid_argument for a shape that cannot be computed.
  ZeroPad(const ZeroPadShape& shape, i64 bytes);

  // A task is one row of the output.
  int phases() const override { return 1; }
  i64 tasks(int phase) const override;
  bool run_task(int phase, i64 index, const Operands& operands, char* shared, char* mine) const noexcept override;
  i64 thread_bytes() const override { return 0; }
  std::string describe() const override;

 private:
  template <class Element>
  void row(const Element* x, Element* y) const;

  ZeroPadShape shape_;
  i64 bytes_;
};

}  // namespace fused_resnet
