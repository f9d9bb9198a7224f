// One convolution, planned: the kernel that was chosen, and the launches that one call takes.
#pragma once

#include <memory>

#include "config.h"
#include "launch.h"
#include "tensor.h"

namespace fused_resnet::cuda {

class Convolution {
 public:
  // `algorithm`: "auto", "general" or a tile's name. `dependent`: see tensor.h. Throws std::invalid_argument or std::overflow_error before
  // any work.
  Convolution(const ConvShape& shape, DType dtype, const Device& device, bool tf32, const std::string& algorithm, bool dependent);

  // Before the first run on a device, which is current.
  void prepare() const;

  // What the general kernel reads has any strides; a tensor-core kernel wants [K, R, S, C] without gaps and aligned operands.
  void run(const ConvOperands& operands, const Strides& weight, Stream stream) const;

  bool tensor_cores() const { return kernel_ != nullptr; }
  std::string name() const { return kernel_ ? kernel_->tile.name() : std::string("general ") + name_of(dtype_); }
  const std::string& reason() const { return reason_; }
  bool dependent() const { return dependent_; }
  i64 launches() const;

 private:
  ConvShape shape_;
  DType dtype_;
  Device device_;
  const TensorKernel* kernel_ = nullptr;  // null: the general kernel
  std::string reason_;
  i64 images_ = 0;  // a launch
  bool dependent_ = false;
};

}  // namespace fused_resnet::cuda
