// Ampere, Ada and whatever comes after Hopper: CUTLASS 2's implicit GEMM convolution (cp.async, mma.sync) with our end.
#pragma once

#include <cutlass/cutlass.h>

// Keep this order: CUTLASS 4.2 uses the first from the second without including it.
#include <cutlass/conv/conv2d_problem_size.h>
#include <cutlass/conv/conv3d_problem_size.h>
#include <cutlass/conv/kernel/default_conv2d_fprop_with_broadcast.h>
#include <cutlass/device_kernel.h>
#include <cutlass/gemm/threadblock/threadblock_swizzle.h>

#include "cutlass_end.cuh"
#include "tensor.h"

namespace fused_resnet::cuda::sm80 {

// The end on a fragment: accumulators + bias (+ shortcut), ReLU, one rounding. In the form of CUTLASS's output operators.
template <class Element, int Count>
struct End {
  static constexpr bool kIsSingleSource = true, kIsHeavy = false, kStoreZ = true, kStoreT = false;
  static constexpr int kElementsPerAccess = Count, kCount = Count;
  using ElementOutput = Element;
  using ElementC = Element;
  using ElementZ = Element;
  using ElementT = Element;
  using ElementVector = Element;
  using ElementAccumulator = float;
  using ElementCompute = float;
  using FragmentAccumulator = cutlass::Array<float, Count>;
  using FragmentCompute = cutlass::Array<float, Count>;
  using FragmentC = cutlass::Array<Element, Count>;
  using FragmentOutput = FragmentC;
  using FragmentZ = FragmentC;
  using FragmentT = FragmentC;

  struct Params {
    bool has_shortcut = false, relu = true;
  };

  CUTLASS_HOST_DEVICE explicit End(const Params& p) : params(p) {}
  CUTLASS_HOST_DEVICE bool is_source_needed() const { return params.has_shortcut; }
  CUTLASS_HOST_DEVICE void set_k_partition(int, int) {}  // the reduction is never cut

  CUTLASS_HOST_DEVICE void operator()(FragmentZ& z, FragmentT&, const FragmentAccumulator& sum, const FragmentC& shortcut,
                                      const FragmentCompute& bias) const {
    finish(z, cutlass::plus<FragmentCompute>()(cutlass::plus<FragmentCompute>()(sum, bias),
                                               cutlass::NumericArrayConverter<float, Element, Count>()(shortcut)));
  }
  CUTLASS_HOST_DEVICE void operator()(FragmentZ& z, FragmentT&, const FragmentAccumulator& sum, const FragmentCompute& bias) const {
    finish(z, cutlass::plus<FragmentCompute>()(sum, bias));
  }

 private:
  CUTLASS_HOST_DEVICE void finish(FragmentZ& z, const FragmentCompute& sum) const {
    z = cutlass::NumericArrayConverter<Element, float, Count>()(OptionalReLU<FragmentCompute>()(sum, {params.relu}));
  }

  Params params;
};

// CUTLASS's iterator over the taps of a few channels rounds their number up to whole steps and reads pixels for those that are not
// there, to multiply them by zero weights: an infinite pixel below the window would become NaN. This one reads none.
template <class Iterator>
struct WithinTaps : Iterator {
  CUTLASS_HOST_DEVICE WithinTaps(const typename Iterator::Params& params, const cutlass::conv::Conv2dProblemSize& size,
                                 const typename Iterator::Element* data, int thread, const cutlass::MatrixCoord& offset = {})
      : Iterator(params, size, data, thread, offset),
        taps_(size.R * size.S),
        tap_((offset.column() + Iterator::ThreadMap::initial_offset(thread).contiguous()) / Iterator::AccessType::kElements) {}

  CUTLASS_HOST_DEVICE void set_iteration_index(typename Iterator::Index index) {
    Iterator::set_iteration_index(index);
    access_ = int(index % Iterator::kAccessesPerVector);
  }
  CUTLASS_HOST_DEVICE void advance() {
    Iterator::advance();
    tap_ += Iterator::kFilterPositionsPerTile;
  }
  CUTLASS_HOST_DEVICE WithinTaps& operator++() {
    Iterator::operator++();
    access_ = (access_ + 1) % Iterator::kAccessesPerVector;
    return *this;
  }
  CUTLASS_HOST_DEVICE bool valid() const { return tap_ + access_ < taps_ && Iterator::valid(); }

 private:
  int taps_, tap_, access_ = 0;
};

// CUTLASS's kernel; for Form::few, with that iterator.
template <class Built, class Swizzle, bool few>
struct Chosen {
  using Kernel = Built;
};
template <class Built, class Swizzle>
struct Chosen<Built, Swizzle, true> {
  using Mma = typename Built::Mma;
  using Kernel = cutlass::conv::kernel::ImplicitGemmConvolutionWithFusedEpilogue<
      cutlass::conv::threadblock::ImplicitGemmMultistage<
          typename Mma::Shape, WithinTaps<typename Mma::IteratorA>, typename Mma::SmemIteratorA, Mma::kCacheOpA, typename Mma::IteratorB,
          typename Mma::SmemIteratorB, Mma::kCacheOpB, typename Mma::Policy, Mma::kStages>,
      typename Built::Epilogue, Swizzle, cutlass::conv::Operator::kFprop>;
};

// Tiles of M pixels x N channels in warps of WarpM x WarpN, `Stages` steps of the reduction in flight. Form::few packs the taps of
// kFew channels into one step.
template <class Element, Form form, int M, int N, int WarpM, int WarpN, int Stages>
struct Kernel {
  static constexpr bool kIsFew = form == Form::few;
  static constexpr int kAlignment = 16 / sizeof(Element), kDepth = 128 / sizeof(Element);
  static constexpr int kVector = kIsFew ? int(kFew) : kAlignment;  // elements of one load
  static constexpr auto kIterator = kIsFew ? cutlass::conv::IteratorAlgorithm::kFixedChannels : cutlass::conv::IteratorAlgorithm::kOptimized;
  using Layout = cutlass::layout::TensorNHWC;
  using Swizzle = cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<4>;
  using Built = typename cutlass::conv::kernel::DefaultConv2dFpropWithBroadcast<
      Element, Layout, Element, Layout, Element, Layout, float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80,
      cutlass::gemm::GemmShape<M, N, kDepth>, cutlass::gemm::GemmShape<WarpM, WarpN, kDepth>,
      cutlass::gemm::GemmShape<16, 8, 32 / sizeof(Element)>, End<Element, kAlignment>, Swizzle, Stages, cutlass::arch::OpMultiplyAdd, kIterator,
      cutlass::conv::StrideSupport::kStrided, kVector, kVector>::Kernel;
  using Operation = typename Chosen<Built, Swizzle, kIsFew>::Kernel;
  static constexpr int kShared = int(sizeof(typename Operation::SharedStorage));

  static void launch(const ConvShape& s, const ConvOperands& o, const Device&, Stream stream, bool) {
    const cutlass::conv::Conv2dProblemSize size(
        int(s.n), int(s.h), int(s.w), int(s.c), int(s.k), int(s.r), int(s.s), int(s.p), int(s.q), int(s.pad_top), int(s.pad_left),
        int(s.stride_h), int(s.stride_w), int(s.dilation_h), int(s.dilation_w), cutlass::conv::Mode::kCrossCorrelation);
    const auto reference = [](const void* data, i64 h, i64 w, i64 c) {
      return cutlass::TensorRef<Element, Layout>(const_cast<Element*>(static_cast<const Element*>(data)),
                                                 Layout(int(c), int(w * c), int(h * w * c)));
    };
    check(Operation::Mma::IteratorA::can_implement(size), "cannot read this input");
    check(Operation::Mma::IteratorB::can_implement(size), "cannot read this weight");
    const auto y = reference(o.y, s.p, s.q, s.k);
    const typename Operation::Arguments arguments{
        size, reference(o.x, s.h, s.w, s.c), reference(o.weight, s.r, s.s, s.c),
        s.has_shortcut ? reference(o.shortcut, s.p, s.q, s.k) : y, y, typename End<Element, kAlignment>::Params{s.has_shortcut, s.relu},
        cutlass::conv::SplitKMode::kSerial, const_cast<void*>(s.has_bias ? o.bias : nullptr)};
    typename Operation::Params params(arguments);
    // CUTLASS's kernel with a fused end counts a step for each tap, whatever the iterators do.
    if (kIsFew) params.gemm_k_iterations = int((s.r * s.s * s.c + kDepth - 1) / kDepth);
    const dim3 grid = Swizzle().get_grid_shape(params.grid_tiled_shape);
    cutlass::Kernel<Operation><<<grid, Operation::kThreadCount, kShared, static_cast<cudaStream_t>(stream)>>>(params);
    check(cudaGetLastError(), "could not be launched");
  }

  static void prepare() {
    check(cudaFuncSetAttribute(cutlass::Kernel<Operation>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared), "could not be set up");
  }
};

}  // namespace fused_resnet::cuda::sm80

// The kernels of one tile size. A matrix's form would be the same kernel as an image's.
#define FR_SM80_KERNEL(ARCHITECTURE, M, N, WARP_M, WARP_N, STAGES, DTYPE, FORM)                                                          \
  using Kernel_##DTYPE##_##FORM = sm80::Kernel<ElementOf<DType::DTYPE>::Type, Form::FORM, M, N, WARP_M, WARP_N, STAGES>;                 \
  static const RegisterTensorKernel DTYPE##_##FORM({Architecture::ARCHITECTURE, DType::DTYPE, Form::FORM, M, N},                          \
                                                   &Kernel_##DTYPE##_##FORM::prepare, &Kernel_##DTYPE##_##FORM::launch);
#define FR_SM80_TILE(M, N, WARP_M, WARP_N, STAGES)                                \
  namespace fused_resnet::cuda {                                                  \
  FR_SM80_KERNEL(sm80, M, N, WARP_M, WARP_N, STAGES, bfloat16, image)           \
  FR_SM80_KERNEL(sm80, M, N, WARP_M, WARP_N, STAGES, float16, image)            \
  FR_SM80_KERNEL(sm80, M, N, WARP_M, WARP_N, STAGES, float32, image)            \
  }
#define FR_FEW_TILE(M, N, WARP_M, WARP_N, STAGES)                                 \
  namespace fused_resnet::cuda {                                                  \
  FR_SM80_KERNEL(any, M, N, WARP_M, WARP_N, STAGES, bfloat16, few)              \
  FR_SM80_KERNEL(any, M, N, WARP_M, WARP_N, STAGES, float16, few)               \
  }
