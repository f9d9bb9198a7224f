// A convolution with a weight that is used once, as it is in memory: in training it is another one in each step. It is packed in the first
// phase, into the workspace; or where it is wanted, by the tasks of the convolution.
#pragma once

#include <memory>

#include "convolution.h"

namespace fused_resnet {

class FreshConvolution final : public Step {
 public:
  // `weight`: how it lies. Throws as Convolution::make. What is computed is what a convolution with a packed weight computes, to the bit.
  // `of_gradient`: of a gradient it need not be, and the algorithm is chosen with what packing costs; and a weight that is not finite is
  // refused.
  FreshConvolution(const ConvShape& shape, const Strides& weight, DType dtype, int threads, Request request, bool of_gradient);

  // Operands: weight: as it is in memory. Throws std::bad_alloc, before any work, where there is no memory for the workspace. False: as of
  // Step::run_task; as of Convolution::pack; or the weight was refused.
  bool run(const Operands& operands) const;

  int phases() const override { return 1 + convolution_->phases(); }
  i64 tasks(int phase) const override;
  bool run_task(int phase, i64 index, const Operands& operands, char* shared, char* mine) const noexcept override;
  i64 shared_bytes() const override { return shared_at_ + convolution_->shared_bytes(); }
  i64 thread_bytes() const override { return convolution_->thread_bytes(); }
  i64 workspace_bytes() const { return shared_bytes() + thread_bytes() * threads_; }
  std::string describe() const override { return convolution_->describe(); }
  const Convolution& convolution() const { return *convolution_; }

 private:
  Strides weight_;
  std::unique_ptr<Convolution> convolution_;
  int threads_;
  bool any_weight_;  // also one that is not finite
  i64 shared_at_;  // bytes of the packed weight before what the convolution shares
};

}  // namespace fused_resnet
