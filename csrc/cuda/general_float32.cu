// One dtype a file: they compile in parallel.
#include "general_launch.cuh"

namespace fused_resnet::cuda {
template void general_convolution_of<float>(const GeneralPlan&, const ConvShape&, const Strides&, const ConvOperands&, Stream);
}  // namespace fused_resnet::cuda
