// csrc/cuda/device.h for the host: a Hopper GPU that is not there, and stand-ins for its tensor-core kernels, which hold their
// callers to what the real ones need and compute with the general kernel.
#include "../../csrc/cuda/device.h"

#include <stdexcept>

#include "../../csrc/cuda/tensor.h"

namespace fused_resnet::cuda {
namespace {

template <DType dtype>
void launch(const ConvShape& s, const ConvOperands& o, const Device&, Stream stream) {
  const i64 vector = dtype == DType::float32 ? 4 : 8;
  for (const void* p : {o.x, o.weight, o.bias, o.shortcut, static_cast<const void*>(o.y)}) {
    if (reinterpret_cast<std::uintptr_t>(p) % 16) throw std::logic_error("a tensor-core kernel got a misaligned operand");
  }
  if (s.c % vector || s.k % vector || s.groups != 1) throw std::logic_error("a tensor-core kernel got a shape that is not for it");
  // As the real ones, it knows no strides: everything is channels_last without gaps, the weight [K, R, S, C].
  ConvShape dense = s;
  dense.x = {s.h * s.w * s.c, 1, s.w * s.c, s.c};
  dense.y = {s.p * s.q * s.k, 1, s.q * s.k, s.k};
  dense.shortcut = dense.y;
  general_convolution(dtype, dense, {s.r * s.s * s.c, 1, s.s * s.c, s.c}, o, stream);
}

const RegisterTensorKernel bf16_matrix({"sm90", DType::bfloat16, Form::matrix, 128, 128}, &launch<DType::bfloat16>);
const RegisterTensorKernel bf16_image({"sm90", DType::bfloat16, Form::image, 128, 128}, &launch<DType::bfloat16>);
const RegisterTensorKernel f32_image({"sm90", DType::float32, Form::image, 128, 64}, &launch<DType::float32>);

}  // namespace

const Device& device(int) {
  static const Device hopper{0, 9, 0, 132};
  return hopper;
}

DeviceGuard::DeviceGuard(int) {}
DeviceGuard::~DeviceGuard() = default;

std::vector<std::pair<std::string, std::string>> build() { return {{"cuda", "none"}, {"architectures", "host"}}; }

}  // namespace fused_resnet::cuda
