#include "../sm90_plain.cuh"

namespace fused_resnet::cuda {
using Plain = sm90::PlainKernel<ElementOf<DType::bfloat16>::Type, 128, 128>;
static const RegisterTensorKernel plain({Architecture::sm90, DType::bfloat16, Form::plain, 128, 128}, &Plain::prepare, &Plain::launch);
}  // namespace fused_resnet::cuda
