#include "fresh_convolution.h"

#include <algorithm>

#include "team.h"

namespace fused_resnet {
namespace {

std::unique_ptr<Convolution> made(const ConvShape& shape, DType dtype, int threads, Request request, bool of_gradient) {
  shape.validate();
  request.fresh = of_gradient;
  Choice choice = choose_algorithm(shape, current_table().dtype[int(dtype)], cache_sizes(), request);
  choice.fresh = true;
  return Convolution::make(shape, dtype, threads, choice);
}

}  // namespace

FreshConvolution::FreshConvolution(const ConvShape& shape, const Strides& weight, DType dtype, int threads, Request request, bool of_gradient)
    : weight_(weight),
      convolution_(made(shape, dtype, threads, request, of_gradient)),
      threads_(convolution_->threads()),
      any_weight_(!of_gradient && convolution_->choice().algorithm == Algorithm::direct),
      shared_at_((convolution_->packed_bytes() + 63) / 64 * 64) {
  checked_product(thread_bytes(), threads_);
}

i64 FreshConvolution::tasks(int phase) const {
  if (convolution_->shape().empty()) return 0;
  return phase == 0 ? convolution_->pack_tasks() : convolution_->tasks(phase - 1);
}

bool FreshConvolution::run_task(int phase, i64 index, const Operands& operands, char* shared, char* mine) const noexcept {
  const WeightView weight{operands.weight, weight_};
  if (phase == 0) return convolution_->pack_task(index, weight, {}, shared) || any_weight_;
  Operands packed = operands;
  packed.weight = shared;
  packed.fresh = weight;
  return convolution_->run_task(phase - 1, index, packed, shared + shared_at_, mine);
}

bool FreshConvolution::run(const Operands& operands) const {
  return convolution_->shape().empty() || run_phases(*this, operands, threads_, helpers_as_before(threads_));
}

}  // namespace fused_resnet
