// What the kernels for Hopper share: the convolution's image, the end of the operation, loading and launching.
#pragma once

// Keep this order: CUTLASS 4.2's headers do not all include what they use, and its adapters for products of matrices and for convolutions
// cannot both be included.
#include "tma.h"

#include <cute/tensor.hpp>
#include <cutlass/kernel_hardware_info.h>
#include <cutlass/gemm/gemm.h>

#include <cutlass/conv/collective/collective_builder.hpp>
#include <cutlass/conv/convnd_problem_shape.hpp>
#include <cutlass/device_kernel.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/operations.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "cutlass_end.cuh"
#include "tensor.h"

namespace fused_resnet::cuda::sm90 {

using namespace cute;

constexpr int kDepth = 128;  // bytes of the reduction in one stage: a swizzled line of shared memory

using Image = cutlass::conv::ConvProblemShape<cutlass::conv::Operator::kFprop, 2>;

inline Image image(const ConvShape& s) {
  const int h = int(s.h), w = int(s.w), c = int(s.c);
  // Padding below and on the right as far as the last output reaches; further pixels are never read.
  const i64 bottom = (s.p - 1) * s.stride_h + (s.r - 1) * s.dilation_h + 1 - s.pad_top - s.h;
  const i64 right = (s.q - 1) * s.stride_w + (s.s - 1) * s.dilation_w + 1 - s.pad_left - s.w;
  return Image(cutlass::conv::Mode::kCrossCorrelation, {int(s.n), h, w, c}, {s.h * s.w * s.c, s.w * s.c, s.c, 1},
               {int(s.k), int(s.r), int(s.s), c}, {s.r * s.s * s.c, s.s * s.c, s.c, 1}, {int(s.pad_top), int(s.pad_left)},
               {int(bottom > 0 ? bottom : 0), int(right > 0 ? right : 0)}, {int(s.stride_h), int(s.stride_w)},
               {int(s.dilation_h), int(s.dilation_w)}, 1);
}

// The operands of the end: shortcut and output, and what else it is told.
template <class Arguments, class Element, class Stride>
Arguments end_of(const ConvShape& s, const ConvOperands& o, const Stride& strides) {
  auto* y = static_cast<Element*>(o.y);
  // Without a shortcut its factor is 0 and nothing of it is read; its descriptor needs an address all the same.
  Arguments end{{}, s.has_shortcut ? static_cast<const Element*>(o.shortcut) : y, strides, y, strides};
  end.thread.alpha = 1.0f;
  end.thread.beta = s.has_shortcut ? 1.0f : 0.0f;
  end.thread.bias_ptr = s.has_bias ? static_cast<const Element*>(o.bias) : nullptr;
  end.thread.activation = {s.relu};
  return end;
}

// One launch of a kernel through its adapter, the latter only for the launch itself: attributes are the plan's matter (`prepare`).
// `more`: what the adapter's `run` is told beside.
template <class Adapter, class Kernel, class... More>
void launch_kernel(typename Kernel::Arguments& arguments, const Device& device, Stream stream, More... more) {
  arguments.hw_info.device_id = device.index;
  arguments.hw_info.sm_count = device.multiprocessors;
  check(Adapter::can_implement(arguments), "cannot compute this shape");
  auto params = Kernel::to_underlying_arguments(arguments, nullptr);
  check(Adapter::run(params, static_cast<cudaStream_t>(stream), nullptr, more...), "could not be launched");
}

template <class Kernel>
void prepare_kernel() {
  check(cudaFuncSetAttribute(cutlass::device_kernel<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SharedStorageSize),
        "could not be set up");
}

}  // namespace fused_resnet::cuda::sm90
