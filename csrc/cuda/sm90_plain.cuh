// Hopper: the convolution as CUTLASS 3 itself has it, a kernel that computes one tile and ends. It shares with `sm90::Kernel` the main
// loop's loads and the end of the operation, but neither our adapter (`ImageMainloop`) nor the persistent kernels: where one of those is
// wrong and this is right, the fault lies between them.
#pragma once

#include "sm90_common.cuh"

#include <cutlass/conv/device/conv_universal_adapter.hpp>
#include <cutlass/conv/kernel/conv_universal.hpp>

namespace fused_resnet::cuda::sm90 {

template <class Element, int M, int N>
struct PlainKernel {
  using Depth = Int<kDepth / int(sizeof(Element))>;
  using ClusterShape = Shape<_1, _1, _1>;
  static constexpr int kAlignment = 16 / sizeof(Element);
  using Layout = cutlass::layout::TensorNHWC;

  using End = cutlass::epilogue::fusion::LinCombPerColBiasEltAct<OptionalReLU, Element, float, Element, Element, float>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Shape<Int<M>, Int<N>, Depth>, ClusterShape,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, Element, Layout, kAlignment, Element, Layout, kAlignment,
      cutlass::epilogue::TmaWarpSpecialized, End>::CollectiveOp;
  using Mainloop = typename cutlass::conv::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, cutlass::conv::Operator::kFprop, Element, Layout, kAlignment, Element, Layout,
      kAlignment, float, Shape<Int<M>, Int<N>, Shape<Depth>>, ClusterShape,
      cutlass::conv::collective::StageCountAutoCarveout<int(sizeof(typename Epilogue::SharedStorage))>,
      cutlass::conv::KernelImplicitTmaWarpSpecializedSm90>::CollectiveOp;
  using Operation = cutlass::conv::kernel::ConvUniversal<Image, Mainloop, Epilogue>;

  static void launch(const ConvShape& s, const ConvOperands& o, const Device& device, Stream stream, bool) {
    const auto strides = cute::make_stride(cute::make_stride(s.k, s.q * s.k, s.p * s.q * s.k), _1{}, _0{});
    typename Operation::Arguments arguments{image(s), {static_cast<const Element*>(o.x), static_cast<const Element*>(o.weight)},
                                            end_of<typename Epilogue::Arguments, Element>(s, o, strides)};
    launch_kernel<cutlass::conv::device::ConvUniversalAdapter<Operation>, Operation>(arguments, device, stream);
  }

  static void prepare() { prepare_kernel<Operation>(); }
};

}  // namespace fused_resnet::cuda::sm90
