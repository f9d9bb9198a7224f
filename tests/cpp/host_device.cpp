// csrc/cuda/device.h for the host: a Hopper GPU that is not there, and stand-ins for its tensor-core kernels, which hold their
// callers to what the real ones need and compute with the general kernel.
#include "../../csrc/cuda/device.h"

#include <stdexcept>

#include "../../csrc/cuda/tensor.h"

namespace fused_resnet::cuda {
namespace {

// A kernel that is launched must have been prepared.
template <DType dtype, Form form>
bool prepared = false;
template <DType dtype, Form form>
void prepare() {
  prepared<dtype, form> = true;
}

template <DType dtype, Form form>
void launch(const ConvShape& s, const ConvOperands& o, const Device&, Stream stream, bool) {
  if (!prepared<dtype, form>) throw std::logic_error("a tensor-core kernel was not prepared");
  const i64 vector = dtype == DType::float32 ? 4 : 8, channels = form == Form::few ? kFew : vector;
  for (const void* p : {o.x, o.weight, o.bias, o.shortcut, static_cast<const void*>(o.y)}) {
    if (reinterpret_cast<std::uintptr_t>(p) % 16) throw std::logic_error("a tensor-core kernel got a misaligned operand");
  }
  if (form == Form::few ? s.c != channels : s.c % channels != 0) throw std::logic_error("a tensor-core kernel got channels that are not for it");
  if (s.k % vector || s.groups != 1) throw std::logic_error("a tensor-core kernel got a shape that is not for it");
  // As the real ones, it knows no strides: everything is channels_last without gaps, the weight [K, R, S, C].
  ConvShape dense = s;
  dense.x = {s.h * s.w * s.c, 1, s.w * s.c, s.c};
  dense.y = {s.p * s.q * s.k, 1, s.q * s.k, s.k};
  dense.shortcut = dense.y;
  ConvOperands operands = o;
  if ((form == Form::joined) != (s.joined.c > 0)) throw std::logic_error("a joined convolution got to another kernel");
  if (form == Form::joined) {
    if (reinterpret_cast<std::uintptr_t>(o.joined) % 16 || reinterpret_cast<std::uintptr_t>(o.joined_weight) % 16 || s.joined.x.c != 1) {
      throw std::logic_error("a tensor-core kernel got a projection that is not for it");
    }
    // What a TMA descriptor takes: strides in multiples of 16 bytes, none of them 0.
    for (const i64 stride : {joined_strides(s).n, joined_strides(s).h, joined_strides(s).w}) {
      if (stride <= 0 || stride % vector) throw std::logic_error("a tensor-core kernel got a projection of strides that are not for it");
    }
    operands.joined_weight_strides = {s.joined.c, 1, 1, 1};
  }
  general_convolution(dtype, dense, {s.r * s.s * s.c, 1, s.s * s.c, s.c}, operands, stream);
}

#define STAND_IN(ARCHITECTURE, DTYPE, FORM, M, N) \
  const RegisterTensorKernel DTYPE##_##FORM({Architecture::ARCHITECTURE, DType::DTYPE, Form::FORM, M, N}, &prepare<DType::DTYPE, Form::FORM>, \
                                              &launch<DType::DTYPE, Form::FORM>);

STAND_IN(sm90, bfloat16, matrix, 128, 128)
STAND_IN(sm90, bfloat16, image, 128, 128)
STAND_IN(sm90, float32, image, 128, 64)
STAND_IN(sm90, bfloat16, joined, 128, 128)
STAND_IN(any, bfloat16, few, 128, 64)

}  // namespace

const Device& device(int) {
  static const Device hopper{0, 9, 0, 132, 4.9e6};
  return hopper;
}

DeviceGuard::DeviceGuard(int) {}
DeviceGuard::~DeviceGuard() = default;
CaptureIsUntouched::CaptureIsUntouched() = default;
CaptureIsUntouched::~CaptureIsUntouched() = default;
void load(int) {}
int kernels_to_load() { return 0; }

std::vector<std::pair<std::string, std::string>> build() { return {{"cuda", "none"}, {"architectures", "host"}}; }

}  // namespace fused_resnet::cuda
